//! Processes of the user: starting them, and moving their streams.

#![expect(unsafe_code, reason = "what a child does between fork and exec")]

use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use zygote_protocol::ProcessId;

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
    pub stderr: OwnedFd,
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
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Wait status, once it has ended.
    pub ended: Option<i32>,
    /// Whether it tells its end itself.
    pub tells: bool,
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

/// A program with its environment and directory.
fn command(
    arguments: &[Vec<u8>],
    additions: &[(String, String)],
    cwd: &str,
) -> io::Result<Command> {
    let [program, rest @ ..] = arguments else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no program named",
        ));
    };
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .args(rest.iter().map(|word| OsStr::from_bytes(word)))
        .env_clear()
        .envs(environment(additions))
        .current_dir(cwd);
    Ok(command)
}

/// Starts a program in the cgroup behind `entrance`, in a session of its own, with pipes for its streams and
/// with signals as after a login: none blocked, none ignored.
/// `inherited` stays open in it under the same number. An error tells why the program does not run
/// (not found, not executable, no such directory).
pub fn spawn(
    arguments: &[Vec<u8>],
    additions: &[(String, String)],
    cwd: &str,
    stdin: bool,
    entrance: &File,
    inherited: Option<UnixStream>,
) -> io::Result<Spawned> {
    let entrance_fd = entrance.as_raw_fd();
    let inherited_fd = inherited.as_ref().map(AsRawFd::as_raw_fd);
    let mut command = command(arguments, additions, cwd)?;
    command
        .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: only system calls that are safe between fork and exec, on descriptors that stay open
    // until `spawn` returns.
    unsafe {
        command.pre_exec(move || {
            if libc::write(entrance_fd, c"0".as_ptr().cast(), 1) < 0 || libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            default_signals();
            if let Some(fd) = inherited_fd
                && libc::fcntl(fd, libc::F_SETFD, 0) < 0
            {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let missing = || io::Error::other("a stream is missing");
    Ok(Spawned {
        pid: child.id(),
        stdin: child.stdin.take().map(OwnedFd::from),
        stdout: OwnedFd::from(stdout.ok_or_else(missing)?),
        stderr: OwnedFd::from(stderr.ok_or_else(missing)?),
    })
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
    /// Bytes.
    Data(Vec<u8>),
    /// Nothing now.
    Later,
    /// The stream has ended.
    End,
}

/// Reads one piece of an output stream without waiting, by way of `scratch`.
pub fn read_output(stream: &OwnedFd, scratch: &mut [u8]) -> Output {
    match rustix::io::read(stream, &mut *scratch) {
        Ok(0) => Output::End,
        Ok(count) => Output::Data(scratch[..count].to_vec()),
        Err(Errno::AGAIN | Errno::INTR) => Output::Later,
        Err(_) => Output::End,
    }
}

impl Process {
    /// Takes over a process that has just been started (or become a program).
    pub fn new(id: ProcessId, spawned: Spawned, stdin: bool, tells: bool) -> io::Result<Self> {
        let Spawned {
            pid,
            stdin: input,
            stdout,
            stderr,
        } = spawned;
        for stream in input.iter().chain([&stdout, &stderr]) {
            rustix::io::ioctl_fionbio(stream, true)?;
        }
        Ok(Self {
            id,
            pid,
            stdin: input.filter(|_| stdin),
            input: VecDeque::new(),
            input_ends: false,
            stdout: Some(stdout),
            stderr: Some(stderr),
            ended: None,
            tells,
        })
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
                Ok(count) => drop(self.input.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // Nobody reads it any more (EPIPE): what is left is for nobody.
                Err(_) => {
                    self.stdin = None;
                    self.input.clear();
                }
            }
        }
        self.input.clear();
    }

    /// Sends a signal to the process and all of its group.
    pub fn signal(&self, signal: u8) {
        let Ok(pid) = libc::pid_t::try_from(self.pid) else {
            return;
        };
        if self.ended.is_none() {
            // SAFETY: a plain system call; the process has not been reaped, so the id is its own.
            unsafe { libc::kill(-pid, signal.into()) };
        }
    }
}
