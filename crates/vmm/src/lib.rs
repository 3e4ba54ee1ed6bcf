//! The machine: KVM, memory, vCPUs, interrupts, boot, devices; saving and restoring all of it.
//!
//! The only crate that talks to `/dev/kvm`. It never sees HTTP, configuration files or an async
//! runtime; the agent's byte stream reaches it as a non-blocking file descriptor.

pub mod devices;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod probe;

mod acpi;
mod boot;
mod bus;
mod cpuid;
mod disk;
mod gate;
mod host;
mod ioapic;
mod prefault;
mod statistics;
mod touches;
mod vcpu;
mod vcpu_state;

pub use disk::Disk;
pub use host::Host;
pub use machine::{BootConfig, Machine, MachineError, StopReason, VCPUS_MAX};
pub use memory::{GuestMemory, MemoryError};
pub use statistics::Statistics;
pub use touches::{TouchError, Touches};
pub use vcpu::Prepare;
