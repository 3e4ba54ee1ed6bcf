//! A kernel without its wrapping: unpacking itself is the slowest part of an emulated boot, so the
//! host does it, once.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

/// Fields of the setup header (Documentation/arch/x86/boot.rst).
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR_BYTES: usize = 512;
/// RFC 8878 §3.1.1.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// zstd takes a second.
const UNPACK_MAX_S: &str = "120";
/// The size of the unpacked kernel follows what is packed.
const TRAILER_BYTES: usize = 4;

/// The ELF kernel inside of a bzImage, made in `folder` if it is not there; the bzImage itself if
/// it is packed otherwise or cannot be unpacked here: that boots too, two seconds later.
pub fn unpacked(image: &Path, release: &str, folder: &Path) -> PathBuf {
    let elf = folder.join(format!("vmlinux-{release}"));
    if elf.exists() || unpack(image, &elf).is_ok() {
        elf
    } else {
        image.to_owned()
    }
}

/// A name that nobody else has, in this process or another.
pub fn fresh() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("new-{}-{count}", std::process::id())
}

fn unpack(image: &Path, elf: &Path) -> io::Result<()> {
    let bytes = fs::read(image)?;
    let packed = payload(&bytes).ok_or(io::ErrorKind::InvalidData)?;
    let fresh = elf.with_extension(fresh());
    let mut tool = Command::new("timeout")
        .args([UNPACK_MAX_S, "zstd", "-d", "-q"])
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&fresh)?)
        .stderr(Stdio::null())
        .spawn()?;
    let fed = tool
        .stdin
        .take()
        .map_or(Ok(()), |mut input| input.write_all(packed));
    // timeout(1) sees to the end.
    let good = tool.wait()?.success() && fed.is_ok();
    if good {
        return fs::rename(&fresh, elf);
    }
    fs::remove_file(&fresh)?;
    Err(io::ErrorKind::InvalidData.into())
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes) as usize)
    };
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let kernel = (usize::from(*image.get(SETUP_SECTORS)?) + 1) * SECTOR_BYTES;
    let start = kernel.checked_add(word(PAYLOAD_OFFSET)?)?;
    let length = word(PAYLOAD_LENGTH)?.checked_sub(TRAILER_BYTES)?;
    let payload = image.get(start..start.checked_add(length)?)?;
    payload.starts_with(&ZSTD_MAGIC).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 4 * SECTOR_BYTES];
        image[SETUP_SECTORS] = 3;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET] = 16;
        let length = (packed.len() + TRAILER_BYTES) as u32;
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend([0; 16]);
        image.extend(packed);
        image.extend([0; TRAILER_BYTES]);
        image
    }

    #[test]
    fn the_payload_is_found_and_nonsense_is_not() {
        let packed = [&ZSTD_MAGIC[..], b"kernel"].concat();
        let whole = image(&packed);
        assert_eq!(payload(&whole), Some(&packed[..]));
        assert_eq!(payload(&image(b"BZh9")), None);
        for end in [0, 3, 0x250, whole.len() - 5] {
            assert_eq!(payload(&whole[..end]), None, "{end}");
        }
    }

    #[test]
    fn an_image_that_cannot_be_unpacked_is_used_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinuz");
        fs::write(&path, image(&[&ZSTD_MAGIC[..], b"no frame"].concat())).unwrap();
        assert_eq!(unpacked(&path, "1", folder.path()), path);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
