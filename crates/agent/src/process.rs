//! Processes of the user: starting them, and moving their streams.

#![expect(unsafe_code, reason = "what a child does between fork and exec")]

use crate::context::Context;
use crate::ring::Ring;
use crate::terminal::{self, END_OF_INPUT};
use crate::users::User;
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use zygote_protocol::{ExitStatus, Keep, ProcessId, ReaderId, Start, Stream, TerminalSize};

/// Linux's last signal.
const SIGNAL_MAX: libc::c_int = 64;
/// Where programs start, and relative paths.
pub const HOME: &str = "/root";
/// What every program has in its environment unless the host says otherwise.
const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/root"),
    ("USER", "root"),
    ("LANG", "C.UTF-8"),
];

/// A process with its streams.
pub struct Spawned {
    pub pid: u32,
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
    /// A program on a terminal has none.
    pub stderr: Option<OwnedFd>,
}

/// A process that the host asked for.
pub struct Process {
    pub id: ProcessId,
    pub pid: u32,
    pub stdin: Option<OwnedFd>,
    /// Input that the process has not taken yet.
    pub input: VecDeque<u8>,
    /// Whether the input ends after `input`.
    pub input_ends: bool,
    /// Input that it has taken.
    pub input_taken: u64,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Wait status, once it has ended.
    pub ended: Option<i32>,
    /// Whether it tells its end itself.
    pub tells: bool,
    /// Whether its streams are a terminal.
    pub has_terminal: bool,
    /// What is kept of it for its readers.
    pub kept: Option<Kept>,
    /// The connection to an interpreter that stays.
    pub context: Option<Context>,
}

/// What there is of a process beside its streams, when its output is kept.
pub struct Kept {
    pub ring: Ring,
    /// How it ended, once the host has been told.
    pub status: Option<ExitStatus>,
    /// Whether it has ended and all of its own output is in the ring.
    pub is_drained: bool,
    /// Input that the host has been told of as taken.
    pub input_told: u64,
    /// Whether nobody will ask for it any more.
    pub is_forgotten: bool,
    /// What its host wants to know of it when it has forgotten.
    pub note: Vec<u8>,
    pub started: Instant,
    /// How long it ran, once it has ended.
    pub ran: Option<Duration>,
}

impl Kept {
    /// With reader 0, if it may have something.
    pub fn new(keep: Keep, note: Vec<u8>) -> Self {
        let mut ring = Ring::new(keep.bytes as usize);
        if keep.limit > 0 {
            ring.follow_to_end(0, 0, keep.limit);
        }
        Self {
            ring,
            status: None,
            is_drained: false,
            input_told: 0,
            is_forgotten: false,
            note,
            started: Instant::now(),
            ran: None,
        }
    }
}

/// The default environment with the host's additions.
pub fn environment(additions: &[(String, String)]) -> Vec<(String, String)> {
    let added = |key: &str| additions.iter().any(|(name, _)| name == key);
    let defaults = ENVIRONMENT.iter().filter(|(key, _)| !added(key));
    let mut all: Vec<(String, String)> = defaults
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    all.extend_from_slice(additions);
    all
}

/// What to start, and how.
pub struct Plan<'a> {
    /// The program and its arguments.
    pub arguments: &'a [Vec<u8>],
    /// Comes to the environment that every program has.
    pub env: &'a [(String, String)],
    pub cwd: &'a str,
    /// Whether there will be input.
    pub stdin: bool,
    /// `None`: root.
    pub user: Option<&'a User>,
    /// Of a terminal in place of pipes.
    pub terminal: Option<TerminalSize>,
    /// Stays open in it under the same number.
    pub inherited: Option<OwnedFd>,
}

impl Plan<'_> {
    fn command(&self) -> io::Result<Command> {
        let [program, rest @ ..] = self.arguments else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no program named",
            ));
        };
        let mut command = Command::new(OsStr::from_bytes(program));
        command
            .args(rest.iter().map(|word| OsStr::from_bytes(word)))
            .env_clear()
            .envs(environment(&[]))
            .current_dir(self.cwd);
        if let Some(user) = self.user {
            command.env("HOME", &user.home).env("USER", &user.name);
        }
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        Ok(command)
    }
}

/// Starts a program in the cgroup behind `entrance`, in a session of its own, and with signals as after
/// a login: none blocked, none ignored. An error tells why the program does not run (not found, not
/// executable, no such directory).
pub fn spawn(plan: &Plan<'_>, entrance: &File) -> io::Result<Spawned> {
    let mut command = plan.command()?;
    let terminal = plan.terminal.map(terminal::open).transpose()?;
    match &terminal {
        Some((_, theirs)) => {
            let theirs = || io::Result::Ok(Stdio::from(theirs.try_clone()?));
            command.stdin(theirs()?).stdout(theirs()?).stderr(theirs()?);
        }
        None => {
            let input = if plan.stdin {
                Stdio::piped()
            } else {
                Stdio::null()
            };
            command
                .stdin(input)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
    }
    let entrance_fd = entrance.as_raw_fd();
    let inherited_fd = plan.inherited.as_ref().map(AsRawFd::as_raw_fd);
    let has_terminal = terminal.is_some();
    let user = plan.user.cloned();
    // SAFETY: only system calls that are safe between fork and exec, on descriptors that stay open
    // until `spawn` returns.
    unsafe {
        command.pre_exec(move || {
            checked(libc::write(entrance_fd, c"0".as_ptr().cast(), 1))?;
            checked(libc::setsid())?;
            if has_terminal {
                checked(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            default_signals();
            if let Some(fd) = inherited_fd {
                checked(libc::fcntl(fd, libc::F_SETFD, 0))?;
            }
            user.as_ref()
                .map_or(Ok(()), |user| become_user(user, has_terminal))
        });
    }
    let mut child = command.spawn()?;
    let pid = child.id();
    if let Some((ours, _)) = terminal {
        return Ok(Spawned {
            pid,
            stdin: Some(ours.try_clone()?),
            stdout: ours,
            stderr: None,
        });
    }
    let missing = || io::Error::other("a stream is missing");
    let stdout = child.stdout.take().ok_or_else(missing)?;
    Ok(Spawned {
        pid,
        stdin: child.stdin.take().map(OwnedFd::from),
        stdout: OwnedFd::from(stdout),
        stderr: child.stderr.take().map(OwnedFd::from),
    })
}

fn checked<T: Default + PartialOrd>(result: T) -> io::Result<()> {
    if result < T::default() {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives up root for a user. Safe between fork and exec.
fn become_user(user: &User, has_terminal: bool) -> io::Result<()> {
    // SAFETY: plain system calls; the list is read.
    unsafe {
        if has_terminal {
            // As login(1) leaves it: the terminal is its user's.
            checked(libc::fchown(0, user.uid, libc::gid_t::MAX))?;
        }
        checked(libc::setgroups(user.groups.len(), user.groups.as_ptr()))?;
        checked(libc::setresgid(user.gid, user.gid, user.gid))?;
        checked(libc::setresuid(user.uid, user.uid, user.uid))
    }
}

/// Undoes what the agent has done to signals for itself. Safe between fork and exec.
pub fn default_signals() {
    // SAFETY: system calls on a local set; numbers that cannot be changed are refused.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        for signal in 1..=SIGNAL_MAX {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

/// What a read of an output stream gave.
pub enum Output {
    /// So many bytes.
    Data(usize),
    /// Nothing now.
    Later,
    /// The stream has ended.
    End,
}

/// Reads one piece of an output stream without waiting.
pub fn read_output(stream: &OwnedFd, buffer: &mut [u8]) -> Output {
    match rustix::io::read(stream, buffer) {
        Ok(0) => Output::End,
        Ok(count) => Output::Data(count),
        Err(Errno::AGAIN | Errno::INTR) => Output::Later,
        // A terminal that no program has open any more says EIO.
        Err(_) => Output::End,
    }
}

impl Process {
    /// Takes over a process that has just been started (or become a program).
    pub fn new(start: &Start, spawned: Spawned, tells: bool) -> io::Result<Self> {
        let Spawned {
            pid,
            stdin: input,
            stdout,
            stderr,
        } = spawned;
        for stream in input.iter().chain([&stdout]).chain(&stderr) {
            rustix::io::ioctl_fionbio(stream, true)?;
        }
        Ok(Self {
            id: start.process,
            pid,
            stdin: input.filter(|_| start.stdin || start.terminal.is_some()),
            input: VecDeque::new(),
            input_ends: false,
            input_taken: 0,
            stdout: Some(stdout),
            stderr,
            ended: None,
            tells,
            has_terminal: start.terminal.is_some(),
            kept: start.keep.map(|keep| Kept::new(keep, start.note.clone())),
            context: None,
        })
    }

    /// One of its output streams.
    pub fn slot(&mut self, stream: Stream) -> &mut Option<OwnedFd> {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// Moves what its context says. One that hangs up or talks nonsense is of no use any more.
    pub fn turn_context(&mut self) {
        let Some(context) = &mut self.context else {
            return;
        };
        let (is_good, is_to_interrupt) = (context.turn(), context.is_to_interrupt());
        if !is_good {
            self.signal(libc::SIGKILL as u8, true);
        } else if is_to_interrupt {
            self.signal(libc::SIGINT as u8, true);
        }
    }

    /// Sends it a signal that its host has asked for; an interrupt is for the cell that the host knows of.
    pub fn signal_for_host(&mut self, signal: u8, group: bool) {
        let is_interrupt = i32::from(signal) == libc::SIGINT;
        let context = self.context.as_mut().filter(|_| is_interrupt);
        if context.is_none_or(Context::may_interrupt) {
            self.signal(signal, group);
        }
    }

    /// Gives its context a cell, and who reads what that prints.
    pub fn begin_cell(
        &mut self,
        code: &[u8],
        reader: ReaderId,
        from: u64,
        limit: u64,
        note: Vec<u8>,
    ) {
        if let (Some(context), Some(kept)) = (&mut self.context, &mut self.kept) {
            kept.ring.follow_to_end(reader, from, limit);
            context.begin(code, reader, note);
        }
    }

    /// Its host has gone: nobody reads, and nobody takes what is displayed.
    pub fn lose_host(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.ring.unfollow_all();
        }
        if let Some(context) = &mut self.context {
            context.lose_host();
        }
    }

    /// The end of an event has been sent: if it was that of a cell, who reads ends there.
    pub fn end_cell(&mut self, offset: u64, is_last: bool) {
        if let (Some(context), Some(kept)) = (&mut self.context, &mut self.kept)
            && let Some(reader) = context.ended_cell().filter(|_| is_last)
        {
            kept.ring.end_reader(reader, offset);
        }
    }

    /// Whether an event of its context is being sent: what it prints has to wait.
    pub fn is_sending(&self) -> bool {
        self.context.as_ref().is_some_and(Context::is_sending)
    }

    /// What to wait for at its context's connection.
    pub fn control(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let (control, reads, writes) = self.context.as_ref()?.interest();
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, reads);
        flags.set(PollFlags::OUT, writes);
        (!flags.is_empty()).then_some((control, flags))
    }

    /// Whether the host has been told that it has ended, or need not be.
    pub fn is_over(&self) -> bool {
        let is_closed = self.stdout.is_none() && self.stderr.is_none();
        match &self.kept {
            None => self.ended.is_some() && is_closed,
            Some(kept) => kept.is_forgotten && self.ended.is_some() && is_closed,
        }
    }

    /// More input; a terminal has no end but the character for it.
    pub fn take_input(&mut self, data: Vec<u8>) {
        if !self.input_ends {
            self.input.extend(data);
        }
    }

    /// No more input.
    pub fn end_input(&mut self) {
        if self.has_terminal {
            self.input.push_back(END_OF_INPUT);
        } else {
            self.input_ends = true;
        }
    }

    /// Writes input as far as the process takes it; closes its stdin at the end of it.
    pub fn feed(&mut self) {
        while let Some(stdin) = &self.stdin {
            if self.input.is_empty() {
                if self.input_ends {
                    self.stdin = None;
                }
                return;
            }
            let (front, _) = self.input.as_slices();
            match rustix::io::write(stdin, front) {
                Ok(count) => {
                    self.input.drain(..count);
                    self.input_taken += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // Nobody reads it any more (EPIPE): what is left is for nobody.
                Err(_) => self.stdin = None,
            }
        }
        self.input_taken += self.input.len() as u64;
        self.input.clear();
    }

    /// Sends a signal to the process, or to all of its group.
    pub fn signal(&self, signal: u8, group: bool) {
        let Ok(pid) = libc::pid_t::try_from(self.pid) else {
            return;
        };
        if self.ended.is_none() {
            let target = if group { -pid } else { pid };
            // SAFETY: a plain system call; the process has not been reaped, so the id is its own.
            unsafe { libc::kill(target, signal.into()) };
        }
    }
}
