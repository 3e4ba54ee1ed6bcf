//! Devices of the machine, and how they are made: fresh, or as they were saved.

pub mod host_clock;
pub mod virtio;

use crate::Disk;
use crate::bus::Pin;
use crate::ioapic::Ioapic;
use crate::layout::{VIRTIO_GSI, VIRTIO_SLOTS_MAX};
use crate::machine::MachineError;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio::block::Block;
use virtio::entropy::Entropy;
use virtio::vsock::Vsock;
use virtio::{Device, MmioTransport};
use zygote_snapshot::state::{DeviceState, VirtioDeviceState};

/// Slots beside those of disks: entropy and socket.
const SLOTS_BESIDE_DISKS: usize = 2;

fn pin(ioapic: &Arc<Ioapic>, slot: usize) -> Box<Pin> {
    Box::new(Pin::new(Arc::clone(ioapic), VIRTIO_GSI + slot as u32))
}

/// Fresh devices by slot: disks first, so that the first disk is /dev/vda.
///
/// # Errors
/// If there are too many disks, or an image cannot be read.
pub fn create(
    disks: Vec<Disk>,
    agent: OwnedFd,
    ioapic: &Arc<Ioapic>,
) -> Result<Vec<MmioTransport>, MachineError> {
    if disks.len() + SLOTS_BESIDE_DISKS > VIRTIO_SLOTS_MAX {
        return Err(MachineError::State(format!(
            "{} disks: a machine has at most {}",
            disks.len(),
            VIRTIO_SLOTS_MAX - SLOTS_BESIDE_DISKS
        )));
    }
    let mut devices = Vec::new();
    devices.extend(
        disks
            .into_iter()
            .map(|disk| Device::Block(Block::new(disk))),
    );
    devices.push(Device::Entropy(Entropy));
    devices.push(Device::Vsock(Vsock::new(agent)));
    let slots = devices.into_iter().enumerate();
    Ok(slots
        .map(|(slot, device)| MmioTransport::new(device, pin(ioapic, slot)))
        .collect())
}

/// Saved devices, over their images and a stream of their own.
///
/// # Errors
/// If the state does not fit the images, or together.
pub fn restore(
    states: &[VirtioDeviceState],
    disks: Vec<Disk>,
    agent: OwnedFd,
    ioapic: &Arc<Ioapic>,
) -> Result<Vec<MmioTransport>, MachineError> {
    let refuse = |what: &str| MachineError::State(what.to_owned());
    if states.len() > VIRTIO_SLOTS_MAX {
        return Err(refuse("too many devices"));
    }
    let mut disks = disks.into_iter();
    let mut agent = Some(agent);
    let mut slots = Vec::new();
    for (slot, VirtioDeviceState { transport, device }) in states.iter().enumerate() {
        let device = match device {
            DeviceState::Block {
                sectors,
                image_digest,
            } => {
                let disk = disks
                    .next()
                    .ok_or_else(|| refuse("a disk image is missing"))?;
                Device::Block(
                    Block::restore(disk, *sectors, image_digest).map_err(MachineError::State)?,
                )
            }
            DeviceState::Entropy => Device::Entropy(Entropy),
            DeviceState::Vsock { agent: connection } => {
                let stream = agent.take().ok_or_else(|| refuse("two socket devices"))?;
                Device::Vsock(Vsock::restore(stream, *connection))
            }
        };
        let transport = MmioTransport::restore(device, pin(ioapic, slot), transport);
        slots.push(transport.map_err(MachineError::State)?);
    }
    Ok(slots)
}
