//! A guest that is being made into a template: its machine, and the conversation with its agent.

use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::time::Timespec;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use zygote_protocol::{AgentMessage, FrameDecoder, FrameError, HostMessage, encode};
use zygote_runner::Console;
use zygote_snapshot::Ahead;
use zygote_snapshot::state::MachineState;
use zygote_vmm::{
    BootConfig, Disk, GuestMemory, Host, Machine, MachineError, Statistics, StopReason,
};

const AGENT: u64 = 0;
const STOP: u64 = 1;
const HOST: u64 = 2;
/// Parameters of the guest's kernel. A fork pays for each page that it writes: new pages are not
/// cleared twice.
///
/// Then (docs/performance.md has what each brings): objects of the kernel lie in as few pages as they
/// fit in; their memory is not accounted to groups, huge pages come only when asked for, and what looks
/// at the kernel from time to time is off. Attacks between a guest's programs and its kernel are not
/// fended off: the programs are root in there.
pub const COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=k init_on_alloc=0 quiet \
    slab_max_order=0 cgroup.memory=nokmem transparent_hugepage=madvise psi=0 nowatchdog \
    kfence.sample_interval=0 randomize_kstack_offset=off lsm=landlock mitigations=off \
    tsc=reliable audit=0";

/// Why a guest did not become what it should.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A socket or descriptor of ours.
    #[error("cannot talk to the guest")]
    Own(#[from] io::Error),
    /// The guest sent what is no message.
    #[error("the guest sent what is no message")]
    Nonsense(#[from] FrameError),
    /// The guest stopped.
    #[error(
        "the guest stopped while it was to {stage}: {reason}\nits console said last:\n{console}"
    )]
    Stopped {
        /// What it was doing.
        stage: &'static str,
        /// Why it stopped.
        reason: String,
        /// The end of its console.
        console: String,
    },
    /// It takes too long.
    #[error("the guest did not {stage} within {limit_s} s\nits console said last:\n{console}")]
    Timeout {
        /// What it should have done.
        stage: &'static str,
        /// How long that may take.
        limit_s: u64,
        /// The end of its console.
        console: String,
    },
    /// The warm-up code failed.
    #[error("the recipe's warm-up code failed:\n{0}")]
    Warm(String),
    /// What is put into it.
    #[error("cannot read what is put into the guest")]
    Archive(#[source] io::Error),
    /// A command of the recipe's failed.
    #[error("the recipe's command failed: {command}\n{how}; it said last:\n{output}")]
    Command {
        /// The command.
        command: String,
        /// How it ended.
        how: String,
        /// The end of its output.
        output: String,
    },
    /// A program could not be started, or what came before it could not be done.
    #[error("{0}")]
    NotStarted(String),
    /// It said something else.
    #[error("the guest answered {0} instead")]
    Unexpected(String),
}

/// A machine with its agent.
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    console: Console,
    stream: UnixStream,
    /// The machine's end of it, under the number that the epoll set knows.
    _agent: UnixStream,
    epoll: OwnedFd,
    decoder: FrameDecoder,
    /// KVM's counters, if its kernel has any.
    pub statistics: Option<Statistics>,
}

/// What to boot.
pub struct Boot {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Kernel image.
    pub kernel: File,
    /// initramfs.
    pub initramfs: File,
    /// Root image.
    pub root: Disk,
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    }
}

fn watch(
    agent: &UnixStream,
    machine: &Machine,
    stream: &UnixStream,
) -> rustix::io::Result<OwnedFd> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    let level = epoll::EventFlags::IN;
    let number = epoll::EventData::new_u64;
    epoll::add(&set, agent, number(AGENT), edges)?;
    epoll::add(&set, machine.stop_event(), number(STOP), level)?;
    epoll::add(&set, stream, number(HOST), level)?;
    Ok(set)
}

impl Guest {
    /// Boots a guest; it runs when this returns.
    pub fn boot(boot: Boot) -> Result<Self, GuestError> {
        let (agent, stream) = UnixStream::pair()?;
        agent.set_nonblocking(true)?;
        let config = BootConfig {
            memory_bytes: boot.memory_bytes,
            vcpus: boot.vcpus,
            kernel: boot.kernel,
            initramfs: boot.initramfs,
            command_line: COMMAND_LINE.into(),
            disks: vec![boot.root],
        };
        let console = Console::default();
        let sink = Box::new(console.clone());
        let machine = Machine::boot(config, agent.try_clone()?.into(), sink)?;
        Self::begin(machine, console, agent, stream)
    }

    /// Goes on from a saved state, with pages copied and mapped ahead; it runs when this returns.
    pub fn restore(
        state: &MachineState,
        memory: GuestMemory,
        disks: Vec<Disk>,
        ahead: &Ahead,
    ) -> Result<Self, GuestError> {
        let (agent, stream) = UnixStream::pair()?;
        agent.set_nonblocking(true)?;
        let console = Console::default();
        memory.copy_ahead(&ahead.written);
        let machine = Machine::restore(
            &Host::open()?,
            state,
            memory,
            disks,
            agent.try_clone()?.into(),
            Box::new(console.clone()),
        )?;
        machine.map_ahead(&ahead.touched);
        Self::begin(machine, console, agent, stream)
    }

    fn begin(
        machine: Machine,
        console: Console,
        agent: UnixStream,
        stream: UnixStream,
    ) -> Result<Self, GuestError> {
        let set = watch(&agent, &machine, &stream).map_err(io::Error::from)?;
        stream.set_nonblocking(true)?;
        let statistics = machine.statistics().ok();
        let mut guest = Self {
            machine,
            console,
            stream,
            _agent: agent,
            epoll: set,
            decoder: FrameDecoder::default(),
            statistics,
        };
        guest.machine.start()?;
        Ok(guest)
    }

    /// Sends a message, as fast as the guest takes it; `stage` completes "the guest did not …".
    pub fn send(
        &mut self,
        message: &HostMessage,
        stage: &'static str,
        limit: Duration,
    ) -> Result<(), GuestError> {
        let bytes = encode(message)?;
        let mut rest = &bytes[..];
        let start = Instant::now();
        while !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = self.left(start, limit, stage)?;
                    self.await_room(stage, left)?;
                }
                Err(error) => return Err(error.into()),
            }
            self.machine.agent_ready();
        }
        Ok(())
    }

    /// Waits until the guest has taken something.
    fn await_room(&self, stage: &'static str, left: Duration) -> Result<(), GuestError> {
        let stop = self.machine.stop_event();
        let mut fds = [
            PollFd::new(&self.stream, PollFlags::OUT),
            PollFd::new(&stop, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&timespec(left))) {
            Ok(_) if !fds[1].revents().is_empty() => Err(self.stopped(stage)),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// How much of the time is left.
    fn left(
        &self,
        start: Instant,
        limit: Duration,
        stage: &'static str,
    ) -> Result<Duration, GuestError> {
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(GuestError::Timeout {
                stage,
                limit_s: limit.as_secs(),
                console: self.console.tail(),
            });
        }
        Ok(left)
    }

    /// The next message; `stage` completes "the guest did not …".
    pub fn next(
        &mut self,
        stage: &'static str,
        limit: Duration,
    ) -> Result<AgentMessage, GuestError> {
        let start = Instant::now();
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            let left = self.left(start, limit, stage)?;
            self.turn(stage, left)?;
        }
    }

    fn turn(&mut self, stage: &'static str, left: Duration) -> Result<(), GuestError> {
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 4];
        let count = match epoll::wait(&self.epoll, &mut events, Some(&timespec(left))) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(io::Error::from(error).into()),
        };
        for event in &events[..count] {
            match event.data.u64() {
                AGENT => drop(self.machine.agent_ready()),
                STOP => return Err(self.stopped(stage)),
                _ => self.receive()?,
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), GuestError> {
        let mut bytes = [0; 16384];
        match self.stream.read(&mut bytes) {
            // The agent is gone, and the guest will stop; its console tells why.
            Ok(0) => {
                epoll::delete(&self.epoll, &self.stream).map_err(io::Error::from)?;
                Ok(())
            }
            Ok(count) => {
                self.decoder.extend(&bytes[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn stopped(&self, stage: &'static str) -> GuestError {
        let reason = match self.machine.stop_reason() {
            Some(StopReason::GuestCrash(what) | StopReason::HostError(what)) => what,
            Some(StopReason::GuestReset) | None => "it reset or powered off".to_owned(),
        };
        GuestError::Stopped {
            stage,
            reason,
            console: self.console.tail(),
        }
    }
}
