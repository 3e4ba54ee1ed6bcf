//! Devices of the machine.

pub mod host_clock;
