//! Live sandboxes in the API's words.

use crate::local::{failure, milliseconds, printable};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zygote_api::{
    ErrorCode, Failure, ProcessInfo, ProcessResult, SandboxEnd, SandboxEvent, SandboxHappening,
    SandboxInfo, SandboxState, rfc3339,
};
use zygote_engine::live::{self, Entry, Happening, LiveError, Phase, ProcessState, Sandbox};
use zygote_engine::{ExitStatus, StartFailure};

/// After how long what was refused at a limit is worth another try, in seconds.
const RETRY_AFTER_S: u32 = 1;

pub fn unix_s(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub fn state(phase: Phase) -> SandboxState {
    match phase {
        Phase::Making => SandboxState::Making,
        Phase::Running => SandboxState::Running,
        Phase::Paused => SandboxState::Paused,
        Phase::Ending => SandboxState::Ending,
        Phase::Ended => SandboxState::Ended,
    }
}

pub fn running(sandbox: &Sandbox) -> u64 {
    let processes = sandbox.processes();
    let running = processes.iter().filter(|process| !process.state.is_over());
    running.count() as u64
}

pub fn sandbox_info(sandbox: &Sandbox) -> SandboxInfo {
    let status = sandbox.status();
    let created = unix_s(sandbox.created);
    SandboxInfo {
        id: sandbox.id_text(),
        name: sandbox.spec.name.clone(),
        tenant: sandbox.spec.tenant.clone(),
        template: sandbox.spec.template.clone(),
        build: sandbox.build.clone(),
        parent: sandbox.parent.map(|parent| parent.to_string()),
        state: state(status.phase),
        end: status.end.map(|end| SandboxEnd {
            reason: end.reason.name().to_owned(),
            message: printable(&end.reason.to_string()),
            at: rfc3339(unix_s(end.at)),
        }),
        created: rfc3339(created),
        created_unix_s: created,
        expires_unix_s: status.expires.map(unix_s),
        idle_seconds: status.idle.map(|idle| idle.as_secs_f64()),
        processes: running(sandbox),
        env: sandbox.spec.env.iter().cloned().collect(),
        fork_time_ms: status.fork_time.map(milliseconds),
        disk_bytes: status.disk_bytes,
    }
}

pub fn process_info(sandbox: &Sandbox, info: &live::ProcessInfo) -> ProcessInfo {
    let state = match info.state {
        ProcessState::Starting => "starting",
        ProcessState::Running => "running",
        ProcessState::Ended { .. } => "ended",
        ProcessState::Lost => "lost",
    };
    ProcessInfo {
        process: info.id,
        pid: info.pid,
        command: info
            .command
            .iter()
            .map(|word| word.clone().into())
            .collect(),
        user: info.user.clone(),
        terminal: info.has_terminal,
        state: state.to_owned(),
        started_unix_s: unix_s(info.started),
        result: result(sandbox, info).ok().map(Box::new),
        output_kept_bytes: None,
        output_dropped_bytes: None,
    }
}

/// How a process ended; a failure if it was lost with its sandbox, or has not ended.
pub fn result(sandbox: &Sandbox, info: &live::ProcessInfo) -> Result<ProcessResult, Failure> {
    let ProcessState::Ended { status, timed_out } = info.state else {
        return Err(lost(sandbox));
    };
    let (signal, out_of_memory) = match status {
        ExitStatus::Signal {
            signal,
            out_of_memory,
        } => (Some(signal), out_of_memory),
        ExitStatus::Code(_) => (None, false),
    };
    let error = if timed_out {
        let message = "the program was killed at its time limit";
        Some(Failure::new(ErrorCode::TimedOut, message))
    } else {
        out_of_memory.then(|| {
            let message = "the program was killed because the guest ran out of memory";
            Failure::new(ErrorCode::OutOfMemory, message)
        })
    };
    Ok(ProcessResult {
        sandbox: sandbox.id_text(),
        process: info.id,
        exit_code: exit_code(status, timed_out),
        signal,
        timed_out,
        out_of_memory,
        total_time_ms: milliseconds(info.took.unwrap_or(Duration::ZERO)),
        error,
        ..ProcessResult::default()
    })
}

/// As a shell tells it.
fn exit_code(status: ExitStatus, timed_out: bool) -> u8 {
    match status {
        _ if timed_out => 124,
        ExitStatus::Code(code) => code,
        ExitStatus::Signal { signal, .. } => 128_u8.saturating_add(signal),
    }
}

/// Why there is no more to come from a sandbox.
pub fn lost(sandbox: &Sandbox) -> Failure {
    if sandbox.status().phase == Phase::Paused {
        return Failure::new(ErrorCode::SandboxPaused, "the sandbox was paused");
    }
    let Some(end) = sandbox.status().end else {
        let message = "the sandbox was rolled back to an earlier moment";
        return Failure::new(ErrorCode::RolledBack, message);
    };
    let why = end.reason;
    Failure::new(
        ErrorCode::SandboxEnded,
        printable(&format!("the sandbox has ended: {why}")),
    )
}

pub fn event(entry: Entry) -> SandboxEvent {
    SandboxEvent {
        number: entry.number,
        at: rfc3339(unix_s(entry.at)),
        sandbox: entry.sandbox.to_string(),
        name: entry.name,
        what: match entry.what {
            Happening::Made => SandboxHappening::Made,
            Happening::Branched { into } => SandboxHappening::Branched {
                into: into.iter().map(ToString::to_string).collect(),
            },
            Happening::MomentKept { number, name } => SandboxHappening::MomentKept {
                number,
                moment: name,
            },
            Happening::RolledBack { to } => SandboxHappening::RolledBack { to },
            Happening::Paused => SandboxHappening::Paused,
            Happening::Resumed => SandboxHappening::Resumed,
            Happening::Adopted => SandboxHappening::Adopted,
            Happening::Ended { reason, message } => SandboxHappening::Ended {
                reason: reason.to_owned(),
                message: printable(&message),
            },
            Happening::ProcessStarted { process, command } => SandboxHappening::ProcessStarted {
                process,
                command: command.into_iter().map(Into::into).collect(),
            },
            Happening::ProcessEnded {
                process,
                status,
                timed_out,
            } => {
                let signal = match status {
                    ExitStatus::Signal { signal, .. } => Some(signal),
                    ExitStatus::Code(_) => None,
                };
                SandboxHappening::ProcessEnded {
                    process,
                    exit_code: exit_code(status, timed_out),
                    signal,
                    timed_out,
                    out_of_memory: matches!(
                        status,
                        ExitStatus::Signal {
                            out_of_memory: true,
                            ..
                        }
                    ),
                }
            }
            Happening::LimitHit { limit } => SandboxHappening::LimitHit {
                limit: limit.to_owned(),
            },
        },
    }
}

/// What could not be done, with a remedy.
pub fn live_failure(error: &LiveError) -> Failure {
    let with = |code| Failure::new(code, printable(&error.to_string()));
    match error {
        LiveError::NotFound(_) => {
            with(ErrorCode::SandboxNotFound).remedy("see which there are: zygote ps")
        }
        LiveError::Ambiguous(..) => {
            with(ErrorCode::Ambiguous).remedy("give more of the id, or the name")
        }
        LiveError::NameTaken(..) => {
            with(ErrorCode::NameTaken).remedy("choose another name, or end that one: zygote rm")
        }
        LiveError::BadName(_) => with(ErrorCode::BadRequest)
            .remedy("use 1 to 63 letters, digits, -, _ and . that begin with a letter or digit"),
        LiveError::Ended { .. } => with(ErrorCode::SandboxEnded),
        LiveError::NotMade(_) => with(ErrorCode::SandboxDied),
        LiveError::NoProcess(_) => {
            with(ErrorCode::ProcessNotFound).remedy("see which there are: zygote ps SANDBOX")
        }
        LiveError::ProcessEnded(_) => with(ErrorCode::ProcessEnded),
        LiveError::NoInput(_) => with(ErrorCode::ProcessEnded)
            .remedy("start it with input (stdin_stream; zygote exec -i)"),
        LiveError::NoTerminal(_) => {
            with(ErrorCode::NoTerminal).remedy("start it with one (terminal; zygote exec -t)")
        }
        LiveError::NoContext(_) => with(ErrorCode::ContextNotFound),
        LiveError::ContextTaken(_) => with(ErrorCode::NameTaken),
        LiveError::ContextDead(..) => with(ErrorCode::ContextDead)
            .remedy("restart it: POST …/contexts/{name}/restart; zygote python --restart"),
        LiveError::NoLanguage(_) => with(ErrorCode::BadRequest).remedy("python is there"),
        LiveError::OverQuota(_) | LiveError::TooMany { .. } => with(ErrorCode::LimitReached)
            .remedy("end some, or raise the limit")
            .retry_after(RETRY_AFTER_S),
        LiveError::StartFailed { reason, .. } => with(match reason {
            StartFailure::NotFound => ErrorCode::ProgramNotFound,
            StartFailure::NotExecutable => ErrorCode::ProgramNotExecutable,
            StartFailure::Other => ErrorCode::ProgramNotStarted,
        }),
        LiveError::NotBranched(_) => with(ErrorCode::NotBranched).remedy(
            "try again; if processes wait in the kernel, go on all the same: zygote branch --force",
        ),
        LiveError::NoMoment(_) => {
            with(ErrorCode::MomentNotFound).remedy("see which are kept: zygote moments SANDBOX")
        }
        LiveError::MomentTaken(_) => with(ErrorCode::NameTaken).remedy(
            "choose another name, or let that one go: zygote moments SANDBOX --forget NAME",
        ),
        LiveError::Paused(_) => {
            with(ErrorCode::SandboxPaused).remedy("have it go on: zygote resume SANDBOX")
        }
        LiveError::NotAsleep(_) => with(ErrorCode::SandboxPaused),
        LiveError::NotPaused(_) => with(ErrorCode::PauseFailed)
            .remedy("free some space on the disk with the state directory, if that is full"),
        LiveError::NotCompared(_) => with(ErrorCode::NotBranched).remedy("try again"),
        LiveError::NotPublished(_) => with(ErrorCode::BuildFailed)
            .remedy("free some space on the disk with the state directory, if that is full"),
        LiveError::NotResumed(_) => with(ErrorCode::PauseFailed)
            .remedy("what is wrong with it is named; if it cannot be mended: zygote rm SANDBOX"),
        LiveError::Late(_) => with(ErrorCode::Busy).retry_after(RETRY_AFTER_S),
        LiveError::TooLarge(_) => with(ErrorCode::TooLarge),
        LiveError::KeyReused => with(ErrorCode::Conflict).remedy("draw a new key for each request"),
        LiveError::Engine(error) => failure(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_have_the_codes_that_shells_know() {
        let killed = ExitStatus::Signal {
            signal: 9,
            out_of_memory: false,
        };
        assert_eq!(exit_code(killed, false), 137);
        assert_eq!(exit_code(killed, true), 124);
        assert_eq!(exit_code(ExitStatus::Code(3), false), 3);
    }
}
