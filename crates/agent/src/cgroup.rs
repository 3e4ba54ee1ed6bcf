//! The cgroup (v2) of the user's processes: limits, freezing, and out-of-memory kills.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Everything that is not the agent lives here.
const USER: &str = "/sys/fs/cgroup/user";
/// A group in it: the warm interpreter, while it waits.
const WARM: &str = "warm";
/// Memory that the user's processes cannot take, so that the agent and the kernel go on.
const RESERVED_BYTES: u64 = 40 << 20;
/// Most processes and threads of the user.
const PROCESSES_MAX: u32 = 4096;
/// Freezing waits for tasks to come out of the kernel; longer than this is a failure.
const FREEZE_MAX: Duration = Duration::from_secs(20);

fn write(file: &str, value: &str) -> io::Result<()> {
    let path = Path::new(USER).join(file);
    fs::write(&path, value).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("write {value:?} to {}: {e}", path.display()),
        )
    })
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

/// The same, into the warm interpreter's part of it.
pub fn interpreters_entrance() -> io::Result<fs::File> {
    fs::create_dir_all(Path::new(USER).join(WARM))?;
    let path = Path::new(USER).join(WARM).join("cgroup.procs");
    fs::OpenOptions::new().write(true).open(path)
}

/// Lets frozen processes go on, without looking for their group first.
pub struct Thaw {
    all: fs::File,
    interpreter: Option<fs::File>,
    /// Whether the interpreter stays frozen when all others go on.
    sleeps: bool,
}

impl Thaw {
    /// For the processes that there are now. An interpreter that is alone, and so does nothing but wait
    /// for a request, need not wake up for less.
    pub fn prepare() -> io::Result<Self> {
        let switch = |folder: &Path| {
            let file = folder.join("cgroup.freeze");
            fs::OpenOptions::new().write(true).open(file)
        };
        let warm = Path::new(USER).join(WARM);
        let tasks = |file: &str| fs::read_to_string(warm.join(file)).unwrap_or_default();
        let is_one = |text: String| text.lines().count() == 1;
        let sleeps = is_one(tasks("cgroup.procs")) && is_one(tasks("cgroup.threads"));
        let thaw = Self {
            all: switch(Path::new(USER))?,
            interpreter: switch(&warm).ok(),
            sleeps,
        };
        if sleeps {
            thaw.set(&thaw.interpreter, "1")?;
        }
        Ok(thaw)
    }

    /// All but an interpreter that sleeps.
    pub fn all(&self) -> io::Result<()> {
        (&self.all).write_all(b"0")
    }

    /// Whether the interpreter sleeps still.
    pub fn sleeps(&self) -> bool {
        self.sleeps
    }

    /// The interpreter.
    pub fn interpreter(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.sleeps) {
            self.set(&self.interpreter, "0")?;
        }
        Ok(())
    }

    fn set(&self, file: &Option<fs::File>, value: &str) -> io::Result<()> {
        match file {
            Some(file) => (&*file).write_all(value.as_bytes()),
            None => Ok(()),
        }
    }
}

/// Stops every process of the user; returns when all have stopped.
pub fn freeze() -> io::Result<()> {
    write("cgroup.freeze", "1")?;
    let events = fs::File::open(Path::new(USER).join("cgroup.events"))?;
    let start = Instant::now();
    loop {
        // The kernel notifies pollers of this file (POLLPRI) at each change; re-read each time.
        if fs::read_to_string(Path::new(USER).join("cgroup.events"))?.contains("frozen 1") {
            return Ok(());
        }
        let left = FREEZE_MAX.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(io::Error::other("the user's processes do not freeze"));
        }
        let timeout = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
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
