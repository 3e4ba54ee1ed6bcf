//! Guest memory: where it lies in the guest's address space and what backs it on the host.

#![expect(unsafe_code, reason = "madvise")]

use kvm_bindings::kvm_userspace_memory_region;
use std::fs::File;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};

/// End of low memory; the hole up to 4 GiB holds devices, IOAPIC and LAPIC.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where high memory begins.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Smallest guest.
pub const MEMORY_MIN_BYTES: u64 = 128 << 20;
/// Largest guest.
pub const MEMORY_MAX_BYTES: u64 = 16 << 30;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Outside of what a machine can have.
    #[error("{bytes} bytes of guest memory: not a multiple of 4096 from 128 MiB to 16 GiB")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// mmap refused.
    #[error("cannot map guest memory")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// The regions do not fit together.
    #[error("cannot lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// The guest's memory. Offsets into its backing ("RAM offsets") leave the hole out, so that a
/// memory file of a 4 GiB guest is 4 GiB long.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    map: GuestMemoryMmap,
    bytes: u64,
}

impl GuestMemory {
    /// Fresh zeroed memory, for a boot.
    pub fn anonymous(bytes: u64) -> Result<Self, MemoryError> {
        Self::map(bytes, None)
    }

    /// A private copy-on-write mapping of a snapshot's memory file.
    pub fn private(file: &File, bytes: u64) -> Result<Self, MemoryError> {
        Self::map(bytes, Some(file))
    }

    /// Size in bytes, without the hole.
    pub fn size_bytes(&self) -> u64 {
        self.bytes
    }

    /// `(RAM offset, guest-physical address, length)` of each region, in ascending order.
    pub fn layout(bytes: u64) -> Vec<(u64, u64, u64)> {
        if bytes <= HOLE_START {
            vec![(0, 0, bytes)]
        } else {
            vec![
                (0, 0, HOLE_START),
                (HOLE_START, HOLE_END, bytes - HOLE_START),
            ]
        }
    }

    /// Writes at a RAM offset; false if that does not lie within the memory.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let (mut offset, mut rest) = (offset, bytes);
        for (start, address, length) in Self::layout(self.bytes) {
            let Some(within) = offset.checked_sub(start).filter(|within| *within < length) else {
                continue;
            };
            let (now, later) = rest.split_at(rest.len().min((length - within) as usize));
            if self
                .map
                .write_slice(now, GuestAddress(address + within))
                .is_err()
            {
                return false;
            }
            (offset, rest) = (offset + now.len() as u64, later);
        }
        rest.is_empty()
    }

    /// `(RAM offset, host address, length)` of each region, in ascending order.
    pub fn host_ranges(&self) -> Vec<(u64, *mut u8, usize)> {
        Self::layout(self.bytes)
            .into_iter()
            .filter_map(|(offset, address, length)| {
                let host = self.map.get_host_address(GuestAddress(address)).ok()?;
                Some((offset, host, length as usize))
            })
            .collect()
    }

    /// For KVM: one memory slot a region, numbers not yet given.
    pub fn kvm_regions(&self) -> Vec<kvm_userspace_memory_region> {
        self.host_ranges()
            .into_iter()
            .zip(Self::layout(self.bytes))
            .map(
                |((_, host, length), (_, guest_phys_addr, _))| kvm_userspace_memory_region {
                    guest_phys_addr,
                    memory_size: length as u64,
                    userspace_addr: host as u64,
                    ..Default::default()
                },
            )
            .collect()
    }

    /// Copies pages ahead of their first write: `ranges` of RAM offsets and lengths in bytes. A kernel
    /// that cannot (before Linux 5.14) copies none, and each is copied when it is written.
    pub fn copy_ahead(&self, ranges: &[(u64, u64)]) {
        let regions = self.host_ranges();
        for &(offset, length) in ranges {
            let end = offset.saturating_add(length);
            let region = regions
                .iter()
                .find(|(start, _, bytes)| *start <= offset && end <= start + *bytes as u64);
            let Some((start, host, _)) = region else {
                continue;
            };
            // SAFETY: within a mapping of ours, as compared above; the content stays as it is.
            let copied = unsafe {
                let address = host.add((offset - start) as usize);
                rustix::mm::madvise(
                    address.cast(),
                    length as usize,
                    rustix::mm::Advice::LinuxPopulateWrite,
                )
            };
            if copied.is_err() {
                return;
            }
        }
    }

    /// Guest-physical addresses of RAM offsets; `(start, length)` in bytes. What lies in no region, or in
    /// two, is left out.
    #[must_use]
    pub fn guest_ranges(&self, ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let regions = Self::layout(self.bytes);
        let address = |&(offset, length): &(u64, u64)| {
            let region = regions.iter().find(|(start, _, bytes)| {
                *start <= offset && offset.saturating_add(length) <= start + bytes
            });
            region.map(|(start, address, _)| (address + offset - start, length))
        };
        ranges.iter().filter_map(address).collect()
    }

    /// Pages that have been copied since the memory was mapped privately, as `[first, count]` in pages
    /// of 4 KiB of its backing.
    ///
    /// # Errors
    /// If the kernel does not tell (Documentation/admin-guide/mm/pagemap.rst).
    pub fn copied(&self) -> std::io::Result<Vec<[u32; 2]>> {
        use std::os::unix::fs::FileExt;
        const PAGE: usize = 4096;
        const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
        const OF_A_FILE: u64 = 1 << 61;
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut copied: Vec<[u32; 2]> = Vec::new();
        for (offset, host, length) in self.host_ranges() {
            let mut entries = vec![0; length / PAGE * 8];
            pagemap.read_exact_at(&mut entries, (host as usize / PAGE * 8) as u64)?;
            let first = (offset / PAGE as u64) as u32;
            for (number, entry) in entries.chunks_exact(8).enumerate() {
                let mut bits = [0; 8];
                bits.copy_from_slice(entry);
                let bits = u64::from_ne_bytes(bits);
                if bits & PRESENT_OR_SWAPPED == 0 || bits & OF_A_FILE != 0 {
                    continue;
                }
                let page = first + number as u32;
                match copied.last_mut() {
                    Some([begin, count]) if *begin + *count == page => *count += 1,
                    _ => copied.push([page, 1]),
                }
            }
        }
        Ok(copied)
    }

    /// The map that devices read and write through.
    pub fn map_ref(&self) -> &GuestMemoryMmap {
        &self.map
    }

    fn map(bytes: u64, file: Option<&File>) -> Result<Self, MemoryError> {
        if !(MEMORY_MIN_BYTES..=MEMORY_MAX_BYTES).contains(&bytes) || !bytes.is_multiple_of(4096) {
            return Err(MemoryError::Size { bytes });
        }
        Self::map_any_size(bytes, file)
    }

    /// As `anonymous`, for the tiny guests of tests and probes, which need no more than a few MiB.
    pub fn tiny(bytes: u64) -> Result<Self, MemoryError> {
        Self::map_any_size(bytes, None)
    }

    fn map_any_size(bytes: u64, file: Option<&File>) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        for (offset, address, length) in Self::layout(bytes) {
            let mut builder = MmapRegionBuilder::new(length as usize)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
            builder = match file {
                Some(file) => builder
                    .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                    .with_file_offset(FileOffset::new(
                        file.try_clone().map_err(|e| {
                            MemoryError::Map(vm_memory::mmap::MmapRegionError::Mmap(e))
                        })?,
                        offset,
                    )),
                None => builder
                    .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
            };
            let region = builder.build().map_err(MemoryError::Map)?;
            let region = GuestRegionMmap::new(region, GuestAddress(address))
                .ok_or(MemoryError::Size { bytes })?;
            regions.push(region);
        }
        let map = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
        debug_assert!(map.last_addr().raw_value() >= bytes - 1);
        Ok(Self { map, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn offsets_above_the_hole_are_addresses_above_it() {
        let memory = GuestMemory {
            map: GuestMemoryMmap::new(),
            bytes: HOLE_START + 8192,
        };
        let ranges = [
            (4096, 8192),
            (HOLE_START, 4096),
            (HOLE_START - 4096, 8192),
            (HOLE_START + 8192, 1),
            (u64::MAX, 4096),
        ];
        let addresses = [(4096, 8192), (HOLE_END, 4096)];
        assert_eq!(memory.guest_ranges(&ranges), addresses);
    }

    #[test]
    fn what_is_copied_ahead_is_what_was_written_and_keeps_its_content() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..16 * 4096_u32).map(|n| (n / 4096) as u8).collect();
        file.write_all(&content).unwrap();
        let memory = || GuestMemory::map_any_size(16 * 4096, Some(&file)).unwrap();
        let written = memory();
        for page in [1_u64, 2, 9] {
            let place = GuestAddress(page * 4096 + 7);
            written.map_ref().write_obj(0xff_u8, place).unwrap();
        }
        // A page that is only read is nobody's copy.
        let _: u8 = written.map_ref().read_obj(GuestAddress(5 * 4096)).unwrap();
        let copied = written.copied().unwrap();
        assert_eq!(copied, [[1, 2], [9, 1]]);
        let ahead = memory();
        let bytes = |&[first, count]: &[u32; 2]| (u64::from(first) << 12, u64::from(count) << 12);
        ahead.copy_ahead(&copied.iter().map(bytes).collect::<Vec<_>>());
        assert_eq!(ahead.copied().unwrap(), copied);
        let nine: u8 = ahead
            .map_ref()
            .read_obj(GuestAddress(9 * 4096 + 8))
            .unwrap();
        assert_eq!(nine, 9);
        // What lies outside is left alone.
        memory().copy_ahead(&[(15 * 4096, 8192), (u64::MAX - 4096, 4096), (1 << 40, 4096)]);
    }
}
