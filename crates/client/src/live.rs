//! Asking for live sandboxes.

use crate::{Client, ClientError, Events, escaped, line, whole, whole_body};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::Method;
use hyper::body::{Frame, Incoming};
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::sync::mpsc;
use zygote_api::{
    AttachRequest, BranchRequest, Branched, Built, CodeEvent, CodeRequest, ContextInfo,
    ContextList, ContextRequest, CreateEvent, Diff, DiffRequest, FileAction, FileEvent, FileInfo,
    MomentInfo, MomentList, MomentRequest, PauseRequest, ProcessEvent, ProcessInfo, ProcessInput,
    ProcessList, ProcessOutput, ProcessRequest, ProcessSignal, PublishRequest, RollbackRequest,
    SandboxChange, SandboxEvent, SandboxInfo, SandboxList, SandboxRequest, SandboxStats, base64,
};

/// How long one request waits for an end; it is asked again.
const WAIT_S: u32 = 30;

/// How long what is done to a whole machine may take; the engine has deadlines of its own.
const MACHINE_MAX: Duration = Duration::from_secs(1200);
/// How long a template may take to be made of a sandbox: builds before it are waited for, up to two hours.
const PUBLISH_MAX: Duration = Duration::from_secs(3 * 3600);

fn path(id: &str, rest: &str) -> String {
    format!("/v1/sandboxes/{}{rest}", escaped(id))
}

fn process_path(id: &str, process: u32, rest: &str) -> String {
    path(id, &format!("/processes/{process}{rest}"))
}

/// A path, for a query.
fn named(file: &[u8]) -> String {
    match std::str::from_utf8(file) {
        Ok(text) => format!("path={}", escaped(text)),
        Err(_) => format!("path_base64={}", escaped(&base64(file))),
    }
}

/// Bytes as they come.
pub struct Octets(Incoming);

impl Octets {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// If they break off before that.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.0.frame().await {
            let frame = frame.map_err(ClientError::broken)?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

/// All may fail with [`ClientError`].
#[expect(clippy::missing_errors_doc, reason = "see above")]
impl Client {
    /// `POST /v1/sandboxes`. With an idempotency key it may be asked again.
    pub async fn create(
        &self,
        request: &SandboxRequest,
        key: Option<&str>,
    ) -> Result<Events<CreateEvent>, ClientError> {
        let body = whole_body(line(request)?);
        self.events(Method::POST, "/v1/sandboxes", body, key).await
    }

    /// `GET /v1/sandboxes`: a page of those in a state (`all`, or without: all that live).
    pub async fn sandboxes(
        &self,
        state: Option<&str>,
        after: Option<&str>,
    ) -> Result<SandboxList, ClientError> {
        let mut path = "/v1/sandboxes?limit=1000".to_owned();
        for (key, value) in [("state", state), ("after", after)] {
            if let Some(value) = value {
                path.push_str(&format!("&{key}={}", escaped(value)));
            }
        }
        self.ask(Method::GET, &path, None::<&()>).await
    }

    /// `GET /v1/sandboxes/{id}`.
    pub async fn sandbox(&self, id: &str) -> Result<SandboxInfo, ClientError> {
        self.ask(Method::GET, &path(id, ""), None::<&()>).await
    }

    /// `DELETE /v1/sandboxes/{id}`.
    pub async fn end_sandbox(&self, id: &str) -> Result<SandboxInfo, ClientError> {
        self.ask(Method::DELETE, &path(id, ""), None::<&()>).await
    }

    /// `PATCH /v1/sandboxes/{id}`.
    pub async fn change_sandbox(
        &self,
        id: &str,
        change: SandboxChange,
    ) -> Result<SandboxInfo, ClientError> {
        self.ask(Method::PATCH, &path(id, ""), Some(&change)).await
    }

    /// `GET /v1/sandboxes/{id}/stats`.
    pub async fn sandbox_stats(&self, id: &str) -> Result<SandboxStats, ClientError> {
        self.ask(Method::GET, &path(id, "/stats"), None::<&()>)
            .await
    }

    /// `POST /v1/sandboxes/{id}/branch`.
    pub async fn branch(&self, id: &str, request: &BranchRequest) -> Result<Branched, ClientError> {
        self.ask_within(
            MACHINE_MAX,
            Method::POST,
            &path(id, "/branch"),
            Some(request),
        )
        .await
    }

    /// `POST /v1/sandboxes/{id}/diff`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn diff(&self, id: &str, request: &DiffRequest) -> Result<Diff, ClientError> {
        self.ask_within(MACHINE_MAX, Method::POST, &path(id, "/diff"), Some(request))
            .await
    }

    /// `POST /v1/sandboxes/{id}/template`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn publish(&self, id: &str, request: &PublishRequest) -> Result<Built, ClientError> {
        let path = path(id, "/template");
        self.ask_within(PUBLISH_MAX, Method::POST, &path, Some(request))
            .await
    }

    /// `POST /v1/sandboxes/{id}/moments`.
    pub async fn keep_moment(
        &self,
        id: &str,
        request: &MomentRequest,
    ) -> Result<MomentInfo, ClientError> {
        self.ask_within(
            MACHINE_MAX,
            Method::POST,
            &path(id, "/moments"),
            Some(request),
        )
        .await
    }

    /// `GET /v1/sandboxes/{id}/moments`.
    pub async fn moments(&self, id: &str) -> Result<MomentList, ClientError> {
        self.ask(Method::GET, &path(id, "/moments"), None::<&()>)
            .await
    }

    /// `DELETE /v1/sandboxes/{id}/moments/{moment}`.
    pub async fn forget_moment(&self, id: &str, moment: &str) -> Result<MomentList, ClientError> {
        let path = path(id, &format!("/moments/{}", escaped(moment)));
        self.ask(Method::DELETE, &path, None::<&()>).await
    }

    /// `POST /v1/sandboxes/{id}/rollback`.
    pub async fn roll_back(
        &self,
        id: &str,
        request: &RollbackRequest,
    ) -> Result<SandboxInfo, ClientError> {
        self.ask_within(
            MACHINE_MAX,
            Method::POST,
            &path(id, "/rollback"),
            Some(request),
        )
        .await
    }

    /// `POST /v1/sandboxes/{id}/pause`.
    pub async fn pause(&self, id: &str, request: PauseRequest) -> Result<SandboxInfo, ClientError> {
        self.ask_within(
            MACHINE_MAX,
            Method::POST,
            &path(id, "/pause"),
            Some(&request),
        )
        .await
    }

    /// `POST /v1/sandboxes/{id}/resume`.
    pub async fn resume(&self, id: &str) -> Result<SandboxInfo, ClientError> {
        self.ask_within(MACHINE_MAX, Method::POST, &path(id, "/resume"), None::<&()>)
            .await
    }

    /// Waits for a sandbox's end: as long as that takes.
    pub async fn wait_sandbox(&self, id: &str) -> Result<SandboxInfo, ClientError> {
        let path = path(id, &format!("/wait?timeout_seconds={WAIT_S}"));
        loop {
            let info: SandboxInfo = self.ask(Method::GET, &path, None::<&()>).await?;
            if info.end.is_some() && info.state == zygote_api::SandboxState::Ended {
                return Ok(info);
            }
        }
    }

    /// `POST /v1/sandboxes/{id}/exec`, with what comes after the request.
    pub async fn exec_in(
        &self,
        id: &str,
        request: &ProcessRequest,
        input: Option<mpsc::Receiver<ProcessInput>>,
    ) -> Result<Events<ProcessEvent>, ClientError> {
        self.stream(&path(id, "/exec"), request, input).await
    }

    /// The same, detached.
    pub async fn start_in(
        &self,
        id: &str,
        request: &ProcessRequest,
    ) -> Result<ProcessInfo, ClientError> {
        let path = path(id, "/exec");
        self.ask(Method::POST, &path, Some(request)).await
    }

    /// `POST /v1/sandboxes/{id}/code`: a cell of code.
    pub async fn run_code(
        &self,
        id: &str,
        request: &CodeRequest,
    ) -> Result<Events<CodeEvent>, ClientError> {
        let body = whole_body(line(request)?);
        let path = path(id, "/code");
        self.events(Method::POST, &path, body, None).await
    }

    /// `GET …/contexts`.
    pub async fn contexts(&self, id: &str) -> Result<ContextList, ClientError> {
        self.ask(Method::GET, &path(id, "/contexts"), None::<&()>)
            .await
    }

    /// `POST …/contexts`.
    pub async fn create_context(
        &self,
        id: &str,
        request: &ContextRequest,
    ) -> Result<ContextInfo, ClientError> {
        let path = path(id, "/contexts");
        self.ask(Method::POST, &path, Some(request)).await
    }

    /// `DELETE …/contexts/{name}`.
    pub async fn remove_context(&self, id: &str, name: &str) -> Result<(), ClientError> {
        let path = path(id, &format!("/contexts/{}", escaped(name)));
        let asked = self.ask(Method::DELETE, &path, None::<&()>);
        asked.await.map(|_: serde_json::Value| ())
    }

    /// `POST …/contexts/{name}/interrupt`.
    pub async fn interrupt(&self, id: &str, name: &str) -> Result<(), ClientError> {
        let path = path(id, &format!("/contexts/{}/interrupt", escaped(name)));
        let asked = self.ask(Method::POST, &path, None::<&()>);
        asked.await.map(|_: serde_json::Value| ())
    }

    /// `POST …/contexts/{name}/restart`.
    pub async fn restart(&self, id: &str, name: &str) -> Result<ContextInfo, ClientError> {
        let path = path(id, &format!("/contexts/{}/restart", escaped(name)));
        self.ask(Method::POST, &path, None::<&()>).await
    }

    /// `POST …/files`: something to do with files; what it is answered with is up to that.
    pub async fn files<T: DeserializeOwned>(
        &self,
        id: &str,
        action: &FileAction,
    ) -> Result<T, ClientError> {
        self.ask(Method::POST, &path(id, "/files"), Some(action))
            .await
    }

    /// `GET …/files`: a file's bytes, from an offset on.
    pub async fn read_file(
        &self,
        id: &str,
        file: &[u8],
        offset: u64,
        length: Option<u64>,
    ) -> Result<Octets, ClientError> {
        let length = length.map(|n| format!("&length={n}")).unwrap_or_default();
        let rest = format!("/files?offset={offset}{length}&{}", named(file));
        self.bytes(&path(id, &rest)).await
    }

    /// `PUT …/files`: writes one. `options`: further parts of the query, such as `append=true`.
    pub async fn write_file(
        &self,
        id: &str,
        file: &[u8],
        options: &str,
        input: mpsc::Receiver<std::io::Result<Bytes>>,
    ) -> Result<FileInfo, ClientError> {
        let rest = format!("/files?{}{options}", named(file));
        self.put(&path(id, &rest), input).await
    }

    /// `GET …/tar`: a file or folder as a tar archive.
    pub async fn pack(&self, id: &str, file: &[u8]) -> Result<Octets, ClientError> {
        self.bytes(&path(id, &format!("/tar?{}", named(file))))
            .await
    }

    /// `PUT …/tar`: unpacks a tar archive into a folder.
    pub async fn unpack(
        &self,
        id: &str,
        folder: &[u8],
        input: mpsc::Receiver<std::io::Result<Bytes>>,
    ) -> Result<(), ClientError> {
        let path = path(id, &format!("/tar?{}", named(folder)));
        self.put(&path, input).await.map(|_: serde_json::Value| ())
    }

    /// `GET …/watch`: what changes in a file or folder.
    pub async fn watch(
        &self,
        id: &str,
        file: &[u8],
        recursive: bool,
    ) -> Result<Events<FileEvent>, ClientError> {
        let rest = format!("/watch?recursive={recursive}&{}", named(file));
        self.events(
            Method::GET,
            &path(id, &rest),
            whole_body(Bytes::new()),
            None,
        )
        .await
    }

    async fn bytes(&self, path: &str) -> Result<Octets, ClientError> {
        let kind = "application/octet-stream";
        let body = whole_body(Bytes::new());
        let answer = self.send(Method::GET, path, kind, body, None).await?;
        Ok(Octets(answer.into_body()))
    }

    /// A body that breaks off with an error is not taken for a whole one.
    async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        input: mpsc::Receiver<std::io::Result<Bytes>>,
    ) -> Result<T, ClientError> {
        let pieces = stream::unfold(input, |mut input| async {
            let next = input.recv().await?;
            let piece = next.map(Frame::data).map_err(crate::BodyError::from);
            Some((piece, input))
        });
        let body = UnsyncBoxBody::new(StreamBody::new(pieces));
        let kind = "application/octet-stream";
        let answer = self.send(Method::PUT, path, kind, body, None).await?;
        let bytes = whole(answer.into_body()).await?;
        serde_json::from_slice(&bytes).map_err(ClientError::nonsense)
    }

    /// `GET …/processes`.
    pub async fn processes(&self, id: &str) -> Result<ProcessList, ClientError> {
        self.ask(Method::GET, &path(id, "/processes"), None::<&()>)
            .await
    }

    /// `GET …/processes/{process}`.
    pub async fn process(&self, id: &str, process: u32) -> Result<ProcessInfo, ClientError> {
        let path = process_path(id, process, "");
        self.ask(Method::GET, &path, None::<&()>).await
    }

    /// Waits for a process's end: as long as that takes.
    pub async fn wait_process(&self, id: &str, process: u32) -> Result<ProcessInfo, ClientError> {
        let rest = format!("/wait?timeout_seconds={WAIT_S}");
        let path = process_path(id, process, &rest);
        loop {
            let info: ProcessInfo = self.ask(Method::GET, &path, None::<&()>).await?;
            if matches!(&info.state[..], "ended" | "lost") {
                return Ok(info);
            }
        }
    }

    /// `POST …/processes/{process}/signal`.
    pub async fn signal_process(
        &self,
        id: &str,
        process: u32,
        signal: ProcessSignal,
    ) -> Result<(), ClientError> {
        let path = process_path(id, process, "/signal");
        let asked = self.ask(Method::POST, &path, Some(&signal));
        asked.await.map(|_: serde_json::Value| ())
    }

    /// `POST …/processes/{process}/attach`.
    pub async fn attach(
        &self,
        id: &str,
        process: u32,
        request: AttachRequest,
        input: Option<mpsc::Receiver<ProcessInput>>,
    ) -> Result<Events<ProcessEvent>, ClientError> {
        let path = process_path(id, process, "/attach");
        self.stream(&path, &request, input).await
    }

    /// `GET …/processes/{process}/output`: what is kept of it, as one object.
    pub async fn output(
        &self,
        id: &str,
        process: u32,
        from: Option<u64>,
    ) -> Result<ProcessOutput, ClientError> {
        let from = from.map(|from| format!("?from={from}")).unwrap_or_default();
        let path = process_path(id, process, &format!("/output{from}"));
        self.ask(Method::GET, &path, None::<&()>).await
    }

    /// The same as events, and what comes if it is followed.
    pub async fn read_output(
        &self,
        id: &str,
        process: u32,
        from: Option<u64>,
        follow: bool,
    ) -> Result<Events<ProcessEvent>, ClientError> {
        let from = from.map(|from| format!("&from={from}")).unwrap_or_default();
        let path = process_path(id, process, &format!("/output?follow={follow}{from}"));
        self.events(Method::GET, &path, whole_body(Bytes::new()), None)
            .await
    }

    /// `GET /v1/events`: what has happened behind a number, and what happens if it is followed.
    pub async fn sandbox_events(
        &self,
        after: u64,
        follow: bool,
    ) -> Result<Events<SandboxEvent>, ClientError> {
        let path = format!("/v1/events?after={after}&follow={follow}");
        self.events(Method::GET, &path, whole_body(Bytes::new()), None)
            .await
    }
}
