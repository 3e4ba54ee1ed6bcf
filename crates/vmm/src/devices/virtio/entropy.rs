//! Entropy device (virtio 1.3 §5.4): the host's generator.

use super::{Buffer, scatter, writable_bytes};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::GuestMemoryMmap;

/// Most bytes given for one request; a driver asks again.
pub const REQUEST_MAX_BYTES: usize = 4096;

/// The device has no state.
#[derive(Debug, Default)]
pub struct Entropy;

/// Fills a chain's writable buffers; gives back the number of bytes.
pub fn request(chain: &[Buffer], memory: &GuestMemoryMmap) -> u32 {
    let mut bytes = vec![0; writable_bytes(chain).min(REQUEST_MAX_BYTES)];
    if getrandom(&mut bytes, GetRandomFlags::empty()) != Ok(bytes.len()) {
        return 0;
    }
    scatter(chain, &bytes, memory).unwrap_or(0)
}
