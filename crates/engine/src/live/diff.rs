//! What differs between two moments: files, as forks that are only looked at show them, and pages of memory.

use super::error::LiveError;
use super::sandbox::Sandbox;
use crate::engine::Engine;
use crate::fork::Fork;
use crate::loaded::{Loaded, Replica};
use crate::sandbox::{Event, Outcome, RunRequest, Stdin, run_in};
use crate::saved::SaveError;
use crate::zygote::Zygote;
use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use zygote_protocol::{Buffering, FileAnswer, FileEntry, FileKind, FileTask, Program, take_answer};
use zygote_runner::chain;
use zygote_runner::pages::{self, Piece};
use zygote_snapshot::{OpenError, PAGE_BYTES, RunKind, Snapshot};

/// How long the look at a file system may take; emulated hosts are a hundred times slower than real ones.
const LOOK_MAX: Duration = Duration::from_secs(600);
/// Most bytes of a guest's list of its files.
const LIST_MAX_BYTES: usize = 64 << 20;
/// What each fork is given anew: that says nothing of what has been done in it.
const GIVEN: [&[u8]; 3] = [b"etc/hostname", b"etc/hosts", b"etc/machine-id"];

/// A moment of a sandbox.
#[derive(Clone)]
pub struct Side {
    /// Whose.
    pub sandbox: Arc<Sandbox>,
    /// One that is kept; `None`: now.
    pub moment: Option<String>,
}

/// What is to be compared.
pub struct DiffSpec {
    /// The earlier one; `None`: the later one's beginning, as its template has it.
    pub from: Option<Side>,
    /// The later one.
    pub to: Side,
    /// How long a sandbox's processes may take to stop.
    pub limit: Duration,
    /// Whether to go on although some have not.
    pub anyway: bool,
}

/// What differs.
#[derive(Debug)]
pub struct Difference {
    /// By path.
    pub files: Vec<FileDifference>,
    /// How many pages of memory; `None` if they have not come from the same boot.
    pub pages: Option<u64>,
}

/// A file, folder or link that is not the same.
#[derive(Debug, PartialEq, Eq)]
pub struct FileDifference {
    /// Absolute.
    pub path: Vec<u8>,
    /// As it was, if it was there.
    pub before: Option<FileEntry>,
    /// As it is, if it is there.
    pub after: Option<FileEntry>,
}

/// What can be looked at: a process that can be forked, and its memory.
struct Seen {
    zygote: Arc<Zygote>,
    /// `None`: it has nothing but its snapshot's.
    own: Option<Arc<Zygote>>,
    snapshot: PathBuf,
    pieces: PathBuf,
    /// Kept meanwhile.
    _loaded: Option<Arc<Loaded>>,
}

type Files = BTreeMap<Vec<u8>, FileEntry>;
type Pages = HashMap<u64, blake3::Hash>;

impl Engine {
    /// Compares two moments. The sandboxes go on meanwhile.
    ///
    /// # Errors
    /// If one of them cannot be branched, or looked at.
    pub async fn diff(&self, spec: &DiffSpec) -> Result<Difference, LiveError> {
        let to = self.seen(&spec.to, spec).await?;
        let from = match &spec.from {
            Some(side) => self.seen(side, spec).await?,
            None => self.beginning(&spec.to.sandbox, &to).await?,
        };
        let _turn = self.turn(spec.to.sandbox.whose()).await?;
        let (before, after) = tokio::try_join!(files(&from.zygote), files(&to.zygote))?;
        let pages = differing_pages(&from, &to).await?;
        Ok(Difference {
            files: differing(before, after),
            pages,
        })
    }

    async fn seen(&self, side: &Side, spec: &DiffSpec) -> Result<Seen, LiveError> {
        side.sandbox.touch().await;
        let moment = match &side.moment {
            Some(words) => side.sandbox.moment(words).await?,
            None => Arc::new(side.sandbox.branch(spec.limit, spec.anyway).await?),
        };
        let zygote = Arc::clone(&moment.zygote);
        let place = zygote.snapshot().cloned();
        let (snapshot, pieces) =
            place.ok_or_else(|| LiveError::NotCompared("its process has ended".to_owned()))?;
        Ok(Seen {
            own: Some(Arc::clone(&zygote)),
            zygote,
            snapshot,
            pieces,
            _loaded: None,
        })
    }

    /// A sandbox as its template has it.
    async fn beginning(&self, sandbox: &Sandbox, now: &Seen) -> Result<Seen, LiveError> {
        let loaded = self.find(&sandbox.spec.template, Some(sandbox.build.clone()), None)?;
        let roots = |path: &PathBuf| root_of(path, &self.settings().store.pieces_of(path));
        let root = roots(&now.snapshot).map_err(|error| failed(&error))?;
        let is_same =
            |replica: &&Replica| roots(&replica.snapshot).is_ok_and(|other| other == root);
        let replica = loaded.replicas.iter().find(is_same);
        let replica = replica.or(loaded.replicas.first());
        let replica = replica
            .ok_or_else(|| LiveError::NotCompared("its template has no snapshots".to_owned()))?;
        let pool = replica.pool(self.settings(), self.admission(), RunKind::Sandbox, || ());
        let pool = pool.await.map_err(|error| failed(&error))?;
        Ok(Seen {
            zygote: pool.zygote_arc(),
            own: None,
            snapshot: replica.snapshot.clone(),
            pieces: self.settings().store.pieces_of(&replica.snapshot),
            _loaded: Some(Arc::clone(&loaded)),
        })
    }
}

fn failed(error: &dyn Error) -> LiveError {
    LiveError::NotCompared(chain(error))
}

/// The folder of the whole snapshot that one differs from, or its own.
fn root_of(snapshot: &Path, pieces: &Path) -> Result<PathBuf, OpenError> {
    let opened = Snapshot::open(snapshot, pieces)?;
    let home = pieces.parent().unwrap_or(pieces);
    let base = opened.manifest().base.as_ref();
    Ok(base.map_or_else(|| snapshot.to_owned(), |base| home.join(&base.folder)))
}

/// All files of a fork that nobody uses.
async fn files(zygote: &Arc<Zygote>) -> Result<Files, LiveError> {
    let fork = Fork::of(zygote, RunKind::Sandbox).await;
    let mut fork = fork.map_err(|error| failed(&error))?;
    fork.identity.stays = true;
    let path = b"/".to_vec();
    let request = RunRequest {
        program: Program::Files(FileTask::Walk { path }),
        env: Vec::new(),
        cwd: String::new(),
        stdin: Stdin::Empty,
        buffering: Buffering::Full,
        puts: None,
        signals: None,
        gets: Vec::new(),
        timeout: Some(LOOK_MAX),
        measure: false,
    };
    let (events, heard) = mpsc::channel(16);
    let fork = std::future::ready(Ok(fork));
    let looking = run_in(zygote, Instant::now(), fork, request, events);
    let (ended, read) = tokio::join!(looking, read(heard));
    match ended.outcome {
        Outcome::Exited(zygote_protocol::ExitStatus::Code(0)) => read,
        Outcome::Failed(why) | Outcome::StartFailed { message: why, .. } => {
            Err(LiveError::NotCompared(why))
        }
        Outcome::Exited(_) | Outcome::TimedOut => {
            let why = "the list of its files could not be had";
            Err(LiveError::NotCompared(why.to_owned()))
        }
    }
}

/// The list, as it comes.
async fn read(mut heard: mpsc::Receiver<Event>) -> Result<Files, LiveError> {
    let nonsense = || LiveError::NotCompared("the guest's list of its files is none".to_owned());
    let (mut files, mut buffer, mut total) = (Files::new(), Vec::new(), 0);
    while let Some(event) = heard.recv().await {
        let Event::Stdout(bytes) = event else {
            continue;
        };
        total += bytes.len();
        if total > LIST_MAX_BYTES {
            let limit = LIST_MAX_BYTES >> 20;
            let why = format!("the list of its files is longer than {limit} MiB");
            return Err(LiveError::NotCompared(why));
        }
        buffer.extend_from_slice(&bytes);
        while let Some(answer) = take_answer(&mut buffer).map_err(|_| nonsense())? {
            let FileAnswer::Entry(entry) = answer else {
                return Err(nonsense());
            };
            files.insert(entry.path.clone(), entry);
        }
    }
    Ok(files)
}

/// Whether two entries tell of the same; a folder's time and length are those of what is in it.
fn is_same(a: &FileEntry, b: &FileEntry) -> bool {
    let owner = |entry: &FileEntry| (entry.kind, entry.mode, entry.uid, entry.gid);
    let content = |entry: &FileEntry| (entry.bytes, entry.modified_ns, entry.target.clone());
    owner(a) == owner(b) && (a.kind == FileKind::Folder || content(a) == content(b))
}

fn differing(mut before: Files, after: Files) -> Vec<FileDifference> {
    let mut all: BTreeMap<Vec<u8>, (Option<FileEntry>, Option<FileEntry>)> = BTreeMap::new();
    for (path, after) in after {
        match before.remove(&path) {
            Some(before) if is_same(&before, &after) => {}
            before => drop(all.insert(path, (before, Some(after)))),
        }
    }
    let gone = before.into_iter();
    all.extend(gone.map(|(path, before)| (path, (Some(before), None))));
    let is_own = |(path, _): &(Vec<u8>, _)| !GIVEN.contains(&&path[..]);
    let differences = all.into_iter().filter(is_own);
    differences
        .map(|(path, (before, after))| FileDifference {
            path: [b"/", &path[..]].concat(),
            before,
            after,
        })
        .collect()
}

/// How many pages are not the same.
async fn differing_pages(from: &Seen, to: &Seen) -> Result<Option<u64>, LiveError> {
    let roots = |seen: &Seen| root_of(&seen.snapshot, &seen.pieces);
    let (a, b) = (
        roots(from).map_err(|e| failed(&e))?,
        roots(to).map_err(|e| failed(&e))?,
    );
    if a != b {
        return Ok(None);
    }
    let (before, after) = (own_pages(from).await?, own_pages(to).await?);
    let changed = after
        .iter()
        .filter(|(page, hash)| before.get(page) != Some(hash));
    let undone = before.keys().filter(|page| !after.contains_key(page));
    Ok(Some((changed.count() + undone.count()) as u64))
}

/// The pages that are not as in the whole snapshot under it.
async fn own_pages(seen: &Seen) -> Result<Pages, LiveError> {
    let (snapshot, pieces) = (seen.snapshot.clone(), seen.pieces.clone());
    let stream = match &seen.own {
        Some(zygote) => Some(
            zygote
                .begin_to_send()
                .await
                .map_err(|error| failed(&error))?,
        ),
        None => None,
    };
    let work = move || -> Result<Pages, SaveError> {
        let opened = Snapshot::open(&snapshot, &pieces)?;
        let mut found = Found {
            base: opened
                .memory_file()
                .try_clone()
                .map_err(SaveError::Stream)?,
            pages: Pages::new(),
        };
        let Some(mut stream) = stream else {
            let mut all = Ok(());
            let read = opened.read_delta(&mut |offset, bytes| {
                all = found.take(offset, bytes);
                all.is_ok()
            });
            all.map_err(SaveError::Stream)?;
            read.map_err(|error| SaveError::Stream(io::Error::other(error)))?;
            return Ok(found.pages);
        };
        while let Piece::Pages { offset, bytes } =
            pages::receive(&mut stream).map_err(SaveError::Stream)?
        {
            found.take(offset, &bytes).map_err(SaveError::Stream)?;
        }
        Ok(found.pages)
    };
    let worked = spawn_blocking(work).await;
    let worked = worked.map_err(|error| LiveError::NotCompared(error.to_string()))?;
    worked.map_err(|error| failed(&error))
}

struct Found {
    /// The memory under it.
    base: std::fs::File,
    pages: Pages,
}

impl Found {
    fn take(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut before = vec![0; bytes.len()];
        self.base.read_exact_at(&mut before, offset)?;
        let size = PAGE_BYTES as usize;
        for (index, (page, before)) in bytes.chunks(size).zip(before.chunks(size)).enumerate() {
            if page != before {
                let number = offset / PAGE_BYTES + index as u64;
                self.pages.insert(number, blake3::hash(page));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: FileKind, bytes: u64) -> (Vec<u8>, FileEntry) {
        let path = path.as_bytes().to_vec();
        let entry = FileEntry {
            path: path.clone(),
            kind,
            bytes,
            mode: 0o644,
            uid: 0,
            gid: 0,
            modified_ns: bytes as i64,
            target: None,
        };
        (path, entry)
    }

    #[test]
    fn what_was_added_changed_and_removed_is_told_by_path() {
        use FileKind::{File, Folder, Link};
        let before = [
            entry("etc", Folder, 1),
            entry("etc/hosts", File, 1),
            entry("etc/a", File, 1),
            entry("etc/b", File, 1),
            entry("etc/c", File, 1),
            entry("etc/d", File, 1),
        ];
        let after = [
            entry("etc", Folder, 2),
            entry("etc/hosts", File, 2),
            entry("etc/a", File, 1),
            entry("etc/b", File, 2),
            entry("etc/c", Link, 1),
            entry("etc/e", File, 1),
        ];
        let found = differing(before.into(), after.into());
        let told = found.iter().map(|one| {
            let path = String::from_utf8_lossy(&one.path).into_owned();
            (path, one.before.is_some(), one.after.is_some())
        });
        let expected = [
            ("/etc/b", true, true),
            ("/etc/c", true, true),
            ("/etc/d", true, false),
            ("/etc/e", false, true),
        ];
        let expected = expected.map(|(path, before, after)| (path.to_owned(), before, after));
        assert_eq!(told.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn pages_as_under_it_are_nobodys_own() {
        let base = tempfile::tempfile().unwrap();
        base.set_len(3 * PAGE_BYTES).unwrap();
        let pages = Pages::new();
        let mut found = Found { base, pages };
        let mut bytes = vec![0; 2 * PAGE_BYTES as usize];
        bytes[PAGE_BYTES as usize] = 1;
        found.take(PAGE_BYTES, &bytes).unwrap();
        assert_eq!(found.pages.keys().collect::<Vec<_>>(), [&2]);
        assert!(found.take(2 * PAGE_BYTES, &bytes).is_err());
    }
}
