//! A disk image: an open file that nobody changes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// A read-only disk image.
#[derive(Debug)]
pub struct Disk {
    pub(crate) file: File,
    pub(crate) digest: String,
    pub(crate) bytes: u64,
}

impl Disk {
    /// An image, with its digest as recorded in the snapshot. Its size is asked for here, once: a
    /// process that makes machines of it may have given up the right to ask.
    ///
    /// # Errors
    /// If the file's size cannot be read.
    pub fn new(file: File, digest: String) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self {
            file,
            digest,
            bytes,
        })
    }

    /// The same image for another machine.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            digest: self.digest.clone(),
            bytes: self.bytes,
        })
    }
}

impl AsRawFd for Disk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
