//! Paths of what is done to a sandbox's whole machine: branches, moments, and the way to disk and back.

use super::branch as branches;
use super::diff as diffs;
use super::moment;
use super::routes::{Answer, Its, engine, find, told};
use super::words::sandbox_info;
use crate::answer::json;
use crate::backend::Backend;
use crate::lines::object;
use crate::local::allowance;
use crate::path::Path;
use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::routing::{delete, get, post};
use std::sync::Arc;
use zygote_access::Caller;
use zygote_api::{BranchRequest, DiffRequest, MomentRequest, PauseRequest, RollbackRequest};

/// All of it.
pub fn router<B: Backend>() -> Router<Arc<B>> {
    Router::new()
        .route("/v1/sandboxes/{id}/branch", post(branch::<B>))
        .route(
            "/v1/sandboxes/{id}/moments",
            get(list_moments).post(keep_moment),
        )
        .route("/v1/sandboxes/{id}/moments/{moment}", delete(forget_moment))
        .route("/v1/sandboxes/{id}/rollback", post(roll_back))
        .route("/v1/sandboxes/{id}/diff", post(diff::<B>))
        .route("/v1/sandboxes/{id}/pause", post(pause::<B>))
        .route("/v1/sandboxes/{id}/resume", post(resume::<B>))
}

async fn branch<B: Backend>(
    State(backend): State<Arc<B>>,
    Its(source): Its,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer {
    let asked: BranchRequest = object(body).await?;
    let engine = engine(&*backend)?;
    let branched = branches::branch(engine, &caller, &source, asked).await?;
    backend.counts().branched(&branched.pause);
    Ok(json(&branched))
}

async fn keep_moment(Its(sandbox): Its, body: Body) -> Answer {
    let asked: MomentRequest = object(body).await?;
    Ok(json(&moment::keep(&sandbox, asked).await?))
}

async fn list_moments(Its(sandbox): Its) -> Answer {
    Ok(json(&moment::list(&sandbox).await?))
}

async fn forget_moment(Its(sandbox): Its, Path((_, words)): Path<(String, String)>) -> Answer {
    Ok(json(&moment::forget(&sandbox, &words).await?))
}

async fn roll_back(Its(sandbox): Its, body: Body) -> Answer {
    let asked: RollbackRequest = object(body).await?;
    Ok(json(&moment::roll_back(&sandbox, &asked).await?))
}

async fn diff<B: Backend>(
    State(backend): State<Arc<B>>,
    Its(sandbox): Its,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer {
    let asked: DiffRequest = object(body).await?;
    let other = |id: &str| find(&*backend, &caller, id);
    let engine = engine(&*backend)?;
    Ok(json(&diffs::diff(engine, sandbox, asked, other).await?))
}

async fn pause<B: Backend>(State(backend): State<Arc<B>>, Its(sandbox): Its, body: Body) -> Answer {
    let asked: PauseRequest = object(body).await?;
    let limit = branches::freeze_limit(asked.freeze_seconds)?;
    let paused = engine(&*backend)?.pause(&sandbox, limit, asked.force).await;
    paused.map_err(told)?;
    Ok(json(&sandbox_info(&sandbox)))
}

async fn resume<B: Backend>(
    State(backend): State<Arc<B>>,
    Its(sandbox): Its,
    Extension(caller): Extension<Caller>,
) -> Answer {
    let quota = allowance(&caller).quota;
    let woken = engine(&*backend)?.wake(&sandbox, quota).await;
    woken.map_err(told)?;
    Ok(json(&sandbox_info(&sandbox)))
}
