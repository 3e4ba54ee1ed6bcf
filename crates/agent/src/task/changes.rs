//! Watching files and folders (inotify(7)).

use super::answer;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use zygote_protocol::{FileAnswer, FileChange};

const BUFFER_BYTES: usize = 64 * 1024;
/// Most folders that are watched at once.
const FOLDERS_MAX: usize = 10_000;

struct Watcher {
    inotify: OwnedFd,
    root: PathBuf,
    recursive: bool,
    /// What a watch stands for, relative to the root.
    watched: HashMap<i32, PathBuf>,
}

/// Something that was moved away, until it is known whither.
struct Moved {
    cookie: u32,
    path: PathBuf,
    is_folder: bool,
}

/// Tells of changes, without end.
pub fn watch(root: &Path, recursive: bool) -> io::Result<()> {
    let mut watcher = Watcher {
        inotify: inotify::init(CreateFlags::CLOEXEC)?,
        root: root.to_owned(),
        recursive,
        watched: HashMap::new(),
    };
    watcher.add(Path::new(""), false)?;
    answer(&FileAnswer::Watching)?;
    io::stdout().flush()?;
    let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
    loop {
        let changes = watcher.read(&mut buffer)?;
        for (path, is_folder, change) in changes {
            let path = path.as_os_str().as_bytes().to_vec();
            answer(&FileAnswer::Change {
                path,
                is_folder,
                change,
            })?;
        }
        io::stdout().flush()?;
    }
}

type Change = (PathBuf, bool, FileChange);

impl Watcher {
    fn interest() -> WatchFlags {
        WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVE_SELF
    }

    /// Watches a path, and folders in it if they are wanted; gives back what is in those that are new.
    fn add(&mut self, path: &Path, is_new: bool) -> io::Result<Vec<Change>> {
        let full = if path == Path::new("") {
            self.root.clone()
        } else {
            self.root.join(path)
        };
        if self.watched.len() >= FOLDERS_MAX {
            return Err(io::Error::other(format!("over {FOLDERS_MAX} folders")));
        }
        let number = inotify::add_watch(&self.inotify, &full, Self::interest())?;
        self.watched.insert(number, path.to_owned());
        let mut found = Vec::new();
        let is_link = fs::symlink_metadata(&full).is_ok_and(|meta| meta.is_symlink());
        if !self.recursive || (is_link && path != Path::new("")) {
            return Ok(found);
        }
        for entry in fs::read_dir(&full).into_iter().flatten().flatten() {
            let inner = path.join(entry.file_name());
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_new {
                // Made before it was watched.
                found.push((inner.clone(), is_folder, FileChange::Created));
            }
            if is_folder {
                // One that goes away meanwhile is told as removed.
                found.extend(self.add(&inner, is_new).unwrap_or_default());
            }
        }
        Ok(found)
    }

    fn read(&mut self, buffer: &mut [MaybeUninit<u8>]) -> io::Result<Vec<Change>> {
        let (mut changes, mut new): (Vec<Change>, Vec<PathBuf>) = (Vec::new(), Vec::new());
        let mut moved: Option<Moved> = None;
        {
            let mut reader = inotify::Reader::new(&self.inotify, buffer);
            let mut is_first = true;
            while is_first || !reader.is_buffer_empty() {
                is_first = false;
                let event = reader.next()?;
                let flags = event.events();
                if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                    changes.push((PathBuf::new(), false, FileChange::Overflow));
                    continue;
                }
                if flags.contains(ReadFlags::IGNORED) {
                    self.watched.remove(&event.wd());
                    continue;
                }
                let Some(folder) = self.watched.get(&event.wd()) else {
                    continue;
                };
                let name = event
                    .file_name()
                    .map(|name| OsStr::from_bytes(name.to_bytes()));
                let path = name.map_or_else(|| folder.clone(), |name| folder.join(name));
                let is_folder = flags.contains(ReadFlags::ISDIR);
                let was_moved = moved.take();
                if flags.contains(ReadFlags::MOVED_TO)
                    && let Some(from) = &was_moved
                    && from.cookie == event.cookie()
                {
                    let to = path.as_os_str().as_bytes().to_vec();
                    changes.push((from.path.clone(), is_folder, FileChange::Renamed { to }));
                    if is_folder {
                        new.push(path);
                    }
                    continue;
                }
                // Away, to where nobody watches.
                changes.extend(was_moved.map(gone));
                if flags.contains(ReadFlags::MOVED_FROM) {
                    let cookie = event.cookie();
                    moved = Some(Moved {
                        cookie,
                        path,
                        is_folder,
                    });
                    continue;
                }
                let Some(change) = change(flags, name.is_some()) else {
                    continue;
                };
                if is_folder && change == FileChange::Created {
                    new.push(path.clone());
                }
                changes.push((path, is_folder, change));
            }
        }
        changes.extend(moved.map(gone));
        if self.recursive {
            for path in new {
                let is_renamed = changes.iter().any(|(_, _, change)| {
                    matches!(change, FileChange::Renamed { to } if to == path.as_os_str().as_bytes())
                });
                changes.extend(self.add(&path, !is_renamed).unwrap_or_default());
            }
        }
        Ok(changes)
    }
}

fn gone(moved: Moved) -> Change {
    (moved.path, moved.is_folder, FileChange::Removed)
}

/// What an event says, if it says something of its own: what happens to a folder in a watched folder is
/// told there.
fn change(flags: ReadFlags, has_name: bool) -> Option<FileChange> {
    if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
        Some(FileChange::Created)
    } else if flags.contains(ReadFlags::CLOSE_WRITE) {
        Some(FileChange::Written)
    } else if flags.contains(ReadFlags::DELETE) {
        Some(FileChange::Removed)
    } else if flags.contains(ReadFlags::ATTRIB) && has_name {
        Some(FileChange::Attributes)
    } else if flags.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF) && !has_name {
        Some(FileChange::Removed)
    } else {
        None
    }
}
