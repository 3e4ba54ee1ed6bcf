//! Asking an engine, over a Unix socket or any other stream of bytes: the command line's way, and that
//! of an engine that passes on to another one. HTTP/2, so that many requests share a connection and
//! each may go on in both directions.

mod error;
mod lines;
mod live;

pub use error::ClientError;
pub use live::Octets;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lines::Lines;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zygote_api::{
    BatchRequest, BatchResult, BuildEvent, BuildRequest, CommandRequest, ErrorBody, ExecEvent,
    ExecInput, ExecRequest, Failure, Health, LINE_MAX_BYTES, NDJSON, ON_BEHALF, OnBehalf, Removed,
    SignalRequest, Status, StopRequest, Stopped, TemplateList,
};

/// How long an answer may take that needs nothing but words.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// How long all programs of a batch may take.
const BATCH_MAX: Duration = Duration::from_secs(24 * 3600);
/// A silent engine is asked whether it is alive,
const PING_EVERY: Duration = Duration::from_secs(10);
/// and given up when it says nothing for so long: an emulated one may be slow.
const SILENCE_MAX: Duration = Duration::from_secs(55);
/// What may be on its way in one stream before its reader takes it,
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// and in all of them: a slow reader slows nobody but itself.
const CONNECTION_WINDOW_BYTES: u32 = 1 << 30;

/// A body that breaks off breaks its request off.
type Body = UnsyncBoxBody<Bytes, BodyError>;
type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A connection to an engine. Dropping it, and what shares it, ends what was asked for over it.
pub struct Client {
    requests: SendRequest<Body>,
    connection: Arc<Connection>,
    /// On whose behalf it asks, if not on its own.
    behalf: Option<HeaderValue>,
    /// The key that it shows, as a header.
    key: Option<HeaderValue>,
}

struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// Connects to a socket.
    ///
    /// # Errors
    /// If nobody listens there, or another user does (`PermissionDenied`).
    pub async fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket).await;
        let stream = stream.map_err(ClientError::Connect)?;
        let peer = stream.peer_cred().map_err(ClientError::Connect)?.uid();
        let own = rustix::process::geteuid().as_raw();
        // What is asked is for nobody's eyes but its owner's. Root may ask anybody.
        if own != 0 && peer != own && peer != 0 {
            let error = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
            return Err(ClientError::Connect(error));
        }
        Self::over(stream).await
    }

    /// Over a stream at whose other end an engine is.
    ///
    /// # Errors
    /// If it is none.
    pub async fn over<S>(stream: S) -> Result<Self, ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (requests, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(SILENCE_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(ClientError::broken)?;
        // Its end is told to every request.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self {
            requests,
            connection: Arc::new(Connection(connection)),
            behalf: None,
            key: None,
        })
    }

    /// The same connection, with a key (RFC 6750 §2.1); `None` if it is none that a header could have.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Option<Self> {
        let mut header = HeaderValue::from_str(&format!("Bearer {key}")).ok()?;
        header.set_sensitive(true);
        Some(Self {
            key: Some(header),
            ..self.on_behalf(None)
        })
    }

    /// The same connection, on behalf of somebody: an engine believes that of its owner alone.
    #[must_use]
    pub fn on_behalf(&self, behalf: Option<&OnBehalf>) -> Self {
        // Names of tenants and keys have nothing that a header may not have.
        let header = |behalf: &OnBehalf| {
            let text = serde_json::to_string(behalf).ok()?;
            HeaderValue::from_str(&text).ok()
        };
        Self {
            requests: self.requests.clone(),
            connection: Arc::clone(&self.connection),
            behalf: behalf.and_then(header),
            key: self.key.clone(),
        }
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.connection.0.is_finished() || self.requests.is_closed()
    }

    /// `GET /v1/health`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.ask(Method::GET, "/v1/health", None::<&()>).await
    }

    /// `GET /v1/status`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, "/v1/status", None::<&()>).await
    }

    /// `GET /v1/metrics`: Prometheus' text format.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let asking = async {
            let body = whole_body(Bytes::new());
            let answer = self
                .send(Method::GET, "/v1/metrics", "*/*", body, None)
                .await?;
            let bytes = whole(answer.into_body()).await?;
            String::from_utf8(bytes.into()).map_err(|error| ClientError::Broken(error.to_string()))
        };
        let answered = timeout(ANSWER_MAX, asking).await;
        answered.map_err(|_| ClientError::Late(ANSWER_MAX))?
    }

    /// `POST /v1/stop`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn stop(&self, request: StopRequest) -> Result<Stopped, ClientError> {
        self.ask(Method::POST, "/v1/stop", Some(&request)).await
    }

    /// `GET /v1/templates`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn templates(&self) -> Result<TemplateList, ClientError> {
        self.ask(Method::GET, "/v1/templates", None::<&()>).await
    }

    /// `DELETE /v1/templates/{name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn remove_template(&self, name: &str, derived: bool) -> Result<Removed, ClientError> {
        let path = format!("/v1/templates/{}?derived={derived}", escaped(name));
        self.ask(Method::DELETE, &path, None::<&()>).await
    }

    /// `POST /v1/templates`: builds one. Dropping what is given back gives the build up.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn build(&self, request: &BuildRequest) -> Result<Events<BuildEvent>, ClientError> {
        let input = None::<mpsc::Receiver<()>>;
        self.stream("/v1/templates", request, input).await
    }

    /// `POST /v1/exec`: runs a program. `input` is what comes after the request. Dropping what is
    /// given back kills the program.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn exec(
        &self,
        request: &ExecRequest,
        input: Option<mpsc::Receiver<ExecInput>>,
    ) -> Result<Events<ExecEvent>, ClientError> {
        self.stream("/v1/exec", request, input).await
    }

    /// `POST /v1/exec/batch`: runs programs, each in a fork of its own. Giving up the wait kills those that run.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn batch(&self, request: &BatchRequest) -> Result<BatchResult, ClientError> {
        self.ask_within(BATCH_MAX, Method::POST, "/v1/exec/batch", Some(request))
            .await
    }

    /// `POST /v1/lab/exec`: runs a command on the emulated host.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lab_exec(
        &self,
        request: &CommandRequest,
        input: Option<mpsc::Receiver<ExecInput>>,
    ) -> Result<Events<ExecEvent>, ClientError> {
        self.stream("/v1/lab/exec", request, input).await
    }

    /// `POST /v1/lab/down`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lab_down(&self) -> Result<(), ClientError> {
        let asked = self.ask(Method::POST, "/v1/lab/down", None::<&()>);
        asked.await.map(|_: serde_json::Value| ())
    }

    /// `POST /v1/exec/{id}/signal`.
    ///
    /// # Errors
    /// See [`ClientError`]; the program may have ended.
    pub async fn signal(&self, id: &str, signal: u8) -> Result<(), ClientError> {
        let path = format!("/v1/exec/{}/signal", escaped(id));
        let request = SignalRequest { signal };
        let asked = self.ask(Method::POST, &path, Some(&request));
        asked.await.map(|_: serde_json::Value| ())
    }

    /// Any request whose answer is a stream of events.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn stream<E: DeserializeOwned, I: Serialize + Send + Sync + 'static>(
        &self,
        path: &str,
        request: &impl Serialize,
        input: Option<mpsc::Receiver<I>>,
    ) -> Result<Events<E>, ClientError> {
        let head = stream::iter([line(request)?]);
        let rest = stream::unfold(input, |mut input| async {
            let next = input.as_mut()?.recv().await?;
            Some((line(&next), input))
        });
        // None of our types fails to be written.
        let rest = rest.filter_map(|line| std::future::ready(line.ok()));
        let frames = head
            .chain(rest)
            .map(|line| Ok::<_, BodyError>(Frame::data(line)));
        let body = UnsyncBoxBody::new(StreamBody::new(frames));
        self.events(Method::POST, path, body, None).await
    }

    async fn events<E: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body,
        key: Option<&str>,
    ) -> Result<Events<E>, ClientError> {
        let answer = self.send(method, path, NDJSON, body, key).await?;
        Ok(Events {
            lines: Lines::new(answer.into_body()),
            kind: std::marker::PhantomData,
        })
    }

    /// Passes a request on as it came, and its answer back, whatever that is.
    ///
    /// # Errors
    /// If the connection breaks off before an answer.
    pub async fn forward<B>(&self, request: Request<B>) -> Result<Response<Incoming>, ClientError>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BodyError>,
    {
        let (mut head, body) = request.into_parts();
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let uri = format!("http://localhost{path}").parse();
        head.uri = uri.map_err(|_| ClientError::Broken("no path to pass on".to_owned()))?;
        head.version = hyper::Version::HTTP_2;
        // Of one connection, and not of the next (RFC 9113 §8.2.2).
        for name in [header::HOST, header::CONNECTION, header::TRANSFER_ENCODING] {
            head.headers.remove(name);
        }
        // A key is for this engine; whose it is is not the client's to say.
        head.headers.remove(header::AUTHORIZATION);
        head.headers.remove(ON_BEHALF);
        if let Some(behalf) = &self.behalf {
            head.headers.insert(ON_BEHALF, behalf.clone());
        }
        let body = UnsyncBoxBody::new(body.map_err(Into::into));
        let mut requests = self.requests.clone();
        let answer = requests.send_request(Request::from_parts(head, body)).await;
        answer.map_err(ClientError::broken)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        request: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        self.ask_within(ANSWER_MAX, method, path, request).await
    }

    /// The same, of what may take longer.
    async fn ask_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
        method: Method,
        path: &str,
        request: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let body = whole_body(match request {
            Some(request) => line(request)?,
            None => Bytes::new(),
        });
        let asking = async {
            let kind = "application/json";
            let answer = self.send(method, path, kind, body, None).await?;
            let bytes = whole(answer.into_body()).await?;
            serde_json::from_slice(&bytes).map_err(ClientError::nonsense)
        };
        let answered = timeout(limit, asking).await;
        answered.map_err(|_| ClientError::Late(limit))?
    }

    /// Gives back a good answer's head; any other is an error.
    async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        body: Body,
        key: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://localhost{path}"))
            .header(header::CONTENT_TYPE, accept)
            .header(header::ACCEPT, accept);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        if let Some(behalf) = &self.behalf {
            request = request.header(ON_BEHALF, behalf);
        }
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, key);
        }
        let request = request
            .body(body)
            .map_err(|error| ClientError::Broken(error.to_string()))?;
        let mut requests = self.requests.clone();
        let answer = requests.send_request(request).await;
        let answer = answer.map_err(ClientError::broken)?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let body = whole(answer.into_body()).await?;
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => Err(ClientError::Refused(Box::new(body.error))),
            Err(_) => Err(ClientError::Nonsense(format!("status {status}"))),
        }
    }
}

/// What happens, as the engine tells it.
pub struct Events<E> {
    lines: Lines,
    kind: std::marker::PhantomData<fn() -> E>,
}

impl<E: DeserializeOwned> Events<E> {
    /// The next event; `None` at the end.
    ///
    /// # Errors
    /// If the stream breaks off.
    pub async fn next(&mut self) -> Result<Option<E>, ClientError> {
        self.lines.next().await
    }
}

fn line(value: &impl Serialize) -> Result<Bytes, ClientError> {
    let mut line = serde_json::to_vec(value).map_err(ClientError::nonsense)?;
    if line.len() > LINE_MAX_BYTES {
        let failure = Failure::new(
            zygote_api::ErrorCode::TooLarge,
            format!("the request has more than {} MiB", LINE_MAX_BYTES >> 20),
        );
        return Err(ClientError::Refused(Box::new(failure)));
    }
    line.push(b'\n');
    Ok(line.into())
}

fn whole_body(bytes: Bytes) -> Body {
    let body = http_body_util::Full::new(bytes);
    UnsyncBoxBody::new(body.map_err(|never| match never {}))
}

async fn whole(body: Incoming) -> Result<Bytes, ClientError> {
    let limited = http_body_util::Limited::new(body, LINE_MAX_BYTES);
    let collected = limited.collect().await;
    collected
        .map(|body| body.to_bytes())
        .map_err(|error| ClientError::Broken(error.to_string()))
}

/// A path's segment (RFC 3986 §2.1).
fn escaped(segment: &str) -> String {
    let mut text = String::new();
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_place_in_a_path() {
        assert_eq!(escaped("a-b_c.1"), "a-b_c.1");
        assert_eq!(escaped("../x?y"), "..%2Fx%3Fy");
    }
}
