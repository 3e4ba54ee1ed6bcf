//! Tasks with files, each by a process of its own, started by the agent from this same program: what a
//! file system does to it (a pipe that nobody writes to, a disk that is full) happens to nobody else, and
//! it may be killed at any time.

mod changes;
mod entry;
mod tree;
mod write;

use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::Path;
use zygote_protocol::{FileAnswer, FileFailure, FileTask, encode_answer};

/// The word that makes this program one; the task follows.
pub const VERB: &str = "files";
const BUFFER_BYTES: usize = 64 * 1024;

/// Does a task; a failure has been told on standard error.
pub fn run(word: Option<String>) -> io::Result<()> {
    let task = word.and_then(|word| FileTask::from_word(&word));
    let task = task.ok_or_else(|| io::Error::other("no task"))?;
    match perform(&task) {
        Ok(()) => io::stdout().flush(),
        Err(failure) => {
            let bytes = encode_answer(&failure).map_err(io::Error::other)?;
            io::stderr().write_all(&bytes)?;
            std::process::exit(1);
        }
    }
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// What went wrong, and with what.
fn failed(what: &str, path: &[u8], error: &io::Error) -> FileFailure {
    let name = String::from_utf8_lossy(path);
    // Without the standard library's number behind the kernel's words.
    let words = error.to_string();
    let words = words.split(" (os error ").next().unwrap_or_default();
    let inner = error.get_ref().and_then(|inner| inner.source());
    let errno = error.raw_os_error().or_else(|| {
        let inner = inner?.downcast_ref::<io::Error>()?;
        inner.raw_os_error()
    });
    FileFailure {
        errno: errno.unwrap_or(0),
        message: format!("cannot {what} {name}: {words}"),
    }
}

fn answer(answer: &FileAnswer) -> io::Result<()> {
    let bytes = encode_answer(answer).map_err(io::Error::other)?;
    io::stdout().write_all(&bytes)
}

fn perform(task: &FileTask) -> Result<(), FileFailure> {
    let (what, name, done) = match task {
        FileTask::Read {
            path: name,
            offset,
            length,
        } => ("read", name, read(path(name), *offset, *length)),
        FileTask::Write {
            path: name,
            mode,
            how,
            parents,
        } => (
            "write",
            name,
            write::write(path(name), *mode, *how, *parents),
        ),
        FileTask::Stat { path: name, follow } => {
            ("look at", name, entry::stat(path(name), *follow))
        }
        FileTask::List { path: name, depth } => ("list", name, entry::list(path(name), *depth)),
        FileTask::Walk { path: name } => ("list", name, entry::walk(path(name))),
        FileTask::MakeFolder {
            path: name,
            mode,
            parents,
        } => ("make", name, make_folder(path(name), *mode, *parents)),
        FileTask::Move { from, to, replace } => {
            ("move", from, rename(path(from), path(to), *replace))
        }
        FileTask::Remove {
            path: name,
            recursive,
        } => ("remove", name, remove(path(name), *recursive)),
        FileTask::Chmod { path: name, mode } => {
            let permissions = Permissions::from_mode(*mode);
            ("chmod", name, fs::set_permissions(path(name), permissions))
        }
        FileTask::Chown { path: name, user } => ("chown", name, chown(path(name), user)),
        FileTask::Link { path: name, target } => ("link", name, symlink(path(target), path(name))),
        FileTask::Watch {
            path: name,
            recursive,
        } => ("watch", name, changes::watch(path(name), *recursive)),
        FileTask::Pack { path: name } => ("pack", name, tree::pack(path(name))),
        FileTask::Unpack { path: name } => ("unpack into", name, tree::unpack(path(name))),
    };
    done.map_err(|error| failed(what, name, &error))
}

fn read(path: &Path, offset: u64, length: Option<u64>) -> io::Result<()> {
    let mut file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(Errno::ISDIR.into());
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    copy(
        &mut file.take(length.unwrap_or(u64::MAX)),
        &mut io::stdout(),
    )
}

/// By a buffer of its own: what is copied may be a pipe, a device, anything.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.flush(),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn make_folder(path: &Path, mode: u32, parents: bool) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(parents).mode(mode).create(path)?;
    // Whatever the umask is.
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn rename(from: &Path, to: &Path, replace: bool) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let flags = if replace {
        RenameFlags::empty()
    } else {
        RenameFlags::NOREPLACE
    };
    Ok(renameat_with(CWD, from, CWD, to, flags)?)
}

fn remove(path: &Path, recursive: bool) -> io::Result<()> {
    let is_folder = fs::symlink_metadata(path)?.is_dir();
    match (is_folder, recursive) {
        (false, _) => fs::remove_file(path),
        (true, false) => fs::remove_dir(path),
        (true, true) => fs::remove_dir_all(path),
    }
}

fn chown(path: &Path, user: &str) -> io::Result<()> {
    let user = crate::users::find(user)?;
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))
}
