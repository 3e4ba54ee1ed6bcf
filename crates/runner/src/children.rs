//! The runners of a zygote process, from fork to reaping.

#![expect(unsafe_code, reason = "sigprocmask, signalfd, wait4, kill")]

use crate::control::Spent;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// Child processes of a process with one thread.
pub struct Children {
    /// Readable when a child has ended.
    signals: OwnedFd,
    running: HashSet<u32>,
    /// How many there have been.
    made: u32,
}

impl Children {
    /// None so far. Blocks SIGCHLD in this process from here on.
    pub fn new() -> io::Result<Self> {
        let set = block();
        // SAFETY: makes a descriptor that is ours.
        let signals = unsafe {
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Self {
            signals,
            running: HashSet::new(),
            made: 0,
        })
    }

    /// In a child that has children of its own: none so far. A descriptor for signals tells of those of the
    /// process that reads it (signalfd(2)), so that it can stay.
    pub fn begin_anew(&mut self) {
        block();
        self.running.clear();
        self.made = 0;
    }

    /// One more, just forked.
    pub fn add(&mut self, pid: u32) {
        self.running.insert(pid);
        self.made = self.made.wrapping_add(1);
    }

    /// How many there have been: the next one's number.
    pub fn made(&self) -> u32 {
        self.made
    }

    /// Gives `ended` the process id and wait status of each child that has ended since, and what it has taken.
    pub fn reap(
        &mut self,
        mut ended: impl FnMut(u32, i32, Spent) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut drained = [0; 128];
        while rustix::io::read(&self.signals, &mut drained[..]).is_ok() {}
        while let Some((pid, status, spent)) = self.wait_for_any(libc::WNOHANG) {
            ended(pid, status, spent)?;
        }
        Ok(())
    }

    /// Kills one; it is reaped with the others.
    pub fn end(&self, pid: u32) {
        if self.running.contains(&pid) {
            // SAFETY: a child that has not been reaped keeps its id.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        }
    }

    /// Kills and reaps those that still run. SIGKILL is not refused, so the wait ends; should it
    /// not, the engine kills this process's namespace.
    pub fn end_all(&mut self) {
        for pid in &self.running {
            self.end(*pid);
        }
        while self.wait_for_any(0).is_some() {}
    }

    fn wait_for_any(&mut self, flags: i32) -> Option<(u32, i32, Spent)> {
        let mut status = 0;
        // SAFETY: all zeroes are one.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        let pid = loop {
            // SAFETY: writes one integer, and one structure of its own.
            let pid = unsafe { libc::wait4(-1, &raw mut status, flags, &raw mut usage) };
            if pid >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                break pid;
            }
        };
        let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0)?;
        self.running.remove(&pid);
        Some((pid, status, spent(&usage)))
    }
}

/// As getrusage(2) tells it.
fn spent(usage: &libc::rusage) -> Spent {
    let number = |value: i64| u64::try_from(value).unwrap_or_default();
    let micros = |time: libc::timeval| number(time.tv_sec) * 1_000_000 + number(time.tv_usec);
    Spent {
        faults: number(usage.ru_minflt) + number(usage.ru_majflt),
        cpu_us: micros(usage.ru_utime) + micros(usage.ru_stime),
    }
}

/// Has the ends of children told by the descriptor alone.
fn block() -> libc::sigset_t {
    // SAFETY: sets how one signal is met, and blocks it in this only thread.
    unsafe {
        // Inherited as ignored, it would make children vanish unseen (sigaction(2)).
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    }
}

impl AsFd for Children {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}
