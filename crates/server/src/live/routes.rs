//! Paths and methods of live sandboxes.

use super::code;
use super::events::{self, events};
use super::files;
use super::machine;
use super::process::{attach, exec, output};
use super::socket as ws;
use super::words::{live_failure, process_info, running, sandbox_info, state};
use crate::answer::{Failed, json};
use crate::backend::Backend;
use crate::lines::{object, query};
use crate::local::time_limit;
use crate::stream::{EVENTS_MAX, Form, answer};
use axum::Router;
use axum::body::Body;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::Deserialize;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::time::timeout;
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
/// The path of all sandboxes.
const ALL: &str = "/v1/sandboxes";

/// All of it, in front of a backend.
pub fn router<B: Backend>(backend: &Arc<B>) -> Router<Arc<B>> {
    Router::new()
        .merge(machine::router())
        .route(ALL, get(list::<B>))
        .route(
            "/v1/sandboxes/{id}",
            get(inspect::<B>).delete(remove::<B>).patch(change::<B>),
        )
        .route("/v1/sandboxes/{id}/wait", get(wait::<B>))
        .route("/v1/sandboxes/{id}/stats", get(stats::<B>))
        .route("/v1/sandboxes/{id}/exec", post(start::<B>))
        .route("/v1/sandboxes/{id}/code", post(run_code::<B>))
        .route(
            "/v1/sandboxes/{id}/contexts",
            get(list_contexts::<B>).post(create_context::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/contexts/{name}",
            delete(remove_context::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/contexts/{name}/interrupt",
            post(interrupt::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/contexts/{name}/restart",
            post(restart::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/files",
            get(read_file::<B>)
                .put(write_file::<B>)
                .post(act_on_files::<B>)
                .delete(remove_file::<B>),
        )
        .route("/v1/sandboxes/{id}/watch", get(watch_files::<B>))
        .route(
            "/v1/sandboxes/{id}/tar",
            get(pack_files::<B>).put(unpack_files::<B>),
        )
        .route("/v1/sandboxes/{id}/processes", get(processes::<B>))
        .route("/v1/sandboxes/{id}/processes/{process}", get(process::<B>))
        .route(
            "/v1/sandboxes/{id}/processes/{process}/wait",
            get(wait_process::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/output",
            get(read_output::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/attach",
            post(attach_to::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/input",
            post(input::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/signal",
            post(signal::<B>),
        )
        .route(
            "/v1/sandboxes/{id}/processes/{process}/resize",
            post(resize::<B>),
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
    request: Request,
    next: Next,
) -> Response {
    if backend.live().is_some() {
        return next.run(request).await;
    }
    let passed = backend.forward(request).await;
    passed.unwrap_or_else(|failure| Failed(failure).into_response())
}

pub(super) fn engine<B: Backend>(backend: &B) -> Result<&Arc<Engine>, Failure> {
    let engine = backend.live();
    engine.ok_or_else(|| Failure::internal("the sandboxes are elsewhere"))
}

pub(super) fn find<B: Backend>(backend: &B, id: &str) -> Result<Arc<Sandbox>, Failure> {
    let found = engine(backend)?.live().find(id);
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
        return Ok(json(&backend.create(asked, key, events).await?));
    }
    let work = Box::pin(async move {
        let created = backend.create(asked, key, events).await?;
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

async fn list<B: Backend>(State(backend): State<Arc<B>>, uri: axum::http::Uri) -> Answer {
    let wanted: Wanted = query(&uri)?;
    let limit = wanted.limit.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
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
    let all = engine(&*backend)?.live().all();
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

async fn inspect<B: Backend>(State(backend): State<Arc<B>>, Path(id): Path<String>) -> Answer {
    Ok(json(&sandbox_info(&*find(&*backend, &id)?)))
}

async fn remove<B: Backend>(State(backend): State<Arc<B>>, Path(id): Path<String>) -> Answer {
    let sandbox = find(&*backend, &id)?;
    sandbox.end(EndReason::Removed).await;
    Ok(json(&sandbox_info(&sandbox)))
}

async fn change<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    body: Body,
) -> Answer {
    let asked: SandboxChange = object(body).await?;
    let sandbox = find(&*backend, &id)?;
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

async fn wait<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    uri: axum::http::Uri,
) -> Answer {
    let sandbox = find(&*backend, &id)?;
    let ended = async { drop(sandbox.ended().await) };
    query::<Patience>(&uri)?.wait(ended).await?;
    Ok(json(&sandbox_info(&sandbox)))
}

async fn stats<B: Backend>(State(backend): State<Arc<B>>, Path(id): Path<String>) -> Answer {
    let sandbox = find(&*backend, &id)?;
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

async fn start<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    Ok(exec(find(&*backend, &id)?, request).await?)
}

async fn run_code<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    Ok(code::run(find(&*backend, &id)?, request).await?)
}

async fn list_contexts<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
) -> Answer {
    let contexts = find(&*backend, &id)?.contexts().await.map_err(told)?;
    let contexts = contexts.into_iter().map(code::context_info).collect();
    Ok(json(&ContextList { contexts }))
}

async fn create_context<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    body: Body,
) -> Answer {
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
    let made = find(&*backend, &id)?.create_context(spec).await;
    Ok(json(&code::context_info(made.map_err(told)?)))
}

async fn remove_context<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, name)): Path<(String, String)>,
) -> Answer {
    let sandbox = find(&*backend, &id)?;
    sandbox.remove_context(&name).await.map_err(told)?;
    Ok(json(&serde_json::json!({ "context": name })))
}

async fn interrupt<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, name)): Path<(String, String)>,
) -> Answer {
    let sandbox = find(&*backend, &id)?;
    sandbox.interrupt(&name).await.map_err(told)?;
    Ok(json(&serde_json::json!({ "context": name })))
}

async fn restart<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, name)): Path<(String, String)>,
) -> Answer {
    let restarted = find(&*backend, &id)?.restart(&name).await;
    Ok(json(&code::context_info(restarted.map_err(told)?)))
}

async fn socket<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
    uri: axum::http::Uri,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Answer {
    let asked: AttachRequest = query(&uri)?;
    let upgrade = upgrade.map_err(|error| {
        Failure::bad_request("this is a WebSocket (RFC 6455)").cause(error.body_text())
    })?;
    Ok(upgrade
        .max_message_size(WS_MESSAGE_MAX_BYTES)
        .on_upgrade(move |socket| ws::serve(backend, id, process, asked, socket)))
}

async fn read_file<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    headers: HeaderMap,
    uri: axum::http::Uri,
) -> Answer {
    let sandbox = find(&*backend, &id)?;
    Ok(files::read(sandbox, query(&uri)?, &headers).await?)
}

async fn write_file<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    uri: axum::http::Uri,
    body: Body,
) -> Answer {
    Ok(files::write(find(&*backend, &id)?, query(&uri)?, body).await?)
}

async fn act_on_files<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    uri: axum::http::Uri,
    body: Body,
) -> Answer {
    Ok(files::act(find(&*backend, &id)?, query(&uri)?, body).await?)
}

async fn remove_file<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    uri: axum::http::Uri,
) -> Answer {
    Ok(files::remove(find(&*backend, &id)?, query(&uri)?).await?)
}

async fn watch_files<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    headers: HeaderMap,
    uri: axum::http::Uri,
) -> Answer {
    let sandbox = find(&*backend, &id)?;
    Ok(files::watch(sandbox, query(&uri)?, form(&headers)).await?)
}

async fn pack_files<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    uri: axum::http::Uri,
) -> Answer {
    Ok(files::pack(find(&*backend, &id)?, query(&uri)?).await?)
}

async fn unpack_files<B: Backend>(
    State(backend): State<Arc<B>>,
    Path(id): Path<String>,
    uri: axum::http::Uri,
    body: Body,
) -> Answer {
    Ok(files::unpack(find(&*backend, &id)?, query(&uri)?, body).await?)
}

async fn processes<B: Backend>(State(backend): State<Arc<B>>, Path(id): Path<String>) -> Answer {
    let sandbox = find(&*backend, &id)?;
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

async fn process<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
) -> Answer {
    let sandbox = find(&*backend, &id)?;
    let info = sandbox.process(process).map_err(told)?;
    let mut told = process_info(&sandbox, &info);
    let rings = sandbox.rings().await.unwrap_or_default();
    if let Some(ring) = rings.iter().find(|ring| ring.process == info.id) {
        told.output_kept_bytes = Some(ring.kept_bytes);
        told.output_dropped_bytes = Some(ring.dropped_bytes);
    }
    Ok(json(&told))
}

async fn wait_process<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
    uri: axum::http::Uri,
) -> Answer {
    let sandbox = find(&*backend, &id)?;
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

async fn read_output<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
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
    Ok(output(find(&*backend, &id)?, attach, form(&headers)).await?)
}

async fn attach_to<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
    request: Request,
) -> Answer {
    Ok(attach(find(&*backend, &id)?, process, request).await?)
}

/// What becomes of a process's input behind what is sent.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct InputEnd {
    /// Whether that was all.
    end: bool,
}

async fn input<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
    uri: axum::http::Uri,
    body: Body,
) -> Answer {
    let InputEnd { end } = query(&uri)?;
    let sandbox = find(&*backend, &id)?;
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

async fn signal<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
    body: Body,
) -> Answer {
    let asked: ProcessSignal = object(body).await?;
    if !(1..=64).contains(&asked.signal) {
        return Err(Failure::bad_request("signal: a number from 1 to 64").into());
    }
    let sandbox = find(&*backend, &id)?;
    let sent = sandbox.signal(process, asked.signal, !asked.only_process);
    sent.await.map_err(told)?;
    Ok(json(&serde_json::json!({ "process": process })))
}

async fn resize<B: Backend>(
    State(backend): State<Arc<B>>,
    Path((id, process)): Path<(String, u32)>,
    body: Body,
) -> Answer {
    let TerminalSize { rows, columns } = object(body).await?;
    let sandbox = find(&*backend, &id)?;
    let size = zygote_engine::TerminalSize { rows, columns };
    sandbox.resize(process, size).await.map_err(told)?;
    Ok(json(&serde_json::json!({ "process": process })))
}

async fn happenings<B: Backend>(
    State(backend): State<Arc<B>>,
    headers: HeaderMap,
    uri: axum::http::Uri,
) -> Answer {
    let asked: events::Asked = query(&uri)?;
    Ok(events(Arc::clone(engine(&*backend)?), asked, form(&headers)).await?)
}
