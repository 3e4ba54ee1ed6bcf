//! Noticing that a snapshot's files are not any more what they were, at the cost of a look at each.

use crate::{MANIFEST_FILE, Snapshot};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Inode, length, modification and change time: no program can set the last.
type Identity = (u64, u64, i64, i64, i64, i64);

/// A snapshot's files as they were at some time. A loaded snapshot is a mapping of them: what somebody
/// writes into one shows in it.
#[derive(Debug)]
pub struct Watch {
    files: Vec<(PathBuf, Identity)>,
}

fn identity(path: &Path) -> io::Result<Identity> {
    let meta = fs::metadata(path)?;
    Ok((
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
    ))
}

impl Watch {
    /// As they are now.
    ///
    /// # Errors
    /// If the snapshot cannot be opened, in the kernel's words.
    pub fn begin(directory: &Path, pieces: &Path) -> io::Result<Self> {
        let snapshot = Snapshot::open(directory, pieces).map_err(io::Error::other)?;
        let files = snapshot.files().map(|(path, _)| path.clone());
        let paths = files.chain([directory.join(MANIFEST_FILE)]);
        let files = paths.map(|path| Ok((path.clone(), identity(&path)?)));
        Ok(Self {
            files: files.collect::<io::Result<_>>()?,
        })
    }

    /// Whether they are still the same.
    #[must_use]
    pub fn holds(&self) -> bool {
        let is_same =
            |(path, then): &(PathBuf, Identity)| identity(path).is_ok_and(|now| now == *then);
        self.files.iter().all(is_same)
    }
}
