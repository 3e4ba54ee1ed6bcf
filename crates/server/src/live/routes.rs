//! Paths and methods of live sandboxes.

use super::code;
use super::events::{self, events};
use super::files;
use super::machine;
use super::process::{attach, exec, output};
use super::socket as ws;
use super::words::{live_failure, process_info, running, sandbox_info, state};
use crate::answer::{Failed, Made, json};
use crate::backend::Backend;
use crate::lines::{object, query};
use crate::path::Path;
use crate::request::time_limit;
use crate::stream::{EVENTS_MAX, Form, answer};
use axum::Router;
use axum::body::Body;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Extension, FromRequestParts, RawPathParams, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::Deserialize;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::time::timeout;
use zygote_access::Caller;
use zygote_api::{
    AttachRequest, ContextList, ContextRequest, CreateEvent, ErrorCode, Failure, ProcessList,
    ProcessSignal, SandboxChange, SandboxList, SandboxRequest, SandboxState, SandboxStats,
    TerminalSize,
};
use zygote_engine::live::{Attach, ContextSpec, EndReason, LiveError, Sandbox};
use zygote_engine::{Engine, STREAM_CHUNK_MAX_BYTES};

pub(super) type Answer = Result<Response, Failed>;

/// The header that makes a request safe to repeat.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Longest of its values.
const KEY_MAX_BYTES: usize = 255;
/// Sandboxes of a page, at most and by default.
const PAGE_MAX: usize = 1000;
/// Largest message of a WebSocket.
const WS_MESSAGE_MAX_BYTES: usize = 1 << 20;
/// What a client that shows its key as a subprotocol offers beside it: one of what is offered must be taken
/// (RFC 6455 §4.1).
const PROTOCOL: &str = "zygote";
/// The path of all sandboxes.
const ALL: &str = "/v1/sandboxes";

/// All of it, in front of a backend.
pub fn router<B: Backend>(backend: &Arc<B>) -> Router<Arc<B>> {
    Router::new()
        .merge(machine::router())
        .route(ALL, get(list::<B>))
        .route(
            "/v1/sandboxes/{id}",
            get(inspect).delete(remove).patch(change),
        )
        .route("/v1/sandboxes/{id}/wait", get(wait))
        .route("/v1/sandboxes/{id}/stats", get(stats))
        .route("/v1/sandboxes/{id}/exec", post(start))
        .route("/v1/sandboxes/{id}/code", post(run_code))
        .route(
            "/v1/sandboxes/{id}/contexts",
            get(list_contexts).post(create_context),
        )
        .route("/v1/sandboxes/{id}/contexts/{name}", delete(remove_context))
        .route(
            "/v1/sandboxes/{id}/contexts/{name}/interrupt",
            post(interrupt),
        )
        .route("/v1/sandboxes/{id}/contexts/{name}/restart", post(restart))
        .route(
            "/v1/sandboxes/{id}/files",
            get(read_file)
                .put(write_file)
                .post(act_on_files)
                .delete(remove_file),
        )
        .route("/v1/sandboxes/{id}/watch", get(watch_files))
        .route("/v1/sandboxes/{id}/tar", get(pack_files).put(unpack_files))
        .route("/v1/sandboxes/{id}/processes", get(processes))
        .route("/v1/sandboxes/{id}/processes/{process}", get(process))
        .route(
            "/v1/sandboxes/{id}/processes/{process}/wait",
            get(wait_process),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/output",
            get(read_output),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/attach",
            post(attach_to),
        )
        .route("/v1/sandboxes/{id}/processes/{process}/input", post(input))
        .route(
            "/v1/sandboxes/{id}/processes/{process}/signal",
            post(signal),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/resize",
            post(resize),
        )
        .route("/v1/events", get(happenings::<B>))
        .layer(middleware::from_fn_with_state(
            Arc::clone(backend),
            elsewhere::<B>,
        ))
        .route(ALL, post(create::<B>))
        .route(
            "/v1/sandboxes/{id}/processes/{process}/socket",
            get(socket::<B>),
        )
}

/// Where the sandboxes are another engine's, it is asked.
async fn elsewhere<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    if backend.live().is_some() {
        return next.run(request).await;
    }
    let passed = backend.forward(&caller, request).await;
    passed.unwrap_or_else(|failure| Failed(failure).into_response())
}

pub(super) fn engine<B: Backend>(backend: &B) -> Result<&Arc<Engine>, Failure> {
    let engine = backend.live();
    engine.ok_or_else(|| Failure::internal("the sandboxes are elsewhere"))
}

/// The sandbox that a path is about, if it is there for whoever asks.
pub(super) struct Its(pub Arc<Sandbox>);

impl<B: Backend> FromRequestParts<Arc<B>> for Its {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, backend: &Arc<B>) -> Result<Self, Failed> {
        let paths = RawPathParams::from_request_parts(parts, backend).await;
        let paths = paths.map_err(|error| Failure::bad_request(error.body_text()))?;
        let id = paths.iter().find(|(name, _)| *name == "id");
        let id = id.map(|(_, id)| id).unwrap_or_default();
        // Whoever was let in is known; nobody has nothing.
        let caller = parts.extensions.get::<Caller>();
        let caller = caller.ok_or_else(|| Failure::internal("nobody knows who asks"))?;
        Ok(Self(find(&**backend, caller, id)?))
    }
}

pub(super) fn find<B: Backend>(
    backend: &B,
    caller: &Caller,
    id: &str,
) -> Result<Arc<Sandbox>, Failure> {
    let found = engine(backend)?.live().find(id, caller.tenant.as_deref());
    found.map_err(|error| live_failure(&error))
}

pub(super) fn told(error: LiveError) -> Failed {
    Failed(live_failure(&error))
}

fn form(headers: &HeaderMap) -> Form {
    let accept = headers.get(header::ACCEPT);
    Form::of(accept.and_then(|value| value.to_str().ok()))
}

async fn create<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let asked: SandboxRequest = object(body).await?;
    let key = headers.get(IDEMPOTENCY_KEY);
    let key = key.map(|key| key.to_str().unwrap_or_default().to_owned());
    if key
        .as_ref()
        .is_some_and(|key| key.is_empty() || key.len() > KEY_MAX_BYTES)
    {
        let message = format!("{IDEMPOTENCY_KEY}: 1 to {KEY_MAX_BYTES} ASCII characters");
        return Err(Failure::bad_request(message).into());
    }
    let form = form(&headers);
    let (events, happening) = mpsc::channel(EVENTS_MAX);
    if form == Form::Json {
        // Who wants no progress is told at the end.
        drop(happening);
        let created = backend.create(&caller, asked, key, events).await?;
        let mut answer = json(&created);
        answer.extensions_mut().insert(Made(created.id));
        return Ok(answer);
    }
    let work = Box::pin(async move {
        let created = backend.create(&caller, asked, key, events).await?;
        Ok(Some(CreateEvent::Created(Box::new(created))))
    });
    Ok(answer(form, work, happening, |error| CreateEvent::Error { error }).await?)
}

/// Which sandboxes are wanted.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Wanted {
    /// In which state; without, all that have not ended.
    state: Option<String>,
    template: Option<String>,
    name: Option<String>,
    /// At most so many.
    limit: Option<usize>,
    /// Behind the one with this id.
    after: Option<String>,
}

async fn list<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    uri: axum::http::Uri,
) -> Answer {
    let wanted: Wanted = query(&uri)?;
    let limit = wanted.limit.unwrap_or(PAGE_MAX);
    if !(1..=PAGE_MAX).contains(&limit) {
        let message = format!("limit: 1 to {PAGE_MAX}");
        return Err(Failure::bad_request(message).into());
    }
    let asked = wanted.state.as_deref();
    let of_state = match asked {
        None | Some("all") => None,
        Some(name) => Some(SandboxState::of(name).ok_or_else(|| {
            Failure::bad_request("state: making, running, paused, ending, ended or all")
        })?),
    };
    let is_wanted = |sandbox: &Arc<Sandbox>| {
        let now = state(sandbox.status().phase);
        let is_state = match (asked, of_state) {
            (None, _) => now != SandboxState::Ended,
            (Some(_), None) => true,
            (Some(_), Some(of_state)) => now == of_state,
        };
        let is = |wish: &Option<String>, is: Option<&str>| {
            wish.as_deref().is_none_or(|wish| is == Some(wish))
        };
        is_state
            && is(&wanted.template, Some(&sandbox.spec.template))
            && is(&wanted.name, sandbox.spec.name.as_deref())
    };
    let all = engine(&*backend)?.live().all_of(caller.tenant.as_deref());
    let is_behind = |sandbox: &&Arc<Sandbox>| {
        let after = wanted.after.as_ref();
        after.is_none_or(|after| sandbox.id_text() > *after)
    };
    // Ids are in the order of their making (UUID version 7).
    let mut found: Vec<_> = all
        .iter()
        .filter(is_behind)
        .filter(|s| is_wanted(s))
        .collect();
    found.sort_by_key(|sandbox| sandbox.id);
    let next = (found.len() > limit).then(|| found[limit - 1].id_text());
    found.truncate(limit);
    let sandboxes = found.into_iter().map(|one| sandbox_info(one)).collect();
    Ok(json(&SandboxList { sandboxes, next }))
}

async fn inspect(Its(sandbox): Its) -> Answer {
    Ok(json(&sandbox_info(&sandbox)))
}

async fn remove(Its(sandbox): Its) -> Answer {
    sandbox.end(EndReason::Removed).await;
    Ok(json(&sandbox_info(&sandbox)))
}

async fn change(Its(sandbox): Its, body: Body) -> Answer {
    let asked: SandboxChange = object(body).await?;
    let ttl = asked.ttl_seconds.map(time_limit).transpose()?;
    let idle = asked.idle_seconds.map(time_limit).transpose()?;
    sandbox.extend(ttl, idle).await.map_err(told)?;
    Ok(json(&sandbox_info(&sandbox)))
}

/// How long to wait.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Patience {
    /// In seconds; 0: for any time.
    timeout_seconds: f64,
}

impl Patience {
    /// Waits, but not for longer.
    async fn wait(self, waited: impl Future<Output = ()>) -> Result<(), Failure> {
        match time_limit(self.timeout_seconds)? {
            None => waited.await,
            // Its state is in the answer.
            Some(limit) => drop(timeout(limit, waited).await),
        }
        Ok(())
    }
}

async fn wait(Its(sandbox): Its, uri: axum::http::Uri) -> Answer {
    let ended = async { drop(sandbox.ended().await) };
    query::<Patience>(&uri)?.wait(ended).await?;
    Ok(json(&sandbox_info(&sandbox)))
}

async fn stats(Its(sandbox): Its) -> Answer {
    let usage = sandbox.usage().await.map_err(told)?;
    let Some(usage) = usage else {
        let message = "the sandbox's process cannot be measured: it has ended";
        return Err(Failure::new(ErrorCode::SandboxEnded, message).into());
    };
    Ok(json(&SandboxStats {
        id: sandbox.id_text(),
        name: sandbox.spec.name.clone(),
        memory_private_kib: usage.private_kib,
        page_tables_kib: usage.page_tables_kib,
        cpu_seconds: usage.cpu.as_secs_f64(),
        processes: running(&sandbox),
    }))
}

async fn start(Its(sandbox): Its, request: Request) -> Answer {
    Ok(exec(sandbox, request).await?)
}

async fn run_code(Its(sandbox): Its, request: Request) -> Answer {
    Ok(code::run(sandbox, request).await?)
}

async fn list_contexts(Its(sandbox): Its) -> Answer {
    let contexts = sandbox.contexts().await.map_err(told)?;
    let contexts = contexts.into_iter().map(code::context_info).collect();
    Ok(json(&ContextList { contexts }))
}

async fn create_context(Its(sandbox): Its, body: Body) -> Answer {
    let ContextRequest {
        name,
        language,
        cwd,
    } = object(body).await?;
    if cwd.contains('\0') {
        return Err(Failure::bad_request("cwd: it may not have a NUL").into());
    }
    let spec = ContextSpec {
        name,
        language,
        cwd,
    };
    let made = sandbox.create_context(spec).await;
    Ok(json(&code::context_info(made.map_err(told)?)))
}

async fn remove_context(Its(sandbox): Its, Path((_, name)): Path<(String, String)>) -> Answer {
    sandbox.remove_context(&name).await.map_err(told)?;
    Ok(json(&serde_json::json!({ "context": name })))
}

async fn interrupt(Its(sandbox): Its, Path((_, name)): Path<(String, String)>) -> Answer {
    sandbox.interrupt(&name).await.map_err(told)?;
    Ok(json(&serde_json::json!({ "context": name })))
}

async fn restart(Its(sandbox): Its, Path((_, name)): Path<(String, String)>) -> Answer {
    let restarted = sandbox.restart(&name).await;
    Ok(json(&code::context_info(restarted.map_err(told)?)))
}

async fn socket<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    Path((id, process)): Path<(String, u32)>,
    uri: axum::http::Uri,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Answer {
    let asked: AttachRequest = query(&uri)?;
    let upgrade = upgrade.map_err(|error| {
        Failure::bad_request("this is a WebSocket (RFC 6455)").cause(error.body_text())
    })?;
    Ok(upgrade
        .protocols([PROTOCOL])
        .max_message_size(WS_MESSAGE_MAX_BYTES)
        .on_upgrade(move |socket| ws::serve(backend, caller, id, process, asked, socket)))
}

async fn read_file(Its(sandbox): Its, headers: HeaderMap, uri: axum::http::Uri) -> Answer {
    Ok(files::read(sandbox, query(&uri)?, &headers).await?)
}

async fn write_file(Its(sandbox): Its, uri: axum::http::Uri, body: Body) -> Answer {
    Ok(files::write(sandbox, query(&uri)?, body).await?)
}

async fn act_on_files(Its(sandbox): Its, uri: axum::http::Uri, body: Body) -> Answer {
    Ok(files::act(sandbox, query(&uri)?, body).await?)
}

async fn remove_file(Its(sandbox): Its, uri: axum::http::Uri) -> Answer {
    Ok(files::remove(sandbox, query(&uri)?).await?)
}

async fn watch_files(Its(sandbox): Its, headers: HeaderMap, uri: axum::http::Uri) -> Answer {
    Ok(files::watch(sandbox, query(&uri)?, form(&headers)).await?)
}

async fn pack_files(Its(sandbox): Its, uri: axum::http::Uri) -> Answer {
    Ok(files::pack(sandbox, query(&uri)?).await?)
}

async fn unpack_files(Its(sandbox): Its, uri: axum::http::Uri, body: Body) -> Answer {
    Ok(files::unpack(sandbox, query(&uri)?, body).await?)
}

async fn processes(Its(sandbox): Its) -> Answer {
    // One that has ended has no output any more.
    let rings = sandbox.rings().await.unwrap_or_default();
    let all = sandbox.processes();
    let told = all.iter().map(|info| {
        let mut told = process_info(&sandbox, info);
        if let Some(ring) = rings.iter().find(|ring| ring.process == info.id) {
            told.output_kept_bytes = Some(ring.kept_bytes);
            told.output_dropped_bytes = Some(ring.dropped_bytes);
        }
        told
    });
    let processes = told.collect();
    Ok(json(&ProcessList { processes }))
}

async fn process(Its(sandbox): Its, Path((_, process)): Path<(String, u32)>) -> Answer {
    let info = sandbox.process(process).map_err(told)?;
    let mut told = process_info(&sandbox, &info);
    let rings = sandbox.rings().await.unwrap_or_default();
    if let Some(ring) = rings.iter().find(|ring| ring.process == info.id) {
        told.output_kept_bytes = Some(ring.kept_bytes);
        told.output_dropped_bytes = Some(ring.dropped_bytes);
    }
    Ok(json(&told))
}

async fn wait_process(
    Its(sandbox): Its,
    Path((_, process)): Path<(String, u32)>,
    uri: axum::http::Uri,
) -> Answer {
    sandbox.process(process).map_err(told)?;
    let ended = async { drop(sandbox.wait(process).await) };
    query::<Patience>(&uri)?.wait(ended).await?;
    let info = sandbox.process(process).map_err(told)?;
    Ok(json(&process_info(&sandbox, &info)))
}

/// Which output is wanted.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Part {
    /// From this offset on.
    from: Option<u64>,
    /// Whether to wait for more.
    follow: bool,
}

async fn read_output(
    Its(sandbox): Its,
    Path((_, process)): Path<(String, u32)>,
    headers: HeaderMap,
    uri: axum::http::Uri,
) -> Answer {
    let part: Part = query(&uri)?;
    let attach = Attach {
        process,
        from: part.from,
        follow: part.follow,
        holds: false,
    };
    Ok(output(sandbox, attach, form(&headers)).await?)
}

async fn attach_to(
    Its(sandbox): Its,
    Path((_, process)): Path<(String, u32)>,
    request: Request,
) -> Answer {
    Ok(attach(sandbox, process, request).await?)
}

/// What becomes of a process's input behind what is sent.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct InputEnd {
    /// Whether that was all.
    end: bool,
}

async fn input(
    Its(sandbox): Its,
    Path((_, process)): Path<(String, u32)>,
    uri: axum::http::Uri,
    body: Body,
) -> Answer {
    let InputEnd { end } = query(&uri)?;
    let mut body = crate::lines::Pieces::new(body);
    let mut taken: u64 = 0;
    while let Some(piece) = body.next().await? {
        for chunk in piece.chunks(STREAM_CHUNK_MAX_BYTES) {
            let given = sandbox.input(process, chunk.to_vec()).await;
            given.map_err(told)?;
            taken += chunk.len() as u64;
        }
    }
    if end {
        sandbox.end_input(process).await.map_err(told)?;
    }
    Ok(json(&serde_json::json!({ "bytes": taken })))
}

async fn signal(Its(sandbox): Its, Path((_, process)): Path<(String, u32)>, body: Body) -> Answer {
    let asked: ProcessSignal = object(body).await?;
    if !(1..=64).contains(&asked.signal) {
        return Err(Failure::bad_request("signal: a number from 1 to 64").into());
    }
    let sent = sandbox.signal(process, asked.signal, !asked.only_process);
    sent.await.map_err(told)?;
    Ok(json(&serde_json::json!({ "process": process })))
}

async fn resize(Its(sandbox): Its, Path((_, process)): Path<(String, u32)>, body: Body) -> Answer {
    let TerminalSize { rows, columns } = object(body).await?;
    let size = zygote_engine::TerminalSize { rows, columns };
    sandbox.resize(process, size).await.map_err(told)?;
    Ok(json(&serde_json::json!({ "process": process })))
}

async fn happenings<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    uri: axum::http::Uri,
) -> Answer {
    let asked: events::Asked = query(&uri)?;
    let engine = Arc::clone(engine(&*backend)?);
    Ok(events(engine, caller, asked, form(&headers)).await?)
}
