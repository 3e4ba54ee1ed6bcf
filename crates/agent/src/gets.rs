//! Files that the host asks for: sent piece by piece, as fast as the host takes them.

use crate::files::resolve;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use zygote_protocol::Got;

/// What has been asked for, in order.
#[derive(Default)]
pub struct Gets {
    asked: VecDeque<PathBuf>,
    /// What is being sent: the path that was asked for, and what is left of it.
    current: Option<Walk>,
}

/// A file or folder that is being sent.
struct Walk {
    root: PathBuf,
    /// Paths that are still to be sent, the next one last.
    rest: Vec<PathBuf>,
    open: Option<File>,
}

impl Gets {
    /// Asks for a file or a folder; a relative path starts where programs do.
    pub fn ask(&mut self, path: &[u8]) {
        self.asked.push_back(resolve(path));
    }

    /// Whether there is something to send.
    pub fn is_pending(&self) -> bool {
        self.current.is_some() || !self.asked.is_empty()
    }

    /// The next piece; `None` if there is nothing to send.
    pub fn next(&mut self, scratch: &mut [u8]) -> Option<Got> {
        if self.current.is_none() {
            let root = self.asked.pop_front()?;
            self.current = Some(Walk {
                rest: vec![root.clone()],
                root,
                open: None,
            });
        }
        let walk = self.current.as_mut()?;
        let got = walk.next(scratch).unwrap_or_else(|error| {
            Some(Got::Failed {
                message: error.to_string(),
            })
        });
        let got = got.unwrap_or(Got::End);
        if matches!(got, Got::End | Got::Failed { .. }) {
            self.current = None;
        }
        Some(got)
    }
}

impl Walk {
    fn next(&mut self, scratch: &mut [u8]) -> io::Result<Option<Got>> {
        if let Some(file) = &mut self.open {
            let count = file.read(scratch)?;
            if count > 0 {
                let data = scratch[..count].to_vec();
                return Ok(Some(Got::Data { data }));
            }
            self.open = None;
        }
        let Some(path) = self.rest.pop() else {
            return Ok(None);
        };
        // What is named may be a link; what lies in a folder is sent as it is.
        let meta = if path == self.root {
            fs::metadata(&path)
        } else {
            fs::symlink_metadata(&path)
        };
        self.piece(&path, &meta?).map(Some)
    }

    fn piece(&mut self, path: &Path, meta: &Metadata) -> io::Result<Got> {
        let within = path.strip_prefix(&self.root).unwrap_or(Path::new(""));
        let name = within.as_os_str().as_bytes().to_vec();
        let mode = meta.permissions().mode() & 0o7777;
        if meta.is_dir() {
            let mut inside = Vec::new();
            for entry in fs::read_dir(path)? {
                inside.push(entry?.path());
            }
            inside.sort();
            self.rest.extend(inside.into_iter().rev());
            Ok(Got::Folder { path: name, mode })
        } else if meta.is_symlink() {
            let target: &OsStr = &fs::read_link(path)?.into_os_string();
            let target = target.as_bytes().to_vec();
            Ok(Got::Link { path: name, target })
        } else if meta.is_file() {
            // What has become a pipe meanwhile is not waited for.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            self.open = Some(File::from(openat(CWD, path, flags, Mode::empty())?));
            let bytes = meta.len();
            let path = name;
            Ok(Got::File { path, mode, bytes })
        } else {
            Err(io::Error::other("it is neither a file nor a folder"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(gets: &mut Gets) -> Vec<Got> {
        let mut scratch = [0; 4];
        std::iter::from_fn(|| gets.next(&mut scratch)).collect()
    }

    #[test]
    fn a_folder_comes_whole_and_in_order_and_links_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("out");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("sub/a"), "123456").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("link")).unwrap();
        let mut gets = Gets::default();
        gets.ask(root.as_os_str().as_bytes());
        gets.ask(b"/no/such");
        let got = all(&mut gets);
        let names: Vec<&[u8]> = got
            .iter()
            .filter_map(|got| match got {
                Got::Folder { path, .. } | Got::File { path, .. } | Got::Link { path, .. } => {
                    Some(&path[..])
                }
                _ => None,
            })
            .collect();
        assert_eq!(names, [&b""[..], b"link", b"sub", b"sub/a"]);
        let data: Vec<u8> = got
            .iter()
            .filter_map(|got| match got {
                Got::Data { data } => Some(data.clone()),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(data, b"123456");
        assert_eq!(got.iter().filter(|got| **got == Got::End).count(), 1);
        assert!(matches!(got.last(), Some(Got::Failed { message }) if message.contains("No such")));
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let mut gets = Gets::default();
        gets.ask(b"/dev/zero");
        assert!(matches!(&all(&mut gets)[..], [Got::Failed { .. }]));
    }
}
