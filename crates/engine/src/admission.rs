//! How many sandboxes there may be, and what they may take from the host together. One for a whole
//! engine; who comes when it is full is refused at once, with the reason.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zygote_runner::control::Spent;

/// How old the host's word about its memory may be: asking takes 20 µs, and a fork must not.
const MEMORY_AGE_MAX: Duration = Duration::from_millis(100);
/// A sandbox begins only if the host has so much left: what a small one takes, and some air.
const MEMORY_LEFT_MIN_BYTES: u64 = 128 << 20;

/// What all sandboxes of an engine may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Sandboxes at once.
    pub sandboxes_max: usize,
    /// Memory of their processes together, kept by a cgroup where the host has one.
    pub memory_max_bytes: u64,
}

/// A thousand sandboxes, and nine tenths of the memory that the host has left.
impl Default for Budget {
    fn default() -> Self {
        Self {
            sandboxes_max: 1000,
            memory_max_bytes: memory_left_bytes().unwrap_or(u64::MAX) / 10 * 9,
        }
    }
}

/// Why there is no room.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// Too many.
    #[error("{max} sandboxes run already, as many as may at once; try again when one has ended")]
    Sandboxes {
        /// How many may.
        max: usize,
    },
    /// Too little memory.
    #[error(
        "the host has {left_mib} MiB of memory left, and a sandbox begins only with {} MiB; try \
         again when others have ended",
        MEMORY_LEFT_MIN_BYTES >> 20
    )]
    Memory {
        /// What it has.
        left_mib: u64,
    },
}

/// What sandboxes that have ended have taken from the host, since the engine began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// How many.
    pub sandboxes: u64,
    /// Their page faults.
    pub faults: u64,
    /// Their processor time, in microseconds.
    pub cpu_us: u64,
}

/// The engine's doorkeeper.
#[derive(Debug)]
pub struct Admission {
    budget: Budget,
    sandboxes: Arc<Semaphore>,
    memory: Mutex<Option<(Instant, u64)>>,
    /// Of those that have left: how many, their faults, their time.
    ended: [AtomicU64; 3],
}

/// A sandbox's place; dropped when its process is gone.
#[derive(Debug)]
pub struct Place(#[expect(dead_code, reason = "kept to be dropped")] OwnedSemaphorePermit);

impl Admission {
    /// For an engine with this budget.
    pub fn new(budget: Budget) -> Arc<Self> {
        Arc::new(Self {
            budget,
            sandboxes: Arc::new(Semaphore::new(budget.sandboxes_max)),
            memory: Mutex::default(),
            ended: Default::default(),
        })
    }

    /// One has ended.
    pub(crate) fn has_spent(&self, spent: Spent) {
        for (sum, number) in self.ended.iter().zip([1, spent.faults, spent.cpu_us]) {
            sum.fetch_add(number, Ordering::Relaxed);
        }
    }

    /// What those have taken that have ended.
    pub fn ended(&self) -> Ended {
        let [sandboxes, faults, cpu_us] =
            self.ended.each_ref().map(|sum| sum.load(Ordering::Relaxed));
        Ended {
            sandboxes,
            faults,
            cpu_us,
        }
    }

    /// What it has to give.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// A place for one more.
    ///
    /// # Errors
    /// If there is none.
    pub fn admit(&self) -> Result<Place, NoRoom> {
        let max = self.budget.sandboxes_max;
        let permit = Arc::clone(&self.sandboxes).try_acquire_owned();
        let permit = permit.map_err(|_| NoRoom::Sandboxes { max })?;
        match self.memory_left() {
            Some(left) if left < MEMORY_LEFT_MIN_BYTES => Err(NoRoom::Memory {
                left_mib: left >> 20,
            }),
            _ => Ok(Place(permit)),
        }
    }

    fn memory_left(&self) -> Option<u64> {
        let mut known = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        match *known {
            Some((at, left)) if at.elapsed() < MEMORY_AGE_MAX => Some(left),
            _ => {
                let left = memory_left_bytes()?;
                *known = Some((Instant::now(), left));
                Some(left)
            }
        }
    }
}

/// What programs can still get (proc_meminfo(5)).
pub fn memory_left_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_when_it_is_full_is_refused_until_one_has_gone() {
        let budget = Budget {
            sandboxes_max: 2,
            ..Budget::default()
        };
        let admission = Admission::new(budget);
        let (first, _second) = (admission.admit().unwrap(), admission.admit().unwrap());
        assert_eq!(admission.admit().unwrap_err(), NoRoom::Sandboxes { max: 2 });
        drop(first);
        admission.admit().unwrap();
    }

    #[test]
    fn a_host_without_memory_begins_nothing_more() {
        let admission = Admission::new(Budget::default());
        *admission.memory.lock().unwrap() = Some((Instant::now(), 5 << 20));
        assert_eq!(
            admission.admit().unwrap_err(),
            NoRoom::Memory { left_mib: 5 }
        );
        *admission.memory.lock().unwrap() = None;
        assert!(memory_left_bytes().unwrap() > 5 << 20);
        admission.admit().unwrap();
    }
}
