//! Virtio devices (virtio 1.3) behind the MMIO transport (§4.2).
//!
//! A device works on the thread that rings its doorbell, under its transport's lock: no queue
//! threads, so a machine whose vCPUs are stopped has no work in flight. What a guest writes into
//! rings and registers is an allegation: it is copied once, checked, and then the copy is used.

pub mod block;
pub mod entropy;
pub mod transport;
pub mod vsock;

#[cfg(test)]
mod tests;

pub use transport::MmioTransport;

use block::Block;
use entropy::Entropy;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vsock::Vsock;
use zygote_snapshot::state::DeviceState;

/// VIRTIO_F_VERSION_1 (§6): every device here is a modern one.
pub const VERSION_1: u64 = 1 << 32;

/// Where a device raises its interrupt.
pub trait InterruptLine: Send {
    /// One edge. Called with the device's lock held; must not call back into the device.
    fn pulse(&self);
}

/// The devices that a machine can have.
pub enum Device {
    /// §5.2
    Block(Block),
    /// §5.4
    Entropy(Entropy),
    /// §5.10
    Vsock(Vsock),
}

impl Device {
    fn id(&self) -> u32 {
        match self {
            Self::Block(_) => 2,
            Self::Entropy(_) => 4,
            Self::Vsock(_) => 19,
        }
    }

    fn features(&self) -> u64 {
        VERSION_1
            | match self {
                Self::Block(_) => block::FEATURES,
                Self::Entropy(_) | Self::Vsock(_) => 0,
            }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        match self {
            Self::Block(_) => &[256],
            Self::Entropy(_) => &[16],
            Self::Vsock(_) => &[256, 256, 16],
        }
    }

    /// The configuration space, as little-endian bytes.
    fn config(&self) -> Vec<u8> {
        match self {
            Self::Block(device) => device.config(),
            Self::Entropy(_) => Vec::new(),
            Self::Vsock(_) => vsock::config(),
        }
    }

    /// Serves one queue; gives back whether the driver is to be interrupted.
    fn notify(&mut self, queue: usize, queues: &mut [Queue], memory: &GuestMemoryMmap) -> bool {
        match (self, queue) {
            (Self::Block(device), 0) => serve(&mut queues[0], memory, |chain| {
                device.request(chain, memory)
            }),
            (Self::Entropy(_), 0) => serve(&mut queues[0], memory, |chain| {
                entropy::request(chain, memory)
            }),
            (Self::Vsock(device), _) => device.notify(queue, queues, memory),
            _ => false,
        }
    }

    fn reset(&mut self) {
        if let Self::Vsock(device) = self {
            device.reset();
        }
    }

    fn save(&self) -> Result<DeviceState, String> {
        Ok(match self {
            Self::Block(device) => device.save(),
            Self::Entropy(_) => DeviceState::Entropy,
            Self::Vsock(device) => device.save()?,
        })
    }

    fn save_branch(&self) -> Result<DeviceState, String> {
        match self {
            Self::Vsock(device) => Ok(device.save_branch()),
            _ => self.save(),
        }
    }
}

/// One buffer of a descriptor chain, copied out of the guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    address: GuestAddress,
    length: usize,
    writable: bool,
}

/// A descriptor chain, copied out of the guest's memory; never longer than its queue.
pub type Chain = Vec<Buffer>;

/// Takes the available chains, lets `request` answer each with the number of bytes written, and
/// tells whether the driver wants an interrupt. A queue's size is the most that a driver can have
/// outstanding; what it adds meanwhile comes with a doorbell of its own. So one that keeps its ring
/// full is not served without end.
fn serve(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    mut request: impl FnMut(&[Buffer]) -> u32,
) -> bool {
    let mut served = false;
    for _ in 0..queue.size() {
        let Some((head, chain)) = pop(queue, memory) else {
            break;
        };
        let written = request(&chain);
        if queue.add_used(memory, head, written).is_err() {
            break;
        }
        served = true;
    }
    served && queue.needs_notification(memory).unwrap_or(true)
}

fn pop(queue: &mut Queue, memory: &GuestMemoryMmap) -> Option<(u16, Chain)> {
    let chain = queue.pop_descriptor_chain(memory)?;
    let head = chain.head_index();
    // Indirect tables, which are not offered, could be longer.
    let chain = chain
        .take(queue.size().into())
        .map(|descriptor| Buffer {
            address: descriptor.addr(),
            length: descriptor.len() as usize,
            writable: descriptor.is_write_only(),
        })
        .collect();
    Some((head, chain))
}

/// Copies up to `limit` bytes out of the readable buffers of a chain, which a driver may cut as
/// it likes. `None` if an address is bad.
fn gather(chain: &[Buffer], limit: usize, memory: &GuestMemoryMmap) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for buffer in chain.iter().filter(|buffer| !buffer.writable) {
        let start = bytes.len();
        let take = buffer.length.min(limit - start);
        bytes.resize(start + take, 0);
        memory
            .read_slice(&mut bytes[start..], buffer.address)
            .ok()?;
        if bytes.len() == limit {
            break;
        }
    }
    Some(bytes)
}

/// Copies bytes into the writable buffers of a chain. Gives back how many fitted; `None` if an
/// address is bad.
fn scatter(chain: &[Buffer], mut bytes: &[u8], memory: &GuestMemoryMmap) -> Option<u32> {
    let whole = bytes.len();
    for buffer in chain.iter().filter(|buffer| buffer.writable) {
        let (now, later) = bytes.split_at(buffer.length.min(bytes.len()));
        memory.write_slice(now, buffer.address).ok()?;
        bytes = later;
    }
    u32::try_from(whole - bytes.len()).ok()
}

fn writable_bytes(chain: &[Buffer]) -> usize {
    chain
        .iter()
        .filter(|b| b.writable)
        .fold(0, |sum, b| sum.saturating_add(b.length))
}
