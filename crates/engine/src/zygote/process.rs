//! A zygote's process: starting it, seeing it end, ending it.

use super::{END_MAX, EngineConfig};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::Timespec;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use tokio::process::{Child, Command};

pub(super) fn spawn(config: &EngineConfig, control: OwnedFd) -> io::Result<Child> {
    let [program, arguments @ ..] = &config.command[..] else {
        return Err(io::Error::other("no program to start it with"));
    };
    Command::new(program)
        .args(arguments)
        // Tokens and paths of ours are nothing for a process that holds a guest.
        .env_clear()
        .current_dir("/")
        // Ctrl-C is for the engine, which then decides.
        .process_group(0)
        .kill_on_drop(true)
        // Else each fork would look up anew what its zygote has never called.
        .env("LD_BIND_NOW", "1")
        .stdin(Stdio::from(control))
        .stdout(Stdio::null())
        .spawn()
}

/// A zygote process.
pub(super) enum Process {
    Child(Child),
    /// Another engine's, or a runner's child; a pidfd.
    Known(OwnedFd),
}

impl Process {
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Known(process) => process.try_clone(),
            Self::Child(child) => {
                let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
                let pid = pid.ok_or_else(|| io::Error::other("it has ended"))?;
                Ok(pidfd_open(pid, PidfdFlags::empty())?)
            }
        }
    }

    pub async fn ended(&mut self) {
        match self {
            // It is a child of ours.
            Self::Child(child) => drop(child.wait().await),
            Self::Known(process) => {
                let Ok(process) = process.try_clone() else {
                    return;
                };
                // Readable once it has ended (pidfd_open(2)).
                let wait = move || {
                    let limit = Timespec {
                        tv_sec: 2 * END_MAX.as_secs().cast_signed(),
                        tv_nsec: 0,
                    };
                    let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit));
                };
                let _ = tokio::task::spawn_blocking(wait).await;
            }
        }
    }

    pub fn kill(&mut self) {
        // Fails if it has ended.
        match self {
            Self::Child(child) => drop(child.start_kill()),
            Self::Known(process) => drop(pidfd_send_signal(process, Signal::KILL)),
        }
    }
}
