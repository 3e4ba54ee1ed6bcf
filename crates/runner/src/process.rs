//! A runner: one process, one machine, from the fork to the end of the sandbox.

#![expect(unsafe_code, reason = "signal mask, close_range, close")]

use crate::control::{FromRunner, REQUEST_MAX_BYTES, ToRunner, decode, encode};
use crate::loaded::Loaded;
use crate::packet;
use crate::serial::Console;
use rustix::event::epoll;
use rustix::time::Timespec;
use std::error::Error;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use zygote_snapshot::RunKind;
use zygote_vmm::{Machine, StopReason};

const AGENT: u64 = 0;
const STOP: u64 = 1;
const CONTROL: u64 = 2;

/// Runs a sandbox to its end; `number`: among its zygote's. Gives back the process's exit status.
pub fn runner_main(
    loaded: &Loaded,
    kind: RunKind,
    number: u32,
    agent: OwnedFd,
    control: OwnedFd,
) -> i32 {
    leave_parent(loaded, &[agent.as_raw_fd(), control.as_raw_fd()]);
    let console = Console::default();
    let reason = match run(loaded, kind, number, agent, &control, &console) {
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
    let mut keep: Vec<RawFd> = loaded.disks.iter().map(AsRawFd::as_raw_fd).collect();
    keep.push(loaded.host.as_raw_fd());
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
fn close_way_out(loaded: &Loaded) {
    // SAFETY: belongs to the parent's object, which this process never uses again and ends without
    // dropping.
    unsafe { libc::close(loaded.host.as_raw_fd()) };
}

/// `None`: the engine has let go of the sandbox. Otherwise why the machine stopped. The machine is
/// left to the process's end, which nobody waits for.
fn run(
    loaded: &Loaded,
    kind: RunKind,
    number: u32,
    agent: OwnedFd,
    control: &OwnedFd,
    console: &Console,
) -> Result<Option<String>, Box<dyn Error>> {
    if loaded.has_users {
        zygote_jail::become_runner(number)?;
    }
    let ahead = loaded.ahead(kind);
    // Before there is a VM that would have to be told of each page.
    loaded.memory.copy_ahead(&ahead.written);
    let mut machine = ManuallyDrop::new(Machine::restore(
        &loaded.host,
        &loaded.state,
        loaded.memory.clone(),
        loaded.open_disks()?,
        agent.try_clone()?,
        Box::new(console.clone()),
    )?);
    close_way_out(loaded);
    machine.map_ahead(&ahead.touched);
    let events = watch(&agent, &machine, control)?;
    machine.park(agent.try_clone()?, &loaded.prepare_vcpu())?;
    loaded.take_away()?;
    packet::send(control, &encode(&FromRunner::Parked)?, &[])?;
    serve(&mut machine, &events, agent, control)
}

fn watch(agent: &OwnedFd, machine: &Machine, control: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let level = epoll::EventFlags::IN;
    let number = epoll::EventData::new_u64;
    watch_agent(&set, agent)?;
    epoll::add(&set, machine.stop_event(), number(STOP), level)?;
    epoll::add(&set, control, number(CONTROL), level)?;
    Ok(set)
}

/// Its first edge comes at once.
fn watch_agent(set: &OwnedFd, agent: &OwnedFd) -> rustix::io::Result<()> {
    let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(set, agent, epoll::EventData::new_u64(AGENT), edges)
}

/// What an engine says that goes on with this sandbox; `None`: nobody holds the sandbox any more.
fn new_stream(control: &OwnedFd) -> Result<Option<OwnedFd>, Box<dyn Error>> {
    let mut bytes = [0; REQUEST_MAX_BYTES];
    let (length, descriptors) = packet::receive(control, &mut bytes)?;
    if length == 0 {
        return Ok(None);
    }
    let ToRunner::NewStream = decode(&bytes[..length])?;
    let agent = descriptors.into_iter().next();
    Ok(Some(agent.ok_or("a new stream without a stream")?))
}

/// From the parked machine to its end.
fn serve(
    machine: &mut Machine,
    set: &OwnedFd,
    agent: OwnedFd,
    control: &OwnedFd,
) -> Result<Option<String>, Box<dyn Error>> {
    let nothing = epoll::Event {
        flags: epoll::EventFlags::empty(),
        data: epoll::EventData::new_u64(0),
    };
    let mut watched = Some(agent);
    let mut generation = Generation::Old;
    loop {
        let mut events = [nothing; 4];
        // For as long as the engine keeps its end of the control socket: that is the deadline.
        let count = match epoll::wait(set, &mut events, generation.wait().as_ref()) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if generation.is_due() {
            machine.tell_new_generation()?;
            generation = Generation::Told;
        }
        for event in &events[..count] {
            match event.data.u64() {
                // Either end has closed it: the machine's own end, or the engine's word on the
                // control socket, decides what follows.
                AGENT => {
                    // That the stream can be written to is no message.
                    let flags = event.flags;
                    if flags.contains(epoll::EventFlags::IN) {
                        generation.begin();
                    }
                    if let Some(agent) = &watched
                        && !machine.agent_ready()
                    {
                        epoll::delete(set, agent)?;
                        watched = None;
                    }
                }
                STOP => return Ok(Some(describe(machine.stop_reason()))),
                CONTROL => match new_stream(control)? {
                    None => return Ok(None),
                    Some(agent) => {
                        if let Some(old) = watched.take() {
                            epoll::delete(set, &old)?;
                        }
                        machine.replace_agent(agent.try_clone()?);
                        watch_agent(set, &agent)?;
                        watched = Some(agent);
                    }
                },
                _ => {}
            }
        }
    }
}

/// How long after its first message a guest is told by its hardware, too, that it is another one. The
/// message has reseeded its kernel's generator, and proved it; this is the second wall, and who is gone
/// before then need not pay for it.
const GENERATION_AFTER: Duration = Duration::from_millis(250);

/// Whether the guest has its new generation id.
enum Generation {
    /// It has not begun.
    Old,
    /// It gets it then.
    Due(Instant),
    /// It has it.
    Told,
}

impl Generation {
    fn begin(&mut self) {
        if let Self::Old = self {
            *self = Self::Due(Instant::now() + GENERATION_AFTER);
        }
    }

    fn is_due(&self) -> bool {
        matches!(self, Self::Due(at) if Instant::now() >= *at)
    }

    /// How long to wait for it.
    fn wait(&self) -> Option<Timespec> {
        let Self::Due(at) = self else { return None };
        let left = at.saturating_duration_since(Instant::now());
        Some(Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_generation_is_due_once_and_not_before_the_first_message() {
        let mut generation = Generation::Old;
        assert!(generation.wait().is_none() && !generation.is_due());
        generation.begin();
        assert!(generation.wait().is_some() && !generation.is_due());
        let past = Instant::now().checked_sub(Duration::from_millis(1));
        generation = Generation::Due(past.unwrap_or_else(Instant::now));
        // A later message does not put it off.
        generation.begin();
        assert!(generation.is_due());
        let told = Generation::Told;
        assert!(told.wait().is_none() && !told.is_due());
    }
}
