//! The cgroup (v2) of the user's processes: limits, freezing, and out-of-memory kills.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Everything that is not the agent lives here.
const USER: &str = "/sys/fs/cgroup/user";
/// Parts of it: the warm interpreter, and the process that waits for a command.
const WARM: &str = "warm";
const LAUNCHER: &str = "launcher";
/// Who only looks at what the user's processes have left, while they stand still.
const ONLOOKERS: &str = "/sys/fs/cgroup/onlookers";
/// Memory that the user's processes cannot take, so that the agent and the kernel go on.
const RESERVED_BYTES: u64 = 40 << 20;
/// Most processes and threads of the user.
const PROCESSES_MAX: u32 = 4096;
/// Freezing waits for tasks to come out of the kernel; longer than this is a failure.
const FREEZE_MAX: Duration = Duration::from_secs(20);

/// How often it is looked whether all have stopped, should the kernel not tell.
const LOOK_EVERY: Duration = Duration::from_millis(100);

fn write(file: &str, value: &str) -> io::Result<()> {
    let path = Path::new(USER).join(file);
    fs::write(&path, value).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("write {value:?} to {}: {e}", path.display()),
        )
    })
}

/// A file of the group's.
pub fn file(name: &str) -> std::path::PathBuf {
    Path::new(USER).join(name)
}

/// All processes in it.
pub fn processes() -> Vec<i32> {
    let parts = ["", WARM, LAUNCHER].iter();
    let texts = parts.filter_map(|part| {
        fs::read_to_string(Path::new(USER).join(part).join("cgroup.procs")).ok()
    });
    let texts: Vec<String> = texts.collect();
    let lines = texts.iter().flat_map(|text| text.lines());
    lines.filter_map(|line| line.parse().ok()).collect()
}

/// Makes the group with its limits. `memory_bytes`: the guest's.
pub fn create(memory_bytes: u64) -> io::Result<()> {
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids")?;
    fs::create_dir_all(USER)?;
    write(
        "memory.max",
        &memory_bytes.saturating_sub(RESERVED_BYTES).to_string(),
    )?;
    write("pids.max", &PROCESSES_MAX.to_string())
}

/// The file by which a process puts itself into the group.
pub fn entrance() -> io::Result<fs::File> {
    fs::OpenOptions::new()
        .write(true)
        .open(Path::new(USER).join("cgroup.procs"))
}

/// The same, into a group that is not frozen with it.
pub fn onlookers_entrance() -> io::Result<fs::File> {
    fs::create_dir_all(ONLOOKERS)?;
    let path = Path::new(ONLOOKERS).join("cgroup.procs");
    fs::OpenOptions::new().write(true).open(path)
}

/// The same, into the warm interpreter's part of it.
pub fn interpreters_entrance() -> io::Result<fs::File> {
    entrance_of(WARM)
}

/// The same, into that of the process that waits for a command.
pub fn launchers_entrance() -> io::Result<fs::File> {
    entrance_of(LAUNCHER)
}

fn entrance_of(part: &str) -> io::Result<fs::File> {
    let folder = Path::new(USER).join(part);
    fs::create_dir_all(&folder)?;
    fs::OpenOptions::new()
        .write(true)
        .open(folder.join("cgroup.procs"))
}

/// The way back of [`freeze`], open: no path is looked up in a fork.
pub struct Thaw {
    switch: fs::File,
}

impl Thaw {
    /// Opens it.
    pub fn prepare() -> io::Result<Self> {
        let path = Path::new(USER).join("cgroup.freeze");
        let switch = fs::OpenOptions::new().write(true).open(path)?;
        Ok(Self { switch })
    }

    /// Lets every process of the user go on.
    pub fn thaw(&self) -> io::Result<()> {
        (&self.switch).write_all(b"0")
    }
}

/// Whether all that there is of the user's are a warm interpreter of one thread and a process that waits
/// for a command, or those of them that are expected to be there.
pub fn has_only(interpreter: bool, launcher: bool) -> bool {
    let lines = |part: &str, file: &str| {
        let path = Path::new(USER).join(part).join(file);
        fs::read_to_string(path).map_or(0, |text| text.lines().count())
    };
    lines("", "cgroup.procs") == 0
        && lines(LAUNCHER, "cgroup.procs") == usize::from(launcher)
        && lines(WARM, "cgroup.procs") == usize::from(interpreter)
        && lines(WARM, "cgroup.threads") == usize::from(interpreter)
}

/// Stops every process of the user; returns when all have stopped.
pub fn freeze() -> io::Result<()> {
    if freeze_within(FREEZE_MAX)? {
        return Ok(());
    }
    Err(io::Error::other("the user's processes do not freeze"))
}

/// Stops every process of the user. False if not all have stopped by then: those are in the kernel, and
/// stop before they come out of it.
pub fn freeze_within(limit: Duration) -> io::Result<bool> {
    write("cgroup.freeze", "1")?;
    let events = fs::File::open(Path::new(USER).join("cgroup.events"))?;
    let start = Instant::now();
    loop {
        // The kernel notifies pollers of this file (POLLPRI) at each change; re-read each time.
        if fs::read_to_string(Path::new(USER).join("cgroup.events"))?.contains("frozen 1") {
            return Ok(true);
        }
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: left.min(LOOK_EVERY).as_nanos() as i64,
        };
        let mut fds = [rustix::event::PollFd::new(
            &events,
            rustix::event::PollFlags::PRI,
        )];
        rustix::event::poll(&mut fds, Some(&timeout))?;
    }
}

/// How many of the user's processes the kernel has killed for want of memory.
pub fn out_of_memory_kills() -> u64 {
    let events = fs::read_to_string(Path::new(USER).join("memory.events")).unwrap_or_default();
    let count = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    count
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}
