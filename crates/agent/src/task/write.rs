//! Writing a file from standard input.

use super::{copy, entry};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat, renameat};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zygote_protocol::WriteHow;

/// Permissions of a new file.
const MODE: u32 = 0o644;

/// Writes it, and tells what is there then.
pub fn write(path: &Path, mode: Option<u32>, how: WriteHow, parents: bool) -> io::Result<()> {
    if let Some(folder) = path.parent().filter(|_| parents) {
        fs::create_dir_all(folder)?;
    }
    match how {
        WriteHow::Replace => replace(path, mode)?,
        WriteHow::Truncate | WriteHow::Append => into(path, mode, how == WriteHow::Append)?,
    }
    entry::stat(path, true)
}

fn into(path: &Path, mode: Option<u32>, append: bool) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .append(append)
        .truncate(!append)
        .mode(mode.unwrap_or(MODE))
        .open(path)?;
    if let Some(mode) = mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    copy(&mut io::stdin(), &mut file)
}

/// Others see the old file or the new one. One that is not whole has no name: killed, this leaves
/// nothing.
fn replace(path: &Path, mode: Option<u32>) -> io::Result<()> {
    // A link is written through, as by a shell.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let old = fs::metadata(path).ok();
    if old.as_ref().is_some_and(fs::Metadata::is_dir) {
        return Err(Errno::ISDIR.into());
    }
    let is_file = old.as_ref().is_none_or(fs::Metadata::is_file);
    if !is_file {
        // A device or a pipe is written to, not replaced.
        return into(path, None, false);
    }
    let folder = path.parent().filter(|folder| folder != &Path::new(""));
    let folder = folder.unwrap_or(Path::new("."));
    let (mut file, temporary) = nameless(folder)?;
    let written = copy(&mut io::stdin(), &mut file).and_then(|()| {
        let kept = old.as_ref().map(|old| old.permissions().mode() & 0o7777);
        let mode = mode.or(kept).unwrap_or(MODE);
        file.set_permissions(Permissions::from_mode(mode))?;
        if let Some(old) = &old {
            use std::os::unix::fs::MetadataExt;
            // Who may not give files away keeps them.
            let _ = std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()));
        }
        name(&file, temporary.as_deref(), folder, path)
    });
    if written.is_err()
        && let Some(temporary) = &temporary
    {
        let _ = fs::remove_file(temporary);
    }
    written
}

/// A file without a name, or with one of its own where the file system has no such files.
fn nameless(folder: &Path) -> io::Result<(File, Option<PathBuf>)> {
    let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
    match openat(CWD, folder, flags, Mode::from_raw_mode(0o600)) {
        Ok(file) => Ok((File::from(file), None)),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let path = own_name(folder);
            Ok((File::create_new(&path)?, Some(path)))
        }
        Err(error) => Err(error.into()),
    }
}

/// Short, so that it fits wherever the file's own name does.
fn own_name(folder: &Path) -> PathBuf {
    folder.join(format!(".zygote-{}", std::process::id()))
}

/// Gives it its name.
fn name(file: &File, temporary: Option<&Path>, folder: &Path, path: &Path) -> io::Result<()> {
    if let Some(temporary) = temporary {
        return fs::rename(temporary, path);
    }
    let descriptor: &OwnedFd = &file.try_clone()?.into();
    let own = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let link = |to: &Path| linkat(CWD, &*own, CWD, to, AtFlags::SYMLINK_FOLLOW);
    match link(path) {
        Err(Errno::EXIST) => {}
        linked => return Ok(linked?),
    }
    // In place of another, which linkat does not do.
    let own_name = own_name(folder);
    // One that was killed just here may have had this number.
    let _ = fs::remove_file(&own_name);
    link(&own_name)?;
    let renamed = renameat(CWD, &own_name, CWD, path);
    if renamed.is_err() {
        let _ = fs::remove_file(&own_name);
    }
    Ok(renamed?)
}
