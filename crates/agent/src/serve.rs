//! Serving the host: one poll loop over the connection, the children and their streams.
//!
//! The states of a guest: being built (anything goes), frozen (silent until `Activate`), active (and frozen
//! once more, if a template is derived in it), and held, which is where its branches begin: they have lost
//! their host by then, and are activated by another.
//! A failed activation leaves it frozen for ever: no program runs without an identity.

#![expect(unsafe_code, reason = "waitpid")]

use crate::cgroup::{self, Thaw};
use crate::channel::Channel;
use crate::files::Files;
use crate::gets::Gets;
use crate::identity::{HostClock, Papers};
use crate::interpreter::{Interpreter, cold_context};
use crate::launcher::Launcher;
use crate::pressure::{self, Pressure};
use crate::process::{HOME, Plan, Process, Spawned, spawn};
use crate::processes::Processes;
use crate::signals::Signals;
use crate::terminal;
use crate::users::{self, User};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;
use zygote_protocol::{
    AgentMessage, HostMessage, Identity, PROTOCOL_VERSION, Program, PythonSource, Start,
    StartFailure,
};

/// How long what remains of a process is left alone: a machine that has nothing else to do is gone by
/// then.
const REMAINS_MAX: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// How long a message that is in no hurry waits for one that it can go with.
const HELD_MAX: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};
/// How often it is looked whether memory is still used up.
const PRESSED_LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: pressure::LOOK_EVERY.as_nanos() as i64,
};

/// The second finds what the first has left.
const REHEARSALS: usize = 3;

/// This program (proc_pid_exe(5)).
const SELF: &str = "/proc/self/exe";

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Building,
    Frozen,
    Active,
    Held,
}

struct Server {
    channel: Channel,
    signals: Signals,
    processes: Processes,
    /// Becomes the first command.
    launcher: Option<Launcher>,
    /// To where programs run.
    entrance: File,
    /// Whether the user's processes stand still for good.
    stays: bool,
    interpreter: Option<Interpreter>,
    state: State,
    /// `None` where it is no guest.
    clock: Option<HostClock>,
    /// Likewise.
    pressure: Option<Pressure>,
    /// What the next fork needs to become somebody.
    frozen: Option<(Papers, Option<Thaw>)>,
    files: Files,
    gets: Gets,
}

/// Serves until the connection breaks.
pub fn serve(channel: Channel) -> io::Result<()> {
    let entrance = cgroup::entrance()?;
    let mut server = Server::new(channel, entrance, Some(HostClock::map()?), State::Building)?;
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    server.channel.send(&AgentMessage::Hello {
        protocol_version: PROTOCOL_VERSION,
        kernel_release: release,
    })?;
    server.channel.flush()?;
    server.run()
}

/// Serves as the agent of a fork does, but on the machine where it is, for tests of who talks to it.
pub fn serve_here(channel: Channel) -> io::Result<()> {
    let nowhere = File::options().write(true).open("/dev/null")?;
    Server::new(channel, nowhere, None, State::Frozen)?.run()
}

impl Server {
    fn new(
        channel: Channel,
        entrance: File,
        clock: Option<HostClock>,
        state: State,
    ) -> io::Result<Self> {
        Ok(Self {
            channel,
            signals: Signals::new()?,
            processes: Processes::new(),
            launcher: None,
            entrance,
            stays: false,
            interpreter: None,
            state,
            pressure: clock.as_ref().map(|_| Pressure::watch()).transpose()?,
            clock,
            frozen: None,
            files: Files::default(),
            gets: Gets::default(),
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            self.turn()?;
        }
    }

    /// Waits for something to do, and does all of it.
    fn turn(&mut self) -> io::Result<()> {
        let is_hung_up = self.wait()?;
        self.channel.flush()?;
        self.take_signals();
        if self.channel.is_lost() {
            self.channel.find()?;
        } else if is_hung_up || !self.processes.input_is_full() {
            self.hear()?;
        }
        self.processes.turn(&mut self.channel)?;
        while !self.channel.is_full()
            && let Some(got) = self.gets.next(&mut self.processes.scratch)
        {
            self.channel.send(&AgentMessage::Got(got))?;
        }
        self.channel.flush()
    }

    fn hear(&mut self) -> io::Result<()> {
        self.channel.receive();
        if self.channel.is_lost() {
            if !matches!(self.state, State::Active | State::Held) {
                return Err(io::Error::other("the host has closed the connection"));
            }
            // Another one may come.
            self.processes.lose_host();
            self.gets = Gets::default();
            return Ok(());
        }
        while let Some(message) = self.channel.next_message()? {
            self.handle(message)?;
        }
        Ok(())
    }

    /// Gives back whether the host has hung up.
    fn wait(&mut self) -> io::Result<bool> {
        let is_deaf = self.processes.input_is_full() && !self.channel.is_lost();
        let mut interest = if is_deaf {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        interest.set(
            PollFlags::OUT,
            self.channel.is_behind() || self.gets.is_pending() || self.processes.is_pending(),
        );
        let channel = self.channel.fd();
        let mut fds = vec![
            PollFd::new(&channel, interest),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        if let Some(pressure) = &self.pressure {
            fds.push(PollFd::from_borrowed_fd(pressure.fd(), PollFlags::PRI));
        }
        self.processes.watch(&mut fds, self.channel.is_full());
        let is_pressed = self.pressure.as_ref().is_some_and(Pressure::is_pressed);
        // For as long as the machine lives; its host has the deadlines.
        let limit = match (self.processes.has_remains(), is_pressed) {
            _ if self.channel.is_held() => Some(&HELD_MAX),
            (true, _) => Some(&REMAINS_MAX),
            (false, true) => Some(&PRESSED_LOOK),
            (false, false) => None,
        };
        let has_news = |fds: &[PollFd<'_>]| fds[2].revents().contains(PollFlags::PRI);
        let (count, is_near_limit) = match poll(&mut fds, limit) {
            Ok(count) => (count, self.pressure.is_some() && has_news(&fds)),
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let is_hung_up = fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if count == 0 && self.channel.is_held() {
            self.channel.release();
        } else if count == 0 {
            self.processes.clear_remains();
        }
        if (is_near_limit || is_pressed)
            && let Some(pressure) = &mut self.pressure
            && pressure.look()
        {
            self.processes.has_killed_for_memory();
        }
        Ok(is_hung_up)
    }

    fn take_signals(&mut self) {
        let launcher = self.launcher.as_ref().map(Launcher::pid);
        if self.processes.take_signals(&self.signals, launcher)
            && let Some(killed) = self.launcher.take()
        {
            killed.has_ended();
        }
    }

    fn handle(&mut self, message: HostMessage) -> io::Result<()> {
        match message {
            HostMessage::Activate(identity) => self.activate(&identity),
            HostMessage::Put(put) => {
                if self.state == State::Active {
                    self.files.put(put);
                }
                Ok(())
            }
            HostMessage::Start(start) => self.start(start),
            HostMessage::Get { path } => {
                if self.state == State::Active {
                    self.gets.ask(&path);
                }
                Ok(())
            }
            HostMessage::Warm { code } => self.warm(&code),
            HostMessage::Freeze => self.freeze(),
            HostMessage::Forget { process } => {
                self.processes.forget(process);
                Ok(())
            }
            HostMessage::Describe => {
                let processes = self.processes.describe();
                self.channel.send(&AgentMessage::Described { processes })
            }
            HostMessage::Resume => {
                // Whoever wanted a branch has gone.
                self.release()?;
                self.processes.resume(&mut self.channel)
            }
            HostMessage::Hold { limit_ms, anyway } => {
                let limit = Duration::from_millis(limit_ms.into());
                let answer = match self.hold(limit, anyway) {
                    Ok(all) => AgentMessage::Held { all },
                    Err(error) => AgentMessage::NotHeld {
                        message: error.to_string(),
                    },
                };
                self.channel.send(&answer)
            }
            HostMessage::Release => self.release(),
            message => {
                self.tell_process(message);
                Ok(())
            }
        }
    }

    /// A word for one process. One that has ended needs none.
    fn tell_process(&mut self, message: HostMessage) {
        let id = match &message {
            HostMessage::Stdin { process, .. }
            | HostMessage::StdinClose { process }
            | HostMessage::Signal { process, .. }
            | HostMessage::Follow { process, .. }
            | HostMessage::Unfollow { process, .. }
            | HostMessage::Resize { process, .. }
            | HostMessage::Cell { process, .. }
            | HostMessage::CellTaken { process } => *process,
            _ => return,
        };
        let Some(process) = self.processes.find(id) else {
            return;
        };
        let ring = process.kept.as_mut().map(|kept| &mut kept.ring);
        let context = process.context.as_mut();
        match message {
            HostMessage::Cell {
                code,
                reader,
                from,
                limit,
                note,
                ..
            } => process.begin_cell(&code, reader, from, limit, note),
            HostMessage::CellTaken { .. } => {
                if let Some(context) = context {
                    context.taken();
                }
            }
            HostMessage::Stdin { data, .. } => process.take_input(data),
            HostMessage::StdinClose { .. } => process.end_input(),
            HostMessage::Signal { signal, group, .. } => process.signal_for_host(signal, group),
            HostMessage::Follow {
                reader,
                from,
                limit,
                holds,
                ..
            } => {
                // One reader too many gets nothing; its host counts them.
                ring.map(|ring| ring.follow(reader, from, limit, holds));
            }
            HostMessage::Unfollow { reader, .. } => {
                if let Some(ring) = ring {
                    ring.unfollow(reader);
                }
            }
            HostMessage::Resize { size, .. } => {
                // What has closed its terminal has no size.
                let _ = process
                    .stdout
                    .as_ref()
                    .map(|ours| terminal::resize(ours, size));
            }
            _ => {}
        }
    }

    fn activate(&mut self, identity: &Identity) -> io::Result<()> {
        let is_branch = self.state == State::Held;
        if self.state != State::Frozen && !is_branch {
            let message = "the guest is not frozen".to_owned();
            return self.channel.send(&AgentMessage::ActivateFailed { message });
        }
        // Whoever activates a branch knows that there is one.
        self.channel.unmute();
        match self.become_somebody(identity) {
            Ok(random_sample) => {
                self.state = State::Active;
                self.channel
                    .send(&AgentMessage::Activated { random_sample })?;
                if is_branch {
                    self.processes.resume(&mut self.channel)?;
                }
                Ok(())
            }
            Err(error) => {
                let message = error.to_string();
                self.channel.send(&AgentMessage::ActivateFailed { message })
            }
        }
    }

    fn become_somebody(&mut self, identity: &Identity) -> io::Result<Vec<u8>> {
        let Some(clock) = &self.clock else {
            return Ok(identity.kernel_seed.iter().copied().take(32).collect());
        };
        let Some((papers, thaw)) = &self.frozen else {
            return Err(io::Error::other("nothing has been prepared"));
        };
        let sample = papers.apply(identity, clock)?;
        if let Some(interpreter) = &mut self.interpreter {
            interpreter.set_seed(identity.interpreter_seed.as_deref());
        }
        if self.state == State::Held && !identity.stays {
            self.processes.reseed(identity.reseed);
        }
        if identity.stays {
            self.entrance = cgroup::onlookers_entrance()?;
            self.stays = true;
        } else if let Some(thaw) = thaw {
            thaw.thaw()?;
        }
        Ok(sample)
    }

    /// Stops the user's processes, and has ready what a branch needs to become somebody. Gives back whether
    /// all have stopped. If it fails, they go on.
    fn hold(&mut self, limit: Duration, anyway: bool) -> io::Result<bool> {
        if self.state != State::Active {
            return Err(io::Error::other("the guest is not active"));
        }
        if self.clock.is_none() {
            self.state = State::Held;
            return Ok(true);
        }
        let thaw = Thaw::prepare()?;
        let ready = cgroup::freeze_within(limit).and_then(|all| {
            if !all && !anyway {
                let seconds = limit.as_secs_f32();
                let message = format!(
                    "not all of its processes have stopped within {seconds} s: some are in the \
                     kernel, waiting for a disk or for each other"
                );
                return Err(io::Error::other(message));
            }
            let name = rustix::system::uname();
            let papers = Papers::prepare(false)?;
            Ok((all, papers.keep_changes(&name.nodename().to_string_lossy())))
        });
        match ready {
            Ok((all, papers)) => {
                self.frozen = Some((papers, Some(thaw)));
                self.state = State::Held;
                Ok(all)
            }
            Err(error) => {
                thaw.thaw()?;
                Err(error)
            }
        }
    }

    /// Lets the user's processes go on, if they are held.
    fn release(&mut self) -> io::Result<()> {
        if self.state != State::Held {
            return Ok(());
        }
        self.state = State::Active;
        match &self.frozen {
            Some((_, Some(thaw))) => thaw.thaw(),
            _ => Ok(()),
        }
    }

    /// In a fork that is to be a template in its turn, an interpreter takes the place of the one that there
    /// was, which knows nothing of what has been installed since.
    fn warm(&mut self, code: &str) -> io::Result<()> {
        if !matches!(self.state, State::Building | State::Active) {
            let message = "only a template that is being built can be warmed".to_owned();
            return self.channel.send(&AgentMessage::Refused { message });
        }
        self.launcher = None;
        if let Some(old) = self.interpreter.take() {
            old.end();
        }
        match Interpreter::warm(code)? {
            Ok(interpreter) => {
                self.interpreter = Some(interpreter);
                self.channel.send(&AgentMessage::Warmed)
            }
            Err(message) => self.channel.send(&AgentMessage::WarmFailed { message }),
        }
    }

    /// Makes it what is forked: from its boot on, or from a fork, whose programs have done what they were to
    /// do. Those that still run go on in each fork, and belong to nobody.
    fn freeze(&mut self) -> io::Result<()> {
        let is_first = self.state == State::Building;
        self.processes.forget_all();
        rehearse()?;
        if is_first {
            compact_memory()?;
        }
        if self.launcher.is_none() {
            self.launcher = Some(Launcher::prepare()?);
        }
        let mut papers = Papers::prepare(is_first)?;
        if !is_first {
            let name = rustix::system::uname();
            papers = papers.keep_changes(&name.nodename().to_string_lossy());
        }
        // Who waits for a word of ours does nothing until it comes: stopping it, and letting it go on,
        // would only cost each fork.
        let waits = |interpreter: &Interpreter| interpreter.only_waits();
        let has_only = cgroup::has_only(self.interpreter.is_some(), self.launcher.is_some());
        let thaw = if has_only && self.interpreter.as_ref().is_none_or(waits) {
            None
        } else {
            cgroup::freeze()?;
            Some(Thaw::prepare()?)
        };
        self.frozen = Some((papers, thaw));
        rustix::fs::sync();
        self.state = State::Frozen;
        self.channel.send(&AgentMessage::Frozen)
    }

    fn start(&mut self, mut start: Start) -> io::Result<()> {
        let id = start.process;
        let begun = if self.state == State::Frozen {
            Err(io::Error::other(
                "the guest is frozen: it has no identity yet",
            ))
        } else if self.state == State::Held {
            Err(io::Error::other("the guest is held, for a branch"))
        } else if self.stays && !matches!(start.program, Program::Files(_)) {
            Err(io::Error::other("the guest is only to be looked at"))
        } else if self.processes.find(id).is_some() {
            Err(io::Error::other("a process of this number runs already"))
        } else {
            self.begin(&mut start)
        };
        match begun {
            Ok(process) => {
                let pid = process.pid;
                self.processes.add(process);
                let started = AgentMessage::Started { process: id, pid };
                // Who follows it from the start hears more soon, unless it waits for input.
                let is_followed = start.keep.is_some_and(|keep| keep.limit > 0);
                if is_followed && !start.stdin && start.terminal.is_none() {
                    self.channel.send_with_next(&started)
                } else {
                    self.channel.send(&started)
                }
            }
            Err(error) => {
                let (reason, message) = start_failure(&start, &error);
                self.channel.send(&AgentMessage::StartFailed {
                    process: id,
                    reason,
                    message,
                })
            }
        }
    }

    /// What the warm-up has started in it goes on, and not with what other forks have. One that sleeps
    /// is reseeded when it wakes up.
    fn reseed_interpreter(&mut self) -> io::Result<()> {
        match &mut self.interpreter {
            Some(interpreter) if !interpreter.only_waits() => interpreter.reseed(),
            _ => Ok(()),
        }
    }

    fn spawn(
        &mut self,
        arguments: &[Vec<u8>],
        start: &Start,
        user: Option<&User>,
    ) -> io::Result<Spawned> {
        let Start {
            env, cwd, stdin, ..
        } = start;
        if user.is_none() && start.terminal.is_none() && !self.stays {
            if let Some(launcher) = self.launcher.take() {
                match launcher.launch(arguments, env, cwd, *stdin) {
                    // Somebody has killed it.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                    launched => return launched,
                }
            }
            if start.keep.is_some() && self.clock.is_some() {
                // Cheaper than a fork, whose pages must be copied.
                return Launcher::launch_now(arguments, env, cwd, *stdin);
            }
        }
        let plan = Plan {
            arguments,
            env,
            cwd,
            stdin: *stdin,
            user,
            terminal: start.terminal,
            inherited: None,
        };
        spawn(&plan, &self.entrance)
    }

    fn begin(&mut self, start: &mut Start) -> io::Result<Process> {
        self.files.finish()?;
        self.processes.clear_remains();
        let user = match &start.user[..] {
            "" => None,
            words => Some(users::find(words)?),
        };
        if start.cwd.is_empty() {
            // A user without a home starts where there is something.
            let home = user.as_ref().map_or(HOME, |user| &user.home);
            let is_there = user.is_none() || Path::new(home).is_dir();
            start.cwd = if is_there { home } else { "/" }.to_owned();
        }
        if start.cwd != HOME && !Path::new(&start.cwd).is_dir() {
            return Err(io::Error::other(format!(
                "no directory {} in the guest",
                start.cwd
            )));
        }
        let mut tells = false;
        let spawned = match &start.program {
            Program::Context => return self.begin_context(start, user.as_ref()),
            Program::Command(arguments) => {
                self.reseed_interpreter()?;
                self.spawn(arguments, start, user.as_ref())?
            }
            Program::Files(task) => {
                let task = task.to_word().map_err(io::Error::other)?;
                let words = [SELF, crate::FILES_VERB, &task];
                let words = words.map(|word| word.as_bytes().to_vec());
                self.spawn(&words, start, user.as_ref())?
            }
            Program::Python { source, arguments } => match self.interpreter.take() {
                Some(warm) if warm.can_become(start) => {
                    tells = true;
                    warm.become_program(start, source, arguments)?
                }
                unused => {
                    self.interpreter = unused;
                    self.reseed_interpreter()?;
                    let command = cold_python(source, arguments);
                    self.spawn(&command, start, user.as_ref())?
                }
            },
        };
        Process::new(start, spawned, tells)
    }

    fn begin_context(&mut self, start: &Start, user: Option<&User>) -> io::Result<Process> {
        let is_warm = |warm: &mut Interpreter| user.is_none() && warm.can_become(start);
        let (spawned, context) = match self.interpreter.take_if(is_warm) {
            Some(warm) => warm.become_context(start)?,
            None => {
                self.reseed_interpreter()?;
                cold_context(start, user, &self.entrance, self.clock.is_some())?
            }
        };
        let mut process = Process::new(start, spawned, false)?;
        process.context = Some(context);
        Ok(process)
    }
}

/// Does in the template what every fork does, so that the kernel has ready what that takes.
fn rehearse() -> io::Result<()> {
    for _ in 0..REHEARSALS {
        let launcher = Launcher::prepare()?;
        let (command, pid) = ([b"true".to_vec()], launcher.pid());
        // A template without that program has nothing to rehearse.
        let _ = launcher.launch(&command, &[], HOME, false);
        // SAFETY: waits for a child of ours, which ends: the host has the deadline.
        unsafe { libc::waitpid(pid as libc::pid_t, std::ptr::null_mut(), 0) };
    }
    Ok(())
}

/// Brings free pages together, so that new ones lie together: Documentation/admin-guide/sysctl/vm.rst.
fn compact_memory() -> io::Result<()> {
    std::fs::write("/proc/sys/vm/compact_memory", "1")
}

/// The command that a user would type.
fn cold_python(source: &PythonSource, arguments: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut command = vec![b"python3".to_vec()];
    match source {
        PythonSource::Code(code) => command.extend([b"-c".to_vec(), code.clone()]),
        PythonSource::File { path, .. } => command.push(path.clone()),
        PythonSource::Stdin => command.push(b"-".to_vec()),
    }
    command.extend_from_slice(arguments);
    command
}

fn start_failure(start: &Start, error: &io::Error) -> (StartFailure, String) {
    let name = match &start.program {
        Program::Command(arguments) => {
            String::from_utf8_lossy(arguments.first().map_or(b"", |word| word))
        }
        Program::Python { .. } | Program::Context => "python3".into(),
        Program::Files(_) => "a task with files".into(),
    };
    match error.kind() {
        io::ErrorKind::NotFound => (
            StartFailure::NotFound,
            format!("{name}: no such program in the guest"),
        ),
        io::ErrorKind::PermissionDenied => (
            StartFailure::NotExecutable,
            format!("{name}: not executable"),
        ),
        // A sentence of ours says all; the kernel's word needs a name.
        _ if error.get_ref().is_some() => (StartFailure::Other, error.to_string()),
        _ => (StartFailure::Other, format!("{name}: {error}")),
    }
}
