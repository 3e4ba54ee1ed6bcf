//! Verifying a snapshot: every byte of every piece against its digest.

use crate::delta::DeltaError;
use crate::memory::{CHUNK_BYTES, chunk_digest, is_hole};
use crate::reader::{OpenError, Snapshot};
use crate::stamps;
use crate::writer::file_digest;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Why a snapshot is damaged, or could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Its manifest or state.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A piece cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Memory is not what was written.
    #[error("{} does not match its digest in bytes {start} to {end}: it has been damaged", path.display())]
    Memory {
        /// Which file.
        path: PathBuf,
        /// First byte of the damaged chunk.
        start: u64,
        /// Byte after it.
        end: u64,
    },
    /// What differs from its base.
    #[error(transparent)]
    Delta(DeltaError),
    /// Whoever wanted it has gone.
    #[error("the comparison with its digests was stopped")]
    Stopped,
    /// A disk image is not what was written.
    #[error("{} does not match its digest: it has been damaged", path.display())]
    Disk {
        /// Which file.
        path: PathBuf,
    },
}

impl From<DeltaError> for VerifyError {
    fn from(error: DeltaError) -> Self {
        match error {
            DeltaError::Stopped => Self::Stopped,
            error => Self::Delta(error),
        }
    }
}

/// What was verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes that were read and compared; holes are not read.
    pub read_bytes: u64,
    /// Length of all pieces.
    pub total_bytes: u64,
}

impl Snapshot {
    /// Compares everything with its digests. `progress` gets bytes done and bytes in all, and tells
    /// whether to go on.
    ///
    /// # Errors
    /// The first damage found; `Stopped` if `progress` said so.
    pub fn verify(
        &self,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Report, VerifyError> {
        self.machine()?;
        if let Some((base, _)) = &self.base {
            let report = base.verify(progress)?;
            return self.verify_delta(report, progress);
        }
        let disks: u64 = self.manifest.disks.iter().map(|disk| disk.bytes).sum();
        let total = self.manifest.machine.bytes + self.manifest.memory.bytes + disks;
        let mut done = self.manifest.machine.bytes;
        let mut read = done;
        let (path, file) = &self.memory;
        let mut start = 0;
        for digest in &self.manifest.memory.chunks {
            let length = CHUNK_BYTES.min(self.manifest.memory.bytes - start);
            read += verify_chunk(path, file, start, length, digest)?;
            start += length;
            done += length;
            if !progress(done, total) {
                return Err(VerifyError::Stopped);
            }
        }
        for ((path, file), disk) in self.disks.iter().zip(&self.manifest.disks) {
            let (bytes, digest) = digest_from_start(file).map_err(|source| VerifyError::Read {
                path: path.clone(),
                source,
            })?;
            if (bytes, &digest) != (disk.bytes, &disk.digest) {
                return Err(VerifyError::Disk { path: path.clone() });
            }
            read += bytes;
            done += bytes;
            if !progress(done, total) {
                return Err(VerifyError::Stopped);
            }
        }
        Ok(Report {
            read_bytes: read,
            total_bytes: total,
        })
    }

    /// With what differs from its base, which has been verified.
    fn verify_delta(
        &self,
        base: Report,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Report, VerifyError> {
        let delta = self.manifest.base.as_ref().map(|base| base.delta.bytes());
        let own = self.manifest.machine.bytes + delta.unwrap_or(0);
        let total = base.total_bytes + own;
        let mut done = base.total_bytes + self.manifest.machine.bytes;
        self.read_delta(&mut |_, bytes| {
            done = total.min(done + bytes.len() as u64);
            progress(done, total)
        })?;
        Ok(Report {
            read_bytes: base.read_bytes + own,
            total_bytes: total,
        })
    }

    /// As [`Snapshot::verify`], unless these very files were verified before; `stamps` is the
    /// folder in which that is remembered.
    ///
    /// # Errors
    /// The first damage found.
    pub fn verify_once(
        &self,
        stamps: &Path,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(), VerifyError> {
        if let Some((base, _)) = &self.base {
            // Its own files are compared with their digests as they are read.
            return base.verify_once(stamps, progress);
        }
        if stamps::holds(self, stamps) {
            return Ok(());
        }
        let before = stamps::view(self);
        self.verify(progress)?;
        // Not remembered (a read-only folder, a full disk, a file that was written to meanwhile):
        // verified again next time.
        let _ = before.and_then(|before| stamps::remember(self, stamps, before));
        Ok(())
    }

    /// Has everything compared with its digests at the next [`Snapshot::verify_once`].
    pub fn forget(&self, stamps: &Path) {
        stamps::forget(self, stamps);
    }
}

/// Gives back how many bytes had to be read.
fn verify_chunk(
    path: &Path,
    file: &File,
    start: u64,
    length: u64,
    digest: &str,
) -> Result<u64, VerifyError> {
    let expects_zeros = digest.is_empty();
    if expects_zeros && is_hole(file, start, length) {
        return Ok(0);
    }
    let mut chunk = vec![0; length as usize];
    file.read_exact_at(&mut chunk, start)
        .map_err(|source| VerifyError::Read {
            path: path.to_owned(),
            source,
        })?;
    if chunk_digest(&chunk) != digest {
        return Err(VerifyError::Memory {
            path: path.to_owned(),
            start,
            end: start + length,
        });
    }
    Ok(length)
}

fn digest_from_start(file: &File) -> io::Result<(u64, String)> {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
    file_digest(file)
}
