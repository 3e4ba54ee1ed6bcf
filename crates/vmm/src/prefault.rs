//! Mapping guest pages before the guest touches them (Documentation/virt/kvm/api.rst,
//! KVM_PRE_FAULT_MEMORY): a page that is mapped costs no exit.

#![expect(unsafe_code, reason = "an ioctl")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)` of Linux `include/uapi/linux/kvm.h`.
const KVM_PRE_FAULT_MEMORY: libc::Ioctl = 0xc040_aed5_u32 as libc::Ioctl;
/// A call that a signal interrupts goes on where it was; one that gets nowhere is given up.
const TRIES_MAX: u32 = 8;

#[repr(C)]
struct Range {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

/// Maps guest-physical ranges, `(address, length)` in bytes, as if the guest had read them. A page that
/// is private already can be written without a fault, too.
///
/// # Errors
/// If the kernel cannot (before Linux 6.12, or without two-dimensional paging): then each page is mapped
/// when it is touched.
pub fn map(vcpu: &impl AsRawFd, ranges: &[(u64, u64)]) -> io::Result<()> {
    ranges
        .iter()
        .try_for_each(|range| one(vcpu.as_raw_fd(), *range))
}

fn one(vcpu: RawFd, (gpa, size): (u64, u64)) -> io::Result<()> {
    let mut range = Range {
        gpa,
        size,
        flags: 0,
        padding: [0; 5],
    };
    for _ in 0..TRIES_MAX {
        // SAFETY: the call reads the structure and writes what is left into it; memory that the guest
        // has is mapped for the guest alone.
        let result = unsafe { libc::ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &raw mut range) };
        if result >= 0 && range.size == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        let goes_on = [Some(libc::EINTR), Some(libc::EAGAIN)].contains(&error.raw_os_error());
        if result < 0 && !goes_on {
            return Err(error);
        }
    }
    Err(io::ErrorKind::Interrupted.into())
}
