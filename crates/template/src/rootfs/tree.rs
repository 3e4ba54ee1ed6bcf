//! Writing into a tree that a guest will have as its root: its links lead nowhere else.

use super::error::{RootfsError, at};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Writes a file into a tree as a program that runs in it would: its symbolic links never lead out
/// of it (openat2(2), RESOLVE_IN_ROOT).
pub(super) fn add_file(
    tree: &Path,
    path: &Path,
    mode: u32,
    content: &[u8],
) -> Result<(), RootfsError> {
    let write = || -> io::Result<()> {
        let root = openat(CWD, tree, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        let inside = path.strip_prefix("/").unwrap_or(path);
        let folder = make_folders(&root, inside.parent().unwrap_or(Path::new("")))?;
        let name = inside.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let mode = Mode::from_raw_mode(mode);
        // What is there may be a link: it is replaced, not followed.
        let _ = rustix::fs::unlinkat(&folder, name, rustix::fs::AtFlags::empty());
        let file = openat(&folder, name, flags | OFlags::NOFOLLOW, mode)?;
        rustix::fs::fchmod(&file, mode)?;
        File::from(file).write_all(content)
    };
    write().map_err(at("write into the root file system", path))
}

fn make_folders(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let open = |path: &Path| {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    };
    let mut prefix = PathBuf::new();
    let mut folder = open(&prefix)?;
    for part in path {
        prefix.push(part);
        folder = match open(&prefix) {
            Err(Errno::NOENT) => {
                mkdirat(&folder, part, Mode::from_raw_mode(0o755))?;
                open(&prefix)?
            }
            other => other?,
        };
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_link_in_the_tree_does_not_lead_out_of_it() {
        let outside = tempfile::tempdir().unwrap();
        let tree = tempfile::tempdir().unwrap();
        symlink(outside.path(), tree.path().join("abs")).unwrap();
        symlink("../../../..", tree.path().join("up")).unwrap();
        fs::create_dir_all(tree.path().join(outside.path().strip_prefix("/").unwrap())).unwrap();
        for path in ["/abs/x", "/up/y", "/new/folder/z"] {
            add_file(tree.path(), Path::new(path), 0o640, b"content").unwrap();
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(tree.path().join("y").exists());
        let file = tree.path().join("new/folder/z");
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o640
        );
    }
}
