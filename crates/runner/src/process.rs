//! A runner: one process, one machine, from the fork to the end of the sandbox.

#![expect(unsafe_code, reason = "signal mask, close_range, close")]

use crate::control::{FromRunner, ToRunner, decode, encode};
use crate::loaded::Loaded;
use crate::packet;
use crate::serial::Console;
use crate::usage::Meter;
use rustix::event::{PollFd, PollFlags, epoll, poll};
use std::error::Error;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use zygote_vmm::{Machine, StopReason};

const AGENT: u64 = 0;
const STOP: u64 = 1;
const CONTROL: u64 = 2;

/// Runs a sandbox to its end; gives back the process's exit status.
pub fn runner_main(loaded: &Loaded, agent: OwnedFd, control: OwnedFd) -> i32 {
    leave_parent(loaded, &[agent.as_raw_fd(), control.as_raw_fd()]);
    let console = Console::default();
    let reason = match run(loaded, agent, &control, &console) {
        Ok(None) => return 0,
        Ok(Some(reason)) => reason,
        Err(error) => chain(error.as_ref()),
    };
    let message = FromRunner::Stopped {
        reason,
        console: console.tail(),
    };
    if let Ok(bytes) = encode(&message) {
        // Fails only when the engine is gone, and then nobody wants to know.
        let _ = packet::send(&control, &bytes, &[]);
    }
    1
}

/// Gives up what the zygote process had open, but for the snapshot's images, and its signals.
fn leave_parent(loaded: &Loaded, own: &[RawFd]) {
    let mut keep: Vec<RawFd> = loaded.disks.iter().map(|(f, _)| f.as_raw_fd()).collect();
    keep.extend(ways_out(loaded));
    keep.extend_from_slice(own);
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().chain([RawFd::MAX]) {
        if fd > first {
            // SAFETY: these descriptors belong to the parent's objects, which this process never
            // uses again and ends without dropping.
            unsafe { libc::close_range(first as u32, fd as u32 - 1, 0) };
        }
        first = fd.saturating_add(1).max(first);
    }
    // SAFETY: an empty set is valid; this is the process's only thread.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    let _ = rustix::thread::set_name(c"zygote-runner");
}

/// What is needed to make a machine, and no longer.
fn ways_out(loaded: &Loaded) -> [RawFd; 2] {
    [loaded.host.as_raw_fd(), loaded.processes.as_raw_fd()]
}

fn close_ways_out(loaded: &Loaded) {
    for fd in ways_out(loaded) {
        // SAFETY: belongs to the parent's object, which this process never uses again and ends
        // without dropping.
        unsafe { libc::close(fd) };
    }
}

/// `None`: the engine has let go of the sandbox. Otherwise why the machine stopped.
fn run(
    loaded: &Loaded,
    agent: OwnedFd,
    control: &OwnedFd,
    console: &Console,
) -> Result<Option<String>, Box<dyn Error>> {
    rustix::io::ioctl_fionbio(&agent, true)?;
    let mut machine = Machine::restore(
        &loaded.host,
        &loaded.state,
        loaded.memory.clone(),
        loaded.open_disks()?,
        agent.try_clone()?,
        Box::new(console.clone()),
    )?;
    let meter = Meter::open(loaded.processes.as_fd())?;
    close_ways_out(loaded);
    loaded.filter.install()?;
    if !wait_for_activation(&agent, control, &meter)? {
        return Ok(None);
    }
    machine.start()?;
    serve(&mut machine, &agent, control, &meter)
}

/// Parked: until the first byte for the agent. False when the engine has gone.
fn wait_for_activation(
    agent: &OwnedFd,
    control: &OwnedFd,
    meter: &Meter,
) -> rustix::io::Result<bool> {
    loop {
        let mut fds = [
            PollFd::new(agent, PollFlags::IN),
            PollFd::new(control, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error),
        }
        let hung_up = fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP));
        if hung_up || fds[0].revents().contains(PollFlags::IN) {
            return Ok(!hung_up);
        }
        if fds[1].revents().contains(PollFlags::IN) && !answer(control, meter) {
            return Ok(false);
        }
    }
}

fn serve(
    machine: &mut Machine,
    agent: &OwnedFd,
    control: &OwnedFd,
    meter: &Meter,
) -> Result<Option<String>, Box<dyn Error>> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    let level = epoll::EventFlags::IN;
    epoll::add(&set, agent, epoll::EventData::new_u64(AGENT), edges)?;
    epoll::add(
        &set,
        machine.stop_event(),
        epoll::EventData::new_u64(STOP),
        level,
    )?;
    epoll::add(&set, control, epoll::EventData::new_u64(CONTROL), level)?;
    let nothing = epoll::Event {
        flags: epoll::EventFlags::empty(),
        data: epoll::EventData::new_u64(0),
    };
    let mut watched = true;
    loop {
        let mut events = [nothing; 4];
        let count = match epoll::wait(&set, &mut events, None) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for event in &events[..count] {
            match event.data.u64() {
                // Either end has closed it: the machine's own end, or the engine's word on the
                // control socket, decides what follows.
                AGENT if watched && !machine.agent_ready() => {
                    epoll::delete(&set, agent)?;
                    watched = false;
                }
                STOP => return Ok(Some(describe(machine.stop_reason()))),
                CONTROL if !answer(control, meter) => return Ok(None),
                _ => {}
            }
        }
    }
}

/// Answers the engine; false when it has gone or talks nonsense.
fn answer(control: &OwnedFd, meter: &Meter) -> bool {
    let Ok((bytes, _)) = packet::receive(control.as_fd()) else {
        return false;
    };
    match decode::<ToRunner>(&bytes) {
        Ok(ToRunner::Measure) => encode(&FromRunner::Usage(meter.measure()))
            .is_ok_and(|reply| packet::send(control.as_fd(), &reply, &[]).is_ok()),
        Err(_) => false,
    }
}

fn describe(reason: Option<StopReason>) -> String {
    match reason {
        None => "the machine has stopped".to_owned(),
        Some(StopReason::GuestReset) => {
            "the guest has switched itself off (a program did it, or its kernel panicked)"
                .to_owned()
        }
        Some(StopReason::GuestCrash(what)) => format!("the guest has crashed: {what}"),
        Some(StopReason::HostError(what)) => format!("the machine has failed: {what}"),
    }
}

/// An error with its causes.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
