//! Guest memory that tells which of its pages are touched, and in what order: the first touch of a page
//! is a fault that a thread of ours resolves and writes down (userfaultfd(2),
//! Documentation/admin-guide/mm/userfaultfd.rst). Slow, and for measuring alone.
//!
//! Whether a page is written it does not tell: under userfaultfd KVM of Linux 6.12 asks for pages that
//! the guest only reads as if they were to be written. [`GuestMemory::copied`] tells that.

#![expect(unsafe_code, reason = "ioctls of userfaultfd")]

use crate::memory::{GuestMemory, MemoryError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

const PAGE: usize = 4096;
/// Of Linux `include/uapi/linux/userfaultfd.h`.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
const REGISTER_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;

/// Why touches cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum TouchError {
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel, or this user's rights.
    #[error(
        "cannot {0}; watching a guest's pages needs root, or: sysctl \
         vm.unprivileged_userfaultfd=1"
    )]
    Userfaultfd(&'static str, #[source] io::Error),
}

/// A snapshot's memory, watched. Whatever runs in it must have stopped when this is dropped.
pub struct Touches {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    /// Pages of the memory's backing.
    touches: Vec<u32>,
    failure: Option<io::Error>,
}

impl Touches {
    /// Maps the memory of a snapshot, to be watched.
    ///
    /// # Errors
    /// See [`TouchError`].
    pub fn watch(file: &File, bytes: u64) -> Result<(GuestMemory, Self), TouchError> {
        let memory = GuestMemory::anonymous(bytes)?;
        let watcher = Watcher::over(&memory, file)?;
        let (seen, stop) = (Arc::clone(&watcher.seen), Arc::clone(&watcher.stop));
        let thread = std::thread::Builder::new().name("touches".to_owned());
        let thread = thread
            .spawn(move || watcher.run())
            .map_err(|error| TouchError::Userfaultfd("start a thread", error))?;
        let touches = Self {
            seen,
            stop,
            thread: Some(thread),
        };
        Ok((memory, touches))
    }

    /// How many there have been: a moment, to be found again in [`Touches::taken`].
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.seen).touches.len()
    }

    /// All of them so far, in order: pages of the memory's backing.
    ///
    /// # Errors
    /// If a fault could not be resolved: the guest hangs then.
    pub fn taken(&self) -> io::Result<Vec<u32>> {
        let mut seen = lock(&self.seen);
        match seen.failure.take() {
            Some(error) => Err(error),
            None => Ok(seen.touches.clone()),
        }
    }
}

impl Drop for Touches {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Watcher {
    faults: OwnedFd,
    file: File,
    /// Offset in the backing, host address, length.
    ranges: Vec<(u64, usize, usize)>,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<OwnedFd>,
}

impl Watcher {
    /// Of memory whose content is in a file.
    fn over(memory: &GuestMemory, file: &File) -> Result<Self, TouchError> {
        let failed = |what| move |error: io::Error| TouchError::Userfaultfd(what, error);
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: it watches memory of ours, and nothing else.
        let faults = unsafe { userfaultfd(flags) };
        let faults = faults.map_err(|error| failed("watch page faults")(error.into()))?;
        let mut api = [UFFD_API, 0, 0];
        ask(&faults, UFFDIO_API, &mut api).map_err(failed("watch page faults"))?;
        for (_, host, length) in memory.host_ranges() {
            let mut range = [host as u64, length as u64, REGISTER_MISSING, 0];
            ask(&faults, UFFDIO_REGISTER, &mut range).map_err(failed("watch guest memory"))?;
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(|error| failed("make an eventfd")(error.into()))?);
        Ok(Self {
            faults,
            file: file.try_clone().map_err(failed("open the memory twice"))?,
            ranges: memory
                .host_ranges()
                .into_iter()
                .map(|(offset, host, length)| (offset, host as usize, length))
                .collect(),
            seen: Arc::default(),
            stop,
        })
    }

    fn run(self) {
        if let Err(error) = self.serve() {
            lock(&self.seen).failure = Some(error);
        }
    }

    /// For as long as its owner wants it.
    fn serve(&self) -> io::Result<()> {
        loop {
            let mut fds = [
                PollFd::new(&self.faults, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
            let mut message = [0; MESSAGE_BYTES];
            match rustix::io::read(&self.faults, &mut message[..]) {
                Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGEFAULT => self.resolve(&message)?,
                Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn resolve(&self, message: &[u8; MESSAGE_BYTES]) -> io::Result<()> {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&message[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        let address = word(16) & !(PAGE as u64 - 1);
        let range = self
            .ranges
            .iter()
            .find(|(_, host, length)| (*host as u64..(host + length) as u64).contains(&address));
        let Some(&(offset, host, _)) = range else {
            return Err(io::Error::other("a fault outside of guest memory"));
        };
        let offset = offset + (address - host as u64);
        let page = (offset / PAGE as u64) as u32;
        // Before who has touched it goes on.
        lock(&self.seen).touches.push(page);
        match self.bring(address, offset) {
            Ok(()) => {}
            // Two threads have met at the page: it is there, and this one has only to look again. Or the
            // memory has gone meanwhile, and whoever waits must learn that: a machine that ends waits for it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOENT)) => {
                lock(&self.seen).touches.pop();
                let mut range = [address, PAGE as u64];
                ask(&self.faults, UFFDIO_WAKE, &mut range)?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn bring(&self, address: u64, offset: u64) -> io::Result<()> {
        let mut content = [0_u8; PAGE];
        self.file.read_exact_at(&mut content, offset)?;
        let source = content.as_ptr() as u64;
        let mut copy = [address, source, PAGE as u64, 0, 0];
        ask(&self.faults, UFFDIO_COPY, &mut copy)
    }
}

/// `argument`: the call's structure, all of whose fields are words.
fn ask<const N: usize>(
    faults: &OwnedFd,
    call: libc::Ioctl,
    argument: &mut [u64; N],
) -> io::Result<()> {
    // SAFETY: each call reads and writes the words of its structure, whose size is in its number;
    // pages appear in memory of ours that nobody holds a reference into.
    let result = unsafe { libc::ioctl(faults.as_raw_fd(), call, argument.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_touch_of_memory_that_has_gone_meanwhile_is_no_failure() {
        let file = tempfile::tempfile().unwrap();
        let bytes = crate::memory::MEMORY_MIN_BYTES;
        file.set_len(bytes).unwrap();
        let memory = GuestMemory::anonymous(bytes).unwrap();
        let watcher = Watcher::over(&memory, &file).unwrap();
        let mut message = [0; MESSAGE_BYTES];
        message[0] = EVENT_PAGEFAULT;
        message[16..24].copy_from_slice(&(watcher.ranges[0].1 as u64).to_ne_bytes());
        watcher.resolve(&message).unwrap();
        assert_eq!(lock(&watcher.seen).touches, [0]);
        // A machine is dropped while one of its threads waits for a page.
        drop(memory);
        watcher.resolve(&message).unwrap();
        assert_eq!(lock(&watcher.seen).touches, [0]);
    }

    #[test]
    fn who_waits_for_memory_that_has_gone_meanwhile_is_woken() {
        let file = tempfile::tempfile().unwrap();
        let bytes = crate::memory::MEMORY_MIN_BYTES;
        file.set_len(bytes).unwrap();
        let memory = GuestMemory::anonymous(bytes).unwrap();
        let watcher = Watcher::over(&memory, &file).unwrap();
        let address = watcher.ranges[0].1;
        let zeros = File::open("/dev/zero").unwrap();
        let reading = std::thread::spawn(move || {
            // SAFETY: the kernel alone writes there, to nobody's references, and checks the address.
            unsafe { libc::read(zeros.as_raw_fd(), address as *mut libc::c_void, 1) }
        });
        let mut fds = [PollFd::new(&watcher.faults, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        let mut message = [0; MESSAGE_BYTES];
        rustix::io::read(&watcher.faults, &mut message[..]).unwrap();
        drop(memory);
        watcher.resolve(&message).unwrap();
        assert_eq!(reading.join().unwrap(), -1);
        assert!(lock(&watcher.seen).touches.is_empty());
    }

    #[test]
    fn first_touches_are_told_in_order() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes = crate::memory::MEMORY_MIN_BYTES;
        file.set_len(bytes).unwrap();
        let content: Vec<u8> = (0..16 * 4096_u32).map(|n| (n / 4096) as u8).collect();
        file.write_all(&content).unwrap();
        let (memory, touches) = match Touches::watch(&file, bytes) {
            Ok(watched) => watched,
            // This user may not: then that is what is told, with the remedy.
            Err(error) => return assert!(error.to_string().contains("sysctl"), "{error}"),
        };
        let map = memory.map_ref();
        let read = |page: u64| map.read_obj::<u8>(GuestAddress(page << 12)).unwrap();
        assert_eq!((read(3), read(3)), (3, 3));
        map.write_obj(9_u8, GuestAddress((3 << 12) + 1)).unwrap();
        map.write_obj(9_u8, GuestAddress(5 << 12)).unwrap();
        assert_eq!((read(5), read(3), read(7000)), (9, 3, 0));
        assert_eq!(touches.count(), 3);
        assert_eq!(touches.taken().unwrap(), [3, 5, 7000]);
    }
}
