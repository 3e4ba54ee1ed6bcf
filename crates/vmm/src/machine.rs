//! One virtual machine, from its making to its end.

use crate::memory::{GuestMemory, MemoryError};
use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use zygote_snapshot::state::MachineState;

/// What to boot.
pub struct BootConfig {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// 1 to 32.
    pub vcpus: u8,
    /// bzImage or ELF.
    pub kernel: File,
    /// initramfs (cpio, maybe compressed).
    pub initramfs: File,
    /// Kernel command line.
    pub command_line: String,
    /// Block devices: the first is /dev/vda.
    pub disks: Vec<Disk>,
}

/// A read-only disk image.
#[derive(Debug)]
pub struct Disk {
    /// The image.
    pub file: File,
    /// Its digest, as recorded in the snapshot.
    pub digest: String,
}

/// Why the machine stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest reset or powered off (a panicking guest kernel does, too).
    GuestReset,
    /// Triple fault or another state from which the CPU cannot go on.
    GuestCrash(String),
    /// KVM or a device failed: our problem, not the guest's.
    HostError(String),
}

/// Why a machine could not be made, run, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Memory.
    #[error("cannot set up guest memory")]
    Memory(#[from] MemoryError),
    /// A KVM call.
    #[error("KVM refused to {operation}")]
    Kvm {
        /// Verb and object.
        operation: &'static str,
        /// The kernel's word.
        #[source]
        source: std::io::Error,
    },
    /// The state does not fit this machine.
    #[error("the machine state is not usable: {0}")]
    State(String),
    /// The kernel or initramfs cannot be loaded.
    #[error("cannot load the guest's kernel: {0}")]
    Load(String),
}

/// A virtual machine. Its owner's thread moves the agent's bytes and waits for its end; vCPUs have
/// threads of their own from [`Machine::start`] on.
pub struct Machine {}

impl Machine {
    /// Makes a machine that has not run yet. `agent`: non-blocking stream; `serial`: where the
    /// guest's early messages go.
    pub fn boot(_config: BootConfig, _agent: OwnedFd, _serial: Box<dyn Write + Send>) -> Result<Self, MachineError> {
        unimplemented!()
    }

    /// Makes a machine from a snapshot, parked before its first instruction.
    pub fn restore(
        _state: &MachineState,
        _memory: GuestMemory,
        _disks: Vec<Disk>,
        _agent: OwnedFd,
        _serial: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        unimplemented!()
    }

    /// Lets the vCPUs run (starts their threads the first time; resumes after `pause`).
    pub fn start(&mut self) -> Result<(), MachineError> {
        unimplemented!()
    }

    /// Stops every vCPU outside the guest and outside locks; returns when all have stopped.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        unimplemented!()
    }

    /// The state of a paused machine.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        unimplemented!()
    }

    /// The guest's memory; stable only while paused.
    pub fn memory(&self) -> &GuestMemory {
        unimplemented!()
    }

    /// The agent's stream, and which readiness the machine waits for: `(fd, readable, writable)`.
    pub fn agent_interest(&self) -> (BorrowedFd<'_>, bool, bool) {
        unimplemented!()
    }

    /// Call when the agent's stream is ready: moves bytes both ways as far as they go.
    /// Gives back false when the host's end of the stream is closed.
    pub fn agent_ready(&mut self) -> Result<bool, MachineError> {
        unimplemented!()
    }

    /// Readable once the machine has stopped by itself.
    pub fn stop_event(&self) -> BorrowedFd<'_> {
        unimplemented!()
    }

    /// Why it stopped, once `stop_event` is readable.
    pub fn stop_reason(&self) -> Option<StopReason> {
        unimplemented!()
    }
}
