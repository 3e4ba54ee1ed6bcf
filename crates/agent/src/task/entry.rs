//! What there is: one path, or a folder's.

use super::answer;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use zygote_protocol::{FileAnswer, FileEntry, FileKind};

/// Tells what there is at a path.
pub fn stat(path: &Path, follow: bool) -> io::Result<()> {
    let meta = if follow {
        fs::metadata(path)?
    } else {
        fs::symlink_metadata(path)?
    };
    answer(&FileAnswer::Entry(entry(path, path, &meta)))
}

fn entry(path: &Path, shown: &Path, meta: &Metadata) -> FileEntry {
    let kind = match meta.file_type() {
        kind if kind.is_file() => FileKind::File,
        kind if kind.is_dir() => FileKind::Folder,
        kind if kind.is_symlink() => FileKind::Link,
        _ => FileKind::Other,
    };
    let target = (kind == FileKind::Link)
        .then(|| fs::read_link(path).ok())
        .flatten();
    FileEntry {
        path: shown.as_os_str().as_bytes().to_vec(),
        kind,
        bytes: meta.len(),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        modified_ns: meta
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(meta.mtime_nsec()),
        target: target.map(|target| target.as_os_str().as_bytes().to_vec()),
    }
}

/// Lists a folder, and folders in it, in the order of their names. What goes away meanwhile is left out.
pub fn list(root: &Path, depth: u32) -> io::Result<()> {
    // What is named may be a link to a folder.
    let mut folders = vec![(root.to_owned(), 1)];
    while let Some((folder, level)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(_) if level > 1 => continue,
            Err(error) => return Err(error),
        };
        let mut inside: Vec<PathBuf> = Vec::new();
        for entry in entries {
            inside.push(entry?.path());
        }
        inside.sort();
        let mut deeper = Vec::new();
        for path in inside {
            let Ok(meta) = fs::symlink_metadata(&path) else {
                continue;
            };
            let shown = path.strip_prefix(root).unwrap_or(&path);
            answer(&FileAnswer::Entry(entry(&path, shown, &meta)))?;
            if meta.is_dir() && level < depth {
                deeper.push((path, level + 1));
            }
        }
        folders.extend(deeper.into_iter().rev());
    }
    Ok(())
}
