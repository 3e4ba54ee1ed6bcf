//! Guest memory: where it lies in the guest's address space and what backs it on the host.

use kvm_bindings::kvm_userspace_memory_region;
use std::fs::File;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
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
