//! Block device (virtio 1.3 §5.2): a read-only image.
//!
//! Reads go from the file straight into guest memory (pread), so that an image that is cut while
//! a guest uses it gives I/O errors in the guest, and not a SIGBUS here.

#![expect(unsafe_code, reason = "pread into guest memory")]

use super::{Buffer, scatter};
use crate::Disk;
use std::os::fd::AsRawFd;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap};
use zygote_snapshot::state::DeviceState;

const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: usize = 16;
const ID_BYTES: usize = 20;
/// Most data in a request: more than a Linux driver asks for (1.25 MiB), and little enough that a
/// full queue of them is read within a second.
const REQUEST_MAX_BYTES: u64 = 8 << 20;
/// Most data buffers in a request that the driver is told it may use.
const SEGMENTS_MAX: u32 = 126;

const FEATURE_SEGMENTS_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
/// Features beside [`super::VERSION_1`].
pub const FEATURES: u64 = FEATURE_SEGMENTS_MAX | FEATURE_READ_ONLY;

const TYPE_IN: u32 = 0;
const TYPE_GET_ID: u32 = 8;
const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// The device.
pub struct Block {
    disk: Disk,
    sectors: u64,
}

impl Block {
    /// A device of the image's size, rounded down to sectors.
    pub fn new(disk: Disk) -> Self {
        let sectors = disk.bytes / SECTOR_BYTES;
        Self { disk, sectors }
    }

    /// The saved device over the same image.
    ///
    /// # Errors
    /// A sentence, if it is another image.
    pub fn restore(disk: Disk, sectors: u64, image_digest: &str) -> Result<Self, String> {
        let device = Self::new(disk);
        if device.sectors != sectors || device.disk.digest != image_digest {
            return Err(format!(
                "the disk image is not the one of the snapshot ({} sectors with digest {}, not {sectors} with {image_digest})",
                device.sectors, device.disk.digest
            ));
        }
        Ok(device)
    }

    /// What to persist.
    pub fn save(&self) -> DeviceState {
        DeviceState::Block {
            sectors: self.sectors,
            image_digest: self.disk.digest.clone(),
        }
    }

    /// Configuration space (§5.2.4): capacity, (unused) size_max, seg_max.
    pub fn config(&self) -> Vec<u8> {
        let mut config = self.sectors.to_le_bytes().to_vec();
        config.extend_from_slice(&0u32.to_le_bytes());
        config.extend_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config
    }

    /// Serves one request (§5.2.6): header, data, status byte. Gives back the bytes written.
    pub fn request(&self, chain: &[Buffer], memory: &GuestMemoryMmap) -> u32 {
        let Some((status, data)) = chain.split_last() else {
            return 0;
        };
        if !status.writable || status.length == 0 {
            return 0;
        }
        let (code, written) = match data.split_first() {
            Some((header, data)) => self.execute(header, data, memory),
            None => (STATUS_ERROR, 0),
        };
        match memory.write_obj(code, status.address) {
            Ok(()) => written.saturating_add(1),
            Err(_) => 0,
        }
    }

    fn execute(&self, header: &Buffer, data: &[Buffer], memory: &GuestMemoryMmap) -> (u8, u32) {
        let mut bytes = [0; HEADER_BYTES];
        if header.writable
            || header.length < HEADER_BYTES
            || memory.read_slice(&mut bytes, header.address).is_err()
        {
            return (STATUS_ERROR, 0);
        }
        let kind = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let sector = bytes[8..]
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let written = match kind {
            TYPE_IN => self.read(sector, data, memory),
            TYPE_GET_ID => {
                let mut id = [0; ID_BYTES];
                let digest = self.disk.digest.as_bytes();
                let length = digest.len().min(ID_BYTES);
                id[..length].copy_from_slice(&digest[..length]);
                scatter(data, &id, memory)
            }
            _ => return (STATUS_UNSUPPORTED, 0),
        };
        written.map_or((STATUS_ERROR, 0), |written| (STATUS_OK, written))
    }

    fn read(&self, sector: u64, data: &[Buffer], memory: &GuestMemoryMmap) -> Option<u32> {
        let mut offset = sector.checked_mul(SECTOR_BYTES)?;
        let end = (self.sectors * SECTOR_BYTES).min(offset.saturating_add(REQUEST_MAX_BYTES));
        let mut written = 0u32;
        for buffer in data {
            let length = buffer.length as u64;
            if !buffer.writable
                || !length.is_multiple_of(SECTOR_BYTES)
                || offset.checked_add(length)? > end
            {
                return None;
            }
            self.read_at(offset, buffer, memory)?;
            offset += length;
            written = written.checked_add(u32::try_from(length).ok()?)?;
        }
        Some(written)
    }

    fn read_at(&self, offset: u64, buffer: &Buffer, memory: &GuestMemoryMmap) -> Option<()> {
        let slice = memory.get_slice(buffer.address, buffer.length).ok()?;
        let guard = slice.ptr_guard_mut();
        let mut done = 0;
        while done < buffer.length {
            let at = i64::try_from(offset + done as u64).ok()?;
            // SAFETY: the slice is `buffer.length` bytes of mapped guest memory, which lives as
            // long as `memory`; the kernel writes at most the rest of it. That the guest may
            // write there as well harms only the guest.
            let count = unsafe {
                libc::pread64(
                    self.disk.file.as_raw_fd(),
                    guard.as_ptr().add(done).cast(),
                    buffer.length - done,
                    at,
                )
            };
            match usize::try_from(count) {
                Ok(0) => return None,
                Ok(count) => done += count,
                Err(_)
                    if std::io::Error::last_os_error().kind()
                        == std::io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        Some(())
    }
}
