//! File locks that say who holds them, and are not waited for without end.

use rustix::event::poll;
use rustix::time::Timespec;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest that builds are waited for: several may be in line, of a quarter of an hour each.
pub const BUILD_MAX: Duration = Duration::from_secs(2 * 3600);
/// Longest that a change of a name is waited for: it takes milliseconds.
pub const NAME_MAX: Duration = Duration::from_secs(60);
/// How often a held lock is tried again: flock(2) cannot wait for a limited time.
const TRY_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Why a lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Its file.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// Verb.
        operation: &'static str,
        /// Object.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Somebody keeps it.
    #[error("{} has been locked for {} s{holder}; wait for that to end, or end it", path.display(), waited.as_secs())]
    Held {
        /// The lock.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
        /// Who, as far as is known.
        holder: String,
    },
}

/// Takes a lock, and writes into it who has it. Whoever has to wait is told once, with the holder:
/// ` (process 17: zygote template build python)`, or nothing if that is not known. Dropping the file
/// releases it.
pub fn hold(
    path: &Path,
    limit: Duration,
    waiting: &mut dyn FnMut(&str),
) -> Result<File, LockError> {
    let mut file = open(path)?;
    let begun = Instant::now();
    let mut is_told = false;
    while file.try_lock().is_err() {
        let holder = holder(&mut file);
        if begun.elapsed() >= limit {
            return Err(LockError::Held {
                path: path.to_owned(),
                waited: begun.elapsed(),
                holder,
            });
        }
        if !is_told {
            waiting(&holder);
            is_told = true;
        }
        // Nothing to wait for but time.
        let _ = poll(&mut [], Some(&TRY_EVERY));
    }
    // Who comes later then knows less; no reason to fail.
    let _ = sign(&mut file);
    Ok(file)
}

/// Takes a lock if nobody has it.
pub fn try_hold(path: &Path) -> Option<File> {
    let mut file = open(path).ok()?;
    file.try_lock().ok()?;
    let _ = sign(&mut file);
    Some(file)
}

fn open(path: &Path) -> Result<File, LockError> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    options.open(path).map_err(|source| LockError::File {
        operation: "open the lock",
        path: path.to_owned(),
        source,
    })
}

fn sign(file: &mut File) -> io::Result<()> {
    let words: Vec<String> = std::env::args_os()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    file.set_len(0)?;
    file.rewind()?;
    write!(file, "process {}: {}", std::process::id(), words.join(" "))
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(200).read_to_string(&mut text));
    match read {
        Ok(count) if count > 0 => format!(
            " ({})",
            text.replace(|letter: char| letter.is_control(), " ")
        ),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_names_its_holder_and_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = hold(&path, NAME_MAX, &mut |_| panic!("it is free")).unwrap();
        let mut told = Vec::new();
        let error = hold(&path, Duration::from_millis(120), &mut |holder| {
            told.push(holder.to_owned());
        });
        let own = format!("process {}", std::process::id());
        assert!(told.len() == 1 && told[0].contains(&own), "{told:?}");
        assert!(error.unwrap_err().to_string().contains(&own));
        assert!(try_hold(&path).is_none());
        drop(held);
        assert!(try_hold(&path).is_some());
    }
}
