//! Writing an initramfs: cpio in the "newc" format (kernel document
//! driver-api/early-userspace/buffer-format), the same bytes for the same content.

use cpio::newc::{Builder, trailer};
use std::io::{self, Write};

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An initramfs that is being written. Folders come before what they hold.
pub struct Initramfs<W: Write> {
    output: W,
    inode: u32,
}

impl<W: Write> Initramfs<W> {
    /// An empty one.
    pub fn new(output: W) -> Self {
        Self { output, inode: 0 }
    }

    /// A folder.
    ///
    /// # Errors
    /// If the output cannot be written; so for all that follow.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, FOLDER | 0o755, (0, 0), &[])
    }

    /// A file with its permissions.
    ///
    /// # Errors
    /// As [`Initramfs::folder`].
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | mode, (0, 0), content)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// As [`Initramfs::folder`].
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes())
    }

    /// A character device.
    ///
    /// # Errors
    /// As [`Initramfs::folder`].
    pub fn device(&mut self, path: &str, mode: u32, number: (u32, u32)) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | mode, number, &[])
    }

    /// The end of it; gives the output back.
    ///
    /// # Errors
    /// As [`Initramfs::folder`].
    pub fn finish(self) -> io::Result<W> {
        trailer(self.output)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        self.inode += 1;
        let builder = Builder::new(path.trim_start_matches('/'))
            .ino(self.inode)
            .mode(mode)
            .nlink(1)
            .rdev_major(device.0)
            .rdev_minor(device.1);
        let length = u32::try_from(content.len())
            .map_err(|_| io::Error::other(format!("{path} is too large for an initramfs")))?;
        let mut writer = builder.write(&mut self.output, length);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Initramfs::new(Vec::new());
        archive.folder("/dev").unwrap();
        archive.device("/dev/console", 0o600, (5, 1)).unwrap();
        archive.file("/init", 0o755, b"program").unwrap();
        archive.link("/sh", "init").unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn entries_are_what_they_were_said_to_be() {
        let mut rest = &sample()[..];
        let mut seen = Vec::new();
        loop {
            let mut reader = cpio::NewcReader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut content = Vec::new();
            io::copy(&mut reader, &mut content).unwrap();
            seen.push((entry.name().to_owned(), entry.mode(), content));
            rest = reader.finish().unwrap();
        }
        assert_eq!(seen[0], ("dev".into(), 0o040_755, vec![]));
        assert_eq!(seen[1].1, 0o020_600);
        assert_eq!(seen[2], ("init".into(), 0o100_755, b"program".to_vec()));
        assert_eq!(seen[3].2, b"init");
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        assert_eq!(sample(), sample());
    }
}
