//! The guest's console, as far as anyone will want to read it: its last bytes.

use crate::control::CONSOLE_MAX_BYTES;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Keeps the last [`CONSOLE_MAX_BYTES`] written to any of its clones.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<VecDeque<u8>>>);

impl Console {
    /// What was written last, printable.
    pub fn tail(&self) -> String {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(kept.make_contiguous()).into_owned()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(CONSOLE_MAX_BYTES);
        kept.drain(..excess);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_without_end_keeps_its_last_bytes_only() {
        let mut console = Console::default();
        for _ in 0..100 {
            console.write_all(&[b'x'; 100]).unwrap();
        }
        console.write_all(b"end").unwrap();
        assert_eq!(console.tail().len(), CONSOLE_MAX_BYTES);
        assert!(console.tail().ends_with("xend"));
    }
}
