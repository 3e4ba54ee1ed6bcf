//! A file that comes out: without a name until it is whole, so that what was there stays there until
//! then, and half a file is nowhere, even if this process is killed (open(2), O_TMPFILE).

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, linkat, openat, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A file that comes. Dropped before it has landed, it leaves nothing.
pub struct Landing {
    path: PathBuf,
    file: File,
    folder: OwnedFd,
    name: OsString,
    meanwhile: Meanwhile,
}

/// What it is called until it is whole.
enum Meanwhile {
    /// Nothing.
    Nameless,
    /// So: file systems without O_TMPFILE.
    Called(OsString),
    /// As it will be: a device or a pipe is written to as it is; and what has landed.
    Itself,
}

impl Landing {
    /// Begins it in a folder; `path`: the same place, for people. What is there already is replaced if it is
    /// a file; `is_named`: the user has named this very place, and no link that lies there leads elsewhere.
    pub fn begin(
        folder: OwnedFd,
        name: &OsStr,
        path: PathBuf,
        mode: u32,
        is_named: bool,
    ) -> io::Result<Self> {
        let there = match statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(FileType::from_raw_mode(stat.st_mode)),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error.into()),
        };
        let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
        let (file, meanwhile) = match there {
            Some(FileType::Directory) => return Err(Errno::ISDIR.into()),
            Some(FileType::Symlink) if is_named => {
                let words = "it is a link; name what it leads to, or another file";
                return Err(io::Error::other(words));
            }
            None | Some(FileType::RegularFile | FileType::Symlink) => {
                let mode = Mode::from_raw_mode(mode & 0o777);
                let nameless = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::TMPFILE;
                match openat(&folder, ".", nameless, mode) {
                    Ok(file) => (file, Meanwhile::Nameless),
                    Err(_) => {
                        let (file, name) = create(&folder, flags, mode)?;
                        (file, Meanwhile::Called(name))
                    }
                }
            }
            Some(_) if is_named => {
                let file = openat(&folder, name, flags, Mode::empty())?;
                (file, Meanwhile::Itself)
            }
            Some(_) => return Err(io::Error::other("it is no file")),
        };
        Ok(Self {
            path,
            file: file.into(),
            folder,
            name: name.to_owned(),
            meanwhile,
        })
    }

    /// Where it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// More of it.
    pub fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all(data)
    }

    /// It is whole.
    pub fn land(&mut self) -> io::Result<()> {
        if let Meanwhile::Nameless = self.meanwhile {
            // A link cannot replace what is there; a rename can.
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let ((), name) =
                unused(|name| linkat(CWD, &*own, &self.folder, name, AtFlags::SYMLINK_FOLLOW))?;
            self.meanwhile = Meanwhile::Called(name);
        }
        if let Meanwhile::Called(temporary) = &self.meanwhile {
            renameat(&self.folder, temporary, &self.folder, &self.name)?;
            self.meanwhile = Meanwhile::Itself;
        }
        Ok(())
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if let Meanwhile::Called(temporary) = &self.meanwhile {
            let _ = unlinkat(&self.folder, temporary, AtFlags::empty());
        }
    }
}

fn create(folder: &OwnedFd, flags: OFlags, mode: Mode) -> io::Result<(OwnedFd, OsString)> {
    let flags = flags | OFlags::CREATE | OFlags::EXCL;
    unused(|name| openat(folder, name, flags, mode))
}

/// Makes something under a name that nothing has.
fn unused<T>(make: impl Fn(&OsStr) -> rustix::io::Result<T>) -> io::Result<(T, OsString)> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = OsString::from(format!(".zygote-get-{}-{number}", std::process::id()));
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_system_without_nameless_files_serves_too() {
        let home = tempfile::tempdir().unwrap();
        let folder = || File::open(home.path()).unwrap().into();
        let path = home.path().join("a");
        let begin = || {
            let mut landing = Landing::begin(folder(), "a".as_ref(), path.clone(), 0o644, true);
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let (file, name) = create(&folder(), flags, Mode::from_raw_mode(0o644)).unwrap();
            let landing_mut = landing.as_mut().unwrap();
            (landing_mut.file, landing_mut.meanwhile) = (file.into(), Meanwhile::Called(name));
            landing.unwrap()
        };
        let mut landing = begin();
        landing.write(b"whole").unwrap();
        landing.land().unwrap();
        drop(landing);
        let mut half = begin();
        half.write(b"half").unwrap();
        drop(half);
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }
}
