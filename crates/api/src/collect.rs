//! Output, collected to its end within limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most output of one stream that is kept.
pub const COLLECTED_MAX_BYTES: usize = 64 << 20;

/// How much output may be kept of all runs together.
#[derive(Debug)]
pub struct OutputBudget {
    left_bytes: AtomicUsize,
}

impl OutputBudget {
    /// So much.
    #[must_use]
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            left_bytes: AtomicUsize::new(bytes),
        })
    }

    /// Takes as much of `wanted` as there is.
    fn take(&self, wanted: usize) -> usize {
        let mut taken = 0;
        let update = |left: usize| {
            taken = wanted.min(left);
            Some(left - taken)
        };
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        // Never fails: `update` always gives a value.
        let _ = self.left_bytes.fetch_update(set, fetch, update);
        taken
    }
}

/// What a program has written. What it took of the budget goes back when it is dropped.
#[derive(Debug)]
pub struct Collected {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Whether some of it was thrown away.
    pub truncated: bool,
    limit_bytes: usize,
    taken_bytes: usize,
    budget: Arc<OutputBudget>,
}

impl Collected {
    /// Nothing yet; at most so much of each stream.
    #[must_use]
    pub fn new(limit_bytes: usize, budget: &Arc<OutputBudget>) -> Self {
        Self {
            stdout: Vec::new(),
            stderr: Vec::new(),
            truncated: false,
            limit_bytes,
            taken_bytes: 0,
            budget: Arc::clone(budget),
        }
    }

    /// More standard output.
    pub fn push_stdout(&mut self, data: &[u8]) {
        let room = self.room(self.stdout.len(), data.len());
        self.stdout.extend_from_slice(&data[..room]);
    }

    /// More standard error.
    pub fn push_stderr(&mut self, data: &[u8]) {
        let room = self.room(self.stderr.len(), data.len());
        self.stderr.extend_from_slice(&data[..room]);
    }

    /// Standard output and error, of which nothing is left here.
    pub fn take(&mut self) -> (Vec<u8>, Vec<u8>) {
        (
            std::mem::take(&mut self.stdout),
            std::mem::take(&mut self.stderr),
        )
    }

    fn room(&mut self, kept: usize, wanted: usize) -> usize {
        let room = self.budget.take(wanted.min(self.limit_bytes - kept));
        self.taken_bytes += room;
        self.truncated |= wanted > room;
        room
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        let left = &self.budget.left_bytes;
        left.fetch_add(self.taken_bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_at_the_limit_is_whole_and_beyond_it_is_marked() {
        let budget = OutputBudget::new(usize::MAX);
        let mut whole = Collected::new(4, &budget);
        whole.push_stdout(b"ab");
        whole.push_stdout(b"cd");
        assert_eq!((&whole.stdout[..], whole.truncated), (&b"abcd"[..], false));
        whole.push_stdout(b"e");
        whole.push_stderr(b"f");
        assert_eq!((&whole.stdout[..], whole.truncated), (&b"abcd"[..], true));
        assert_eq!(whole.stderr, b"f");
    }

    #[test]
    fn a_budget_gives_no_more_than_there_is_and_gets_it_back() {
        let budget = OutputBudget::new(5);
        let mut one = Collected::new(100, &budget);
        one.push_stdout(b"abc");
        let mut two = Collected::new(100, &budget);
        two.push_stderr(b"abc");
        assert_eq!((two.stderr.len(), two.truncated), (2, true));
        drop((one, two));
        assert_eq!(budget.take(9), 5);
    }
}
