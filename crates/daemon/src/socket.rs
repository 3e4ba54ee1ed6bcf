//! Where the daemon listens: one at a socket, and nobody but its owner.

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::process::{geteuid, umask};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longest path of a socket (unix(7): sun_path has 108 bytes, with an end).
const PATH_MAX_BYTES: usize = 107;

/// Why nobody can listen there.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Its path is too long.
    #[error(
        "the path of the engine's socket has {length} bytes, and {PATH_MAX_BYTES} is the most that \
         the kernel takes: {}; name a shorter one with --socket or in ZYGOTE_SOCKET",
        path.display()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// What is there is no socket.
    #[error("{} is there, and no socket; name another path with --socket", .0.display())]
    NoSocket(PathBuf),
    /// Somebody else's.
    #[error(
        "another program listens at {}, and it is no engine; name another path with --socket",
        .0.display()
    )]
    Foreign(PathBuf),
    /// Its folder is not ours alone.
    #[error(
        "the folder of the engine's socket, {}, belongs to somebody else or can be written by \
         others; remove it, set XDG_RUNTIME_DIR, or name another path with --socket",
        .0.display()
    )]
    Folder(PathBuf),
    /// Another engine is there.
    #[error("an engine listens at {} already; see: zygote status", .0.display())]
    Taken(PathBuf),
    /// A file.
    #[error("cannot {operation} {}; name another path with --socket", path.display())]
    File {
        /// Verb.
        operation: &'static str,
        /// Object.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

fn at<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SocketError + 'a {
    move |source| SocketError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// The folder for sockets: the system's for root, else the session's, else one in /tmp.
fn folder() -> PathBuf {
    if geteuid().is_root() {
        return "/run/zygote".into();
    }
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match session.filter(|path| path.is_absolute()) {
        Some(session) => session.join("zygote"),
        None => format!("/tmp/zygote-{}", geteuid().as_raw()).into(),
    }
}

/// The socket of the engine that has a state directory.
pub fn default_socket(state_dir: &Path) -> PathBuf {
    if state_dir == zygote_template::default_state_dir() {
        return folder().join("zygote.sock");
    }
    // FNV-1a: two directories of one user do not meet by accident.
    let bytes = state_dir.as_os_str().as_bytes();
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    folder().join(format!("zygote-{sum:016x}.sock"))
}

/// Checks a path before anybody tries it.
pub fn check(path: &Path) -> Result<(), SocketError> {
    let length = path.as_os_str().len();
    if length > PATH_MAX_BYTES {
        let path = path.to_owned();
        return Err(SocketError::TooLong { path, length });
    }
    Ok(())
}

/// A socket that is ours. Dropping it removes its files.
pub struct Bound {
    path: PathBuf,
    _lock: Lock,
    /// Device and inode, so that nobody else's is removed; `None`: a service manager's, which stays.
    identity: Option<(u64, u64)>,
}

struct Lock {
    path: PathBuf,
    /// Locked, until it is closed.
    _file: OwnedFd,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Held still: whoever has opened it finds out that it is gone.
        let _ = fs::remove_file(&self.path);
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.unlink();
    }
}

impl Bound {
    /// Removes the socket, so that nobody comes any more; the lock stays.
    pub fn unlink(&self) {
        let own = self.identity;
        if own.is_some() && identity(&self.path).ok() == own {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// Listens at a path. What a killed engine has left there is replaced.
///
/// # Errors
/// `Taken` if another engine is alive there.
pub fn bind(path: &Path) -> Result<(Bound, UnixListener), SocketError> {
    check(path)?;
    own_folder(path)?;
    let lock = lock(path)?;
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            // Nobody holds the lock, so no engine is alive there.
            if UnixStream::connect(path).is_ok() {
                return Err(SocketError::Foreign(path.to_owned()));
            }
            fs::remove_file(path).map_err(at("remove the old socket", path))?;
        }
        Ok(_) => return Err(SocketError::NoSocket(path.to_owned())),
        Err(_) => {}
    }
    // Before any thread of ours makes files.
    let before = umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    let listener = bound.map_err(at("listen at", path))?;
    let nonblocking = listener.set_nonblocking(true);
    nonblocking.map_err(at("listen at", path))?;
    let bound = Bound {
        path: path.to_owned(),
        _lock: lock,
        identity: Some(identity(path).map_err(at("look at", path))?),
    };
    Ok((bound, listener))
}

/// Listens where a service manager does already.
///
/// # Errors
/// As [`bind`].
pub fn take_over(path: &Path) -> Result<Bound, SocketError> {
    own_folder(path)?;
    Ok(Bound {
        path: path.to_owned(),
        _lock: lock(path)?,
        identity: None,
    })
}

/// Makes the socket's folder; nobody else may put things into it.
fn own_folder(path: &Path) -> Result<(), SocketError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(folder)
        .map_err(at("make the folder", folder))?;
    let meta = fs::metadata(folder).map_err(at("look at the folder", folder))?;
    let is_sticky = meta.mode() & 0o1000 != 0;
    let others_write = meta.mode() & 0o022 != 0;
    let is_ours = meta.uid() == geteuid().as_raw() || meta.uid() == 0;
    if !is_ours || others_write && !is_sticky {
        return Err(SocketError::Folder(folder.to_owned()));
    }
    Ok(())
}

fn lock_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// Whether an engine is alive there, also one that does not listen yet, or no more.
pub fn is_held(socket: &Path) -> bool {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = open(lock_path(socket), flags, Mode::empty());
    file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

fn lock(socket: &Path) -> Result<Lock, SocketError> {
    let path = lock_path(socket);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        let file = open(&path, flags, Mode::from_raw_mode(0o600));
        let file = file.map_err(|error| at("open the lock", &path)(error.into()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(SocketError::Taken(socket.to_owned()));
        }
        let held = rustix::fs::fstat(&file).map_err(|e| at("look at", &path)(e.into()))?;
        // Its last holder may have removed it just now.
        if identity(&path).is_ok_and(|now| now == (held.st_dev, held.st_ino)) {
            return Ok(Lock { path, _file: file });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_listens_and_what_a_killed_one_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/zygote.sock");
        let (bound, listener) = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(SocketError::Taken(_))));
        bound.unlink();
        assert!(is_held(&path), "it has not ended yet");
        drop((bound, listener));
        assert!(!is_held(&path));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
        // As after a kill: a socket that nobody listens at, and no lock.
        drop(UnixListener::bind(&path).unwrap());
        assert!(bind(&path).is_ok());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_path_at_the_limit_is_taken_and_a_longer_one_refused() {
        let folder = tempfile::tempdir().unwrap();
        let room = PATH_MAX_BYTES - folder.path().as_os_str().len() - 1;
        bind(&folder.path().join("x".repeat(room))).unwrap();
        let error = bind(&folder.path().join("x".repeat(room + 1)))
            .err()
            .unwrap();
        assert!(error.to_string().contains("--socket"), "{error}");
    }

    #[test]
    fn a_folder_that_others_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let bound = bind(&folder.path().join("zygote.sock"));
        assert!(matches!(bound, Err(SocketError::Folder(_))));
    }

    #[test]
    fn each_state_directory_has_a_socket_of_its_own() {
        let default = default_socket(&zygote_template::default_state_dir());
        assert!(default.ends_with("zygote/zygote.sock") || default.starts_with("/tmp"));
        let (one, two) = (
            default_socket(Path::new("/a")),
            default_socket(Path::new("/b")),
        );
        assert!(one != two && one != default && one.parent() == default.parent());
    }
}
