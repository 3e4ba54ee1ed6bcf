//! What sandboxes take from the host together, by what they do: for a monitor, and as exact as the kernel's own
//! count of pages. It walks the page tables of each, so that it is taken every few seconds at most.

use crate::engine::Engine;
use crate::live::{Phase, Sandbox};
use crate::usage::{Meter, Usage};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// How old an answer may be.
const AGE_MAX: Duration = Duration::from_secs(5);
/// A sandbox that has not said by then what it takes is busy, and counted without that.
const MEASURE_MAX: Duration = Duration::from_millis(500);
/// So are those that are left after so long in all: who asks does not wait for ever.
const COUNT_MAX: Duration = Duration::from_secs(3);

/// What some sandboxes take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// How many there are.
    pub sandboxes: u64,
    /// Pages that are theirs alone, and their processes' page tables, in KiB.
    pub private_kib: u64,
    /// Pages that they have mapped of their template, each counted for each of them, in KiB.
    pub shared_kib: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

impl Taken {
    fn add(&mut self, usage: Usage) {
        self.private_kib += usage.private_kib + usage.page_tables_kib;
        self.shared_kib += usage.shared_kib;
    }
}

/// All of them but those that run a program to its end, which are gone before they could be measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Forks made ahead.
    pub pooled: Taken,
    /// Live ones.
    pub running: Taken,
    /// Those on disk.
    pub paused: Taken,
}

/// The last one.
#[derive(Default)]
pub(crate) struct Counted(Mutex<Option<(Instant, Census)>>);

impl Counted {
    pub async fn recent(&self, engine: &Engine) -> Census {
        let mut last = self.0.lock().await;
        match *last {
            Some((at, census)) if at.elapsed() < AGE_MAX => census,
            _ => {
                let census = count(engine).await;
                *last = Some((Instant::now(), census));
                census
            }
        }
    }
}

async fn count(engine: &Engine) -> Census {
    let mut census = Census::default();
    let pools = engine.pools().await;
    let waiting: Vec<_> = pools.iter().flat_map(|pool| pool.processes()).collect();
    census.pooled.sandboxes = waiting.len() as u64;
    let measuring = tokio::task::spawn_blocking(move || measure(&waiting));
    for usage in measuring.await.unwrap_or_default() {
        census.pooled.add(usage);
    }
    let begun = Instant::now();
    for sandbox in engine.live().all() {
        let left = COUNT_MAX.saturating_sub(begun.elapsed());
        add(&mut census, &sandbox, MEASURE_MAX.min(left)).await;
    }
    census
}

fn measure(processes: &[OwnedFd]) -> Vec<Usage> {
    let meters = processes
        .iter()
        .filter_map(|process| Meter::open(process).ok());
    meters.filter_map(Meter::measure).collect()
}

async fn add(census: &mut Census, sandbox: &Sandbox, limit: Duration) {
    let status = sandbox.status();
    match status.phase {
        Phase::Running | Phase::Making | Phase::Ending => {
            census.running.sandboxes += 1;
            let measured = timeout(limit, sandbox.usage()).await;
            if let Ok(Ok(Some(usage))) = measured {
                census.running.add(usage);
            }
        }
        Phase::Paused => {
            census.paused.sandboxes += 1;
            census.paused.disk_bytes += status.disk_bytes.unwrap_or_default();
        }
        Phase::Ended => {}
    }
}
