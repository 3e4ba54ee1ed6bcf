//! A process's output, kept for those who read it: the newest bytes, with the offset of each in all that
//! the process has written. Two streams share it, so that their order is kept too.

use std::collections::VecDeque;
use zygote_protocol::{ReaderId, STREAM_CHUNK_MAX_BYTES, Stream};

/// Most readers of one process.
const READERS_MAX: usize = 64;

/// The newest output of a process.
pub struct Ring {
    capacity: usize,
    bytes: VecDeque<u8>,
    /// The offset of the first byte that is kept.
    start: u64,
    /// Where each run of one stream begins; the first covers `start`.
    runs: VecDeque<(u64, Stream)>,
    readers: Vec<Reader>,
    /// Whose turn it is.
    turn: usize,
    /// Where the process's own output has ended.
    closed_at: Option<u64>,
}

struct Reader {
    id: ReaderId,
    next: u64,
    limit: u64,
    holds: bool,
    /// Whether it ends where the process does.
    ends_itself: bool,
    /// Where it ends in any case.
    until: Option<u64>,
}

impl Reader {
    fn end(&self, closed_at: Option<u64>) -> Option<u64> {
        self.until.or(closed_at.filter(|_| self.ends_itself))
    }

    fn is_done(&self, closed_at: Option<u64>) -> bool {
        self.end(closed_at).is_some_and(|end| self.next >= end)
    }
}

/// What a reader is to be sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of one stream.
    Bytes {
        offset: u64,
        stream: Stream,
        data: Vec<u8>,
    },
    /// Bytes that are gone.
    Skipped { from: u64, to: u64 },
}

impl Ring {
    /// Keeps at most so many bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            bytes: VecDeque::new(),
            start: 0,
            runs: VecDeque::new(),
            readers: Vec::new(),
            turn: 0,
            closed_at: None,
        }
    }

    /// The first offset that is kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// How much may be put in now: nothing that a holding reader has not had is dropped.
    pub fn room(&self) -> usize {
        let held = self.readers.iter().filter(|reader| reader.holds);
        let Some(oldest) = held.map(|reader| reader.next).min() else {
            return usize::MAX;
        };
        let unread = self.end().saturating_sub(oldest.max(self.start));
        self.capacity
            .saturating_sub(usize::try_from(unread).unwrap_or(usize::MAX))
    }

    /// Puts output in, and drops the oldest that there is no room for.
    pub fn push(&mut self, stream: Stream, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        if self.runs.back().is_none_or(|(_, last)| *last != stream) {
            self.runs.push_back((self.end(), stream));
        }
        self.bytes.extend(data);
        self.drop_oldest(self.bytes.len().saturating_sub(self.capacity));
    }

    /// Bytes that are kept.
    pub fn kept(&self) -> usize {
        self.bytes.len()
    }

    /// Drops the oldest half, as far as no holding reader has yet to have it; gives back how much.
    pub fn halve(&mut self) -> usize {
        let held = self.readers.iter().filter(|reader| reader.holds);
        let oldest = held.map(|reader| reader.next).min().unwrap_or(u64::MAX);
        let free = usize::try_from(oldest.saturating_sub(self.start)).unwrap_or(usize::MAX);
        let count = self.bytes.len().div_ceil(2).min(free).min(self.bytes.len());
        self.drop_oldest(count);
        self.bytes.shrink_to_fit();
        count
    }

    fn drop_oldest(&mut self, count: usize) {
        self.bytes.drain(..count);
        self.start += count as u64;
        while self.runs.get(1).is_some_and(|(at, _)| *at <= self.start) {
            self.runs.pop_front();
        }
    }

    /// A reader from the start of a process, or of a cell, which holds it and ends where that does.
    pub fn follow_to_end(&mut self, id: ReaderId, from: u64, limit: u64) {
        if self.follow(id, from, limit, true)
            && let Some(reader) = self.readers.last_mut()
        {
            reader.ends_itself = true;
        }
        self.drop_done();
    }

    /// A new reader, or more for one that is known. False if there are too many.
    pub fn follow(&mut self, id: ReaderId, from: u64, limit: u64, holds: bool) -> bool {
        if let Some(reader) = self.readers.iter_mut().find(|reader| reader.id == id) {
            reader.limit = reader.limit.max(limit);
            return true;
        }
        if self.readers.len() >= READERS_MAX {
            return false;
        }
        let next = from.min(self.end());
        self.readers.push(Reader {
            id,
            next,
            limit,
            holds,
            ends_itself: false,
            until: None,
        });
        true
    }

    /// The process has ended, and all of its own output is here: who has had that reads no more.
    pub fn close(&mut self) {
        self.closed_at = Some(self.end());
        self.drop_done();
    }

    /// A reader ends at an offset, which may lie behind it.
    pub fn end_reader(&mut self, id: ReaderId, at: u64) {
        if let Some(reader) = self.readers.iter_mut().find(|reader| reader.id == id) {
            reader.until = Some(at);
        }
        self.drop_done();
    }

    fn drop_done(&mut self) {
        let closed_at = self.closed_at;
        self.readers.retain(|reader| !reader.is_done(closed_at));
    }

    /// A reader wants no more.
    pub fn unfollow(&mut self, id: ReaderId) {
        self.readers.retain(|reader| reader.id != id);
    }

    /// Nobody reads any more.
    pub fn unfollow_all(&mut self) {
        self.readers.clear();
    }

    /// Where the process's own output has ended, once it has.
    pub fn closed_at(&self) -> Option<u64> {
        self.closed_at
    }

    /// Nobody reads any more, and nothing is kept.
    pub fn discard(&mut self) {
        self.readers.clear();
        self.start = self.end();
        (self.bytes, self.runs, self.capacity) = (VecDeque::new(), VecDeque::new(), 0);
    }

    /// Whether there is a piece for one of its readers.
    pub fn is_pending(&self) -> bool {
        self.readers.iter().any(|reader| self.has_more(reader))
    }

    fn has_more(&self, reader: &Reader) -> bool {
        reader.next < reader.limit.min(self.end()).min(self.end_of(reader))
    }

    fn end_of(&self, reader: &Reader) -> u64 {
        reader.end(self.closed_at).unwrap_or(u64::MAX)
    }

    /// The next piece for one of its readers, in turn.
    pub fn next(&mut self) -> Option<(ReaderId, Piece)> {
        let count = self.readers.len();
        let index = (0..count)
            .map(|step| (self.turn + step) % count)
            .find(|index| self.has_more(&self.readers[*index]))?;
        self.turn = index + 1;
        let reader = &self.readers[index];
        let (next, limit) = (reader.next, reader.limit.min(self.end_of(reader)));
        let piece = if next < self.start {
            Piece::Skipped {
                from: next,
                to: self.start,
            }
        } else {
            self.piece(next, limit)
        };
        let reader = &mut self.readers[index];
        reader.next = match &piece {
            Piece::Skipped { to, .. } => *to,
            Piece::Bytes { offset, data, .. } => offset + data.len() as u64,
        };
        let id = reader.id;
        if reader.is_done(self.closed_at) {
            self.readers.remove(index);
        }
        Some((id, piece))
    }

    /// The run of bytes at an offset that is kept.
    fn piece(&self, offset: u64, limit: u64) -> Piece {
        let after = self.runs.partition_point(|(at, _)| *at <= offset);
        let stream = self.runs[after - 1].1;
        let run_end = self.runs.get(after).map_or(self.end(), |(at, _)| *at);
        let length = (limit.min(run_end) - offset).min(STREAM_CHUNK_MAX_BYTES as u64);
        let first = (offset - self.start) as usize;
        let data = self.copy(first, first + length as usize);
        Piece::Bytes {
            offset,
            stream,
            data,
        }
    }

    fn copy(&self, first: usize, end: usize) -> Vec<u8> {
        let (front, back) = self.bytes.as_slices();
        let within = |slice: &[u8], at: usize| at.min(slice.len());
        let mut data = Vec::with_capacity(end - first);
        data.extend_from_slice(&front[within(front, first)..within(front, end)]);
        let (first, end) = (
            first.saturating_sub(front.len()),
            end.saturating_sub(front.len()),
        );
        data.extend_from_slice(&back[first..end]);
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(offset: u64, stream: Stream, data: &[u8]) -> Piece {
        let data = data.to_vec();
        Piece::Bytes {
            offset,
            stream,
            data,
        }
    }

    #[test]
    fn both_streams_come_in_the_order_in_which_they_were_written() {
        let mut ring = Ring::new(100);
        ring.push(Stream::Stdout, b"one");
        ring.push(Stream::Stdout, b"two");
        ring.push(Stream::Stderr, b"bad");
        ring.push(Stream::Stdout, b"end");
        assert!(ring.follow(1, 0, 100, true));
        assert_eq!(ring.next(), Some((1, bytes(0, Stream::Stdout, b"onetwo"))));
        assert_eq!(ring.next(), Some((1, bytes(6, Stream::Stderr, b"bad"))));
        assert_eq!(ring.next(), Some((1, bytes(9, Stream::Stdout, b"end"))));
        assert_eq!(ring.next(), None);
    }

    #[test]
    fn no_reader_is_sent_more_than_it_may_have_and_each_has_its_own_place() {
        let mut ring = Ring::new(100);
        ring.push(Stream::Stdout, b"0123456789");
        ring.follow(1, 0, 4, true);
        ring.follow(2, 8, 100, false);
        assert_eq!(ring.next(), Some((1, bytes(0, Stream::Stdout, b"0123"))));
        assert_eq!(ring.next(), Some((2, bytes(8, Stream::Stdout, b"89"))));
        assert_eq!(ring.next(), None);
        ring.follow(1, 0, 6, true);
        assert_eq!(ring.next(), Some((1, bytes(4, Stream::Stdout, b"45"))));
        ring.unfollow(1);
        assert_eq!(ring.next(), None);
    }

    #[test]
    fn the_oldest_is_dropped_and_who_comes_to_it_late_is_told() {
        let mut ring = Ring::new(4);
        ring.push(Stream::Stdout, b"abc");
        ring.push(Stream::Stderr, b"def");
        assert_eq!((ring.start(), ring.end()), (2, 6));
        ring.follow(7, 0, 100, false);
        assert_eq!(ring.next(), Some((7, Piece::Skipped { from: 0, to: 2 })));
        assert_eq!(ring.next(), Some((7, bytes(2, Stream::Stdout, b"c"))));
        assert_eq!(ring.next(), Some((7, bytes(3, Stream::Stderr, b"def"))));
    }

    #[test]
    fn a_process_waits_for_a_reader_that_holds_it_and_for_no_other() {
        let mut ring = Ring::new(4);
        assert_eq!(ring.room(), usize::MAX);
        ring.follow(1, 0, 0, true);
        ring.follow(2, 0, 0, false);
        ring.push(Stream::Stdout, b"abc");
        assert_eq!(ring.room(), 1);
        ring.follow(1, 0, 2, true);
        assert!(ring.next().is_some());
        assert_eq!(ring.room(), 3);
        ring.unfollow(1);
        assert_eq!(ring.room(), usize::MAX);
        ring.discard();
        ring.push(Stream::Stdout, b"more");
        assert_eq!((ring.start(), ring.end(), ring.next()), (7, 7, None));
    }

    #[test]
    fn readers_end_where_the_process_does_or_where_they_are_told_to() {
        let mut ring = Ring::new(4);
        ring.push(Stream::Stdout, b"ab");
        ring.follow_to_end(1, 0, 100);
        ring.follow_to_end(2, 2, 100);
        ring.close();
        // Who has yet to have it holds on; what comes behind it is for nobody.
        assert_eq!(ring.room(), 2);
        assert_eq!(ring.next(), Some((1, bytes(0, Stream::Stdout, b"ab"))));
        assert_eq!((ring.room(), ring.next()), (usize::MAX, None));
        let mut ring = Ring::new(4);
        ring.push(Stream::Stdout, b"ab");
        ring.follow_to_end(1, 0, 100);
        ring.end_reader(1, 2);
        ring.push(Stream::Stdout, b"c");
        assert_eq!(ring.next(), Some((1, bytes(0, Stream::Stdout, b"ab"))));
        assert_eq!((ring.next(), ring.room()), (None, usize::MAX));
    }

    #[test]
    fn what_makes_room_is_the_oldest_that_nobody_has_yet_to_have() {
        let mut ring = Ring::new(100);
        ring.push(Stream::Stdout, b"0123456789");
        assert_eq!((ring.halve(), ring.start(), ring.kept()), (5, 5, 5));
        ring.follow(1, 6, 100, true);
        assert_eq!((ring.halve(), ring.halve(), ring.start()), (1, 0, 6));
        ring.unfollow(1);
        assert_eq!((ring.halve(), ring.halve(), ring.halve()), (2, 1, 1));
        assert_eq!((ring.halve(), ring.start(), ring.end()), (0, 10, 10));
    }

    #[test]
    fn a_reader_from_beyond_the_end_begins_at_the_end() {
        let mut ring = Ring::new(4);
        ring.push(Stream::Stdout, b"ab");
        ring.follow(1, u64::MAX, u64::MAX, false);
        assert_eq!(ring.next(), None);
        ring.push(Stream::Stdout, b"c");
        assert_eq!(ring.next(), Some((1, bytes(2, Stream::Stdout, b"c"))));
    }
}
