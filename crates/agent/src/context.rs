//! A context's own connection: cells go in, what comes of them comes out, in order with what it prints.

#![expect(unsafe_code, reason = "kill")]

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use zygote_protocol::{CellEvent, ReaderId, ResumedContext, STREAM_CHUNK_MAX_BYTES};

const HEADER_BYTES: usize = 4;
/// What an interpreter says, to us alone, when it begins with a cell: now it heeds an interrupt (`python/context.py`).
const BEGUN: &[u8] = &[2];
const READ_BYTES: usize = 64 * 1024;

/// Has an interpreter reseed the generators of its TLS, or all (`python/context.py`).
const RESEED_TLS: i32 = 64;
const RESEED_ALL: i32 = 63;

/// Has a context draw keys that nobody else has had; with `all`, any random numbers. It does so before it
/// runs anything else, unless it is somewhere outside of Python.
pub fn reseed(pid: u32, all: bool) {
    let signal = if all { RESEED_ALL } else { RESEED_TLS };
    if catches(pid, signal) {
        // SAFETY: a plain system call; the process has not been reaped, so the id is its own.
        unsafe { libc::kill(pid as libc::pid_t, signal) };
    }
}

/// Whether a process has a handler for a signal (proc_pid_status(5)): one that has just begun has not.
fn catches(pid: u32, signal: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Of one context.
pub struct Context {
    control: UnixStream,
    /// What has been read and is no whole event yet.
    incoming: Vec<u8>,
    /// What has not been written yet.
    outgoing: VecDeque<u8>,
    /// An event that is being sent: its bytes, how many have been, and where the output ended.
    event: Option<Event>,
    /// Whether the host has to take what was displayed before there is more.
    waits: bool,
    /// The cells that have not ended, in their order: who reads what each prints, if anybody does, and
    /// the host's note of it.
    cells: VecDeque<(Option<ReaderId>, Vec<u8>)>,
    /// How many have ended.
    count: u32,
    /// Whether the first of them runs: before that, an interrupt would be ignored, or end an interpreter that has
    /// just been started.
    has_begun: bool,
    /// Whether it is to be interrupted when it does.
    interrupt_waits: bool,
    /// Whether the event that is being sent is a cell's end.
    is_end: bool,
    is_closed: bool,
}

struct Event {
    data: Vec<u8>,
    sent: usize,
    /// Known once all output before it has been read.
    offset: Option<u64>,
}

/// A part of an event.
pub struct Part {
    pub offset: u64,
    pub last: bool,
    pub data: Vec<u8>,
}

impl Context {
    /// Over a connection to the interpreter.
    pub fn new(control: UnixStream) -> io::Result<Self> {
        control.set_nonblocking(true)?;
        Ok(Self {
            control,
            incoming: Vec::new(),
            outgoing: VecDeque::new(),
            event: None,
            waits: false,
            cells: VecDeque::new(),
            count: 0,
            has_begun: false,
            interrupt_waits: false,
            is_end: false,
            is_closed: false,
        })
    }

    /// Queues a request, in the driver's framing.
    pub fn ask(&mut self, items: &[&[u8]]) {
        self.outgoing.extend(crate::interpreter::framed(items));
    }

    /// Gives it a cell.
    pub fn begin(&mut self, code: &[u8], reader: ReaderId, note: Vec<u8>) {
        self.cells.push_back((Some(reader), note));
        self.ask(&[b"cell", code]);
    }

    /// Whether an interrupt may be sent now; else it is one of those that [`Context::is_to_interrupt`] tells of. One
    /// for a cell whose end is on its way does not wait for the next.
    pub fn may_interrupt(&mut self) -> bool {
        let may = self.has_begun || self.is_end || self.cells.is_empty();
        self.interrupt_waits |= !may;
        may
    }

    /// Whether the time has come for an interrupt that had to wait.
    pub fn is_to_interrupt(&mut self) -> bool {
        self.has_begun && std::mem::take(&mut self.interrupt_waits)
    }

    /// Who has read what a cell has printed, once its end has been sent.
    pub fn ended_cell(&mut self) -> Option<ReaderId> {
        if self.event.is_some() || !std::mem::take(&mut self.is_end) {
            return None;
        }
        self.count += 1;
        self.cells.pop_front().and_then(|(reader, _)| reader)
    }

    /// Its host has gone: what it has displayed is for nobody, and so is the end of a cell.
    pub fn lose_host(&mut self) {
        for (reader, _) in &mut self.cells {
            *reader = None;
        }
        self.event = None;
        self.ended_cell();
        self.taken();
    }

    /// Cells that have ended, and the note of the one that runs.
    pub fn resumed(&self) -> ResumedContext {
        ResumedContext {
            count: self.count,
            cell: self.cells.front().map(|(_, note)| note.clone()),
        }
    }

    /// Whether what it says is to be waited for, or whether it can be written to.
    pub fn interest(&self) -> (BorrowedFd<'_>, bool, bool) {
        let reads = self.event.is_none() && !self.waits && !self.is_closed;
        let writes = !self.outgoing.is_empty() && !self.is_closed;
        (self.control.as_fd(), reads, writes)
    }

    /// Whether an event waits for the output before it, or to be sent.
    #[cfg(test)]
    fn has_event(&self) -> bool {
        self.event.is_some()
    }

    /// Whether an event is being sent: output behind it has to wait.
    pub fn is_sending(&self) -> bool {
        self.event
            .as_ref()
            .is_some_and(|event| event.offset.is_some())
    }

    /// Writes and reads what can be, up to one event. False once it hangs up, or talks nonsense.
    pub fn turn(&mut self) -> bool {
        self.is_closed |= self.write().is_err() || self.read().is_err();
        !self.is_closed
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            let (front, _) = self.outgoing.as_slices();
            match (&self.control).write(front) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let mut scratch = [0; READ_BYTES];
        while self.event.is_none() && !self.waits && !self.is_closed {
            if let Some(data) = self.take()? {
                if data == BEGUN {
                    self.has_begun = true;
                    continue;
                }
                self.waits = data.first() == Some(&CellEvent::DISPLAY);
                self.is_end = !self.waits;
                if self.is_end {
                    (self.has_begun, self.interrupt_waits) = (false, false);
                }
                self.event = Some(Event {
                    data,
                    sent: 0,
                    offset: None,
                });
                return Ok(());
            }
            match (&self.control).read(&mut scratch) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.incoming.extend_from_slice(&scratch[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A whole event of what has been read.
    fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some((header, rest)) = self.incoming.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > CellEvent::MAX_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(data) = rest.get(..length) else {
            return Ok(None);
        };
        let data = data.to_vec();
        self.incoming.drain(..HEADER_BYTES + length);
        Ok(Some(data))
    }

    /// All output before the event has been read: it ends there.
    pub fn output_is_read(&mut self, end: u64) {
        if let Some(event) = &mut self.event {
            event.offset.get_or_insert(end);
        }
    }

    /// The next part of the event that is being sent.
    pub fn part(&mut self) -> Option<Part> {
        let event = self.event.as_mut()?;
        let offset = event.offset?;
        let rest = &event.data[event.sent..];
        let data = rest[..rest.len().min(STREAM_CHUNK_MAX_BYTES)].to_vec();
        event.sent += data.len();
        let last = event.sent == event.data.len();
        if last {
            self.event = None;
        }
        Some(Part { offset, last, data })
    }

    /// The host has passed on what was displayed.
    pub fn taken(&mut self) {
        if self.waits && self.event.is_none() {
            self.waits = false;
            self.outgoing.push_back(b'!');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(data: &[u8]) -> Vec<u8> {
        [&(data.len() as u32).to_le_bytes()[..], data].concat()
    }

    #[test]
    fn an_event_waits_for_the_output_before_it_and_the_next_for_its_taking() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut context = Context::new(ours).unwrap();
        let big = vec![CellEvent::DISPLAY; STREAM_CHUNK_MAX_BYTES + 3];
        theirs.write_all(&event(&big)).unwrap();
        theirs.write_all(&event(&[1, 7])).unwrap();
        context.turn();
        while !context.has_event() {
            context.turn();
        }
        assert!(context.part().is_none() && !context.is_sending());
        context.output_is_read(10);
        // What is printed meanwhile is behind it.
        context.output_is_read(20);
        let first = context.part().unwrap();
        assert!((first.offset, first.last) == (10, false) && context.is_sending());
        let second = context.part().unwrap();
        assert_eq!((second.last, second.data.len()), (true, 3));
        context.turn();
        assert!(!context.has_event());
        context.taken();
        context.turn();
        let mut word = [0];
        theirs.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"!");
        assert!(context.has_event());
        context.output_is_read(30);
        assert_eq!(context.part().unwrap().data, [1, 7]);
    }

    #[test]
    fn an_interrupt_waits_for_the_cell_that_it_is_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut context = Context::new(ours).unwrap();
        assert!(context.may_interrupt() && !context.is_to_interrupt());
        context.begin(b"1", 1, Vec::new());
        assert!(!context.may_interrupt() && !context.is_to_interrupt());
        theirs.write_all(&event(BEGUN)).unwrap();
        context.turn();
        assert!(context.is_to_interrupt() && !context.is_to_interrupt());
        assert!(context.may_interrupt() && !context.is_to_interrupt());
        theirs.write_all(&event(&[1, 1])).unwrap();
        context.turn();
        context.output_is_read(0);
        // The host does not know yet that it has ended.
        assert!(context.may_interrupt() && !context.is_to_interrupt());
        assert_eq!(context.part().unwrap().data, [1, 1]);
        assert_eq!(context.ended_cell(), Some(1));
        // Nor does it wait for another.
        context.begin(b"2", 2, Vec::new());
        assert!(!context.may_interrupt());
        theirs.write_all(&event(&[1, 2])).unwrap();
        context.turn();
        context.begin(b"3", 3, Vec::new());
        theirs.write_all(&event(BEGUN)).unwrap();
        context.output_is_read(0);
        context.part().unwrap();
        context.turn();
        assert!(!context.is_to_interrupt());
    }

    #[test]
    fn a_signal_without_a_handler_is_not_sent() {
        let mut child = std::process::Command::new("sleep")
            .arg("9")
            .spawn()
            .unwrap();
        assert!(!catches(child.id(), RESEED_TLS));
        reseed(child.id(), true);
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_is_no_event_closes_the_connection() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut context = Context::new(ours).unwrap();
        theirs.write_all(&[0xff; 8]).unwrap();
        context.turn();
        assert!(!context.interest().1 && !context.has_event());
    }
}
