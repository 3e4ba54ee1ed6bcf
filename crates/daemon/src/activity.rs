//! Whether a daemon has work, and since when it has none.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Work that goes on now.
#[derive(Debug)]
pub struct Activity {
    state: Mutex<State>,
    ended: Notify,
}

#[derive(Debug)]
struct State {
    runs: u64,
    others: u64,
    last: Instant,
}

/// A piece of work, until it is dropped.
pub struct Work<'a> {
    activity: &'a Activity,
    is_run: bool,
}

impl Activity {
    /// None yet.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State {
                runs: 0,
                others: 0,
                last: Instant::now(),
            }),
            ended: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run begins.
    pub fn run(&self) -> Work<'_> {
        self.lock().runs += 1;
        Work {
            activity: self,
            is_run: true,
        }
    }

    /// Something else begins.
    pub fn other(&self) -> Work<'_> {
        self.lock().others += 1;
        Work {
            activity: self,
            is_run: false,
        }
    }

    /// Runs and other work.
    pub fn count(&self) -> u64 {
        let state = self.lock();
        state.runs + state.others
    }

    /// For how long there has been none; `None` while there is.
    pub fn idle_for(&self) -> Option<Duration> {
        let state = self.lock();
        (state.runs + state.others == 0).then(|| state.last.elapsed())
    }

    /// Waits until there is none: as long as the longest run.
    pub async fn ended(&self) {
        loop {
            // Before looking, so that none is missed.
            let ended = self.ended.notified();
            if self.count() == 0 {
                return;
            }
            ended.await;
        }
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        let mut state = self.activity.lock();
        if self.is_run {
            state.runs -= 1;
        } else {
            state.others -= 1;
        }
        state.last = Instant::now();
        drop(state);
        self.activity.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn idleness_begins_when_the_last_work_ends() {
        let activity = Activity::new();
        assert!(activity.idle_for().is_some());
        let (run, other) = (activity.run(), activity.other());
        assert_eq!((activity.count(), activity.idle_for()), (2, None));
        drop(run);
        tokio::join!(activity.ended(), async { drop(other) });
        assert!(activity.idle_for().is_some());
    }
}
