//! A runner: one process, one machine, from the fork to the end of the sandbox.

#![expect(unsafe_code, reason = "signal mask, close_range, close")]

use crate::branch;
use crate::control::{FromRunner, REQUEST_MAX_BYTES, ToRunner, decode, encode};
use crate::loaded::Loaded;
use crate::packet;
use crate::serial::Console;
use rustix::event::epoll;
use rustix::time::Timespec;
use std::error::Error;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use zygote_snapshot::RunKind;
use zygote_snapshot::state::MachineState;
use zygote_vmm::{Machine, Prepare, StopReason};

const AGENT: u64 = 0;
const STOP: u64 = 1;
const CONTROL: u64 = 2;

/// What a runner is made with.
pub struct Making {
    /// What its sandbox will do.
    pub kind: RunKind,
    /// Among its zygote's.
    pub number: u32,
    /// The agent's stream.
    pub agent: OwnedFd,
    /// To the engine.
    pub control: OwnedFd,
}

/// What becomes of a process that was a runner's.
pub enum Fate {
    /// It ends with this status.
    End(i32),
    /// It is the child of one, and holds its machine.
    Zygote(Branch),
}

/// A machine as its runner has forked it, and the way to the engine of who holds it.
pub struct Branch {
    /// vCPUs and devices.
    pub state: Box<MachineState>,
    /// To the engine.
    pub control: OwnedFd,
}

/// How serving a sandbox ends.
enum Served {
    /// The engine has let go of it.
    LetGo,
    /// The machine has stopped, for this reason.
    Stopped(String),
    /// In the child: it has been branched.
    Branch(Branch),
}

/// Runs a sandbox to its end. `signals`: its parent's, of children that end.
pub fn runner_main(loaded: &Loaded, making: Making, signals: BorrowedFd<'_>) -> Fate {
    let Making {
        kind,
        number,
        agent,
        control,
    } = making;
    let own = [agent.as_raw_fd(), control.as_raw_fd(), signals.as_raw_fd()];
    // Only a branch has children.
    let count = if kind == RunKind::Sandbox { 3 } else { 2 };
    leave_parent(loaded, &own[..count]);
    let console = Console::default();
    let reason = match run(loaded, kind, number, agent, &control, &console) {
        Ok(Served::LetGo) => return Fate::End(0),
        Ok(Served::Branch(branch)) => return Fate::Zygote(branch),
        Ok(Served::Stopped(reason)) => reason,
        Err(error) => chain(error.as_ref()),
    };
    let message = FromRunner::Stopped {
        reason,
        console: console.tail(),
    };
    // Fails only when the engine is gone, and then nobody wants to know.
    let _ = tell(&control, &message, &[]);
    Fate::End(1)
}

/// Tells the engine something.
pub fn tell(
    control: &OwnedFd,
    message: &FromRunner,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Box<dyn Error>> {
    packet::send(control, &encode(message)?, descriptors)?;
    Ok(())
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

/// The machine is left to the process's end, which nobody waits for; but for that of a child, which has
/// no use for it.
fn run(
    loaded: &Loaded,
    kind: RunKind,
    number: u32,
    agent: OwnedFd,
    control: &OwnedFd,
    console: &Console,
) -> Result<Served, Box<dyn Error>> {
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
    if loaded.is_branch {
        // Its guest finds the old connection gone, and a new one before it.
        machine.replace_agent(agent.try_clone()?);
    }
    // What may be branched goes on making machines, in its children.
    let may_branch = kind == RunKind::Sandbox;
    if !may_branch {
        close_way_out(loaded);
    }
    machine.map_ahead(&ahead.touched);
    let events = watch(&agent, &machine, control)?;
    let prepare = loaded.prepare_vcpu();
    machine.park(agent.try_clone()?, &prepare)?;
    if !may_branch {
        loaded.take_away()?;
    }
    tell(control, &FromRunner::Parked, &[])?;
    let served = serve(&mut machine, &prepare, may_branch, &events, agent, control)?;
    if let Served::Branch(_) = served {
        drop(ManuallyDrop::into_inner(machine));
    }
    Ok(served)
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

/// What an engine says, with its descriptor; `None`: nobody holds the sandbox any more.
fn hear(control: &OwnedFd) -> Result<Option<(ToRunner, OwnedFd)>, Box<dyn Error>> {
    let mut bytes = [0; REQUEST_MAX_BYTES];
    let (length, descriptors) = packet::receive(control, &mut bytes)?;
    if length == 0 {
        return Ok(None);
    }
    let message = decode(&bytes[..length])?;
    let descriptor = descriptors.into_iter().next();
    Ok(Some((
        message,
        descriptor.ok_or("a word without a descriptor")?,
    )))
}

/// From the parked machine to its end.
fn serve(
    machine: &mut Machine,
    prepare: &Prepare,
    may_branch: bool,
    set: &OwnedFd,
    agent: OwnedFd,
    control: &OwnedFd,
) -> Result<Served, Box<dyn Error>> {
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
                STOP => return Ok(Served::Stopped(describe(machine.stop_reason()))),
                CONTROL => match hear(control)? {
                    None => return Ok(Served::LetGo),
                    Some((ToRunner::Branch { number }, child)) if may_branch => {
                        if let Some(branch) =
                            branch::fork(machine, prepare, control, number, child)?
                        {
                            return Ok(Served::Branch(branch));
                        }
                    }
                    Some((ToRunner::Branch { number }, _)) => {
                        branch::refuse(control, number, "it runs one program")?
                    }
                    Some((ToRunner::NewStream, agent)) => {
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
