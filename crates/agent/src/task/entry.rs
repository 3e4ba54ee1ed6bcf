//! What there is: one path, or a folder's.

use super::answer;
use std::fs::{self, Metadata};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use zygote_protocol::{FileAnswer, FileEntry, FileKind, encode_answer};

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
    list_if(root, depth, |_| true)
}

/// Lists all of a folder but what is mounted in it.
pub fn walk(root: &Path) -> io::Result<()> {
    let device = fs::metadata(root)?.dev();
    // An overlay's files may lie on other devices, its folders do not
    // (Documentation/filesystems/overlayfs.rst, Inode properties).
    list_if(root, u32::MAX, |meta| {
        !meta.is_dir() || meta.dev() == device
    })
}

fn list_if(root: &Path, depth: u32, is_wanted: impl Fn(&Metadata) -> bool) -> io::Result<()> {
    // What is named may be a link to a folder.
    let mut folders = vec![(root.to_owned(), 1)];
    let mut stdout = BufWriter::new(io::stdout().lock());
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
            let meta = fs::symlink_metadata(&path).ok();
            let Some(meta) = meta.filter(&is_wanted) else {
                continue;
            };
            let shown = path.strip_prefix(root).unwrap_or(&path);
            let told = FileAnswer::Entry(entry(&path, shown, &meta));
            stdout.write_all(&encode_answer(&told).map_err(io::Error::other)?)?;
            if meta.is_dir() && level < depth {
                deeper.push((path, level + 1));
            }
        }
        folders.extend(deeper.into_iter().rev());
    }
    stdout.flush()
}
