//! What differs between two moments, in the API's words.

use super::branch::freeze_limit;
use super::files::file_info;
use super::words::live_failure;
use std::sync::Arc;
use zygote_api::{Diff, DiffChange, DiffRequest, Failure, FileDiff};
use zygote_engine::Engine;
use zygote_engine::live::{DiffSpec, FileDifference, Sandbox, Side};

/// Most files of an answer.
const FILES_MAX: usize = 100_000;

/// Compares; `find` finds the other sandbox.
pub async fn diff(
    engine: &Engine,
    sandbox: Arc<Sandbox>,
    request: DiffRequest,
    find: impl FnOnce(&str) -> Result<Arc<Sandbox>, Failure>,
) -> Result<Diff, Failure> {
    let DiffRequest {
        at,
        from,
        freeze_seconds,
        force,
    } = request;
    let from = match from {
        Some(side) => Some(Side {
            sandbox: find(&side.sandbox)?,
            moment: side.at,
        }),
        None => None,
    };
    let spec = DiffSpec {
        from,
        to: Side {
            sandbox,
            moment: at,
        },
        limit: freeze_limit(freeze_seconds)?,
        anyway: force,
    };
    let compared = engine.diff(&spec).await;
    let compared = compared.map_err(|error| live_failure(&error))?;
    let more = compared.files.len().saturating_sub(FILES_MAX);
    let files = compared.files.into_iter().take(FILES_MAX);
    Ok(Diff {
        files: files.map(told).collect(),
        more_files: more as u64,
        pages: compared.pages,
    })
}

fn told(found: FileDifference) -> FileDiff {
    FileDiff {
        path: found.path.into(),
        change: match (&found.before, &found.after) {
            (None, _) => DiffChange::Added,
            (Some(_), Some(_)) => DiffChange::Changed,
            (Some(_), None) => DiffChange::Removed,
        },
        before: found.before.map(file_info),
        after: found.after.map(file_info),
    }
}
