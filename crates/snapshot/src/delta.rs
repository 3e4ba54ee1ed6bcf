//! Memory as it differs from that of another snapshot: `delta.bin`, zstd frames of pages (RFC 8878).
//!
//! Pages are written in ascending order. One of zeros is only named; the others lie one behind the other, so
//! many to a frame. A frame is compared with its digest before anything is made of it.

use crate::manifest::{PAGE_BYTES, Piece};
use crate::memory::is_zero;
use crate::writer::{WriteError, at, close, create};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Pages of a frame: 2 MiB.
pub const FRAME_PAGES: usize = 512;
const FRAME_BYTES: usize = FRAME_PAGES * PAGE_BYTES as usize;
/// No frame is longer, compressed: zstd's worst case, and room to spare.
const FRAME_MAX_BYTES: u64 = FRAME_BYTES as u64 + (64 << 10);
/// How hard it is tried: fast, as a sandbox waits for it.
const LEVEL: i32 = 1;
/// Runs of pages that the manifest has room for; beyond that neighbours are written along.
const RUNS_MAX: usize = 100_000;

/// What differs from the memory of the snapshot that this one is based on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// Pages whose content is in `delta.bin`, in this order: `[first, count]`, ascending and apart.
    pub pages: Vec<[u32; 2]>,
    /// Pages of zeros, likewise.
    pub zeros: Vec<[u32; 2]>,
    /// The frames of `delta.bin`, one behind the other, each of [`FRAME_PAGES`] of `pages`, the last maybe of
    /// fewer.
    pub frames: Vec<Piece>,
}

impl Delta {
    /// How many pages lie in the file.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.pages.iter().map(|[_, count]| u64::from(*count)).sum()
    }

    /// Length of the file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.bytes).sum()
    }

    /// Whether it has as many frames as its pages need, none too long.
    pub(crate) fn is_sound(&self) -> bool {
        let frames = self.page_count().div_ceil(FRAME_PAGES as u64);
        self.frames.len() as u64 == frames
            && self
                .frames
                .iter()
                .all(|frame| frame.bytes <= FRAME_MAX_BYTES)
    }
}

/// Why a delta cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The file.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// A frame is not what was written.
    #[error("{} does not match its digest in bytes {start} to {end}: it has been damaged", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// First byte of the frame.
        start: u64,
        /// Byte after it.
        end: u64,
    },
    /// Whoever wanted it has gone.
    #[error("reading it was stopped")]
    Stopped,
}

/// A delta that is being written.
pub(crate) struct DeltaWriter {
    path: PathBuf,
    file: File,
    delta: Delta,
    /// Of the frame that is not full yet.
    pending: Vec<u8>,
}

impl DeltaWriter {
    pub fn create(path: &Path) -> Result<Self, WriteError> {
        Ok(Self {
            file: create(path)?,
            path: path.to_owned(),
            delta: Delta::default(),
            pending: Vec::with_capacity(FRAME_BYTES),
        })
    }

    /// One more page; its number is larger than those before.
    pub fn page(&mut self, number: u32, page: &[u8]) -> Result<(), WriteError> {
        debug_assert_eq!(page.len() as u64, PAGE_BYTES);
        if is_zero(page) {
            push(&mut self.delta.zeros, number);
            return Ok(());
        }
        push(&mut self.delta.pages, number);
        self.pending.extend_from_slice(page);
        if self.pending.len() == FRAME_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// Whether the manifest has no room for pages that lie apart.
    pub fn is_crowded(&self) -> bool {
        self.delta.pages.len() + self.delta.zeros.len() >= RUNS_MAX
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let frame = zstd::bulk::compress(&self.pending, LEVEL);
        let frame = frame.map_err(at("compress", &self.path))?;
        self.file
            .write_all(&frame)
            .map_err(at("write", &self.path))?;
        self.delta.frames.push(Piece {
            bytes: frame.len() as u64,
            digest: blake3::hash(&frame).to_hex().to_string(),
        });
        self.pending.clear();
        Ok(())
    }

    pub fn finish(mut self) -> Result<Delta, WriteError> {
        self.flush()?;
        close(&self.file, &self.path)?;
        Ok(self.delta)
    }
}

fn push(runs: &mut Vec<[u32; 2]>, number: u32) {
    match runs.last_mut() {
        Some([first, count]) if *first + *count == number => *count += 1,
        _ => runs.push([number, 1]),
    }
}

/// Reads all pages: `put` gets each run's offset in the memory, and its bytes, and tells whether to go on.
pub(crate) fn read(
    path: &Path,
    file: &File,
    delta: &Delta,
    put: &mut dyn FnMut(u64, &[u8]) -> bool,
) -> Result<(), DeltaError> {
    let mut pages = Pages::of(&delta.pages);
    let mut left = delta.page_count() as usize;
    let mut start = 0;
    for frame in &delta.frames {
        let count = left.min(FRAME_PAGES);
        let bytes = read_frame(path, file, start, frame, count)?;
        let mut at = 0;
        while at < count {
            let Some((number, run)) = pages.take(count - at) else {
                break;
            };
            let bytes = &bytes[at * PAGE_BYTES as usize..(at + run) * PAGE_BYTES as usize];
            if !put(u64::from(number) * PAGE_BYTES, bytes) {
                return Err(DeltaError::Stopped);
            }
            at += run;
        }
        left -= count;
        start += frame.bytes;
    }
    let zeros = vec![0; FRAME_BYTES];
    let mut pages = Pages::of(&delta.zeros);
    while let Some((number, run)) = pages.take(FRAME_PAGES) {
        let bytes = &zeros[..run * PAGE_BYTES as usize];
        if !put(u64::from(number) * PAGE_BYTES, bytes) {
            return Err(DeltaError::Stopped);
        }
    }
    Ok(())
}

fn read_frame(
    path: &Path,
    file: &File,
    start: u64,
    frame: &Piece,
    pages: usize,
) -> Result<Vec<u8>, DeltaError> {
    let damaged = || DeltaError::Damaged {
        path: path.to_owned(),
        start,
        end: start + frame.bytes,
    };
    let mut packed = vec![0; frame.bytes as usize];
    file.read_exact_at(&mut packed, start)
        .map_err(|source| DeltaError::Read {
            path: path.to_owned(),
            source,
        })?;
    if blake3::hash(&packed).to_hex().as_str() != frame.digest {
        return Err(damaged());
    }
    let expected = pages * PAGE_BYTES as usize;
    // A frame that says that it is longer is not unpacked.
    let bytes = zstd::bulk::decompress(&packed, expected).map_err(|_| damaged())?;
    if bytes.len() == expected {
        Ok(bytes)
    } else {
        Err(damaged())
    }
}

/// Runs of pages, in pieces.
struct Pages<'a> {
    runs: std::slice::Iter<'a, [u32; 2]>,
    now: [u32; 2],
}

impl<'a> Pages<'a> {
    fn of(runs: &'a [[u32; 2]]) -> Self {
        Self {
            runs: runs.iter(),
            now: [0, 0],
        }
    }

    /// The next run, of at most so many pages: its first page and how many.
    fn take(&mut self, most: usize) -> Option<(u32, usize)> {
        if self.now[1] == 0 {
            self.now = *self.runs.next()?;
        }
        let [first, count] = self.now;
        let run = count.min(most as u32);
        self.now = [first + run, count - run];
        Some((first, run as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(seed: u8) -> Vec<u8> {
        (0..PAGE_BYTES)
            .map(|at| seed.wrapping_mul(at as u8 | 1))
            .collect()
    }

    fn written(folder: &Path, pages: &[(u32, u8)]) -> (PathBuf, Delta) {
        let path = folder.join("delta.bin");
        let mut writer = DeltaWriter::create(&path).unwrap();
        for (number, seed) in pages {
            writer.page(*number, &page(*seed)).unwrap();
        }
        (path, writer.finish().unwrap())
    }

    fn all(path: &Path, delta: &Delta) -> Result<Vec<(u64, Vec<u8>)>, DeltaError> {
        let mut pages = Vec::new();
        read(
            path,
            &File::open(path).unwrap(),
            delta,
            &mut |offset, bytes| {
                for (index, page) in bytes.chunks(PAGE_BYTES as usize).enumerate() {
                    pages.push((offset + index as u64 * PAGE_BYTES, page.to_vec()));
                }
                true
            },
        )?;
        pages.sort();
        Ok(pages)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_written_is_read(
            steps in prop::collection::vec((1_u32..4, 0_u8..6), 0..1500),
        ) {
            let mut number = 0;
            let pages: Vec<(u32, u8)> = steps.into_iter().map(|(step, seed)| {
                number += step;
                (number, seed)
            }).collect();
            let folder = tempfile::tempdir().unwrap();
            let (path, delta) = written(folder.path(), &pages);
            assert!(delta.is_sound());
            let zeros = pages.iter().filter(|(_, seed)| *seed == 0).count() as u64;
            assert_eq!(delta.page_count() + zeros, pages.len() as u64);
            assert_eq!(path.metadata().unwrap().len(), delta.bytes());
            let expected: Vec<(u64, Vec<u8>)> = pages
                .iter()
                .map(|(number, seed)| (u64::from(*number) * PAGE_BYTES, page(*seed)))
                .collect();
            assert_eq!(all(&path, &delta).unwrap(), expected);
        }
    }

    #[test]
    fn a_single_bit_is_noticed_before_anything_is_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let pages: Vec<(u32, u8)> = (0..600).map(|number| (number, 3)).collect();
        let (path, delta) = written(folder.path(), &pages);
        let good = std::fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let other = folder.path().join(format!("bad-{at}"));
            std::fs::write(&other, &bad).unwrap();
            assert!(matches!(
                all(&other, &delta),
                Err(DeltaError::Damaged { .. })
            ));
        }
        let cut = folder.path().join("cut");
        std::fs::write(&cut, &good[..good.len() - 1]).unwrap();
        assert!(matches!(all(&cut, &delta), Err(DeltaError::Read { .. })));
    }

    #[test]
    fn a_frame_that_unpacks_to_more_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("delta.bin");
        let bomb = zstd::bulk::compress(&vec![7; 64 << 20], LEVEL).unwrap();
        std::fs::write(&path, &bomb).unwrap();
        let delta = Delta {
            pages: vec![[0, 1]],
            zeros: vec![],
            frames: vec![Piece {
                bytes: bomb.len() as u64,
                digest: blake3::hash(&bomb).to_hex().to_string(),
            }],
        };
        assert!(matches!(
            all(&path, &delta),
            Err(DeltaError::Damaged { .. })
        ));
    }
}
