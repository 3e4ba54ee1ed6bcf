//! The manifest: one header line that never changes its shape, then JSON of the version it names.
//!
//! The header is `zygote-snapshot VERSION DIGEST\n`: readable by every version there will ever be,
//! so that a newer snapshot is refused by its version and not by a parse error. DIGEST is BLAKE3,
//! in hex, of all bytes after the header.

use crate::delta::Delta;
use serde::{Deserialize, Serialize};
use std::path::{Component, Path};

/// Version of the format that this program writes.
pub const FORMAT_VERSION: u32 = 5;
/// Oldest version that it reads. Version 1 had no working sets, version 2 the written pages of one, and all
/// before 4 no base; all bases of 4 are of machines that were held.
pub const FORMAT_VERSION_OLDEST: u32 = 1;
/// A page of the working set.
pub const PAGE_BYTES: u64 = 4096;
/// First word of the header.
pub const MAGIC: &str = "zygote-snapshot";
/// Largest manifest; a 16 GiB guest's is 0.6 MB.
pub const MANIFEST_MAX_BYTES: u64 = 4 << 20;

/// What a snapshot consists of and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The header's version, which is not under its digest; absent before 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    /// Where it comes from.
    pub origin: Origin,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// `machine.bin`: postcard of [`crate::state::MachineState`].
    pub machine: Piece,
    /// `memory.bin`.
    pub memory: MemoryPiece,
    /// Disk images, in the order of their devices. They lie beside the snapshots that share them,
    /// in a folder of pieces, each under its digest.
    pub disks: Vec<DiskPiece>,
    /// The snapshot that this one differs from, if it is not whole: then `memory.chunks` and `disks` are empty,
    /// as they are that one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// What runs touch whatever their program. A hint: forks have it ahead.
    #[serde(default)]
    pub working_sets: Vec<WorkingSet>,
    /// Version 2: the written pages of [`RunKind::Python`]. Read, and never written.
    #[serde(default, skip_serializing)]
    working_set: Vec<[u32; 2]>,
}

/// A snapshot, whole, that another one differs from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its folder, from that in which the folder of its disk images lies.
    pub folder: String,
    /// BLAKE3, in hex, of its manifest: all of it is what that says.
    pub manifest_digest: String,
    /// Whether it is of a machine that was running, whose agent holds the user's processes: the connection
    /// to its host went on with that machine. Otherwise it waits frozen, as a whole one does.
    #[serde(default = "always")]
    pub is_held: bool,
    /// What differs.
    pub delta: Delta,
}

fn always() -> bool {
    true
}

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunKind {
    /// Code in the warm interpreter.
    Python,
    /// Any program.
    Command,
    /// Nothing yet: it becomes somebody, and waits.
    Sandbox,
}

/// The pages that every run of a kind touches: `[first, count]` each, in pages of 4 KiB of the memory
/// file, ascending and apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// Of which kind.
    pub of: RunKind,
    /// Those that it writes.
    pub written: Vec<[u32; 2]>,
    /// Those that it only reads.
    pub read: Vec<[u32; 2]>,
}

/// Where a snapshot comes from. Nothing in here changes how it is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Name of the template.
    pub template: String,
    /// Digest of everything that it was built from.
    pub recipe_digest: String,
    /// Which of the template's replicas, from 0.
    pub replica: u32,
    /// When it was taken, in seconds since 1970-01-01T00:00:00Z.
    pub created_unix_s: u64,
    /// Version of the program that took it.
    pub zygote_version: String,
    /// Version of the protocol that the guest's agent speaks.
    pub protocol_version: u32,
    /// The guest's `uname -r`.
    pub kernel_release: String,
    /// The warm interpreter: `python`.
    pub interpreter: String,
    /// Vendor of the CPU that it was taken on, as CPUID leaf 0 tells.
    pub cpu_vendor: String,
}

/// A file that is read whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Length.
    pub bytes: u64,
    /// BLAKE3, in hex.
    pub digest: String,
}

/// The memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryPiece {
    /// Length of the file: the guest's memory without the 32-bit hole.
    pub bytes: u64,
    /// BLAKE3, in hex, of each [`crate::CHUNK_BYTES`] of it, the last one maybe shorter; empty for
    /// a chunk of zeros, which is a hole in the file.
    pub chunks: Vec<String>,
}

/// A disk image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPiece {
    /// Length.
    pub bytes: u64,
    /// BLAKE3, in hex: also the name of its file.
    pub digest: String,
}

/// Why bytes are no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// No header.
    #[error("it does not begin as a snapshot's manifest does")]
    NotASnapshot,
    /// Written by a later program.
    #[error(
        "it has format version {found}, and this program reads versions {FORMAT_VERSION_OLDEST} to \
         {FORMAT_VERSION}"
    )]
    Version {
        /// The version that it names.
        found: u32,
    },
    /// Not the bytes that were written.
    #[error("its digest does not match: it has been damaged")]
    Damaged,
    /// Right digest, wrong content.
    #[error("it does not say what a manifest must say")]
    Content(#[source] serde_json::Error),
    /// It contradicts itself.
    #[error("it contradicts itself: {0}")]
    Contradiction(&'static str),
}

impl Manifest {
    /// Whether it is of a machine that was running: see [`Base::is_held`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.is_held)
    }

    pub(crate) fn new(
        origin: Origin,
        vcpus: u32,
        machine: Piece,
        memory: MemoryPiece,
        disks: Vec<DiskPiece>,
        base: Option<Base>,
        working_sets: Vec<WorkingSet>,
    ) -> Self {
        Self {
            version: Some(FORMAT_VERSION),
            origin,
            vcpus,
            machine,
            memory,
            disks,
            base,
            working_sets,
            working_set: Vec::new(),
        }
    }

    /// Header and JSON.
    ///
    /// # Errors
    /// If JSON cannot be made; for these types it always can.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut body = serde_json::to_vec_pretty(self)?;
        body.push(b'\n');
        let digest = blake3::hash(&body).to_hex();
        let mut bytes = format!("{MAGIC} {FORMAT_VERSION} {digest}\n").into_bytes();
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Reads the header, compares version and digest, and only then decodes the rest.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let end = bytes.iter().take(256).position(|byte| *byte == b'\n');
        let (header, body) = bytes.split_at(end.ok_or(ManifestError::NotASnapshot)? + 1);
        let header = std::str::from_utf8(&header[..header.len() - 1]);
        let words: Vec<&str> = header
            .map_err(|_| ManifestError::NotASnapshot)?
            .split(' ')
            .collect();
        let [MAGIC, version, digest] = words[..] else {
            return Err(ManifestError::NotASnapshot);
        };
        let found: u32 = version.parse().map_err(|_| ManifestError::NotASnapshot)?;
        let is_known = (FORMAT_VERSION_OLDEST..=FORMAT_VERSION).contains(&found);
        if !is_known || version != found.to_string() {
            return Err(ManifestError::Version { found });
        }
        if blake3::hash(body).to_hex().as_str() != digest {
            return Err(ManifestError::Damaged);
        }
        let mut manifest: Self = serde_json::from_slice(body).map_err(ManifestError::Content)?;
        let written = (found >= 5).then_some(found);
        if manifest.version != written {
            return Err(ManifestError::Contradiction("its version is another one's"));
        }
        let is_old =
            manifest.working_sets.is_empty() && (found == 2 || manifest.working_set.is_empty());
        let is_new = found >= 3 && manifest.working_set.is_empty();
        if !is_old && !is_new {
            return Err(ManifestError::Contradiction(
                "its working sets are those of another version",
            ));
        }
        if manifest.base.is_some() && found < 4 {
            return Err(ManifestError::Contradiction("its version knows no base"));
        }
        if !manifest.working_set.is_empty() {
            manifest.working_sets.push(WorkingSet {
                of: RunKind::Python,
                written: std::mem::take(&mut manifest.working_set),
                read: Vec::new(),
            });
        }
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ManifestError> {
        let chunks = match &self.base {
            None => self.memory.bytes.div_ceil(crate::CHUNK_BYTES),
            Some(base) => {
                self.check_base(base)?;
                0
            }
        };
        if self.memory.chunks.len() as u64 != chunks {
            return Err(ManifestError::Contradiction(
                "the number of memory digests does not fit the memory's size",
            ));
        }
        if self.disks.iter().any(|disk| !is_digest(&disk.digest)) {
            return Err(ManifestError::Contradiction("a disk's digest is not one"));
        }
        let are_sound = |set: &WorkingSet| {
            are_pages_of(&set.written, self.memory.bytes)
                && are_pages_of(&set.read, self.memory.bytes)
        };
        if !self.working_sets.iter().all(are_sound) {
            return Err(ManifestError::Contradiction(
                "a working set is not one of its memory",
            ));
        }
        Ok(())
    }
}

impl Manifest {
    fn check_base(&self, base: &Base) -> Result<(), ManifestError> {
        let is_path = Path::new(&base.folder)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !is_path || base.folder.is_empty() || !is_digest(&base.manifest_digest) {
            return Err(ManifestError::Contradiction("its base is no snapshot's"));
        }
        if !self.disks.is_empty() {
            return Err(ManifestError::Contradiction(
                "it has disks beside those of its base",
            ));
        }
        let delta = &base.delta;
        let are_sound = are_pages_of(&delta.pages, self.memory.bytes)
            && are_pages_of(&delta.zeros, self.memory.bytes);
        if !are_sound || !delta.is_sound() {
            return Err(ManifestError::Contradiction(
                "what differs is not of its memory",
            ));
        }
        Ok(())
    }
}

/// Whether ranges ascend, lie apart and within so many bytes.
fn are_pages_of(ranges: &[[u32; 2]], bytes: u64) -> bool {
    let mut end = 0;
    ranges.iter().all(|&[first, count]| {
        let (first, count) = (u64::from(first), u64::from(count));
        let is_sound = count > 0 && first >= end && (first + count) * PAGE_BYTES <= bytes;
        end = first + count;
        is_sound
    })
}

/// Whether a text is a BLAKE3 digest in hex (and so can be a file's name).
pub fn is_digest(text: &str) -> bool {
    text.len() == 2 * blake3::OUT_LEN
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn origin() -> Origin {
        Origin {
            template: "python".into(),
            recipe_digest: "0".into(),
            replica: 0,
            created_unix_s: 1,
            zygote_version: "0.1.0".into(),
            protocol_version: 1,
            kernel_release: "6.12".into(),
            interpreter: "python".into(),
            cpu_vendor: "AuthenticAMD".into(),
        }
    }

    fn manifest() -> Manifest {
        Manifest {
            version: Some(FORMAT_VERSION),
            origin: origin(),
            vcpus: 1,
            machine: Piece {
                bytes: 1,
                digest: "a".repeat(64),
            },
            memory: MemoryPiece {
                bytes: 4096,
                chunks: vec![String::new()],
            },
            disks: vec![],
            base: None,
            working_sets: vec![set(&[[0, 1]], &[])],
            working_set: vec![],
        }
    }

    fn set(written: &[[u32; 2]], read: &[[u32; 2]]) -> WorkingSet {
        WorkingSet {
            of: RunKind::Python,
            written: written.to_vec(),
            read: read.to_vec(),
        }
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_refused() {
        let bytes = manifest().encode().unwrap();
        assert_eq!(Manifest::decode(&bytes).unwrap(), manifest());
        for at in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert!(Manifest::decode(&damaged).is_err(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_its_number_before_anything_else() {
        let bytes = b"zygote-snapshot 6 whatever comes then\n{";
        let Err(ManifestError::NotASnapshot | ManifestError::Version { found: 6 }) =
            Manifest::decode(bytes)
        else {
            panic!("decoded");
        };
        let bytes = b"zygote-snapshot 6 digest\n\xff\xfe not json";
        let Err(error) = Manifest::decode(bytes) else {
            panic!("decoded");
        };
        assert!(error.to_string().contains("version 6"), "{error}");
    }

    #[test]
    fn a_working_set_beyond_the_memory_or_out_of_order_is_refused() {
        let with = |pages: &[[u32; 2]]| Manifest {
            memory: MemoryPiece {
                bytes: 8 * PAGE_BYTES,
                chunks: vec![String::new()],
            },
            working_sets: vec![set(&[[0, 1]], pages), set(pages, &[])],
            ..manifest()
        };
        let read = |set: &[[u32; 2]]| Manifest::decode(&with(set).encode().unwrap());
        assert!(read(&[[0, 2], [2, 1], [7, 1]]).is_ok());
        for bad in [
            &[[8, 1]][..],
            &[[7, 2]],
            &[[1, 0]],
            &[[4, 1], [3, 1]],
            &[[3, 2], [4, 1]],
        ] {
            let read = read(bad);
            assert!(
                matches!(read, Err(ManifestError::Contradiction(_))),
                "{bad:?}"
            );
        }
        assert!(read(&[[u32::MAX, u32::MAX]]).is_err());
    }

    /// As an older version has written it.
    fn old(version: u32, instead: &str) -> Manifest {
        let bytes = Manifest {
            version: None,
            working_sets: vec![],
            ..manifest()
        }
        .encode()
        .unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (_, body) = text.split_once('\n').unwrap();
        let body = body.replace(",\n  \"working_sets\": []", instead);
        assert!(!body.contains("working_sets"));
        let digest = blake3::hash(body.as_bytes()).to_hex();
        let old = format!("{MAGIC} {version} {digest}\n{body}");
        Manifest::decode(old.as_bytes()).unwrap()
    }

    #[test]
    fn version_1_had_no_working_sets_and_version_2_half_of_one() {
        assert_eq!(old(1, "").working_sets, []);
        let two = old(2, ",\n  \"working_set\": [[0, 1]]");
        assert_eq!(two.working_sets, [set(&[[0, 1]], &[])]);
        let then = Manifest {
            version: None,
            ..manifest()
        };
        assert_eq!(two, then);
    }

    #[test]
    fn a_base_that_leads_elsewhere_or_does_not_fit_is_refused() {
        let base = |folder: &str, delta: Delta| Manifest {
            memory: MemoryPiece {
                bytes: 8 * PAGE_BYTES,
                chunks: vec![],
            },
            working_sets: vec![],
            base: Some(Base {
                folder: folder.into(),
                manifest_digest: "0a".repeat(32),
                is_held: true,
                delta,
            }),
            ..manifest()
        };
        let frame = |bytes| Piece {
            bytes,
            digest: "0a".repeat(32),
        };
        let delta = |pages: &[[u32; 2]], frames: Vec<Piece>| Delta {
            pages: pages.to_vec(),
            zeros: vec![],
            frames,
        };
        let read = |manifest: Manifest| Manifest::decode(&manifest.encode().unwrap());
        let one = || delta(&[[1, 2]], vec![frame(9)]);
        assert!(read(base("generations/a-1/replica-0", one())).is_ok());
        for folder in ["", "/etc", "../x", "a/../../b", "."] {
            assert!(read(base(folder, one())).is_err(), "{folder}");
        }
        for bad in [
            delta(&[[1, 2]], vec![]),
            delta(&[], vec![frame(9)]),
            delta(&[[7, 2]], vec![frame(9)]),
            delta(&[[1, 2]], vec![frame(u64::MAX)]),
        ] {
            assert!(read(base("a", bad)).is_err());
        }
        let whole = Manifest {
            memory: manifest().memory,
            ..base("a", one())
        };
        assert!(read(whole).is_err());
    }

    #[test]
    fn a_digest_cannot_lead_out_of_its_folder() {
        assert!(is_digest(&"0a".repeat(32)));
        assert!(!is_digest(&"../".repeat(21)));
        assert!(!is_digest(""));
        assert!(!is_digest(&"0A".repeat(32)));
    }
}
