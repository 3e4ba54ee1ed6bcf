//! Branches in the API's words.

use super::words::{live_failure, sandbox_info};
use crate::local::{allowance, milliseconds};
use crate::request::time_limit;
use std::sync::Arc;
use std::time::Duration;
use tracing::{Instrument, debug_span};
use zygote_access::Caller;
use zygote_api::{BranchPause, BranchRequest, Branched, Failure};
use zygote_engine::live::{BranchSpec, Sandbox};
use zygote_engine::{Engine, Pause};

/// Most children of one request.
const COUNT_MAX: u32 = 1000;
/// Longest time that processes may take to stop.
const FREEZE_MAX_S: f64 = 600.0;

/// Makes children of a sandbox.
pub async fn branch(
    engine: &Arc<Engine>,
    caller: &Caller,
    source: &Arc<Sandbox>,
    request: BranchRequest,
) -> Result<Branched, Failure> {
    let span = debug_span!("branch", count = request.count);
    let spec = spec(request, caller)?;
    let branched = engine.branch(source, &spec).instrument(span).await;
    let branched = branched.map_err(|error| live_failure(&error))?;
    let Pause {
        stop_us,
        save_us,
        fork_us,
        resume_us,
    } = branched.pause;
    Ok(Branched {
        sandboxes: branched
            .sandboxes
            .iter()
            .map(|one| sandbox_info(one))
            .collect(),
        pause_us: branched.pause.total_us(),
        pause: BranchPause {
            stop_us,
            save_us,
            fork_us,
            resume_us,
        },
        freeze_us: u64::try_from(branched.held.took.as_micros()).unwrap_or(u64::MAX),
        all_frozen: branched.held.all,
        total_time_ms: milliseconds(branched.took),
    })
}

fn spec(request: BranchRequest, caller: &Caller) -> Result<BranchSpec, Failure> {
    let BranchRequest {
        count,
        at,
        name,
        ttl_seconds,
        idle_seconds,
        reseed,
        freeze_seconds,
        force,
    } = request;
    if !(1..=COUNT_MAX).contains(&count) {
        return Err(Failure::bad_request(format!("count: 1 to {COUNT_MAX}")));
    }
    Ok(BranchSpec {
        count: count as usize,
        name,
        ttl: ttl_seconds.map(time_limit).transpose()?,
        idle: idle_seconds.map(time_limit).transpose()?,
        reseed,
        limit: freeze_limit(freeze_seconds)?,
        anyway: force,
        moment: at,
        allowance: allowance(caller),
    })
}

/// How long processes may take to stop.
pub fn freeze_limit(seconds: f64) -> Result<Duration, Failure> {
    if !(0.0..=FREEZE_MAX_S).contains(&seconds) {
        let message = format!("freeze_seconds: 0 to {FREEZE_MAX_S}");
        return Err(Failure::bad_request(message));
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_branched_so_is_refused() {
        let with = |count, freeze_seconds| BranchRequest {
            count,
            freeze_seconds,
            ..BranchRequest::default()
        };
        let spec = |request| spec(request, &Caller::owner());
        assert!(spec(with(1, 5.0)).is_ok() && spec(with(COUNT_MAX, 0.0)).is_ok());
        for bad in [
            with(0, 5.0),
            with(COUNT_MAX + 1, 5.0),
            with(1, -1.0),
            with(1, f64::NAN),
            with(1, 1e9),
        ] {
            assert!(spec(bad).is_err());
        }
    }
}
