//! The lab: an emulated x86-64 host with working KVM, for machines that have none.
//!
//! QEMU without acceleration boots Debian's kernel with `kvm_amd`; the host's root file system is
//! its root, with a throwaway layer on top; named folders are shared for writing. One command runs
//! in it, its streams and status come back, and the lab is gone. Slow, and never the place for an
//! absolute time.

mod console;
mod error;
mod host;
mod init;
mod link;
mod qemu;
mod signals;
mod unpack;
mod wire;

pub use error::LabError;
pub use host::{Handle, hold, run};
pub use init::{init_main, port};
pub use link::Streams;
pub use qemu::{LabFiles, PrepareError, prepare};

use error::own;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Set in the environment of everything that runs inside.
pub const IN_LAB: &str = "ZYGOTE_IN_LAB";
/// First argument by which a program that calls [`run`] must end in [`init_main`].
pub const INIT_VERB: &str = "lab-init";

/// The emulated host.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Kernel and initramfs, from [`prepare`].
    pub files: LabFiles,
    /// Folders that are shared for writing, at their own paths. They must exist.
    pub writable: Vec<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors; one when counting instructions.
    pub cpus: u8,
    /// One emulated processor whose clock counts instructions: the same run takes the same time.
    pub icount: bool,
}

/// What to run in it.
#[derive(Clone, Debug)]
pub struct LabCommand {
    /// Program and arguments.
    pub arguments: Vec<OsString>,
    /// The whole environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Directory; `/` if it does not exist inside.
    pub directory: PathBuf,
    /// Whether standard input is passed on; otherwise it is at its end.
    pub stdin: bool,
    /// How long it may run once the lab is up; then the lab ends, and the command with it.
    pub timeout: Option<Duration>,
}
