//! What has happened to sandboxes, for whoever wants to know: the newest events, numbered.

use super::sandbox::{Sandbox, SandboxSpec};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::watch;
use uuid::Uuid;
use zygote_protocol::ExitStatus;

/// Most events that are kept.
const EVENTS_MAX: usize = 10_000;

/// Something that has happened.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Counts from 1 since the engine started.
    pub number: u64,
    /// When.
    pub at: SystemTime,
    /// To which sandbox.
    pub sandbox: Uuid,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Whose it is.
    pub tenant: Option<String>,
    /// What.
    pub what: Happening,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It runs.
    Made,
    /// It was branched, and goes on.
    Branched {
        /// The branches.
        into: Vec<Uuid>,
    },
    /// A moment of it is kept, with a name.
    MomentKept {
        /// Its number.
        number: u64,
        /// Its name.
        name: String,
    },
    /// It has gone back to a moment.
    RolledBack {
        /// Its number.
        to: u64,
    },
    /// It has been written to disk.
    Paused,
    /// It runs again.
    Resumed,
    /// It runs on; the engine that had made it was killed.
    Adopted,
    /// It has ended.
    Ended {
        /// [`super::EndReason::name`].
        reason: &'static str,
        /// In words.
        message: String,
    },
    /// A process has started.
    ProcessStarted {
        /// Which.
        process: u32,
        /// Its program and arguments.
        command: Vec<Vec<u8>>,
    },
    /// A process has ended.
    ProcessEnded {
        /// Which.
        process: u32,
        /// How.
        status: ExitStatus,
        /// Whether at its time limit.
        timed_out: bool,
    },
    /// Something was refused at a limit.
    LimitHit {
        /// Which limit.
        limit: &'static str,
    },
}

/// The newest events.
pub struct Journal {
    entries: Mutex<VecDeque<Entry>>,
    last: watch::Sender<u64>,
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
            last: watch::Sender::new(0),
        }
    }
}

impl Journal {
    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts on behind the numbers that another engine has given.
    pub fn go_on_after(&self, number: u64) {
        self.last.send_replace(number);
    }

    /// Notes an event.
    pub fn note(&self, sandbox: &Sandbox, what: Happening) {
        self.enter(sandbox.id, &sandbox.spec, what);
    }

    fn enter(&self, sandbox: Uuid, spec: &SandboxSpec, what: Happening) {
        let mut entries = self.entries();
        let number = *self.last.borrow() + 1;
        if entries.len() >= EVENTS_MAX {
            entries.pop_front();
        }
        entries.push_back(Entry {
            number,
            at: SystemTime::now(),
            sandbox,
            name: spec.name.clone(),
            tenant: spec.tenant.clone(),
            what,
        });
        drop(entries);
        self.last.send_replace(number);
    }

    /// Events behind a number, as far as they are kept; at most `most`.
    pub fn after(&self, number: u64, most: usize) -> Vec<Entry> {
        let entries = self.entries();
        let first = entries.partition_point(|entry| entry.number <= number);
        entries.iter().skip(first).take(most).cloned().collect()
    }

    /// The number of the last one.
    pub fn last(&self) -> u64 {
        *self.last.borrow()
    }

    /// Waits until there is one behind a number.
    pub async fn wait(&self, number: u64) {
        let mut last = self.last.subscribe();
        // The sender lives as long as this does.
        let _ = last.wait_for(|last| *last > number).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_numbered_and_the_oldest_give_way() {
        let journal = Journal::default();
        for _ in 0..EVENTS_MAX + 5 {
            journal.enter(Uuid::nil(), &SandboxSpec::default(), Happening::Made);
        }
        let kept = journal.after(0, usize::MAX);
        assert_eq!((kept.len(), kept[0].number), (EVENTS_MAX, 6));
        assert_eq!(journal.after(journal.last() - 2, 10).len(), 2);
        assert_eq!(journal.after(0, 3).len(), 3);
        journal.wait(journal.last() - 1).await;
    }
}
