//! Collecting a program's output instead of streaming it.

use crate::sandbox::Event;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::mpsc;

/// What is kept of each stream unless the caller says otherwise.
pub const CAPTURE_MAX_BYTES: usize = 64 * 1024 * 1024;

/// A program's output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Whether either was longer than what was kept.
    pub truncated: bool,
}

/// Room for the output of several programs together. What a program has taken comes back with
/// [`OutputBudget::free`].
#[derive(Debug)]
pub struct OutputBudget {
    left_bytes: AtomicUsize,
}

impl OutputBudget {
    /// So much.
    pub fn new(bytes: usize) -> Self {
        Self {
            left_bytes: AtomicUsize::new(bytes),
        }
    }

    /// Gives back what a program's output has taken.
    pub fn free(&self, captured: &Captured) {
        let bytes = captured.stdout.len() + captured.stderr.len();
        self.left_bytes.fetch_add(bytes, Ordering::Relaxed);
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

/// Collects events to their end. Output beyond `limit_bytes` a stream, or beyond what is left of the
/// budget, is taken from the program, so that it goes on, and thrown away.
pub async fn capture(
    mut events: mpsc::Receiver<Event>,
    limit_bytes: usize,
    budget: &OutputBudget,
) -> Captured {
    let mut captured = Captured::default();
    while let Some(event) = events.recv().await {
        let (kept, data) = match event {
            Event::Activated => continue,
            Event::Stdout(data) => (&mut captured.stdout, data),
            Event::Stderr(data) => (&mut captured.stderr, data),
        };
        let room = budget.take(data.len().min(limit_bytes - kept.len()));
        kept.extend_from_slice(&data[..room]);
        captured.truncated |= data.len() > room;
    }
    captured
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn captured(pieces: &[&str], limit: usize) -> Captured {
        let (sender, events) = mpsc::channel(pieces.len());
        for piece in pieces {
            let event = Event::Stdout(piece.as_bytes().to_vec());
            sender.send(event).await.unwrap();
        }
        drop(sender);
        capture(events, limit, &OutputBudget::new(usize::MAX)).await
    }

    #[tokio::test]
    async fn output_at_the_limit_is_whole_and_beyond_it_is_marked() {
        let whole = captured(&["ab", "cd"], 4).await;
        assert_eq!((&whole.stdout[..], whole.truncated), (&b"abcd"[..], false));
        let cut = captured(&["ab", "cde", "f"], 4).await;
        assert_eq!((&cut.stdout[..], cut.truncated), (&b"abcd"[..], true));
    }

    #[test]
    fn a_budget_gives_no_more_than_there_is_and_takes_it_back() {
        let budget = OutputBudget::new(5);
        assert_eq!((budget.take(3), budget.take(3), budget.take(3)), (3, 2, 0));
        budget.free(&Captured {
            stdout: vec![0; 2],
            stderr: vec![0; 1],
            truncated: true,
        });
        assert_eq!(budget.take(9), 3);
    }
}
