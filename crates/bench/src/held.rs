//! What sandboxes cost while they are held: many of them at once, at three moments.

use crate::runs::{RunError, request};
use futures_util::future::join_all;
use serde::Serialize;
use std::fs;
use std::io;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use zygote_engine::{Event, Pool, Program, PythonSource, Stdin, run};

/// How long sandboxes may take to get where they are to be held.
const HOLD_MAX: Duration = Duration::from_secs(600);
/// How long a killed one may take to be gone.
const GONE_MAX: Duration = Duration::from_secs(60);
/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Lines of /proc/meminfo that a sandbox adds to: its pages, then what the kernel keeps for it.
const USER: [&str; 1] = ["AnonPages:"];
const KERNEL: [&str; 5] = [
    "PageTables:",
    "SecPageTables:",
    "KernelStack:",
    "Slab:",
    "Percpu:",
];

/// A sandbox's cost, the mean of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Pages that are its process's alone.
    pub user_kib: f64,
    /// Page tables, KVM's among them, and objects of the host's kernel.
    pub kernel_kib: f64,
}

/// At three moments.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    /// How many were held at once.
    pub count: usize,
    /// Parked: nothing has run. What was copied ahead is among its pages.
    pub parked: Cost,
    /// After `print(1+1)`.
    pub after_print: Cost,
    /// After a product of two numpy matrices of 100 × 100.
    pub after_numpy: Option<Cost>,
    /// Until the process of a killed one is gone, in milliseconds, the median.
    pub teardown_ms: f64,
}

const PRINT: &str = "print(1+1, flush=True)\nimport sys\nsys.stdin.read()";
const NUMPY: &str = "import numpy\nnumpy.ones((100, 100)) @ numpy.ones((100, 100))\n\
    print(1, flush=True)\nimport sys\nsys.stdin.read()";

/// Holds so many at once. `pool`: with room for as many, and filled by nobody else.
///
/// # Errors
/// If a sandbox does not work, or the host does not tell.
pub async fn hold(pool: &Pool, count: usize) -> Result<Held, RunError> {
    let before = Usage::now()?;
    if !pool.filled(count).await {
        return Err(RunError::new("the pool does not fill"));
    }
    let parked = Usage::now()?.since(before, count);
    let (after_print, teardown_ms) = at(pool, PRINT, count).await?;
    let after_numpy = at(pool, NUMPY, count).await.ok().map(|(cost, _)| cost);
    Ok(Held {
        count,
        parked,
        after_print,
        after_numpy,
        teardown_ms,
    })
}

/// Runs a program in so many forks of their own until each has said something.
async fn at(pool: &Pool, code: &str, count: usize) -> Result<(Cost, f64), RunError> {
    let before = Usage::now()?;
    let runners_before = runners();
    let (said, mut heard) = mpsc::channel(count);
    let sandbox = || async {
        let (sender, mut events) = mpsc::channel::<Event>(16);
        let (_input, stdin) = mpsc::channel(1);
        let source = PythonSource::Code(code.as_bytes().to_vec());
        let mut order = request(Program::Python {
            source,
            arguments: Vec::new(),
        });
        order.stdin = Stdin::Stream(stdin);
        let telling = async {
            while let Some(event) = events.recv().await {
                if let Event::Stdout(_) = event {
                    let _ = said.send(()).await;
                }
            }
        };
        tokio::join!(run(pool.zygote(), order, sender), telling)
    };
    let holding = join_all((0..count).map(|_| sandbox()));
    let measuring = async {
        for _ in 0..count {
            let one = timeout(HOLD_MAX, heard.recv()).await;
            one.map_err(|_| RunError::new("a sandbox that is held says nothing"))?;
        }
        let usage = Usage::now()?;
        Ok::<_, RunError>((usage.since(before, count), runners()))
    };
    let (cost, running) = tokio::select! {
        _ = holding => return Err(RunError::new("a sandbox that is held has ended")),
        measured = measuring => measured?,
    };
    // Here all are dropped, and with them killed.
    let begun = Instant::now();
    let ours: Vec<u32> = running
        .into_iter()
        .filter(|pid| !runners_before.contains(pid))
        .collect();
    let each = gone(&ours, begun).await;
    Ok((cost, each))
}

/// Until all are gone; the time of one, in milliseconds, if they go one after the other.
async fn gone(pids: &[u32], begun: Instant) -> f64 {
    let is_there = |pid: &u32| fs::exists(format!("/proc/{pid}")).unwrap_or(false);
    while pids.iter().any(is_there) && begun.elapsed() < GONE_MAX {
        sleep(LOOK_EVERY).await;
    }
    begun.elapsed().as_secs_f64() * 1000.0 / pids.len().max(1) as f64
}

/// Runner processes of this host.
fn runners() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim() == "zygote-runner")
    })
    .collect()
}

/// Memory of the whole host, in KiB.
#[derive(Clone, Copy)]
struct Usage {
    user: f64,
    kernel: f64,
}

impl Usage {
    fn now() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/meminfo")?))
    }

    fn parse(text: &str) -> Self {
        let sum = |names: &[&str]| {
            let line = |name: &&str| text.lines().find_map(|line| line.strip_prefix(*name));
            let kib = |name| line(name)?.split_whitespace().next()?.parse::<f64>().ok();
            names.iter().filter_map(kib).sum()
        };
        Self {
            user: sum(&USER),
            kernel: sum(&KERNEL),
        }
    }

    fn since(self, before: Self, count: usize) -> Cost {
        Cost {
            user_kib: (self.user - before.user) / count as f64,
            kernel_kib: (self.kernel - before.kernel) / count as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_the_hosts_growth_by_their_number() {
        let before = Usage::parse("AnonPages: 100 kB\nPageTables: 10 kB\nSlab: 5 kB\nX: 1 kB\n");
        let after = Usage::parse("AnonPages: 300 kB\nPageTables: 20 kB\nSlab: 15 kB\nX: 9 kB\n");
        let cost = after.since(before, 10);
        assert_eq!((cost.user_kib, cost.kernel_kib), (20.0, 2.0));
    }
}
