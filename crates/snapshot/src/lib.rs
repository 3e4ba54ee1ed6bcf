//! The snapshot format: what a template or a branch is on disk (docs/snapshot-format.md).
//!
//! Knows files, digests and versions; nothing of KVM, and no running machine's types.

#![forbid(unsafe_code)]

mod ahead;
pub mod cpu;
mod delta;
pub mod manifest;
pub mod state;

mod memory;
mod reader;
mod stamps;
mod verify;
mod watch;
mod writer;

pub use ahead::Ahead;
pub use delta::{Delta, DeltaError};
pub use manifest::{
    Base, DiskPiece, FORMAT_VERSION, Manifest, Origin, PAGE_BYTES, RunKind, WorkingSet,
};
pub use memory::CHUNK_BYTES;
pub use reader::{OpenError, Snapshot, decode_machine};
pub use verify::{Report, VerifyError};
pub use watch::Watch;
pub use writer::{Based, WriteError, Writer, file_digest};

/// File of the header and the manifest.
pub const MANIFEST_FILE: &str = "manifest";
/// File of the machine's state.
pub const MACHINE_FILE: &str = "machine.bin";
/// File of what differs from a base's memory.
pub const DELTA_FILE: &str = "delta.bin";
/// File of the guest's memory.
pub const MEMORY_FILE: &str = "memory.bin";
