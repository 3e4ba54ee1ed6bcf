//! Lines out of pieces, without I/O.

use crate::LINE_MAX_BYTES;

/// A line is longer than [`LINE_MAX_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineTooLong;

/// Pieces in, lines out.
#[derive(Debug, Default)]
pub struct LineSplitter {
    waiting: Vec<u8>,
    /// Where the next line begins, and up to where no end of it was found.
    begin: usize,
    searched: usize,
}

impl LineSplitter {
    /// More of the stream.
    ///
    /// # Errors
    /// If a line is too long; the stream is then of no more use.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), LineTooLong> {
        self.waiting.drain(..self.begin);
        self.searched -= self.begin;
        self.begin = 0;
        self.waiting.extend_from_slice(piece);
        if self.searched > LINE_MAX_BYTES {
            return Err(LineTooLong);
        }
        Ok(())
    }

    /// The next line that is there whole and not empty, without its end.
    pub fn next_line(&mut self) -> Option<&[u8]> {
        loop {
            let fresh = &self.waiting[self.searched..];
            let Some(at) = fresh.iter().position(|byte| *byte == b'\n') else {
                self.searched = self.waiting.len();
                return None;
            };
            let (begin, end) = (self.begin, self.searched + at);
            (self.begin, self.searched) = (end + 1, end + 1);
            if !self.waiting[begin..end].trim_ascii().is_empty() {
                return Some(&self.waiting[begin..end]);
            }
        }
    }

    /// What came after the last line's end, when the stream is over.
    pub fn rest(&mut self) -> Option<Vec<u8>> {
        let rest = self.waiting.split_off(self.begin);
        *self = Self::default();
        (!rest.trim_ascii().is_empty()).then_some(rest)
    }

    /// Whether what waits is longer than a line may be.
    #[must_use]
    pub fn is_too_long(&self) -> bool {
        self.waiting.len() - self.begin > LINE_MAX_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_come_in_any_pieces() {
        let mut splitter = LineSplitter::default();
        let mut seen = Vec::new();
        for piece in ["{\"a\"", ":1}\n\n[2", "]\r\n3", "", "4"] {
            splitter.push(piece.as_bytes()).unwrap();
            while let Some(line) = splitter.next_line() {
                seen.push(String::from_utf8(line.to_vec()).unwrap());
            }
        }
        assert_eq!(seen, ["{\"a\":1}", "[2]\r"]);
        assert_eq!(splitter.rest(), Some(b"34".to_vec()));
        assert_eq!(splitter.rest(), None);
    }

    #[test]
    fn a_line_without_end_is_given_up() {
        let mut splitter = LineSplitter::default();
        splitter.push(&vec![b'x'; LINE_MAX_BYTES]).unwrap();
        assert!(splitter.next_line().is_none() && !splitter.is_too_long());
        splitter.push(b"x").unwrap();
        assert!(splitter.next_line().is_none() && splitter.is_too_long());
        assert_eq!(splitter.push(b"x"), Err(LineTooLong));
    }
}
