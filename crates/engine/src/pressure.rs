//! What the kernel does too late: a group at its limit of memory whose processes need file pages,
//! as all forks of a snapshot do, drops and reads those pages again and again instead of ending
//! somebody. So the kernel is asked to tell when everybody in the group waits for memory
//! (Documentation/accounting/psi.rst), and then the process that has taken most ends.

#![expect(unsafe_code, reason = "a descriptor for tokio to wait for")]

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// All wait for 0.1 s in a second, in microseconds. A group that stood still in the lab for a minute
/// waited for 0.17 to 0.18 s of each.
const TRIGGER: &str = "full 100000 1000000";
/// What the processes are called that may be ended.
const RUNNER: &str = "zygote-runner";

/// Ends runners of a group that takes all of its memory, one at a time, for as long as it is polled.
/// Returns at once where the kernel does not tell.
pub async fn relieve(group: PathBuf) {
    let Ok(told) = listen(&group) else { return };
    loop {
        let Ok(mut ready) = told.ready(Interest::PRIORITY).await else {
            return;
        };
        ready.clear_ready();
        drop(ready);
        let group = group.clone();
        // Reads some files of /proc for each process.
        if tokio::task::spawn_blocking(move || end_largest(&group))
            .await
            .is_err()
        {
            return;
        }
    }
}

fn listen(group: &Path) -> io::Result<AsyncFd<File>> {
    let path = group.join("memory.pressure");
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    file.write_all(TRIGGER.as_bytes())?;
    // SAFETY: the file is moved in, and is nobody else's to close.
    Ok(unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?)
}

/// Whether what its processes have taken for themselves fills most of the group, so that there is no
/// room for the file pages that they need. That the group is at its limit tells nothing: file pages
/// alone fill it. When it is not so the host is short, and that is the host's to settle.
fn is_full(group: &Path) -> bool {
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_default();
    let (stat, max) = (read("memory.stat"), read("memory.max"));
    let own = stat.lines().find_map(|line| line.strip_prefix("anon "));
    let number = |text: &str| text.trim().parse::<u64>().ok();
    match (own.and_then(number), number(&max)) {
        (Some(own), Some(max)) => own >= max / 4 * 3,
        // `max` stands for no limit.
        _ => false,
    }
}

fn end_largest(group: &Path) {
    if !is_full(group) {
        return;
    }
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let processes = processes.lines().filter_map(|pid| pid.parse::<i32>().ok());
    let largest = processes
        .filter_map(|pid| Some((own_pages(pid)?, pid)))
        .max();
    let Some(pid) = largest.and_then(|(_, pid)| Pid::from_raw(pid)) else {
        return;
    };
    // The id may be another's by now, who is not in the group.
    if let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
        && own_pages(pid.as_raw_nonzero().get()).is_some()
    {
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
}

/// How many pages a runner has for itself (proc_pid_statm(5)); `None` for another process.
fn own_pages(pid: i32) -> Option<u64> {
    let folder = PathBuf::from("/proc").join(pid.to_string());
    let name = fs::read_to_string(folder.join("comm")).ok()?;
    if name.trim_end() != RUNNER {
        return None;
    }
    let pages = fs::read_to_string(folder.join("statm")).ok()?;
    let mut words = pages.split_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, shared) = (words.next()?.ok()?, words.next()?.ok()?);
    Some(resident.saturating_sub(shared))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_group_full_of_its_own_pages_is_relieved() {
        let group = tempfile::tempdir().unwrap();
        let set = |file: &str, text: &str| fs::write(group.path().join(file), text).unwrap();
        assert!(!is_full(group.path()), "no files");
        set("memory.max", "1000\n");
        set("memory.stat", "anon 760\nfile 240\nanon_thp 0\n");
        assert!(is_full(group.path()));
        set("memory.stat", "anon 20\nfile 970\nanon_thp 0\n");
        assert!(!is_full(group.path()), "file pages alone");
        set("memory.stat", "anon 760\nfile 240\n");
        set("memory.max", "max\n");
        assert!(!is_full(group.path()), "no limit");
    }

    #[test]
    fn other_processes_are_no_runners() {
        assert_eq!(own_pages(std::process::id() as i32), None);
        assert_eq!(own_pages(i32::MAX), None);
    }
}
