//! The memory file in chunks: what is zero is a hole, what is not has a digest.

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Size of the pieces that have digests of their own: 2 MiB.
pub const CHUNK_BYTES: u64 = 2 << 20;
/// Zeros are found, and left out of the file, in pages.
const PAGE_BYTES: usize = 4096;

// The format's constants cannot change without a new version of the format.
const _: () = assert!(CHUNK_BYTES == 2 << 20 && crate::FORMAT_VERSION == 5);

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// The digest of a chunk as the manifest has it: empty for zeros.
pub fn chunk_digest(chunk: &[u8]) -> String {
    if is_zero(chunk) {
        String::new()
    } else {
        blake3::hash(chunk).to_hex().to_string()
    }
}

/// Writes a chunk's pages that are not zero.
pub fn write_chunk(file: &File, offset: u64, chunk: &[u8]) -> io::Result<()> {
    let mut at = 0;
    while at < chunk.len() {
        let end = (at + PAGE_BYTES).min(chunk.len());
        if is_zero(&chunk[at..end]) {
            at = end;
            continue;
        }
        // One write for each run of pages that are not zero.
        let mut run = end;
        while run < chunk.len() && !is_zero(&chunk[run..(run + PAGE_BYTES).min(chunk.len())]) {
            run = (run + PAGE_BYTES).min(chunk.len());
        }
        file.write_all_at(&chunk[at..run], offset + at as u64)?;
        at = run;
    }
    Ok(())
}

/// Whether a range is a hole, as far as the file system tells; one that does not tell has no holes
/// (lseek(2), SEEK_DATA).
pub fn is_hole(file: &File, offset: u64, length: u64) -> bool {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data >= offset + length,
        Err(error) => error == Errno::NXIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_anywhere_is_not_zero() {
        for at in 0..70 {
            let mut bytes = [0; 70];
            assert!(is_zero(&bytes));
            bytes[at] = 1;
            assert!(!is_zero(&bytes));
        }
    }
}
