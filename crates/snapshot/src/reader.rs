//! Opening a snapshot: header, digest, decode, in this order; refusing by name.

use crate::delta::{self, DeltaError};
use crate::manifest::{Base, MANIFEST_MAX_BYTES, Manifest, ManifestError};
use crate::state::MachineState;
use crate::{DELTA_FILE, MACHINE_FILE, MANIFEST_FILE, MEMORY_FILE};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest machine state; 32 vCPUs need 1 MiB.
const MACHINE_MAX_BYTES: u64 = 16 << 20;

/// Why a snapshot is not usable.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing, or nothing that is readable.
    #[error("cannot read {}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// The manifest.
    #[error("{}: it cannot be used", path.display())]
    Manifest {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// A piece has another length.
    #[error("{} is {found} bytes long, not {expected}: it has been cut or overwritten", path.display())]
    Length {
        /// Which file.
        path: PathBuf,
        /// As recorded.
        expected: u64,
        /// As found.
        found: u64,
    },
    /// A piece has another content.
    #[error("{} does not match its digest: it has been damaged", path.display())]
    Digest {
        /// Which file.
        path: PathBuf,
    },
    /// It is based on another one.
    #[error("{} is not the snapshot that this one differs from: it has been replaced", path.display())]
    Base {
        /// Its folder.
        path: PathBuf,
    },
    /// The state cannot be decoded although its digest is right.
    #[error("{} holds no machine state of this format", path.display())]
    State {
        /// Which file.
        path: PathBuf,
    },
}

/// An opened snapshot: its manifest is good and its pieces are there, as long as they must be.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) manifest: Manifest,
    pub(crate) manifest_digest: String,
    pub(crate) machine: (PathBuf, File),
    pub(crate) memory: (PathBuf, File),
    pub(crate) disks: Vec<(PathBuf, File)>,
    /// What it differs from, and what differs.
    pub(crate) base: Option<(Box<Snapshot>, (PathBuf, File))>,
}

impl Snapshot {
    /// Opens the snapshot in `directory`, whose disk images lie in `pieces`.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(directory: &Path, pieces: &Path) -> Result<Self, OpenError> {
        let path = directory.join(MANIFEST_FILE);
        let bytes = read_limited(&path, MANIFEST_MAX_BYTES)?;
        let manifest =
            Manifest::decode(&bytes).map_err(|source| OpenError::Manifest { path, source })?;
        let machine = open(directory.join(MACHINE_FILE), manifest.machine.bytes)?;
        if let Some(base) = &manifest.base {
            let delta = open(directory.join(DELTA_FILE), base.delta.bytes())?;
            let base = open_base(pieces, base, manifest.memory.bytes)?;
            let copy = |(path, file): &(PathBuf, File)| {
                let copied = file.try_clone().map(|file| (path.clone(), file));
                copied.map_err(|source| OpenError::File {
                    path: path.clone(),
                    source,
                })
            };
            return Ok(Self {
                memory: copy(&base.memory)?,
                disks: base.disks.iter().map(copy).collect::<Result<_, _>>()?,
                machine,
                manifest_digest: blake3::hash(&bytes).to_hex().to_string(),
                manifest,
                base: Some((Box::new(base), delta)),
            });
        }
        let memory = open(directory.join(MEMORY_FILE), manifest.memory.bytes)?;
        let disks = manifest
            .disks
            .iter()
            .map(|disk| open(pieces.join(&disk.digest), disk.bytes));
        Ok(Self {
            disks: disks.collect::<Result<_, _>>()?,
            machine,
            memory,
            manifest_digest: blake3::hash(&bytes).to_hex().to_string(),
            manifest,
            base: None,
        })
    }

    /// The whole snapshot that this one differs from, with that one's folder as a manifest names it; this one,
    /// whose folder is `own`, if it is whole itself.
    #[must_use]
    pub fn into_whole(mut self, own: String) -> (Self, String) {
        match self.base.take() {
            Some((whole, _)) => {
                let folder = self.manifest.base.map(|base| base.folder);
                (*whole, folder.unwrap_or_default())
            }
            None => (self, own),
        }
    }

    /// Its files but for manifests, those of its base among them.
    pub(crate) fn files(&self) -> impl Iterator<Item = &(PathBuf, File)> {
        let delta = self.base.as_ref().map(|(_, delta)| delta);
        let base = self.base.as_ref().map(|(base, _)| &base.machine);
        let own = [&self.machine, &self.memory];
        own.into_iter().chain(&self.disks).chain(delta).chain(base)
    }

    /// What it consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The memory file, to be mapped copy-on-write; what differs from it comes on top:
    /// [`Snapshot::read_delta`].
    pub fn memory_file(&self) -> &File {
        &self.memory.1
    }

    /// The disk images with their digests, in the order of their devices.
    pub fn disks(&self) -> impl Iterator<Item = (&File, &str)> {
        let whole = self.base.as_ref().map_or(self, |(base, _)| base);
        let digests = whole.manifest.disks.iter().map(|disk| disk.digest.as_str());
        self.disks.iter().map(|(_, file)| file).zip(digests)
    }

    /// Reads what differs from the memory file, if something does: `put` gets offsets and bytes of pages, and
    /// tells whether to go on. Each frame's digest is checked before it is unpacked.
    ///
    /// # Errors
    /// See [`DeltaError`].
    pub fn read_delta(&self, put: &mut dyn FnMut(u64, &[u8]) -> bool) -> Result<(), DeltaError> {
        match (&self.base, &self.manifest.base) {
            (Some((_, (path, file))), Some(base)) => delta::read(path, file, &base.delta, put),
            _ => Ok(()),
        }
    }

    /// The machine's state, its digest checked before it is decoded.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn machine(&self) -> Result<MachineState, OpenError> {
        let path = &self.machine.0;
        let bytes = read_limited(path, MACHINE_MAX_BYTES)?;
        if blake3::hash(&bytes).to_hex().as_str() != self.manifest.machine.digest {
            return Err(OpenError::Digest { path: path.clone() });
        }
        decode_machine(&bytes, self.manifest.vcpus)
            .ok_or_else(|| OpenError::State { path: path.clone() })
    }
}

fn open_base(pieces: &Path, base: &Base, bytes: u64) -> Result<Snapshot, OpenError> {
    let folder = pieces.parent().unwrap_or(pieces).join(&base.folder);
    let opened = Snapshot::open(&folder, pieces)?;
    let is_same = opened.manifest_digest == base.manifest_digest
        && opened.base.is_none()
        && opened.manifest.memory.bytes == bytes;
    if is_same {
        Ok(opened)
    } else {
        Err(OpenError::Base { path: folder })
    }
}

/// Decodes a machine's state with this number of vCPUs that fills `bytes` exactly. Its digest has
/// been compared: this is what `fuzz/` feeds.
pub fn decode_machine(bytes: &[u8], vcpus: u32) -> Option<MachineState> {
    let (state, rest) = postcard::take_from_bytes::<MachineState>(bytes).ok()?;
    (rest.is_empty() && state.vcpus.len() == vcpus as usize).then_some(state)
}

fn open(path: PathBuf, expected: u64) -> Result<(PathBuf, File), OpenError> {
    let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
    match opened {
        Ok((found, file)) if found == expected => Ok((path, file)),
        Ok((found, _)) => Err(OpenError::Length {
            path,
            expected,
            found,
        }),
        Err(source) => Err(OpenError::File { path, source }),
    }
}

fn read_limited(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, OpenError> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?
            .take(limit_bytes + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|source| OpenError::File {
        path: path.to_owned(),
        source,
    })?;
    if bytes.len() as u64 > limit_bytes {
        return Err(OpenError::Length {
            path: path.to_owned(),
            expected: limit_bytes,
            found: bytes.len() as u64,
        });
    }
    Ok(bytes)
}
