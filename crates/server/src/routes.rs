//! Paths and methods.

use crate::answer::{Failed, REQUEST_ID, RequestId, failed, json};
use crate::backend::Backend;
use crate::document::document;
use crate::exec::{batch, exec, lab_exec};
use crate::guard::{allowed, guarded, owners};
use crate::lines::{object, query};
use crate::metrics::Answered;
use crate::page;
use crate::path::Path;
use crate::stream::{EVENTS_MAX, Form, answer};
use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use bytes::Bytes;
use serde::Serialize;
use std::sync::{Arc, LazyLock};
use std::time::Instant;
use tokio::sync::mpsc;
use zygote_access::{Access, Caller, Role};
use zygote_api::{BuildEvent, ErrorCode, Failure, HealthAnswer, PublicHealth, RemoveTemplate};

type Answer = Result<Response, Failed>;

/// All of the API, in front of a backend, for those whom `access` lets in.
pub fn router<B: Backend>(backend: Arc<B>, access: Arc<Access>) -> Router {
    let needs = |role| middleware::from_fn_with_state(role, allowed);
    Router::new()
        .merge(anybodys::<B>())
        .merge(users(&backend).route_layer(needs(Role::Run)))
        .merge(managers::<B>().route_layer(needs(Role::Manage)))
        .merge(admins::<B>().route_layer(needs(Role::Admin)))
        .merge(owners_own::<B>().route_layer(middleware::from_fn(owners)))
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(access, guarded))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&backend),
            named::<B>,
        ))
        .with_state(backend)
}

/// What needs no key: see `guard::is_public`.
fn anybodys<B: Backend>() -> Router<Arc<B>> {
    Router::new()
        .route("/v1/health", get(health::<B>))
        // As clients of zeroboot's call it.
        .route("/health", get(health::<B>))
        .route("/v1/openapi.json", get(description))
        .route("/docs", get(page::folder))
        .route("/docs/", get(page::index))
        .route("/docs/{name}", get(page::part))
}

/// Programs and sandboxes.
fn users<B: Backend>(backend: &Arc<B>) -> Router<Arc<B>> {
    Router::new()
        .route("/v1/exec", post(run::<B>))
        .route("/v1/exec/batch", post(run_batch::<B>))
        // As clients of zeroboot's call it.
        .route("/exec", post(run::<B>))
        .route("/v1/exec/{id}/signal", post(signal::<B>))
        .route("/v1/templates", get(templates::<B>))
        .route("/v1/templates/{name}", get(template::<B>))
        .merge(crate::live::router(backend))
}

/// Templates of sandboxes.
fn managers<B: Backend>() -> Router<Arc<B>> {
    Router::new()
        .route("/v1/templates/{name}", delete(remove::<B>))
        .route("/v1/sandboxes/{id}/template", post(publish::<B>))
}

/// The engine itself, and templates that are built: a recipe has the host do things.
fn admins<B: Backend>() -> Router<Arc<B>> {
    Router::new()
        .route("/v1/status", get(status::<B>))
        .route("/v1/metrics", get(metrics::<B>))
        .route("/v1/stop", post(stop::<B>))
        .route("/v1/templates", post(build::<B>))
}

/// Commands on the emulated host, which sees files of this one.
fn owners_own<B: Backend>() -> Router<Arc<B>> {
    Router::new()
        .route("/v1/lab/exec", post(lab_run::<B>))
        .route("/v1/lab/down", post(lab_down::<B>))
}

/// What is counted of requests to where there is nothing, whatever they name.
const NOWHERE: &str = "none";

/// Names each request, counts it, and gives failures their shape.
async fn named<B: Backend>(
    State(backend): State<Arc<B>>,
    mut request: Request,
    next: Next,
) -> Response {
    let begun = Instant::now();
    let id = RequestId::draw();
    tracing::Span::current().record("request_id", &*id.0);
    request.extensions_mut().insert(id.clone());
    let method = known(request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    let mut error = None;
    if let Some(Failed(failure)) = response.extensions_mut().remove() {
        error = Some(failure.code);
        response = failed(failure, &id);
    }
    backend.counts().answered(&Answered {
        method,
        route: route.as_ref().map_or(NOWHERE, MatchedPath::as_str),
        status: response.status().as_u16(),
        error,
        took: begun.elapsed(),
    });
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// Methods that somebody makes up are one.
fn known(method: &Method) -> &'static str {
    let known = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"];
    known
        .into_iter()
        .find(|name| *name == method.as_str())
        .unwrap_or("other")
}

async fn no_path(request: Request) -> Failed {
    let message = format!("there is nothing at {}", request.uri().path());
    let failure = Failure::new(ErrorCode::NotFound, message);
    Failed(failure.remedy("see /v1/openapi.json for what there is"))
}

async fn no_method(request: Request) -> Failed {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{path} does not take {method}");
    let failure = Failure::new(ErrorCode::MethodNotAllowed, message);
    Failed(failure.remedy("see /v1/openapi.json for what it takes"))
}

/// Made once: anybody may ask for it, as often as he likes.
async fn description() -> Response {
    static DESCRIPTION: LazyLock<Bytes> = LazyLock::new(|| {
        // A value of JSON does not fail to be written.
        serde_json::to_vec(&document()).unwrap_or_default().into()
    });
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (kind, DESCRIPTION.clone()).into_response()
}

async fn health<B: Backend>(
    State(backend): State<Arc<B>>,
    caller: Option<Extension<Caller>>,
) -> Response {
    let caller = caller.map(|Extension(caller)| caller);
    let (health, templates) = (backend.health(), backend.templates_ready(caller.as_ref()));
    if caller.is_some_and(|caller| caller.tenant.is_none()) {
        return json(&HealthAnswer { health, templates });
    }
    // Where its files are, and what else there is to know of its process, is its owner's business.
    json(&PublicHealth {
        status: health.status,
        version: health.version,
        templates,
    })
}

async fn status<B: Backend>(State(backend): State<Arc<B>>) -> Response {
    json(&backend.status().await)
}

async fn metrics<B: Backend>(State(backend): State<Arc<B>>) -> Response {
    let kind = HeaderValue::from_static(crate::metrics::TEXT);
    ([(header::CONTENT_TYPE, kind)], backend.metrics().await).into_response()
}

fn told<T: Serialize>(result: Result<T, Failure>) -> Answer {
    Ok(json(&result?))
}

async fn stop<B: Backend>(State(backend): State<Arc<B>>, body: Body) -> Answer {
    told(backend.stop(object(body).await?).await)
}

async fn run<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(access): Extension<Arc<Access>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    Ok(exec(backend, access, caller, request).await?)
}

async fn run_batch<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(access): Extension<Arc<Access>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer {
    let asked = object(body).await?;
    Ok(json(&batch(backend, access, caller, asked).await?))
}

async fn lab_run<B: Backend>(State(backend): State<Arc<B>>, request: Request) -> Answer {
    Ok(lab_exec(backend, request).await?)
}

async fn lab_down<B: Backend>(State(backend): State<Arc<B>>) -> Answer {
    backend.lab_down().await?;
    Ok(json(&serde_json::json!({ "lab": "down" })))
}

async fn signal<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    body: Body,
) -> Answer {
    backend.signal(&caller, &id, object(body).await?).await?;
    Ok(json(&serde_json::json!({ "id": id })))
}

async fn templates<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
) -> Answer {
    told(backend.templates(&caller).await)
}

async fn template<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer {
    told(backend.template(&caller, &name).await)
}

async fn remove<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    uri: Uri,
) -> Answer {
    let asked: RemoveTemplate = query(&uri)?;
    told(backend.remove(&caller, &name, asked.derived).await)
}

async fn publish<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    body: Body,
) -> Answer {
    told(backend.publish(&caller, &id, object(body).await?).await)
}

async fn build<B: Backend>(
    State(backend): State<Arc<B>>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let accept = headers.get(header::ACCEPT);
    let form = Form::of(accept.and_then(|value| value.to_str().ok()));
    let request = object(body).await?;
    let (events, happening) = mpsc::channel(EVENTS_MAX);
    if form == Form::Json {
        // Who wants no progress is told at the end.
        drop(happening);
        return told(backend.build(request, events).await);
    }
    let work = Box::pin(async move {
        let built = backend.build(request, events).await?;
        Ok(Some(BuildEvent::Built(Box::new(built))))
    });
    Ok(answer(form, work, happening, |error| BuildEvent::Error { error }).await?)
}
