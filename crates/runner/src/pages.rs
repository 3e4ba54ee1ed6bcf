//! A branch as a stream of bytes: its private pages, and its machine's state.
//!
//! ```text
//! run of pages:   u64 offset in the memory, u64 length in bytes (both little-endian), the bytes
//! at the end:     u64 END, u64 length in bytes, the machine's state (postcard)
//! ```

#![expect(unsafe_code, reason = "reads guest memory that nobody writes")]

use crate::loaded::Loaded;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use zygote_snapshot::PAGE_BYTES;

/// In place of an offset: the state follows.
pub const END: u64 = u64::MAX;
/// Longest run.
pub const RUN_MAX_BYTES: u64 = 2 << 20;
/// Longest state.
pub const STATE_MAX_BYTES: u64 = 16 << 20;
/// Entries of the page map that are read at once.
const ENTRIES: usize = 8192;
/// Bits of an entry: in memory, in swap, of a file (proc_pid_pagemap(5)).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Sends a branch whose guest never runs, so that its memory stays as it is.
///
/// # Errors
/// If the stream ends, or the page map cannot be read.
pub fn send(loaded: &Loaded, stream: OwnedFd, pagemap: OwnedFd) -> io::Result<()> {
    let (mut stream, pagemap) = (File::from(stream), File::from(pagemap));
    for (offset, host, length) in loaded.memory.host_ranges() {
        // SAFETY: the region is mapped for as long as the process lives, and nobody writes to it: a zygote
        // has no guest.
        let memory = unsafe { std::slice::from_raw_parts(host, length) };
        for (start, end) in private_runs(&pagemap, host as u64, length as u64)? {
            for piece in pieces(start, end) {
                let bytes = &memory[piece.0 as usize..piece.1 as usize];
                header(&mut stream, offset + piece.0, bytes.len() as u64)?;
                stream.write_all(bytes)?;
            }
        }
    }
    let state = postcard::to_stdvec(&loaded.state).map_err(io::Error::other)?;
    header(&mut stream, END, state.len() as u64)?;
    stream.write_all(&state)
}

fn header(stream: &mut impl Write, offset: u64, length: u64) -> io::Result<()> {
    let mut header = [0; 16];
    header[..8].copy_from_slice(&offset.to_le_bytes());
    header[8..].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&header)
}

/// A run in pieces of at most [`RUN_MAX_BYTES`].
fn pieces(start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let starts = (start..end).step_by(RUN_MAX_BYTES as usize);
    starts.map(move |start| (start, end.min(start + RUN_MAX_BYTES)))
}

/// Runs of pages that a process has for itself, in the part of its memory that begins at `address`: offsets
/// from there, in bytes.
fn private_runs(pagemap: &File, address: u64, length: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut entries = vec![0; ENTRIES * 8];
    let (first, count) = (address / PAGE_BYTES, length / PAGE_BYTES);
    let mut page = 0;
    while page < count {
        let some = ((count - page) as usize).min(ENTRIES) * 8;
        pagemap.read_exact_at(&mut entries[..some], (first + page) * 8)?;
        for entry in entries[..some].as_chunks::<8>().0 {
            let entry = u64::from_le_bytes(*entry);
            let start = page * PAGE_BYTES;
            if is_private(entry) {
                match runs.last_mut() {
                    Some((_, end)) if *end == start => *end += PAGE_BYTES,
                    _ => runs.push((start, start + PAGE_BYTES)),
                }
            }
            page += 1;
        }
    }
    Ok(runs)
}

fn is_private(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0
}

/// What comes out of such a stream. It comes from a process that has held a guest: an allegation.
#[derive(Debug)]
pub enum Piece {
    /// Pages.
    Pages {
        /// Where in the memory.
        offset: u64,
        /// Their bytes.
        bytes: Vec<u8>,
    },
    /// The machine's state, encoded; nothing comes after it.
    State(Vec<u8>),
}

/// Reads the next piece.
///
/// # Errors
/// If the stream ends early, or a length makes no sense.
pub fn receive(stream: &mut impl Read) -> io::Result<Piece> {
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    let word = |at: usize| {
        let bytes = header[at..at + 8].iter().rev();
        bytes.fold(0_u64, |word, byte| word << 8 | u64::from(*byte))
    };
    let (offset, length) = (word(0), word(8));
    let most = if offset == END {
        STATE_MAX_BYTES
    } else {
        RUN_MAX_BYTES
    };
    if length > most {
        return Err(io::Error::other("a branch that sends nonsense"));
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes)?;
    Ok(match offset {
        END => Piece::State(bytes),
        offset => Piece::Pages { offset, bytes },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_a_processs_own_is_private() {
        assert!(is_private(PRESENT) && is_private(SWAPPED) && is_private(PRESENT | 7));
        assert!(!is_private(0) && !is_private(PRESENT | OF_FILE) && !is_private(OF_FILE));
    }

    #[test]
    fn runs_are_sent_in_pieces() {
        let all: Vec<_> = pieces(4096, 4096 + 2 * RUN_MAX_BYTES + 1).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(
            all[2],
            (4096 + 2 * RUN_MAX_BYTES, 4096 + 2 * RUN_MAX_BYTES + 1)
        );
        assert_eq!(pieces(7, 7).count(), 0);
    }

    #[test]
    fn lengths_beyond_all_bounds_are_refused_before_room_is_made() {
        for offset in [0, END] {
            let mut bytes = Vec::new();
            header(&mut bytes, offset, u64::MAX).unwrap();
            assert!(receive(&mut &bytes[..]).is_err());
        }
        let mut bytes = Vec::new();
        header(&mut bytes, 8192, 3).unwrap();
        bytes.extend_from_slice(b"abc");
        let Piece::Pages { offset, bytes } = receive(&mut &bytes[..]).unwrap() else {
            panic!("pages");
        };
        assert_eq!((offset, &bytes[..]), (8192, &b"abc"[..]));
        assert!(receive(&mut &[0_u8; 15][..]).is_err());
    }

    #[test]
    fn a_processs_private_pages_are_found_in_its_page_map() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let memory = zygote_vmm::GuestMemory::private(&file, 128 << 20);
        // The file is shorter than the mapping: only its beginning is touched.
        let memory = memory.unwrap();
        let (_, host, _) = memory.host_ranges()[0];
        // SAFETY: within the mapping, and within the file.
        unsafe {
            host.add(3 * 4096).write_volatile(1);
            host.add(4 * 4096).write_volatile(1);
            host.add(9 * 4096).write_volatile(0);
            assert_eq!(host.add(6 * 4096).read_volatile(), 0);
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let runs = private_runs(&pagemap, host as u64, 1 << 20).unwrap();
        assert_eq!(runs, [(3 * 4096, 5 * 4096), (9 * 4096, 10 * 4096)]);
    }
}
