//! Who may ask. On the Unix socket that is settled before a request is read; over TCP a key says who asks, or,
//! where none is needed, the request must be meant for us: any program of this machine and any web page in a
//! browser on it can send one.

use crate::answer::{Failed, Made, RequestId, word};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::Limited;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zygote_access::{Access, Audit, Caller, Entry, Refusal, Role};
use zygote_api::{ErrorCode, Failure, NDJSON, ON_BEHALF};

/// What anybody may read: whether the engine is there, and how it is asked.
fn is_public(path: &str) -> bool {
    let known = ["/v1/health", "/health", "/v1/openapi.json", "/docs"];
    known.contains(&path) || path.starts_with("/docs/")
}

/// The subprotocol by which a page in a browser, which cannot send headers, shows its key on a WebSocket.
const KEY_PROTOCOL: &str = "zygote.key.";

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A Unix socket or a pipe, by which only its owner comes.
    Owner,
    /// TCP.
    Tcp {
        /// From where.
        peer: SocketAddr,
        /// Whether a key must be shown.
        needs_key: bool,
    },
}

/// Lets through what may pass, and says whose it is.
pub async fn guarded(
    State(access): State<Arc<Access>>,
    mut request: Request,
    next: Next,
) -> Response {
    let origin = request.extensions().get::<Origin>().copied();
    let (caller, failure) = passed(&access, origin, &request);
    if let Some(caller) = &caller {
        tell_of(caller);
    }
    let audit = access.audit();
    let pending = audit.and_then(|audit| Pending::of(audit, &access, &request, origin, &caller));
    let answer = match failure {
        Some(failure) => Failed(failure).into_response(),
        None => {
            request.extensions_mut().insert(Arc::clone(&access));
            if let Some(caller) = caller {
                if let Some(most) = caller.limits.upload_bytes {
                    request = no_longer(request, most);
                }
                request.extensions_mut().insert(caller);
            }
            next.run(request).await
        }
    };
    if let Some(pending) = pending {
        pending.answered(&answer);
    }
    answer
}

/// Whoever reads the body is told when more of it comes; see `lines`.
fn no_longer(request: Request, most_bytes: u64) -> Request {
    let most = usize::try_from(most_bytes).unwrap_or(usize::MAX);
    request.map(|body| Body::new(Limited::new(body, most)))
}

/// For the log, and for traces.
fn tell_of(caller: &Caller) {
    let span = tracing::Span::current();
    if let Some(key) = &caller.key {
        span.record("key", &**key);
    }
    if let Some(tenant) = &caller.tenant {
        span.record("tenant", &**tenant);
    }
}

/// Whoever asks, if that is known, and why that one may not, if it is so.
fn passed(
    access: &Access,
    origin: Option<Origin>,
    request: &Request,
) -> (Option<Caller>, Option<Failure>) {
    let entered = match origin {
        Some(Origin::Owner) => owner(request.headers()),
        Some(Origin::Tcp { needs_key, .. }) => visitor(access, request, needs_key),
        None => Err(Failure::internal("a connection from nobody knows where")),
    };
    match entered {
        Err(failure) => (None, Some(failure)),
        Ok(None) => (None, None),
        Ok(Some(caller)) => {
            let late = access.ask(&caller).err();
            let failure = late.map(|wait| too_fast(&caller, wait));
            (Some(caller), failure)
        }
    }
}

/// The status, in the log, of a request whose client went away before its answer.
const CLIENT_GONE: u16 = 499;

/// A request that is not answered yet, for the log of who asked for what: it is in there whether its client waits
/// for the answer or not.
struct Pending<'a> {
    audit: &'a Audit,
    entry: Entry,
    begun: Instant,
}

impl<'a> Pending<'a> {
    /// None of what anybody may read.
    fn of(
        audit: &'a Audit,
        access: &Access,
        request: &Request,
        origin: Option<Origin>,
        caller: &Option<Caller>,
    ) -> Option<Self> {
        if is_public(request.uri().path()) {
            return None;
        }
        let forwarded = request.headers().get("x-forwarded-for");
        let forwarded = forwarded.and_then(|value| value.to_str().ok());
        let id = request.extensions().get::<RequestId>();
        let (key, tenant) = caller
            .as_ref()
            .map(|caller| (caller.key.clone(), caller.tenant.clone()))
            .unwrap_or_default();
        Some(Self {
            audit,
            entry: Entry {
                key,
                tenant,
                status: CLIENT_GONE,
                request: id.map(|id| id.0.clone()).unwrap_or_default(),
                from: match origin {
                    Some(Origin::Tcp { peer, .. }) => access.from(peer.ip(), forwarded).to_string(),
                    _ => "owner".to_owned(),
                },
                method: request.method().to_string(),
                path: request
                    .uri()
                    .path_and_query()
                    .map(ToString::to_string)
                    .unwrap_or_default(),
                ..Entry::default()
            },
            begun: Instant::now(),
        })
    }

    fn answered(mut self, answer: &Response) {
        let failed = answer.extensions().get::<Failed>();
        let failed = failed.map(|failed| failed.0.code);
        self.entry.error = failed.map(word);
        self.entry.status = failed.map_or(answer.status().as_u16(), ErrorCode::status);
        self.entry.made = answer.extensions().get::<Made>().map(|made| made.0.clone());
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut entry = std::mem::take(&mut self.entry);
        entry.ms = (self.begun.elapsed().as_secs_f64() * 1e6).round() / 1000.0;
        self.audit.note(entry);
    }
}

/// Its owner, or somebody for whom an engine of its owner's asks.
fn owner(headers: &HeaderMap) -> Result<Option<Caller>, Failure> {
    let Some(behalf) = headers.get(ON_BEHALF) else {
        return Ok(Some(Caller::owner()));
    };
    let parsed = serde_json::from_slice(behalf.as_bytes());
    let behalf = parsed.map_err(|error| {
        Failure::bad_request(format!("{ON_BEHALF}: it is not what it should be"))
            .cause(error.to_string())
    })?;
    Ok(Some(Caller::passed_on(behalf)))
}

fn visitor(access: &Access, request: &Request, needs_key: bool) -> Result<Option<Caller>, Failure> {
    let shown = shown(request.headers());
    let is_public = is_public(request.uri().path());
    if is_public && shown.is_none() && needs_key {
        return Ok(None);
    }
    let caller = access.enter(shown, needs_key).map_err(refused)?;
    // No page of another site has a key.
    if caller.key.is_none() && !needs_key {
        foreign(request).map_or(Ok(()), Err)?;
    }
    Ok(Some(caller))
}

/// The key that comes with a request (RFC 6750 §2.1).
fn shown(headers: &HeaderMap) -> Option<&str> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let value = value.to_str().unwrap_or_default();
        let bearer = value.split_once(' ');
        let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        // Anything else there is no key, but is shown.
        return Some(bearer.map_or("", |(_, key)| key.trim()));
    }
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    let mut words = offered
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    words.find_map(|word| word.trim().strip_prefix(KEY_PROTOCOL))
}

fn refused(refusal: Refusal) -> Failure {
    let failure = Failure::new(ErrorCode::Unauthorized, refusal.to_string());
    match refusal {
        Refusal::NoKey => failure.remedy(
            "send it as the header Authorization: Bearer KEY; one is made with: zygote key create",
        ),
        Refusal::Unknown | Refusal::Expired(_) => {
            failure.remedy("keys are made with: zygote key create")
        }
        // What is wrong with the file is for its owner.
        Refusal::Unreadable(_) => Failure::internal("the keys of this engine cannot be read")
            .remedy("its owner finds out why with: zygote key ls"),
    }
}

fn too_fast(caller: &Caller, wait: Duration) -> Failure {
    let rate = caller.limits.rate.unwrap_or_default();
    let failure = Failure::new(
        ErrorCode::LimitReached,
        format!("this key may ask {rate} times a second, and asks more often"),
    );
    failure.retry_after(
        u32::try_from(wait.as_secs())
            .unwrap_or(u32::MAX)
            .saturating_add(1),
    )
}

/// Lets through whom a route is for.
pub async fn allowed(State(role): State<Role>, request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>();
    let failure = match caller {
        Some(caller) if caller.role >= role => None,
        Some(caller) => Some(Failure::new(
            ErrorCode::Forbidden,
            format!(
                "this is for keys with the role {role}, and this one has {}",
                caller.role
            ),
        )),
        None => Some(refused(Refusal::NoKey)),
    };
    match failure {
        Some(failure) => Failed(failure).into_response(),
        None => next.run(request).await,
    }
}

/// Lets through who has come by the engine's own socket.
pub async fn owners(request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>();
    if caller.is_some_and(|caller| caller.is_owner) {
        return next.run(request).await;
    }
    let failure = Failure::new(
        ErrorCode::Forbidden,
        "this is for the engine's owner, at its socket, and not to be had over TCP",
    );
    Failed(failure).into_response()
}

/// A page in a browser can send requests here, under its own name (DNS rebinding) or as a form: the
/// first has another host, the second another content type.
fn foreign(request: &Request) -> Option<Failure> {
    let value = |name| request.headers().get(name)?.to_str().ok();
    let host = value(header::HOST).or(request.uri().authority().map(|host| host.as_str()));
    if !host.is_some_and(is_loopback) {
        let failure = Failure::new(
            ErrorCode::Forbidden,
            "this request is meant for another host",
        );
        return Some(failure.remedy("address it to 127.0.0.1, [::1] or localhost, or show a key"));
    }
    // A page may open a WebSocket here, and its browser says whose page it is.
    let origin =
        value(header::ORIGIN).map(|origin| origin.split_once("://").map_or("", |(_, host)| host));
    if origin.is_some_and(|host| !is_loopback(host)) {
        let message = "this request comes from a page of another site";
        return Some(Failure::new(ErrorCode::Forbidden, message));
    }
    let kind = value(header::CONTENT_TYPE).and_then(|kind| kind.split(';').next());
    // None of these can a page send without asking first.
    let kinds = ["application/json", NDJSON, "application/octet-stream"];
    let is_ours = kind.is_some_and(|kind| kinds.contains(&kind.trim()));
    if request.method() == Method::POST && !is_ours {
        let message = "over TCP the content type must be application/json, application/x-ndjson or \
                       application/octet-stream";
        return Some(Failure::bad_request(message));
    }
    None
}

fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "127.0.0.1" | "[::1]" | "localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str, kind: &str) -> Request {
        let builder = Request::builder().method("POST").uri("/v1/exec");
        let builder = builder.header("host", host).header("content-type", kind);
        builder.body(Body::empty()).unwrap()
    }

    #[test]
    fn a_page_in_a_browser_does_not_get_in() {
        let json = "application/json; charset=utf-8";
        for host in ["127.0.0.1:8080", "[::1]:80", "localhost", "[::1]"] {
            assert!(foreign(&request(host, json)).is_none(), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:80",
            "127.0.0.1.evil.example",
            "",
        ] {
            assert!(foreign(&request(host, json)).is_some(), "{host}");
        }
        for (origin, is_good) in [
            ("http://127.0.0.1:8080", true),
            ("https://evil.example", false),
            ("null", false),
        ] {
            let mut request = request("localhost", json);
            let value = origin.parse().unwrap();
            request.headers_mut().insert("origin", value);
            assert_eq!(foreign(&request).is_none(), is_good, "{origin}");
        }
        let form = request("localhost", "application/x-www-form-urlencoded");
        assert!(foreign(&form).is_some());
        assert!(foreign(&request("localhost", "text/plain")).is_some());
    }

    #[test]
    fn a_key_comes_in_a_header_or_as_a_subprotocol() {
        let with = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            shown(&headers).map(str::to_owned)
        };
        let key = |text: &str| Some(text.to_owned());
        assert_eq!(with("authorization", "Bearer abc"), key("abc"));
        assert_eq!(with("authorization", "bearer  abc "), key("abc"));
        // It is something, and no key.
        for other in ["Basic abc", "abc", "Bearer", ""] {
            assert_eq!(with("authorization", other), key(""), "{other}");
        }
        let offered = "zygote, zygote.key.abc";
        assert_eq!(with("sec-websocket-protocol", offered), key("abc"));
        assert_eq!(with("sec-websocket-protocol", "zygote"), None);
        assert_eq!(shown(&HeaderMap::new()), None);
    }

    #[test]
    fn only_what_makes_sense_is_believed_of_an_owner() {
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ON_BEHALF, value.parse().unwrap());
            owner(&headers)
        };
        let caller = with(r#"{"tenant":"acme"}"#).unwrap().unwrap();
        assert_eq!(caller.tenant.as_deref(), Some("acme"));
        assert!(with("acme").is_err() && with(r#"{"role":"admin"}"#).is_err());
        assert!(owner(&HeaderMap::new()).unwrap().unwrap().is_owner);
    }
}
