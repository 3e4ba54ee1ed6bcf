//! Serving the host: one poll loop over the connection, the children and their streams.
//!
//! The states of a guest: being built (anything goes), frozen (silent until `Activate`), active.
//! A failed activation leaves it frozen for ever: no program runs without an identity.

#![expect(unsafe_code, reason = "waitpid, kill")]

use crate::cgroup::{self, Thaw};
use crate::channel::Channel;
use crate::files::Files;
use crate::gets::Gets;
use crate::identity::{HostClock, Papers};
use crate::interpreter::Interpreter;
use crate::launcher::Launcher;
use crate::process::{HOME, Output, Process, Spawned, read_output, spawn};
use crate::signals::{Signal, Signals};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::fs::File;
use std::io;
use std::path::Path;
use zygote_protocol::{
    AgentMessage, ExitStatus, HostMessage, Identity, PROTOCOL_VERSION, ProcessId, Program,
    PythonSource, STREAM_CHUNK_MAX_BYTES, Start, StartFailure,
};

/// Above this, the host is not listened to until programs have taken their input.
const INPUT_HIGH_BYTES: usize = 1024 * 1024;
/// How long what remains of a process is left alone: a machine that has nothing else to do is gone by
/// then.
const REMAINS_MAX: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// The second finds what the first has left.
const REHEARSALS: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Building,
    Frozen,
    Active,
}

struct Server {
    channel: Channel,
    signals: Signals,
    processes: Vec<Process>,
    /// Processes that have told their end, and only keep memory.
    remains: Vec<u32>,
    /// Becomes the first command.
    launcher: Option<Launcher>,
    /// To where programs run.
    entrance: File,
    /// Out-of-memory kills that are known.
    kills: u64,
    /// What programs write passes through here.
    scratch: Vec<u8>,
    interpreter: Option<Interpreter>,
    state: State,
    clock: HostClock,
    /// What the next fork needs to become somebody.
    frozen: Option<(Papers, Option<Thaw>)>,
    files: Files,
    gets: Gets,
}

/// Serves until the connection breaks.
pub fn serve(channel: Channel) -> io::Result<()> {
    let mut server = Server {
        channel,
        signals: Signals::new()?,
        processes: Vec::new(),
        remains: Vec::new(),
        launcher: None,
        entrance: cgroup::entrance()?,
        kills: 0,
        scratch: vec![0; STREAM_CHUNK_MAX_BYTES],
        interpreter: None,
        state: State::Building,
        clock: HostClock::map()?,
        frozen: None,
        files: Files::default(),
        gets: Gets::default(),
    };
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    server.channel.send(&AgentMessage::Hello {
        protocol_version: PROTOCOL_VERSION,
        kernel_release: release,
    })?;
    server.channel.flush()?;
    loop {
        server.turn()?;
    }
}

impl Server {
    /// Waits for something to do, and does all of it.
    fn turn(&mut self) -> io::Result<()> {
        self.wait()?;
        self.channel.flush()?;
        self.take_signals();
        if !self.input_is_full() {
            self.channel.receive()?;
            while let Some(message) = self.channel.next_message()? {
                self.handle(message)?;
            }
        }
        for index in 0..self.processes.len() {
            self.processes[index].feed();
            self.pump(index)?;
        }
        self.finish()?;
        while !self.channel.is_full()
            && let Some(got) = self.gets.next(&mut self.scratch)
        {
            self.channel.send(&AgentMessage::Got(got))?;
        }
        self.channel.flush()
    }

    fn input_is_full(&self) -> bool {
        self.processes
            .iter()
            .any(|process| process.input.len() > INPUT_HIGH_BYTES)
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut interest = if self.input_is_full() {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        interest.set(
            PollFlags::OUT,
            self.channel.is_behind() || self.gets.is_pending(),
        );
        let channel = self.channel.fd();
        let mut fds = vec![
            PollFd::new(&channel, interest),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        for process in &self.processes {
            if !self.channel.is_full() {
                let outputs = process.stdout.iter().chain(&process.stderr);
                fds.extend(outputs.map(|stream| PollFd::new(stream, PollFlags::IN)));
            }
            if let Some(stdin) = process.stdin.as_ref().filter(|_| !process.input.is_empty()) {
                fds.push(PollFd::new(stdin, PollFlags::OUT));
            }
        }
        // For as long as the machine lives; its host has the deadlines.
        let limit = (!self.remains.is_empty()).then_some(&REMAINS_MAX);
        match poll(&mut fds, limit) {
            Ok(0) => self.clear_remains(),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Notes which processes have ended: those that say so, children that have, and the orphans that
    /// PID 1 inherits.
    fn take_signals(&mut self) {
        let mut has_children = false;
        while let Some(signal) = self.signals.next() {
            match signal {
                Signal::Child => has_children = true,
                Signal::Told { pid, status } => {
                    let told = |p: &&mut Process| p.pid == pid && p.tells && p.ended.is_none();
                    if let Some(process) = self.processes.iter_mut().find(told) {
                        process.ended = Some((i32::from(status)) << 8);
                        self.remains.push(pid);
                    }
                }
            }
        }
        if has_children {
            self.reap();
        }
    }

    fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: writes one integer.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            self.remains.retain(|remains| *remains != pid as u32);
            if let Some(killed) = self
                .launcher
                .take_if(|launcher| launcher.pid() == pid as u32)
            {
                killed.has_ended();
            }
            let ended = |p: &&mut Process| p.pid == pid as u32 && p.ended.is_none();
            if let Some(process) = self.processes.iter_mut().find(ended) {
                process.ended = Some(status);
            }
        }
    }

    /// Ends those that have told their end. Nobody has waited for their memory to be given back.
    fn clear_remains(&mut self) {
        for pid in self.remains.drain(..) {
            // SAFETY: a plain system call; the process has not been reaped, so the id is its own.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        }
    }

    /// Sends what a process has written, while the host keeps up.
    fn pump(&mut self, index: usize) -> io::Result<()> {
        for is_stdout in [true, false] {
            while !self.channel.is_full() {
                let process = &mut self.processes[index];
                let id = process.id;
                let slot = if is_stdout {
                    &mut process.stdout
                } else {
                    &mut process.stderr
                };
                let Some(stream) = slot else { break };
                match read_output(stream, &mut self.scratch) {
                    Output::Data(data) if is_stdout => {
                        self.channel
                            .send(&AgentMessage::Stdout { process: id, data })?;
                    }
                    Output::Data(data) => {
                        self.channel
                            .send(&AgentMessage::Stderr { process: id, data })?;
                    }
                    Output::Later => {
                        // The program has ended: what is in the pipe now was all of its own; what
                        // its children may still write is not waited for.
                        if process.ended.is_some() {
                            *slot = None;
                        }
                        break;
                    }
                    Output::End => *slot = None,
                }
            }
        }
        Ok(())
    }

    /// Reports processes that have ended and whose output has been sent.
    fn finish(&mut self) -> io::Result<()> {
        let is_done = |p: &Process| p.ended.is_some() && p.stdout.is_none() && p.stderr.is_none();
        while let Some(index) = self.processes.iter().position(is_done) {
            let process = self.processes.swap_remove(index);
            let status = self.exit_status(process.ended.unwrap_or_default());
            self.channel.send(&AgentMessage::Exited {
                process: process.id,
                status,
            })?;
        }
        Ok(())
    }

    fn exit_status(&mut self, status: i32) -> ExitStatus {
        exit_status(status, || {
            let known = std::mem::replace(&mut self.kills, cgroup::out_of_memory_kills());
            self.kills > known
        })
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
            HostMessage::Stdin { process, data } => {
                if let Some(process) = self.process(process) {
                    process.input.extend(data);
                }
                Ok(())
            }
            HostMessage::StdinClose { process } => {
                if let Some(process) = self.process(process) {
                    process.input_ends = true;
                }
                Ok(())
            }
            HostMessage::Signal { process, signal } => {
                if let Some(process) = self.process(process) {
                    process.signal(signal);
                }
                Ok(())
            }
            HostMessage::Warm { code } => self.warm(&code),
            HostMessage::Freeze => self.freeze(),
        }
    }

    fn process(&mut self, id: ProcessId) -> Option<&mut Process> {
        self.processes.iter_mut().find(|process| process.id == id)
    }

    fn activate(&mut self, identity: &Identity) -> io::Result<()> {
        if self.state != State::Frozen {
            let message = "the guest is not frozen".to_owned();
            return self.channel.send(&AgentMessage::ActivateFailed { message });
        }
        match self.become_somebody(identity) {
            Ok(random_sample) => {
                self.state = State::Active;
                self.channel
                    .send(&AgentMessage::Activated { random_sample })
            }
            Err(error) => {
                let message = error.to_string();
                self.channel.send(&AgentMessage::ActivateFailed { message })
            }
        }
    }

    fn become_somebody(&mut self, identity: &Identity) -> io::Result<Vec<u8>> {
        let Some((papers, thaw)) = &self.frozen else {
            return Err(io::Error::other("nothing has been prepared"));
        };
        let sample = papers.apply(identity, &self.clock)?;
        if let Some(interpreter) = &mut self.interpreter {
            interpreter.set_seed(identity.interpreter_seed.as_deref());
        }
        if let Some(thaw) = thaw {
            thaw.thaw()?;
        }
        Ok(sample)
    }

    fn warm(&mut self, code: &str) -> io::Result<()> {
        if self.state != State::Building {
            let message = "only a template that is being built can be warmed".to_owned();
            return self.channel.send(&AgentMessage::Refused { message });
        }
        match Interpreter::warm(code)? {
            Ok(interpreter) => {
                self.interpreter = Some(interpreter);
                self.channel.send(&AgentMessage::Warmed)
            }
            Err(message) => self.channel.send(&AgentMessage::WarmFailed { message }),
        }
    }

    fn freeze(&mut self) -> io::Result<()> {
        let is_template = self.state == State::Building;
        if is_template {
            rehearse()?;
        }
        if self.launcher.is_none() {
            self.launcher = Some(Launcher::prepare()?);
        }
        let papers = Papers::prepare(is_template)?;
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
        if start.cwd.is_empty() {
            HOME.clone_into(&mut start.cwd);
        }
        let id = start.process;
        let begun = if self.state == State::Frozen {
            Err(io::Error::other(
                "the guest is frozen: it has no identity yet",
            ))
        } else if self.process(id).is_some() {
            Err(io::Error::other("a process of this number runs already"))
        } else {
            self.begin(&start)
        };
        match begun {
            Ok(process) => {
                let pid = process.pid;
                self.processes.push(process);
                self.channel
                    .send(&AgentMessage::Started { process: id, pid })
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

    fn spawn(&mut self, arguments: &[Vec<u8>], start: &Start) -> io::Result<Spawned> {
        let Start {
            env, cwd, stdin, ..
        } = start;
        if let Some(launcher) = self.launcher.take() {
            match launcher.launch(arguments, env, cwd, *stdin) {
                // Somebody has killed it.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                launched => return launched,
            }
        }
        spawn(arguments, env, cwd, *stdin, &self.entrance, None)
    }

    fn begin(&mut self, start: &Start) -> io::Result<Process> {
        self.files.finish()?;
        self.clear_remains();
        if start.cwd != HOME && !Path::new(&start.cwd).is_dir() {
            return Err(io::Error::other(format!(
                "no directory {} in the guest",
                start.cwd
            )));
        }
        let mut tells = false;
        let spawned = match &start.program {
            Program::Command(arguments) => {
                self.reseed_interpreter()?;
                self.spawn(arguments, start)?
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
                    self.spawn(&command, start)?
                }
            },
        };
        Process::new(start.process, spawned, start.stdin, tells)
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
    // Brings free pages together, so that new ones lie together: Documentation/admin-guide/sysctl/vm.rst.
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
        Program::Python { .. } => "python3".into(),
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

/// How a process ended; `was_killed_for_memory` is asked only if that may be.
fn exit_status(status: i32, was_killed_for_memory: impl FnOnce() -> bool) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status) as u8;
        ExitStatus::Signal {
            signal,
            out_of_memory: i32::from(signal) == libc::SIGKILL && was_killed_for_memory(),
        }
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_are_told_apart() {
        let never = || panic!("only a kill may have been for memory");
        assert_eq!(exit_status(7 << 8, never), ExitStatus::Code(7));
        let killed = ExitStatus::Signal {
            signal: 11,
            out_of_memory: false,
        };
        assert_eq!(exit_status(11, never), killed);
        let killed = ExitStatus::Signal {
            signal: 9,
            out_of_memory: true,
        };
        assert_eq!(exit_status(9, || true), killed);
    }
}
