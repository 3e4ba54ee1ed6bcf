//! Who has asked for what: one line of JSON for each request, only ever added to a file. Written by a thread of its
//! own, so that no request waits for a disk.

use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lines that wait to be written; more are lost, and counted.
const WAITING_MAX: usize = 10_000;
/// Lines that are written at once.
const BATCH_MAX: usize = 1000;

/// A request, and what came of it. Nothing of its body, nor of what a program says.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Entry {
    /// Its name, as in the header `x-request-id`.
    pub request: String,
    /// From where: an address, or `owner` for the engine's own socket.
    pub from: String,
    /// The key that was shown, by its id.
    pub key: Option<String>,
    /// Whose it is.
    pub tenant: Option<String>,
    /// `GET`, and so on.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// HTTP status of the answer.
    pub status: u16,
    /// The code of the error that it was.
    pub error: Option<String>,
    /// The sandbox that was made, or the run's, where that is known by then.
    pub made: Option<String>,
    /// Milliseconds until the answer began.
    pub ms: f64,
}

/// A line.
#[derive(Serialize)]
struct Line {
    /// When the answer began, in seconds since 1970-01-01T00:00:00Z.
    at: f64,
    #[serde(flatten)]
    entry: Entry,
    /// Lines before this one that are lost.
    #[serde(skip_serializing_if = "is_zero")]
    lost: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// See the module.
pub struct Audit {
    lines: SyncSender<Line>,
    lost: Arc<AtomicU64>,
}

impl Audit {
    /// To a file, which is made if it is not there; `failed` is told when it cannot be written, and then not until
    /// that has worked again.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn to(path: PathBuf, failed: impl Fn(&io::Error) + Send + 'static) -> io::Result<Self> {
        let file = open(&path)?;
        let (lines, taken) = sync_channel(WAITING_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let own = Arc::clone(&lost);
        let writer = move || write(&path, file, &taken, &own, &failed);
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(writer)?;
        Ok(Self { lines, lost })
    }

    /// Adds a line.
    pub fn note(&self, entry: Entry) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = Line {
            at: (now.unwrap_or_default().as_secs_f64() * 1000.0).round() / 1000.0,
            entry,
            lost: self.lost.swap(0, Ordering::Relaxed),
        };
        if let Err(TrySendError::Full(line) | TrySendError::Disconnected(line)) =
            self.lines.try_send(line)
        {
            self.lost.fetch_add(line.lost + 1, Ordering::Relaxed);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// Whether that is still the file of the path: it may have been set aside, and belong to somebody else now.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |meta: &fs::Metadata| (meta.dev(), meta.ino());
    let (own, there) = (file.metadata(), fs::metadata(path));
    matches!((own, there), (Ok(own), Ok(there)) if identity(&own) == identity(&there))
}

fn write(
    path: &Path,
    mut file: File,
    taken: &Receiver<Line>,
    lost: &AtomicU64,
    failed: &dyn Fn(&io::Error),
) {
    let mut works = true;
    while let Ok(first) = taken.recv() {
        let batch: Vec<Line> = std::iter::once(first)
            .chain(taken.try_iter().take(BATCH_MAX - 1))
            .collect();
        let mut text = Vec::new();
        for line in &batch {
            // None of them fails to be written into memory.
            let _ = serde_json::to_writer(&mut text, line);
            text.push(b'\n');
        }
        let fresh = if is_at(&file, path) {
            Ok(())
        } else {
            open(path).map(|own| file = own)
        };
        match fresh.and_then(|()| file.write_all(&text)) {
            Ok(()) => works = true,
            Err(error) => {
                let gone = batch.iter().map(|line| line.lost + 1).sum();
                lost.fetch_add(gone, Ordering::Relaxed);
                if works {
                    failed(&error);
                }
                works = false;
                // A full disk does not get better by being asked at once.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn lines(path: &Path, count: usize) -> Vec<serde_json::Value> {
        let begun = Instant::now();
        loop {
            let text = fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<_> = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect();
            if lines.len() >= count {
                return lines;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "{text}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn entry(request: &str) -> Entry {
        Entry {
            request: request.to_owned(),
            ..Entry::default()
        }
    }

    #[test]
    fn lines_are_added_in_their_order_and_a_file_that_is_set_aside_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (
            folder.path().join("log/audit.jsonl"),
            folder.path().join("old"),
        );
        let audit = Audit::to(path.clone(), |error| panic!("{error}")).unwrap();
        for number in 0..100 {
            audit.note(entry(&number.to_string()));
        }
        let found = lines(&path, 100);
        for (number, line) in found.iter().enumerate() {
            assert_eq!(line["request"].as_str(), Some(&*number.to_string()));
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::rename(&path, &old).unwrap();
        audit.note(entry("next"));
        assert_eq!(lines(&path, 1)[0]["request"], "next");
        assert_eq!(lines(&old, 100).len(), 100);
        // What is there is kept.
        drop(audit);
        let audit = Audit::to(path.clone(), |error| panic!("{error}")).unwrap();
        audit.note(entry("after"));
        assert_eq!(lines(&path, 2)[1]["request"], "after");
    }

    #[test]
    fn what_cannot_be_written_is_told_once_and_counted() {
        let told = Arc::new(AtomicU64::new(0));
        let own = Arc::clone(&told);
        let audit = Audit::to("/dev/full".into(), move |_| {
            own.fetch_add(1, Ordering::Relaxed);
        });
        let audit = audit.unwrap();
        let begun = Instant::now();
        while audit.lost.load(Ordering::Relaxed) < 2 {
            assert!(begun.elapsed() < Duration::from_secs(10));
            if told.load(Ordering::Relaxed) == 0 || audit.lost.load(Ordering::Relaxed) == 1 {
                audit.note(entry("x"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }
}
