//! What answers a guest's I/O instructions and accesses to device memory.
//!
//! Called by vCPU threads, several at once; each device has a lock of its own, held only while
//! that device works. Addresses without a device read as all ones and ignore writes, as on a PC.

use crate::devices::host_clock;
use crate::devices::virtio::MmioTransport;
use crate::ioapic::Ioapic;
use crate::layout::*;
use crate::machine::StopReason;
use crate::memory::GuestMemory;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use zygote_protocol::HOST_CLOCK_ADDRESS;

/// Raises one IOAPIC pin.
#[derive(Clone)]
pub struct Pin {
    ioapic: Arc<Ioapic>,
    pin: u32,
}

impl Pin {
    /// The line of one pin.
    pub fn new(ioapic: Arc<Ioapic>, pin: u32) -> Self {
        Self { ioapic, pin }
    }

    /// An edge.
    pub fn pulse(&self) {
        self.ioapic.pulse(self.pin);
    }
}

impl Trigger for Pin {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.pulse();
        Ok(())
    }
}

impl crate::devices::virtio::InterruptLine for Pin {
    fn pulse(&self) {
        Pin::pulse(self);
    }
}

/// The serial port; its output goes to the machine's owner.
pub type SerialPort = Serial<Pin, NoEvents, Box<dyn Write + Send>>;

/// Every device of a machine, by address.
pub struct Bus {
    /// Guest memory, for the devices.
    pub memory: GuestMemory,
    /// Interrupt controller.
    pub ioapic: Arc<Ioapic>,
    /// Early boot's serial port.
    pub serial: Mutex<SerialPort>,
    /// By slot.
    pub virtio: Vec<Mutex<MmioTransport>>,
    /// Which of them is the socket device.
    pub vsock_slot: usize,
}

/// A device's lock; a thread that panicked while holding it has ended the process.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// IN. `data` is 1, 2 or 4 bytes, or several times that for a string instruction.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        if let Some(offset) = within(port, SERIAL_PORT, SERIAL_PORTS) {
            let mut serial = lock(&self.serial);
            data.iter_mut().for_each(|byte| *byte = serial.read(offset));
        } else if port == ACPI_SLEEP_STATUS_PORT || port == I8042_COMMAND_PORT {
            // The keyboard controller's status: ready for a command. A guest that resets waits for
            // that before each try.
            data.fill(0);
        } else {
            data.fill(0xff);
        }
    }

    /// OUT. Gives back why the machine ends, when that is what the guest asked for.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<StopReason> {
        if let Some(offset) = within(port, SERIAL_PORT, SERIAL_PORTS) {
            let mut serial = lock(&self.serial);
            for byte in data {
                // Output that its owner does not take is lost, as on an unplugged cable.
                let _ = serial.write(offset, *byte);
            }
            return None;
        }
        let value = *data.first()?;
        let ends = match port {
            I8042_COMMAND_PORT => value == I8042_RESET,
            ACPI_RESET_PORT => value == ACPI_RESET_VALUE,
            ACPI_SLEEP_CONTROL_PORT => true,
            _ => false,
        };
        ends.then_some(StopReason::GuestReset)
    }

    /// A read of device memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some((slot, offset)) = self.virtio_slot(address) {
            lock(slot).read(offset, data);
        } else if (IOAPIC..IOAPIC + IOAPIC_BYTES).contains(&address) {
            self.ioapic.read(address - IOAPIC, data);
        } else if (HOST_CLOCK_ADDRESS..HOST_CLOCK_ADDRESS + host_clock::BYTES).contains(&address) {
            host_clock::read(address - HOST_CLOCK_ADDRESS, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A write to device memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.virtio_slot(address) {
            lock(slot).write(offset, data, self.memory.map_ref());
        } else if (IOAPIC..IOAPIC + IOAPIC_BYTES).contains(&address) {
            self.ioapic.write(address - IOAPIC, data);
        }
    }

    /// Moves the agent's bytes both ways as far as they go; false once an end of its stream is
    /// closed.
    pub fn stream_ready(&self) -> bool {
        lock(&self.virtio[self.vsock_slot]).stream_ready(self.memory.map_ref())
    }

    /// Another stream to the agent, in place of the one there was.
    pub fn replace_stream(&self, stream: OwnedFd) {
        lock(&self.virtio[self.vsock_slot]).replace_stream(stream);
    }

    fn virtio_slot(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let relative = address.checked_sub(VIRTIO_MMIO)?;
        let slot = self
            .virtio
            .get((relative / VIRTIO_MMIO_SLOT_BYTES) as usize)?;
        Some((slot, relative % VIRTIO_MMIO_SLOT_BYTES))
    }
}

fn within(port: u16, base: u16, count: u16) -> Option<u8> {
    let offset = port.checked_sub(base)?;
    (offset < count).then_some(offset as u8)
}
