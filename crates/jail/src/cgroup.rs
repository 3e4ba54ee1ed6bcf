//! Limits of a group of processes (Linux Documentation/admin-guide/cgroup-v2.rst): what sandboxes
//! may take from their host together.
//!
//! A group is made before its processes are jailed, where this user may make one: root below the
//! hierarchy's root; others below their own group, if it was given to them and nobody else is in it.

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The folder of all groups of ours.
const OURS: &str = "zygote";
/// Where an engine moves that was alone in its group.
const ENGINE: &str = "zygote-engine";
const CONTROLLERS: &str = "+memory +pids +cpu";
/// How long killed processes may take to be gone.
const END_MAX: Duration = Duration::from_secs(5);

/// What its processes may take together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory, page cache included; no swap.
    pub memory_max_bytes: u64,
    /// Processes and threads.
    pub processes_max: u32,
    /// Share of the processors when others want them too; a group's default is 100.
    pub cpu_weight: u32,
}

/// A group of our own. Dropped, its processes are killed, and it goes.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    /// Its folder, locked: while somebody has it open, the group is nobody's to sweep.
    lock: OwnedFd,
}

impl Group {
    /// Makes an empty group with these limits.
    ///
    /// # Errors
    /// If this host, or this user, has no group to give.
    pub fn create(limits: &Limits) -> io::Result<Self> {
        let base = base()?;
        sweep(&base);
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        let lock = lock(&path)?;
        let group = Self { path, lock };
        group.set("memory.max", &limits.memory_max_bytes.to_string())?;
        // Not there where the kernel has no swap.
        let _ = group.set("memory.swap.max", "0");
        group.set("pids.max", &limits.processes_max.to_string())?;
        group.set("cpu.weight", &limits.cpu_weight.to_string())?;
        Ok(group)
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        write(&self.path.join(file), value)
    }

    /// One that a process had made which is no more; with its lock.
    #[must_use]
    pub fn adopt(path: PathBuf, lock: OwnedFd) -> Self {
        Self { path, lock }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What keeps it from being swept, for as long as it is open somewhere.
    pub fn lock(&self) -> &OwnedFd {
        &self.lock
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Before Linux 5.14 there is no such file; the processes end by their sockets.
        let _ = self.set("cgroup.kill", "1");
        await_empty(&self.path);
        let _ = fs::remove_dir(&self.path);
        if let Some(base) = self.path.parent() {
            // Fails while others use it.
            let _ = fs::remove_dir(base);
        }
    }
}

/// Puts this process into a group, for good.
///
/// # Errors
/// If the group is gone, or full.
pub fn enter(group: &Path) -> io::Result<()> {
    write(&group.join("cgroup.procs"), "0")
}

/// Has the kernel end this process and its children before anything else when memory is short
/// (proc_pid_oom_score_adj(5)).
///
/// # Errors
/// If there is no /proc.
pub fn die_first() -> io::Result<()> {
    write(Path::new("/proc/self/oom_score_adj"), "1000")
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// The folder below which groups can be made, its controllers given to them.
fn base() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let root = mount_point(&mounts).ok_or_else(|| io::Error::other("no cgroup v2 hierarchy"))?;
    let parent = if rustix::process::geteuid().is_root() {
        root
    } else {
        let own = root.join(own(&fs::read_to_string("/proc/self/cgroup")?));
        match own.parent() {
            Some(parent) if own.ends_with(ENGINE) => parent.to_owned(),
            _ => own,
        }
    };
    give_controllers(&parent)?;
    let base = parent.join(OURS);
    match fs::create_dir(&base) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    write(&base.join("cgroup.subtree_control"), CONTROLLERS)?;
    Ok(base)
}

/// A group whose controllers are given to those below it may have no processes of its own: ours, if
/// it is the only one, moves down.
fn give_controllers(parent: &Path) -> io::Result<()> {
    let control = parent.join("cgroup.subtree_control");
    let has_all = |text: String| {
        ["memory", "pids", "cpu"]
            .iter()
            .all(|name| has(&text, name))
    };
    if fs::read_to_string(&control).is_ok_and(has_all) {
        return Ok(());
    }
    match write(&control, CONTROLLERS) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            let others = fs::read_to_string(parent.join("cgroup.procs"))?;
            if others.trim() != std::process::id().to_string() {
                let path = parent.display();
                return Err(io::Error::other(format!("other processes are in {path}")));
            }
            let engine = parent.join(ENGINE);
            fs::create_dir_all(&engine)?;
            enter(&engine)?;
            write(&control, CONTROLLERS)
        }
        other => other,
    }
}

fn has(text: &str, name: &str) -> bool {
    text.split_whitespace().any(|word| word == name)
}

fn mount_point(mounts: &str) -> Option<PathBuf> {
    let mut lines = mounts.lines().map(|line| line.split(' '));
    lines.find_map(|mut words| {
        let (place, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    })
}

/// This process's own group, relative to the hierarchy's root.
fn own(cgroup: &str) -> PathBuf {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"));
    PathBuf::from(path.unwrap_or_default())
}

fn lock(group: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = open(group, flags, Mode::empty())?;
    flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

/// Removes groups whose makers were killed, and that nobody holds in their place.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name
            .split('-')
            .next()
            .and_then(|pid| pid.parse::<u32>().ok());
        if maker.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
            && lock(&entry.path()).is_ok()
        {
            let _ = write(&entry.path().join("cgroup.kill"), "1");
            await_empty(&entry.path());
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Waits until no process is left: the kernel tells pollers of `cgroup.events` of each change.
fn await_empty(group: &Path) {
    let Ok(mut events) = fs::File::open(group.join("cgroup.events")) else {
        return;
    };
    let begun = Instant::now();
    while begun.elapsed() < END_MAX {
        let mut text = String::new();
        let read = events
            .rewind()
            .and_then(|()| events.read_to_string(&mut text));
        if read.is_err() || text.contains("populated 0") {
            return;
        }
        let left = END_MAX.saturating_sub(begun.elapsed());
        let left = rustix::time::Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [rustix::event::PollFd::new(
            &events,
            rustix::event::PollFlags::PRI,
        )];
        let _ = rustix::event::poll(&mut fds, Some(&left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_of_version_2_is_found_among_others() {
        let mounts = "cgroup /sys/fs/cgroup/memory cgroup rw 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0\n";
        let found = mount_point(mounts);
        assert_eq!(found, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("tmpfs /tmp tmpfs rw 0 0\n"), None);
        assert_eq!(
            own("1:cpu:/x\n0::/user.slice/a\n"),
            Path::new("user.slice/a")
        );
        assert_eq!(own("0::/\n"), Path::new(""));
    }
}
