//! A process of a live sandbox, as its owner knows it.

use super::limits::{INPUT_WINDOW_BYTES, READER_WINDOW_BYTES};
use super::note::Note;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use zygote_protocol::{
    CellEvent, ExitStatus, FileTask, ProcessId, ReaderId, Resumed, Stream, TerminalSize,
};

/// The reader that a process is started for.
pub const FIRST_READER: ReaderId = 0;

/// A process to start.
#[derive(Clone, Debug, Default)]
pub struct ProcessSpec {
    /// The program and its arguments.
    pub command: Vec<Vec<u8>>,
    /// Something to do with files, in place of a program: ended with its reader, and shown to nobody.
    pub task: Option<FileTask>,
    /// Comes to the sandbox's environment.
    pub env: Vec<(String, String)>,
    /// Directory in the guest; empty: the user's home.
    pub cwd: String,
    /// `USER` or `USER:GROUP`; empty: root.
    pub user: String,
    /// Whether there will be input.
    pub stdin: bool,
    /// A terminal in place of the three streams.
    pub terminal: Option<TerminalSize>,
    /// How long it may run.
    pub timeout: Option<Duration>,
    /// Whether somebody reads its output from the start, for whom it waits.
    pub follow: bool,
    /// Whether it is killed, with what it has started, when that reader goes before its end.
    pub ends_with_reader: bool,
}

/// How far a process has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessState {
    /// The guest has been asked for it.
    Starting,
    /// It runs.
    Running,
    /// It has ended.
    Ended {
        /// How.
        status: ExitStatus,
        /// Whether at its time limit.
        timed_out: bool,
    },
    /// It was there when its sandbox ended.
    Lost,
}

impl ProcessState {
    /// Whether there is no more to come of it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Ended { .. } | Self::Lost)
    }
}

/// What is known of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its number in its sandbox.
    pub id: ProcessId,
    /// Its pid in the guest, once it runs.
    pub pid: Option<u32>,
    /// Its program and arguments.
    pub command: Vec<Vec<u8>>,
    /// Who it runs as, as asked for.
    pub user: String,
    /// Whether it has a terminal.
    pub has_terminal: bool,
    /// When it was asked for.
    pub started: SystemTime,
    /// How long it has run, if it has ended.
    pub took: Option<Duration>,
    /// How far it has come.
    pub state: ProcessState,
}

/// What a reader is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Output.
    Output {
        /// Where it lies in all of the process's output.
        offset: u64,
        /// Which stream.
        stream: Stream,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Output that is no longer kept.
    Skipped {
        /// Where the gap begins.
        from: u64,
        /// Where it ends.
        to: u64,
    },
    /// What comes of a cell, in order with what it prints.
    Cell(CellEvent),
    /// All that was asked for has come.
    End,
    /// The sandbox has ended; see there why.
    Lost,
}

/// Somebody who reads.
pub struct Reader {
    pub pieces: mpsc::UnboundedSender<Piece>,
    /// Where it is.
    pub at: u64,
    /// How far the guest may send.
    pub limit: u64,
    /// Where it ends by itself, if not at the process's end.
    pub until: Option<u64>,
    /// Whether the guest ends it there by itself, as it does at the process's end.
    pub ends_itself: bool,
    /// What is told once it is at an offset.
    pub events: VecDeque<(u64, CellEvent)>,
}

impl Reader {
    /// From an offset on, with room for one window.
    pub fn new(pieces: mpsc::UnboundedSender<Piece>, at: u64, until: Option<u64>) -> Self {
        let limit = at.saturating_add(READER_WINDOW_BYTES);
        let limit = until.map_or(limit, |until| limit.min(until));
        Self {
            pieces,
            at,
            limit,
            until,
            ends_itself: false,
            events: VecDeque::new(),
        }
    }

    /// Passes a piece on that ends at an offset, and what happened in between at its place.
    pub fn pass(&mut self, piece: Piece, end: u64) {
        let mut piece = piece;
        while let Some((offset, _)) = self.events.front()
            && *offset < end
        {
            let (before, after) = split(piece, *offset);
            if let Some(before) = before {
                self.send(before);
            }
            piece = after;
            if let Some((_, event)) = self.events.pop_front() {
                self.send(Piece::Cell(event));
            }
        }
        self.send(piece);
        self.at = end;
        self.tell_events();
    }

    /// Tells what has happened up to where it is.
    pub fn tell_events(&mut self) {
        while let Some((_, event)) = self.events.pop_front_if(|(offset, _)| *offset <= self.at) {
            self.send(Piece::Cell(event));
        }
    }

    fn send(&self, piece: Piece) {
        // Who has gone tells it by a notice.
        let _ = self.pieces.send(piece);
    }
}

/// Divides output at an offset; a gap is not divided.
fn split(piece: Piece, at: u64) -> (Option<Piece>, Piece) {
    let Piece::Output {
        offset,
        stream,
        mut data,
    } = piece
    else {
        return (None, piece);
    };
    if at <= offset {
        let whole = Piece::Output {
            offset,
            stream,
            data,
        };
        return (None, whole);
    }
    let rest = data.split_off((at - offset) as usize);
    let before = Piece::Output {
        offset,
        stream,
        data,
    };
    let after = Piece::Output {
        offset: at,
        stream,
        data: rest,
    };
    (Some(before), after)
}

/// The owner's record.
pub struct Process {
    pub info: ProcessInfo,
    /// Whoever waits for it to start.
    pub starting: Option<oneshot::Sender<Result<ProcessInfo, super::LiveError>>>,
    /// The end of its own output, once it has ended.
    pub output_end: Option<u64>,
    pub readers: HashMap<ReaderId, Reader>,
    pub next_reader: ReaderId,
    /// Room for its input, in bytes; closed when it takes none.
    pub input: Arc<Semaphore>,
    pub input_taken: u64,
    pub input_sent: u64,
    pub state: watch::Sender<ProcessState>,
    pub begun: Instant,
    /// When it is killed.
    pub deadline: Option<Instant>,
    pub timed_out: bool,
    /// Whether it is a task with files.
    pub is_task: bool,
    /// Whether it ends with the reader that it was started for.
    pub ends_with_reader: bool,
    /// Whether that reader has gone.
    pub is_abandoned: bool,
}

impl Process {
    pub fn new(id: ProcessId, spec: &ProcessSpec) -> Self {
        let input = Semaphore::new(INPUT_WINDOW_BYTES);
        if !spec.stdin && spec.terminal.is_none() {
            input.close();
        }
        Self {
            info: ProcessInfo {
                id,
                pid: None,
                command: spec.command.clone(),
                user: spec.user.clone(),
                has_terminal: spec.terminal.is_some(),
                started: SystemTime::now(),
                took: None,
                state: ProcessState::Starting,
            },
            starting: None,
            output_end: None,
            readers: HashMap::new(),
            next_reader: FIRST_READER + 1,
            input: Arc::new(input),
            input_taken: 0,
            input_sent: 0,
            state: watch::Sender::new(ProcessState::Starting),
            begun: Instant::now(),
            deadline: None,
            timed_out: false,
            is_task: spec.task.is_some(),
            ends_with_reader: spec.task.is_some() || spec.ends_with_reader,
            is_abandoned: false,
        }
    }

    /// As its guest tells of it to an engine that has not started it, and as its own note does.
    pub fn resumed(resumed: &Resumed, note: Note) -> Self {
        let ran = Duration::from_millis(resumed.ran_ms);
        let begun = Instant::now().checked_sub(ran).unwrap_or_else(Instant::now);
        let state = match resumed.described.status {
            None => ProcessState::Running,
            Some(status) => ProcessState::Ended {
                status,
                timed_out: note.timed_out(ran, status),
            },
        };
        let on_the_way = resumed.input_received.saturating_sub(resumed.input_taken);
        let on_the_way = usize::try_from(on_the_way).unwrap_or(usize::MAX);
        let input = Semaphore::new(INPUT_WINDOW_BYTES.saturating_sub(on_the_way));
        let is_over = state.is_over();
        if is_over || !resumed.takes_input {
            input.close();
        }
        Self {
            info: ProcessInfo {
                id: resumed.described.process,
                pid: Some(resumed.described.pid),
                command: note.command,
                user: note.user,
                has_terminal: note.has_terminal,
                started: note.started,
                took: is_over.then_some(ran),
                state: state.clone(),
            },
            starting: None,
            output_end: resumed.output_end.filter(|_| is_over),
            readers: HashMap::new(),
            next_reader: FIRST_READER + 1,
            input: Arc::new(input),
            input_taken: resumed.input_taken,
            input_sent: resumed.input_received.max(resumed.input_taken),
            state: watch::Sender::new(state),
            begun,
            // A guest may tell of any limit.
            deadline: note
                .timeout
                .filter(|_| !is_over)
                .and_then(|limit| begun.checked_add(limit)),
            timed_out: false,
            is_task: note.is_task,
            // Its client has lost its engine, and has not gone.
            ends_with_reader: note.is_task,
            // Nobody reads: a task has nothing left to do.
            is_abandoned: note.is_task,
        }
    }

    /// Moves it on, and tells who waits.
    pub fn set(&mut self, state: ProcessState) {
        if state.is_over() {
            self.info.took = Some(self.begun.elapsed());
            self.input.close();
            self.deadline = None;
        }
        self.info.state = state.clone();
        self.state.send_replace(state);
    }

    /// Ends readers that have had all; gives back those that the guest has yet to be told of.
    pub fn end_readers(&mut self) -> Vec<ReaderId> {
        let end = self.output_end;
        let done = self.readers.extract_if(|_, reader| {
            let is_at = |offset: u64| reader.at >= offset;
            reader.until.is_some_and(is_at) || (reader.until.is_none() && end.is_some_and(is_at))
        });
        let done = done.filter_map(|(id, reader)| {
            let _ = reader.pieces.send(Piece::End);
            (!reader.ends_itself).then_some(id)
        });
        done.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_between_two_bytes_is_told_between_them() {
        let (sender, mut pieces) = mpsc::unbounded_channel();
        let mut reader = Reader::new(sender, 10, None);
        let event = |count| CellEvent::Done {
            count,
            result: None,
            error: None,
        };
        let output = |offset, data: &[u8]| Piece::Output {
            offset,
            stream: Stream::Stdout,
            data: data.to_vec(),
        };
        reader
            .events
            .extend([(10, event(1)), (12, event(2)), (14, event(3))]);
        reader.tell_events();
        reader.pass(output(10, b"abcd"), 14);
        let mut told = Vec::new();
        while let Ok(piece) = pieces.try_recv() {
            told.push(piece);
        }
        let expected = [
            Piece::Cell(event(1)),
            output(10, b"ab"),
            Piece::Cell(event(2)),
            output(12, b"cd"),
            Piece::Cell(event(3)),
        ];
        assert_eq!(told, expected);
    }
}
