//! The machine: KVM, memory, vCPUs, interrupts, boot, devices; saving and restoring all of it.
//!
//! The only crate that talks to `/dev/kvm`. It never sees HTTP, configuration files or an async
//! runtime; the agent's byte stream reaches it as a non-blocking file descriptor.

pub mod acpi;
pub mod cpuid;
pub mod devices;
pub mod ioapic;
pub mod layout;
pub mod memory;

pub use memory::{GuestMemory, MemoryError};
