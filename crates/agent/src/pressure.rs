//! Memory that is used up without the kernel ending anybody. A group at its limit whose processes need the
//! pages of their own programs has those dropped and read again, over and over: the kernel sees progress
//! where there is none. So the agent looks: if the group has been at its limit for a while, and next to
//! nothing in it could be dropped, its largest process is killed, as the kernel would.

#![expect(unsafe_code, reason = "kill")]

use crate::cgroup;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long it may go on.
const PRESSED_MAX: Duration = Duration::from_secs(3);
/// How often it is looked meanwhile.
pub const LOOK_EVERY: Duration = Duration::from_millis(250);
/// What of the limit cannot be dropped, in percent, when nothing is left to work with.
const HELD_PERCENT: u64 = 95;
const EVENTS_BYTES: usize = 512;

/// Watches the group of the user's processes.
pub struct Pressure {
    /// Notifies who polls it of each change (Documentation/admin-guide/cgroup-v2.rst, memory.events).
    events: fs::File,
    /// How often the limit has been reached.
    reached: u64,
    since: Option<Instant>,
}

impl Pressure {
    /// From here on.
    pub fn watch() -> io::Result<Self> {
        Ok(Self {
            events: fs::File::open(cgroup::file("memory.events"))?,
            reached: 0,
            since: None,
        })
    }

    /// For polling, for `PollFlags::PRI`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Whether it is to be looked again soon.
    pub fn is_pressed(&self) -> bool {
        self.since.is_some()
    }

    /// Looks; true if a process was killed.
    pub fn look(&mut self) -> bool {
        let mut bytes = [0; EVENTS_BYTES];
        let count = self.events.read_at(&mut bytes, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&bytes[..count]);
        let reached = field(&text, "max ").unwrap_or(0);
        let grows = reached > self.reached;
        self.reached = reached;
        if !grows {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < PRESSED_MAX || !is_held() {
            return false;
        }
        self.since = None;
        kill_largest()
    }
}

/// Whether what the group has cannot be dropped: its own pages, and files in memory.
fn is_held() -> bool {
    let read = |name| fs::read_to_string(cgroup::file(name)).unwrap_or_default();
    let (stat, max) = (read("memory.stat"), read("memory.max"));
    let part = |name| field(&stat, name).unwrap_or(0);
    let reclaimable = part("slab_reclaimable ");
    let held = part("anon ") + part("shmem ") + part("kernel ").saturating_sub(reclaimable);
    let max: u64 = max.trim().parse().unwrap_or(u64::MAX);
    held / HELD_PERCENT >= max / 100
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|number| number.trim().parse().ok())
}

fn kill_largest() -> bool {
    let resident = |pid: &i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        text.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let largest = cgroup::processes()
        .into_iter()
        .filter_map(|pid| Some((resident(&pid)?, pid)))
        .max();
    let Some((_, pid)) = largest else {
        return false;
    };
    // SAFETY: a plain system call; at worst the process has just ended by itself.
    unsafe { libc::kill(pid, libc::SIGKILL) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_read_by_its_whole_name() {
        let text = "low 1\nmax 17\noom_kill 2\nanon_thp 9\nanon 5\n";
        assert_eq!(field(text, "max "), Some(17));
        assert_eq!(field(text, "anon "), Some(5));
        assert_eq!(field(text, "high "), None);
    }
}
