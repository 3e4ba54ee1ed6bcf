//! Writing a snapshot: content first, the manifest last. A folder without a manifest is none.

use crate::delta::DeltaWriter;
use crate::manifest::{
    Base, DiskPiece, Manifest, MemoryPiece, Origin, PAGE_BYTES, Piece, WorkingSet,
};
use crate::memory::{CHUNK_BYTES, chunk_digest, write_chunk};
use crate::state::MachineState;
use crate::{DELTA_FILE, MACHINE_FILE, MANIFEST_FILE, MEMORY_FILE, Snapshot};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
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
    /// A snapshot that differs from another one.
    #[error("a snapshot can only be based on one that is whole")]
    Base,
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

pub(crate) fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WriteError {
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
    base: Option<Base>,
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
            base: None,
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

    /// Writes memory as it differs from that of `base`, in the folder `folder` (see [`Base::folder`]), of a
    /// machine that is held, or frozen ([`Base::is_held`]).
    ///
    /// # Errors
    /// If the file cannot be written, or the base is not whole.
    pub fn delta(
        &mut self,
        base: &Snapshot,
        folder: &str,
        is_held: bool,
    ) -> Result<Based<'_>, WriteError> {
        if base.manifest().base.is_some() {
            return Err(WriteError::Base);
        }
        let memory = base.memory_file().try_clone();
        let path = self.directory.join(DELTA_FILE);
        Ok(Based {
            base: memory.map_err(at("open the memory under", &path))?,
            bytes: base.manifest().memory.bytes,
            folder: folder.to_owned(),
            manifest_digest: base.manifest_digest.clone(),
            is_held,
            pages: DeltaWriter::create(&path)?,
            next: 0,
            writer: self,
        })
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
            self.base,
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

pub(crate) fn create(path: &Path) -> Result<File, WriteError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    options.open(path).map_err(at("create", path))
}

/// Memory that is being written, page by page.
pub struct Based<'a> {
    base: File,
    bytes: u64,
    folder: String,
    manifest_digest: String,
    is_held: bool,
    pages: DeltaWriter,
    next: u64,
    writer: &'a mut Writer,
}

impl Based<'_> {
    /// Pages from an offset on; what is as in the base is left out. Offsets ascend.
    ///
    /// # Errors
    /// If they are not pages of the base's memory, in this order, or cannot be written.
    pub fn pages(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let end = offset.checked_add(bytes.len() as u64);
        let is_sound = offset.is_multiple_of(PAGE_BYTES)
            && (bytes.len() as u64).is_multiple_of(PAGE_BYTES)
            && offset >= self.next
            && end.is_some_and(|end| end <= self.bytes);
        if !is_sound {
            let expected = self.next;
            return Err(WriteError::Gap { offset, expected });
        }
        let mut before = vec![0; bytes.len()];
        let path = || Path::new(&self.folder).join(MEMORY_FILE);
        self.base
            .read_exact_at(&mut before, offset)
            .map_err(|source| at("read", &path())(source))?;
        let size = PAGE_BYTES as usize;
        for (index, (page, before)) in bytes.chunks(size).zip(before.chunks(size)).enumerate() {
            if page != before || self.pages.is_crowded() {
                let number = (offset / PAGE_BYTES) as u32 + index as u32;
                self.pages.page(number, page)?;
            }
        }
        self.next = offset + bytes.len() as u64;
        Ok(())
    }

    /// That was all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn finish(self) -> Result<(), WriteError> {
        self.writer.memory = Some(MemoryPiece {
            bytes: self.bytes,
            chunks: Vec::new(),
        });
        self.writer.base = Some(Base {
            folder: self.folder,
            manifest_digest: self.manifest_digest,
            is_held: self.is_held,
            delta: self.pages.finish()?,
        });
        Ok(())
    }
}

/// Read-only from now on, and on the disk.
pub(crate) fn close(file: &File, path: &Path) -> Result<(), WriteError> {
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
