//! Files that the host puts into the guest before a program starts.

use crate::process::HOME;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use zygote_protocol::Put;

/// What is being put, and what could not be.
#[derive(Default)]
pub struct Files {
    open: Option<(PathBuf, File)>,
    failed: Option<io::Error>,
}

impl Files {
    /// Puts it; after a failure nothing more.
    pub fn put(&mut self, put: Put) {
        if self.failed.is_none() {
            self.failed = self.try_put(put).err();
        }
    }

    /// All is there, or why it is not.
    pub fn finish(&mut self) -> io::Result<()> {
        self.open = None;
        self.failed.take().map_or(Ok(()), Err)
    }

    fn try_put(&mut self, put: Put) -> io::Result<()> {
        match put {
            Put::Folder { path, mode } => {
                let path = resolve(&path);
                let made = fs::create_dir_all(&path);
                let set = || fs::set_permissions(&path, Permissions::from_mode(mode));
                named(&path, made.and_then(|()| set()))
            }
            Put::File { path, mode } => {
                let path = resolve(&path);
                let file = named(&path, create(&path, mode))?;
                self.open = Some((path, file));
                Ok(())
            }
            Put::Data { data } => match &mut self.open {
                Some((path, file)) => named(path, file.write_all(&data)),
                None => Err(io::Error::other("bytes came for no file")),
            },
            Put::Failed { message } => Err(io::Error::other(message)),
            Put::Link { path, target } => {
                let path = resolve(&path);
                let linked =
                    make_way(&path).and_then(|()| symlink(OsStr::from_bytes(&target), &path));
                named(&path, linked)
            }
        }
    }
}

pub fn resolve(path: &[u8]) -> PathBuf {
    Path::new(HOME).join(OsStr::from_bytes(path))
}

fn named<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::StorageFull => {
                " (files take up to half of the guest's memory; build the template with more)"
            }
            _ => "",
        };
        let path = path.display();
        io::Error::other(format!("cannot write {path} in the guest: {error}{remedy}"))
    })
}

/// What is there may be a link into the image, or a running program: it is replaced.
fn create(path: &Path, mode: u32) -> io::Result<File> {
    make_way(path)?;
    let file = File::create_new(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}

fn make_way(path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(path: &Path) -> Vec<u8> {
        path.as_os_str().as_bytes().to_vec()
    }

    #[test]
    fn files_folders_and_links_are_put_with_their_permissions() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| bytes(&folder.path().join(name));
        let mut files = Files::default();
        files.put(Put::File {
            path: path("new/a.sh"),
            mode: 0o755,
        });
        files.put(Put::Data {
            data: b"one ".to_vec(),
        });
        files.put(Put::Data {
            data: b"two".to_vec(),
        });
        files.put(Put::Folder {
            path: path("empty"),
            mode: 0o700,
        });
        files.put(Put::Link {
            path: path("b"),
            target: b"new/a.sh".to_vec(),
        });
        files.finish().unwrap();
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        assert_eq!(read("b"), b"one two");
        let mode = |name: &str| {
            fs::metadata(folder.path().join(name))
                .unwrap()
                .permissions()
                .mode()
        };
        assert_eq!(
            (mode("new/a.sh") & 0o777, mode("empty") & 0o777),
            (0o755, 0o700)
        );
        // A link is replaced, not followed.
        files.put(Put::File {
            path: path("b"),
            mode: 0o600,
        });
        files.finish().unwrap();
        assert_eq!((read("b"), read("new/a.sh")), (vec![], b"one two".to_vec()));
    }

    #[test]
    fn the_first_failure_is_told_once_and_names_its_file() {
        let mut files = Files::default();
        files.put(Put::File {
            path: b"/proc/no-such/file".to_vec(),
            mode: 0o600,
        });
        files.put(Put::Data { data: vec![1] });
        let error = files.finish().unwrap_err().to_string();
        assert!(error.contains("/proc/no-such/file"), "{error}");
        files.finish().unwrap();
        files.put(Put::Data { data: vec![1] });
        assert!(files.finish().is_err());
    }
}
