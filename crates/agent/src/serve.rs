//! Serving the host: one poll loop over the connection, the children and their streams.
//!
//! The states of a guest: being built (anything goes), frozen (silent until `Activate`), active.
//! A failed activation leaves it frozen for ever: no program runs without an identity.

#![expect(unsafe_code, reason = "signalfd, waitpid")]

use crate::channel::Channel;
use crate::files::Files;
use crate::identity::HostClock;
use crate::interpreter::Interpreter;
use crate::process::{Output, Process, environment, read_output, spawn};
use crate::{cgroup, identity};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use zygote_protocol::{
    AgentMessage, ExitStatus, HostMessage, Identity, PROTOCOL_VERSION, ProcessId, Program,
    PythonSource, Start, StartFailure,
};

/// Above this, the host is not listened to until programs have taken their input.
const INPUT_HIGH_BYTES: usize = 1024 * 1024;
const HOME: &str = "/root";

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Building,
    Frozen,
    Active,
}

struct Server {
    channel: Channel,
    children: OwnedFd,
    processes: Vec<Process>,
    interpreter: Option<Interpreter>,
    state: State,
    clock: HostClock,
    files: Files,
}

/// Serves until the connection breaks.
pub fn serve(channel: Channel) -> io::Result<()> {
    let mut server = Server {
        channel,
        children: child_signals()?,
        processes: Vec::new(),
        interpreter: None,
        state: State::Building,
        clock: HostClock::map()?,
        files: Files::default(),
    };
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    server.channel.send(&AgentMessage::Hello {
        protocol_version: PROTOCOL_VERSION,
        kernel_release: release,
    })?;
    loop {
        server.turn()?;
    }
}

/// A descriptor that is readable when a child has ended.
fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: a set with one signal, blocked for this only thread and read from the descriptor.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

impl Server {
    /// Waits for something to do, and does all of it.
    fn turn(&mut self) -> io::Result<()> {
        self.wait()?;
        self.channel.flush()?;
        let mut drained = [0; 128];
        while rustix::io::read(&self.children, &mut drained[..]).is_ok() {}
        self.reap();
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
        self.finish()
    }

    fn input_is_full(&self) -> bool {
        self.processes
            .iter()
            .any(|process| process.input.len() > INPUT_HIGH_BYTES)
    }

    fn wait(&self) -> io::Result<()> {
        let mut interest = if self.input_is_full() {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        interest.set(PollFlags::OUT, self.channel.is_behind());
        let channel = self.channel.fd();
        let mut fds = vec![
            PollFd::new(&channel, interest),
            PollFd::new(&self.children, PollFlags::IN),
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
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Collects every child that has ended: ours, and the orphans that PID 1 inherits.
    fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: writes one integer.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            if let Some(process) = self.processes.iter_mut().find(|p| p.pid == pid as u32) {
                process.ended = Some(status);
            }
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
                match read_output(stream) {
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
            let status = exit_status(process.ended.unwrap_or_default(), process.kills_before);
            self.channel.send(&AgentMessage::Exited {
                process: process.id,
                status,
            })?;
        }
        Ok(())
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
        let applied = identity::apply(identity, &self.clock).and_then(|sample| {
            if let Some(interpreter) = &mut self.interpreter {
                interpreter.set_seed(identity.interpreter_seed.as_deref());
            }
            cgroup::thaw()?;
            Ok(sample)
        });
        match applied {
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
        cgroup::freeze()?;
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

    fn begin(&mut self, start: &Start) -> io::Result<Process> {
        self.files.finish()?;
        if !Path::new(&start.cwd).is_dir() {
            return Err(io::Error::other(format!(
                "no directory {} in the guest",
                start.cwd
            )));
        }
        let spawned = match &start.program {
            Program::Command(arguments) => {
                if let Some(interpreter) = &mut self.interpreter {
                    interpreter.reseed()?;
                }
                spawn(arguments, &start.env, &start.cwd, start.stdin, None)?
            }
            Program::Python { source, arguments } => match self.interpreter.take() {
                Some(warm) if warm.can_become(start) => {
                    let environment = environment(&start.env);
                    warm.become_program(start, source, arguments, &environment)?
                }
                unused => {
                    self.interpreter = unused;
                    if let Some(interpreter) = &mut self.interpreter {
                        interpreter.reseed()?;
                    }
                    let command = cold_python(source, arguments);
                    spawn(&command, &start.env, &start.cwd, start.stdin, None)?
                }
            },
        };
        Process::new(start.process, spawned, start.stdin)
    }
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
        _ => (StartFailure::Other, format!("{name}: {error}")),
    }
}

fn exit_status(status: i32, kills_before: u64) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status) as u8;
        let out_of_memory =
            i32::from(signal) == libc::SIGKILL && cgroup::out_of_memory_kills() > kills_before;
        ExitStatus::Signal {
            signal,
            out_of_memory,
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
        assert_eq!(exit_status(7 << 8, 0), ExitStatus::Code(7));
        let killed = ExitStatus::Signal {
            signal: 11,
            out_of_memory: false,
        };
        assert_eq!(exit_status(11, 0), killed);
    }
}
