//! Writing a snapshot: content first, the manifest last. A folder without a manifest is none.

use crate::manifest::{DiskPiece, Manifest, MemoryPiece, Origin, Piece, WorkingSet};
use crate::memory::{CHUNK_BYTES, chunk_digest, write_chunk};
use crate::state::MachineState;
use crate::{MACHINE_FILE, MANIFEST_FILE, MEMORY_FILE};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Why a snapshot could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A file.
    #[error("cannot {operation} {}{}", path.display(), remedy(source))]
    File {
        /// Verb.
        operation: &'static str,
        /// Object.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// The state.
    #[error("cannot encode the machine's state")]
    Encode(#[source] postcard::Error),
    /// The manifest.
    #[error("cannot encode the manifest")]
    Manifest(#[source] serde_json::Error),
    /// Finished too early.
    #[error("a snapshot needs memory and a machine's state")]
    Incomplete,
    /// The caller's memory ranges.
    #[error("memory at offset {offset} does not continue at {expected}")]
    Gap {
        /// Where the range begins.
        offset: u64,
        /// Where it should.
        expected: u64,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (free some space, or choose another state directory)"
        }
        _ => "",
    }
}

fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError::File {
        operation,
        path,
        source,
    }
}

/// A snapshot that is being written. Dropped before [`Writer::finish`], it leaves a folder without
/// a manifest, which nobody takes for a snapshot.
pub struct Writer {
    directory: PathBuf,
    machine: Option<Piece>,
    vcpus: u32,
    memory: Option<MemoryPiece>,
    disks: Vec<DiskPiece>,
    working_sets: Vec<WorkingSet>,
}

impl Writer {
    /// Begins in a new folder.
    ///
    /// # Errors
    /// If it exists or cannot be made.
    pub fn create(directory: &Path) -> Result<Self, WriteError> {
        fs::create_dir(directory).map_err(at("make the folder", directory))?;
        Ok(Self {
            directory: directory.to_owned(),
            machine: None,
            vcpus: 0,
            memory: None,
            disks: Vec::new(),
            working_sets: Vec::new(),
        })
    }

    /// Writes the guest's memory: ranges `(offset, bytes)` in ascending order, without gaps, each
    /// but the last a multiple of [`CHUNK_BYTES`] long.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn memory<'a>(
        &mut self,
        ranges: impl IntoIterator<Item = (u64, &'a [u8])>,
    ) -> Result<(), WriteError> {
        let path = self.directory.join(MEMORY_FILE);
        let file = create(&path)?;
        let mut bytes = 0;
        let mut chunks = Vec::new();
        for (offset, range) in ranges {
            if offset != bytes || bytes % CHUNK_BYTES != 0 {
                return Err(WriteError::Gap {
                    offset,
                    expected: bytes,
                });
            }
            for chunk in range.chunks(CHUNK_BYTES as usize) {
                let digest = chunk_digest(chunk);
                if !digest.is_empty() {
                    write_chunk(&file, bytes, chunk).map_err(at("write", &path))?;
                }
                chunks.push(digest);
                bytes += chunk.len() as u64;
            }
        }
        file.set_len(bytes).map_err(at("write", &path))?;
        close(&file, &path)?;
        self.memory = Some(MemoryPiece { bytes, chunks });
        Ok(())
    }

    /// Writes the machine's state.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn machine(&mut self, state: &MachineState) -> Result<(), WriteError> {
        let bytes = postcard::to_stdvec(state).map_err(WriteError::Encode)?;
        let path = self.directory.join(MACHINE_FILE);
        let mut file = create(&path)?;
        file.write_all(&bytes).map_err(at("write", &path))?;
        close(&file, &path)?;
        self.vcpus = state.vcpus.len() as u32;
        self.machine = Some(Piece {
            bytes: bytes.len() as u64,
            digest: blake3::hash(&bytes).to_hex().to_string(),
        });
        Ok(())
    }

    /// Records a disk image, which lies in the folder of pieces under its digest.
    pub fn disk(&mut self, disk: DiskPiece) {
        self.disks.push(disk);
    }

    /// Records what runs touch whatever their program: see [`Manifest::working_sets`].
    pub fn working_sets(&mut self, sets: Vec<WorkingSet>) {
        self.working_sets = sets;
    }

    /// Writes the manifest: now it is a snapshot, safe on disk.
    ///
    /// # Errors
    /// If it cannot be written, or memory or machine have not been.
    pub fn finish(self, origin: Origin) -> Result<Manifest, WriteError> {
        let (Some(machine), Some(memory)) = (self.machine, self.memory) else {
            return Err(WriteError::Incomplete);
        };
        let manifest = Manifest::new(
            origin,
            self.vcpus,
            machine,
            memory,
            self.disks,
            self.working_sets,
        );
        let bytes = manifest.encode().map_err(WriteError::Manifest)?;
        let path = self.directory.join(MANIFEST_FILE);
        let mut file = create(&path)?;
        file.write_all(&bytes).map_err(at("write", &path))?;
        close(&file, &path)?;
        let directory = File::open(&self.directory).map_err(at("open", &self.directory))?;
        directory.sync_all().map_err(at("flush", &self.directory))?;
        Ok(manifest)
    }
}

fn create(path: &Path) -> Result<File, WriteError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    options.open(path).map_err(at("create", path))
}

/// Read-only from now on, and on the disk.
fn close(file: &File, path: &Path) -> Result<(), WriteError> {
    file.set_permissions(Permissions::from_mode(0o444))
        .map_err(at("protect", path))?;
    file.sync_all().map_err(at("flush", path))
}

/// Length and BLAKE3 digest of a file.
///
/// # Errors
/// If it cannot be read.
pub fn file_digest(mut file: &File) -> io::Result<(u64, String)> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, hasher.finalize().to_hex().to_string())),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
