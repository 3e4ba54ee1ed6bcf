//! Forking a machine that runs: its process forks, the child holds it, and it goes on.
//!
//! The vCPUs' threads give their vCPUs back first, outside of the guest, of locks and of the allocator: so
//! the process that forks has one thread, and its child finds memory, devices and registers of one moment.

#![expect(unsafe_code, reason = "fork, sigaction")]

use crate::control::{FromRunner, Pause};
use crate::process::{Branch, chain, tell};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;
use zygote_vmm::{Machine, MachineError, Prepare};

/// Of a branch that its engine has let go of before it could be told of.
const ENDED_AT_ONCE: &str = "the branch ended at once: its engine had let go of it";

/// In the child: what it is. In the parent, whose machine runs again: nothing, and the engine is told. What
/// fails is told too, unless the machine cannot go on: that is an error.
pub fn fork(
    machine: &mut Machine,
    prepare: &Prepare,
    control: &OwnedFd,
    number: u64,
    child_control: OwnedFd,
) -> Result<Option<Branch>, Box<dyn Error>> {
    if !machine.has_begun() {
        refuse(control, number, "its guest has not begun")?;
        return Ok(None);
    }
    let begun = Instant::now();
    machine.pause()?;
    let stopped = Instant::now();
    let forked = fork_stopped(machine, child_control);
    let done = Instant::now();
    let (pid, saved) = match forked {
        Ok(Forked::Child(branch)) => return Ok(Some(branch)),
        Ok(Forked::Parent(pid, saved)) => (pid, saved),
        Err(message) => {
            machine.resume(prepare)?;
            refuse(control, number, &message)?;
            return Ok(None);
        }
    };
    machine.resume(prepare)?;
    let us =
        |from: Instant, to: Instant| u32::try_from((to - from).as_micros()).unwrap_or(u32::MAX);
    let pause = Pause {
        stop_us: us(begun, stopped),
        save_us: us(stopped, saved),
        fork_us: us(saved, done),
        resume_us: us(done, Instant::now()),
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => tell(
            control,
            &FromRunner::Branched { number, pause },
            &[process.as_fd()],
        )?,
        // Reaped already: it found that nobody waits for it.
        Err(Errno::SRCH) => refuse(control, number, ENDED_AT_ONCE)?,
        Err(_) => {
            // What could not be ended must not begin.
            let _ = kill_process(pid, Signal::KILL);
            refuse(
                control,
                number,
                "cannot open a pidfd for a branch (too many open files?)",
            )?;
        }
    }
    Ok(None)
}

enum Forked {
    Child(Branch),
    /// When its state had been saved.
    Parent(Pid, Instant),
}

fn fork_stopped(machine: &Machine, control: OwnedFd) -> Result<Forked, String> {
    let state = machine
        .save_branch()
        .map_err(|e| chain(&e as &MachineError))?;
    let saved = Instant::now();
    // SAFETY: sets how one signal is met: the kernel reaps the child, whose end its engine sees. Without
    // vCPUs running this process has one thread, so the child finds every lock free.
    let pid = unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        libc::fork()
    };
    match Pid::from_raw(pid) {
        None => Ok(Forked::Child(Branch {
            state: Box::new(state),
            control,
        })),
        Some(pid) if pid.as_raw_nonzero().get() > 0 => Ok(Forked::Parent(pid, saved)),
        Some(_) => Err(format!(
            "cannot fork: {} (too many processes, or too little memory?)",
            io::Error::last_os_error()
        )),
    }
}

/// Tells the engine that there is no branch.
pub fn refuse(control: &OwnedFd, number: u64, message: &str) -> Result<(), Box<dyn Error>> {
    let message = message.to_owned();
    tell(control, &FromRunner::BranchFailed { number, message }, &[])
}
