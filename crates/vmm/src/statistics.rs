//! KVM's own counters of a machine (Documentation/virt/kvm/api.rst §4.131, KVM_GET_STATS_FD).

#![expect(unsafe_code, reason = "an ioctl that gives a descriptor")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

/// `_IO(KVMIO, 0xce)` of Linux `include/uapi/linux/kvm.h`.
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;
const HEADER_BYTES: usize = 24;
/// Of a descriptor, before its name.
const DESCRIPTOR_BYTES: usize = 16;
/// More than any kernel has.
const DESCRIPTORS_MAX: u32 = 4096;
const NAME_MAX_BYTES: u32 = 256;

/// A machine's counters, readable for as long as it lives.
pub struct Statistics {
    files: Vec<File>,
}

impl Statistics {
    pub(crate) fn open(descriptors: &[RawFd]) -> io::Result<Self> {
        let open = |fd: &RawFd| {
            // SAFETY: the call has no argument and gives a new descriptor, or none.
            let stats = unsafe { libc::ioctl(*fd, KVM_GET_STATS_FD, 0) };
            if stats < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: it is ours alone.
            Ok(unsafe { File::from_raw_fd(stats) })
        };
        let files: io::Result<_> = descriptors.iter().map(open).collect();
        Ok(Self { files: files? })
    }

    /// The counters by name, those of all vCPUs added up.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn read(&self) -> io::Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        for file in &self.files {
            for (name, value) in counters(file)? {
                *all.entry(name).or_default() += value;
            }
        }
        Ok(all)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn counters(file: &File) -> io::Result<Vec<(String, u64)>> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let (name_bytes, count) = (word(&header, 4), word(&header, 8));
    let (descriptors, data) = (word(&header, 16), word(&header, 20));
    if name_bytes > NAME_MAX_BYTES || count > DESCRIPTORS_MAX {
        return Err(io::Error::other("KVM's counters are of an unknown form"));
    }
    let each = DESCRIPTOR_BYTES + name_bytes as usize;
    let mut all = vec![0; each * count as usize];
    file.read_exact_at(&mut all, descriptors.into())?;
    let mut counters = Vec::new();
    for descriptor in all.chunks_exact(each) {
        // A histogram has more values than one.
        if word(descriptor, 4) >> 16 != 1 {
            continue;
        }
        let mut value = [0; 8];
        let at = u64::from(data) + u64::from(word(descriptor, 8));
        file.read_exact_at(&mut value, at)?;
        let name = &descriptor[DESCRIPTOR_BYTES..];
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).into_owned();
        counters.push((name, u64::from_ne_bytes(value)));
    }
    Ok(counters)
}
