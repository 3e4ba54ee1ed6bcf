//! Signals to the agent: children end, and the warm interpreter tells that it is about to.

#![expect(unsafe_code, reason = "signalfd")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a signal says.
pub enum Signal {
    /// Children have ended, or an orphan has.
    Child,
    /// A process tells the exit status that it would end with (`python/ending.py`).
    Told {
        /// Which process says so; it may lie.
        pid: u32,
        /// The status.
        status: u8,
    },
}

/// The agent's signals, blocked and read from a descriptor.
pub struct Signals {
    descriptor: OwnedFd,
}

impl Signals {
    /// From here on.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a set with two signals, blocked for this only thread and read from the descriptor.
        let descriptor = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
            libc::sigaddset(&raw mut set, libc::SIGRTMIN());
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Self { descriptor })
    }

    /// The next one that has come.
    pub fn next(&self) -> Option<Signal> {
        const BYTES: usize = size_of::<libc::signalfd_siginfo>();
        let mut bytes = [0; BYTES];
        let length = rustix::io::read(&self.descriptor, &mut bytes[..]).ok()?;
        if length != BYTES {
            return None;
        }
        // SAFETY: plain integers, of which every value is valid.
        let info: libc::signalfd_siginfo = unsafe { std::mem::transmute(bytes) };
        Some(if info.ssi_signo == libc::SIGCHLD as u32 {
            Signal::Child
        } else {
            Signal::Told {
                pid: info.ssi_pid,
                status: info.ssi_int as u8,
            }
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
