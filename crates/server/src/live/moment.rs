//! Moments of sandboxes in the API's words.

use super::branch::freeze_limit;
use super::words::{live_failure, sandbox_info, unix_s};
use crate::request::time_limit;
use zygote_api::{
    Failure, MomentInfo, MomentList, MomentPolicy, MomentRequest, RollbackRequest, SandboxInfo,
    rfc3339,
};
use zygote_engine::live::{self, LiveError, Sandbox};

/// Most moments without a name.
const KEEP_MAX: u32 = 64;
/// Shortest time between two: each has the sandbox stand still.
const EVERY_MIN_S: f64 = 0.1;

/// Keeps one.
pub async fn keep(sandbox: &Sandbox, request: MomentRequest) -> Result<MomentInfo, Failure> {
    let MomentRequest {
        name,
        freeze_seconds,
        force,
    } = request;
    let limit = freeze_limit(freeze_seconds)?;
    let kept = sandbox.keep(name, limit, force).await;
    kept.map(told).map_err(failed)
}

/// All that are kept.
pub async fn list(sandbox: &Sandbox) -> Result<MomentList, Failure> {
    let moments = sandbox.moments().await.map_err(failed)?;
    Ok(MomentList {
        moments: moments.into_iter().map(told).collect(),
    })
}

/// Lets one go; gives back those that are left.
pub async fn forget(sandbox: &Sandbox, words: &str) -> Result<MomentList, Failure> {
    sandbox.forget_moment(words).await.map_err(failed)?;
    list(sandbox).await
}

/// Goes back to one.
pub async fn roll_back(
    sandbox: &Sandbox,
    request: &RollbackRequest,
) -> Result<SandboxInfo, Failure> {
    let RollbackRequest { to, reseed } = request;
    sandbox.roll_back(to, *reseed).await.map_err(failed)?;
    Ok(sandbox_info(sandbox))
}

/// When moments are kept without being asked for.
pub fn policy(asked: MomentPolicy) -> Result<live::MomentPolicy, Failure> {
    let MomentPolicy {
        keep,
        every_seconds,
        on_exec,
    } = asked;
    if !(1..=KEEP_MAX).contains(&keep) {
        let message = format!("moments.keep: 1 to {KEEP_MAX}");
        return Err(Failure::bad_request(message));
    }
    let every = time_limit(every_seconds)?;
    if every.is_some_and(|every| every.as_secs_f64() < EVERY_MIN_S) {
        let message = format!("moments.every_seconds: 0, or at least {EVERY_MIN_S}");
        return Err(Failure::bad_request(message));
    }
    Ok(live::MomentPolicy {
        keep: keep as usize,
        every,
        on_exec,
    })
}

fn failed(error: LiveError) -> Failure {
    live_failure(&error)
}

fn told(info: live::MomentInfo) -> MomentInfo {
    let at = unix_s(info.at);
    MomentInfo {
        number: info.number,
        name: info.name,
        at: rfc3339(at),
        at_unix_s: at,
        pause_us: info.pause.total_us(),
        memory_private_kib: info.private_kib,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_that_cannot_be_are_refused() {
        let with = |keep, every_seconds| MomentPolicy {
            keep,
            every_seconds,
            on_exec: true,
        };
        assert!(policy(with(1, 0.0)).is_ok() && policy(with(KEEP_MAX, 1.0)).is_ok());
        for bad in [
            with(0, 1.0),
            with(KEEP_MAX + 1, 1.0),
            with(1, 0.01),
            with(1, -1.0),
        ] {
            assert!(policy(bad).is_err(), "{bad:?}");
        }
    }
}
