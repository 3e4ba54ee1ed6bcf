//! Collecting a program's output instead of streaming it.

use crate::sandbox::Event;
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

/// Collects events to their end. Output beyond `limit_bytes` a stream is taken from the program,
/// so that it goes on, and thrown away.
pub async fn capture(mut events: mpsc::Receiver<Event>, limit_bytes: usize) -> Captured {
    let mut captured = Captured::default();
    while let Some(event) = events.recv().await {
        let (kept, data) = match event {
            Event::Activated => continue,
            Event::Stdout(data) => (&mut captured.stdout, data),
            Event::Stderr(data) => (&mut captured.stderr, data),
        };
        let room = limit_bytes - kept.len();
        kept.extend_from_slice(&data[..room.min(data.len())]);
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
        capture(events, limit).await
    }

    #[tokio::test]
    async fn output_at_the_limit_is_whole_and_beyond_it_is_marked() {
        let whole = captured(&["ab", "cd"], 4).await;
        assert_eq!((&whole.stdout[..], whole.truncated), (&b"abcd"[..], false));
        let cut = captured(&["ab", "cde", "f"], 4).await;
        assert_eq!((&cut.stdout[..], cut.truncated), (&b"abcd"[..], true));
    }
}
