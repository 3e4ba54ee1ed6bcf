//! What a sandbox's guest remembers for its engine of a process, or of a cell, in case another engine
//! goes on. What comes back is an allegation: it is shown, and no more.

use super::process::ProcessSpec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::time::{Duration, SystemTime};
use zygote_protocol::{ExitStatus, NOTE_MAX_BYTES};

/// Bytes of a command that are remembered; room for the rest is left.
const COMMAND_MAX_BYTES: usize = NOTE_MAX_BYTES / 2;
/// In place of words that are not.
const MORE: &[u8] = "\u{2026}".as_bytes();
/// The signal at a time limit.
const KILL: u8 = 9;

/// Of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Its program and arguments; what is too long ends in an ellipsis.
    pub command: Vec<Vec<u8>>,
    /// Who it runs as, as asked for.
    pub user: String,
    /// Whether it has a terminal.
    pub has_terminal: bool,
    /// When it was asked for.
    pub started: SystemTime,
    /// How long it may run.
    pub timeout: Option<Duration>,
    /// Whether it is a task with files.
    pub is_task: bool,
}

impl Note {
    /// Of a process that is asked for now.
    pub fn of(spec: &ProcessSpec) -> Self {
        Self {
            command: spec.command.clone(),
            user: spec.user.clone(),
            has_terminal: spec.terminal.is_some(),
            started: SystemTime::now(),
            timeout: spec.timeout,
            is_task: spec.task.is_some(),
        }
    }

    /// To send; nothing, should it be too long all the same: the process is a stranger then.
    pub fn encode(mut self) -> Vec<u8> {
        shorten(&mut self.command);
        encode(&self)
    }

    /// Of one whose note makes no sense.
    pub fn of_a_stranger() -> Self {
        Self {
            command: vec![MORE.to_vec()],
            user: String::new(),
            has_terminal: false,
            started: SystemTime::now(),
            timeout: None,
            is_task: false,
        }
    }

    /// Whether a process that ran so long, and ended so, was killed at its time limit.
    pub fn timed_out(&self, ran: Duration, status: ExitStatus) -> bool {
        let was_killed = matches!(status, ExitStatus::Signal { signal: KILL, .. });
        was_killed && self.timeout.is_some_and(|limit| ran >= limit)
    }
}

/// Of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellNote {
    /// When it is interrupted.
    pub deadline: Option<SystemTime>,
}

fn shorten(command: &mut Vec<Vec<u8>>) {
    let mut left = COMMAND_MAX_BYTES;
    for index in 0..command.len() {
        let word = &mut command[index];
        if word.len() + MORE.len() > left {
            word.truncate(left.saturating_sub(MORE.len()));
            word.extend_from_slice(MORE);
            command.truncate(index + 1);
            return;
        }
        // Each has a length besides.
        left -= word.len() + 1;
    }
}

/// Encodes a note.
pub fn encode(note: &impl Serialize) -> Vec<u8> {
    let bytes = postcard::to_stdvec(note).unwrap_or_default();
    if bytes.len() > NOTE_MAX_BYTES {
        return Vec::new();
    }
    bytes
}

/// Decodes a note, if it is one.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(command: &[&[u8]]) -> Note {
        Note {
            command: command.iter().map(|word| word.to_vec()).collect(),
            user: "u".to_owned(),
            timeout: Some(Duration::from_millis(1500)),
            ..Note::of_a_stranger()
        }
    }

    #[test]
    fn a_note_comes_back_as_it_was_and_a_long_command_shorter() {
        let short = note(&[b"a", b"", b"\xff"]);
        assert_eq!(decode(&short.clone().encode()), Some(short));
        let long = note(&[b"sh", &[b'x'; 100_000], b"more"]);
        let back: Note = decode(&long.encode()).unwrap();
        assert_eq!((back.command.len(), &back.command[0][..]), (2, &b"sh"[..]));
        assert!(back.command[1].ends_with(MORE) && back.command[1].len() < COMMAND_MAX_BYTES);
        let many = vec![&b"x"[..]; 50_000];
        let back: Note = decode(&note(&many).encode()).unwrap();
        assert!(back.command.len() > 1000 && back.command.last().unwrap().ends_with(MORE));
        assert_eq!(decode::<Note>(b"nonsense"), None);
    }

    #[test]
    fn a_kill_at_the_limit_is_told_from_others() {
        let killed = ExitStatus::Signal {
            signal: 9,
            out_of_memory: false,
        };
        let (note, limit) = (note(&[b"a"]), Duration::from_millis(1500));
        assert!(note.timed_out(limit, killed));
        assert!(!note.timed_out(limit / 2, killed));
        assert!(!note.timed_out(limit, ExitStatus::Code(0)));
    }
}
