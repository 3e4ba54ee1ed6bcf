//! The signals by which a user or a supervisor ends this process, as messages.

#![expect(unsafe_code, reason = "signal mask, signalfd")]

use crate::link::Event;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::sync::mpsc::Sender;

const CAUGHT: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// While it lives, the signals do nothing else in the thread that made it, and in those that
/// thread has started since.
pub struct Signals {
    before: libc::sigset_t,
}

impl Signals {
    /// Sends each signal of this process from here on.
    pub fn send_to(events: Sender<Event>) -> io::Result<Self> {
        let (before, source) = block()?;
        // Ends with the process, or with the next signal once nobody listens.
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || forward(source, &events))?;
        Ok(Self { before })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: a mask that this thread had before.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            )
        };
    }
}

/// Gives back the mask before, and a descriptor to read the signals from.
fn block() -> io::Result<(libc::sigset_t, File)> {
    // SAFETY: plain system calls on local sets; the descriptor is nobody else's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        for signal in CAUGHT {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok((before, File::from_raw_fd(fd)))
        }
    }
}

fn forward(mut source: File, events: &Sender<Event>) {
    let mut record = [0; size_of::<libc::signalfd_siginfo>()];
    while source.read_exact(&mut record).is_ok() {
        let number = u32::from_ne_bytes([record[0], record[1], record[2], record[3]]);
        if events.send(Event::Signal(number as i32)).is_err() {
            return;
        }
    }
}
