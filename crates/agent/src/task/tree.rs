//! Files and folders as tar archives.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Packs a file or a folder onto standard output, under its own name; links as they are.
pub fn pack(path: &Path) -> io::Result<()> {
    // What is named may be a link; its name is the one that was given.
    let meta = fs::metadata(path)?;
    let real = fs::canonicalize(path)?;
    let name = path
        .file_name()
        .map_or_else(|| PathBuf::from("."), PathBuf::from);
    let mut builder = tar::Builder::new(io::stdout());
    builder.follow_symlinks(false);
    if meta.is_dir() {
        builder.append_dir_all(&name, &real)?;
    } else {
        builder.append_path_with_name(&real, &name)?;
    }
    builder.into_inner()?.flush()
}

/// Unpacks standard input into a folder: with permissions and times, and owners where this is root.
pub fn unpack(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let mut archive = tar::Archive::new(io::stdin());
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(rustix::process::geteuid().is_root());
    archive.set_overwrite(true);
    archive.unpack(path)?;
    // What lies behind the archive's end is read, so that who writes it is not told of a broken pipe.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop)
}
