//! Remembering what was verified: the identity of each file at that time.
//!
//! A stamp says: these very files (inode, length, modification and change time) had the digests of
//! this manifest. A write, a replacement or a restored time changes the change time, which no
//! program can set. What a stamp cannot notice is a disk that loses bits by itself: `verify` can.

use crate::reader::Snapshot;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Views of the same files that are remembered (a shared folder shows other inode numbers).
const VIEWS_MAX: usize = 8;
/// Longest stamp file that is looked at.
const STAMP_MAX_BYTES: u64 = 64 * 1024;

/// Whether the snapshot's files are those that were verified.
pub fn holds(snapshot: &Snapshot, folder: &Path) -> bool {
    let Ok(view) = view(snapshot) else {
        return false;
    };
    read(&stamp_file(snapshot, folder)).contains(&view)
}

/// Remembers that the snapshot's files have been verified, if they still are what they were `before`
/// that began.
pub fn remember(snapshot: &Snapshot, folder: &Path, before: String) -> io::Result<()> {
    let view = view(snapshot)?;
    if view != before {
        return Err(io::Error::other("they have been written to meanwhile"));
    }
    let path = stamp_file(snapshot, folder);
    let mut views = read(&path);
    views.retain(|known| *known != view);
    views.insert(0, view);
    views.truncate(VIEWS_MAX);
    fs::create_dir_all(folder)?;
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    let mut file = File::create(&fresh)?;
    file.write_all(views.join("\n").as_bytes())?;
    fs::rename(&fresh, &path)
}

/// Forgets that they have ever been.
pub fn forget(snapshot: &Snapshot, folder: &Path) {
    // What is not there is forgotten.
    let _ = fs::remove_file(stamp_file(snapshot, folder));
}

fn stamp_file(snapshot: &Snapshot, folder: &Path) -> PathBuf {
    folder.join(&snapshot.manifest_digest)
}

fn read(path: &Path) -> Vec<String> {
    match fs::metadata(path) {
        Ok(meta) if meta.len() <= STAMP_MAX_BYTES => {}
        _ => return Vec::new(),
    }
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// What tells that files are the same, unchanged.
pub fn view(snapshot: &Snapshot) -> io::Result<String> {
    let mut words = Vec::new();
    for (_, file) in snapshot.files() {
        let meta = file.metadata()?;
        words.push(format!(
            "{}:{}:{}.{:09}:{}.{:09}",
            meta.ino(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec()
        ));
    }
    Ok(words.join(" "))
}
