//! What a runner costs the host, from /proc (proc_pid_smaps(5), proc_pid_status(5)).

use crate::zygote::Runner;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

/// What a sandbox costs the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Pages that belong to its process alone, in KiB: guest pages that it changed, the process's
    /// own stacks and heap.
    pub private_kib: u64,
    /// Pages that it has mapped and shares with others, in KiB: above all its template's.
    pub shared_kib: u64,
    /// Page tables of the process, in KiB.
    pub page_tables_kib: u64,
    /// Processor time that it has used.
    pub cpu: Duration,
}

/// Files of a process, opened while it surely was that one.
pub(crate) struct Meter {
    rollup: fs::File,
    status: fs::File,
    stat: fs::File,
}

impl Meter {
    /// Measures a runner, off the runtime's threads: the kernel walks all of its page tables.
    /// `None` if it has ended, or may not be looked at.
    pub async fn of(runner: &Runner) -> Option<Usage> {
        let meter = Self::open(&runner.process).ok()?;
        let measuring = tokio::task::spawn_blocking(|| meter.measure());
        measuring.await.ok()?
    }

    /// For the process behind a pidfd.
    pub fn open(process: &OwnedFd) -> io::Result<Self> {
        let folder = PathBuf::from("/proc").join(pid(process)?.to_string());
        let meter = Self {
            rollup: fs::File::open(folder.join("smaps_rollup"))?,
            status: fs::File::open(folder.join("status"))?,
            stat: fs::File::open(folder.join("stat"))?,
        };
        // An id is given to another process only after this one has been reaped, and then its
        // pidfd has none any more.
        pid(process)?;
        Ok(meter)
    }

    /// Measures; `None` once the process has ended.
    pub fn measure(mut self) -> Option<Usage> {
        let (mut rollup, mut status, mut stat) = (String::new(), String::new(), String::new());
        self.rollup.read_to_string(&mut rollup).ok()?;
        self.status.read_to_string(&mut status).ok()?;
        self.stat.read_to_string(&mut stat).ok()?;
        // Pages of a file in memory (tmpfs) are always dirty; what was copied is anonymous.
        let copied = kib(&rollup, "Private_Dirty:")?.min(kib(&rollup, "Anonymous:")?);
        Some(Usage {
            private_kib: copied + kib(&rollup, "Private_Hugetlb:")?,
            shared_kib: kib(&rollup, "Rss:")?.saturating_sub(copied),
            page_tables_kib: kib(&status, "VmPTE:")?,
            cpu: cpu(&stat)?,
        })
    }
}

/// The id that a process has here (pidfd_open(2): the field Pid of fdinfo).
pub(crate) fn pid(process: &OwnedFd) -> io::Result<u32> {
    let number = process.as_fd().as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    let pid = line.and_then(|pid| pid.trim().parse().ok());
    pid.filter(|pid| *pid > 0)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line?.split_whitespace().next()?.parse().ok()
}

/// Fields 14 and 15 of proc_pid_stat(5), in clock ticks; the second may have any characters.
fn cpu(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let ticks = ticks()? + ticks()?;
    let millis = ticks * 1000 / rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_millis(millis))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::process::{Command, Stdio};

    #[test]
    fn a_field_is_read_by_its_whole_name() {
        let text = "Private_Clean:   4 kB\nPrivate_Dirty:     12 kB\n";
        assert_eq!(kib(text, "Private_Dirty:"), Some(12));
        assert_eq!(kib(text, "VmPTE:"), None);
    }

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a) b) S 1 1 1 0 -1 4 5 6 7 8 150 50 0 0 20 0";
        assert!(cpu(stat).unwrap() >= Duration::from_millis(200));
        assert_eq!(cpu("7 (a) S 1"), None);
    }

    #[test]
    fn a_process_is_measured_while_it_lives_and_not_after() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let meter = Meter::open(&process).unwrap();
        assert!(meter.measure().unwrap().page_tables_kib > 0);
        let meter = Meter::open(&process).unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(meter.measure(), None);
        assert!(Meter::open(&process).is_err());
    }
}
