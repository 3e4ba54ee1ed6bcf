//! Where lines of the log go: to standard error, which in the background is a file. A file that has grown large
//! makes place for a new one.

use rustix::fs::fstat;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A log of this size is set aside; one such is kept.
const SIZE_MAX_BYTES: u64 = 1 << 20;

static FILE: OnceLock<PathBuf> = OnceLock::new();

/// Opens the log for a process that is about to be started, and makes place if it is large.
pub fn open(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if std::fs::metadata(path).is_ok_and(|meta| meta.len() > SIZE_MAX_BYTES) {
        std::fs::rename(path, aside(path))?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// From here on standard error is known to be this file.
pub fn is_file(path: PathBuf) {
    // Fails only if it was said before.
    let _ = FILE.set(path);
}

/// Takes one line, which comes whole.
pub fn lines() -> impl Write {
    Lines
}

struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // One that cannot be written (a full disk) is lost, and nothing else is.
        let _ = io::stderr().lock().write_all(line);
        if let Some(path) = FILE.get() {
            let _ = rotate(path);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is started later inherits the new file; what runs goes on with the old one.
fn rotate(path: &Path) -> io::Result<()> {
    let is_large = fstat(rustix::stdio::stderr())?.st_size > SIZE_MAX_BYTES as i64;
    if is_large {
        let file = open(path)?;
        rustix::stdio::dup2_stderr(&file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_log_is_set_aside_and_one_such_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log/engine.log");
        for round in 0..3 {
            let mut file = open(&path).unwrap();
            file.write_all(&vec![b'x'; SIZE_MAX_BYTES as usize + 1])
                .unwrap();
            assert!(file.metadata().unwrap().len() > SIZE_MAX_BYTES, "{round}");
        }
        open(&path).unwrap();
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            2
        );
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}
