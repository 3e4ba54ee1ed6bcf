//! A branch on disk: a snapshot that differs from the one with which its family began.

use crate::usage::pid;
use crate::zygote::{Zygote, ZygoteError};
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zygote_runner::pages::{self, Piece};
use zygote_snapshot::{Manifest, OpenError, Origin, Snapshot, WriteError, Writer, decode_machine};

/// How long the next piece is waited for.
const PIECE_MAX: Duration = Duration::from_secs(60);

/// Why a branch is not on disk.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It is no branch, or has ended.
    #[error(transparent)]
    Zygote(#[from] ZygoteError),
    /// Which pages are its own is not told.
    #[error("cannot read the page map of its process (proc_pid_pagemap(5))")]
    PageMap(#[source] io::Error),
    /// The snapshot that it differs from.
    #[error("the snapshot that it has come from cannot be opened")]
    Base(#[from] OpenError),
    /// It breaks off.
    #[error("its process has not sent all of it")]
    Stream(#[source] io::Error),
    /// What it sent.
    #[error("its process sent nonsense")]
    Nonsense,
    /// Our side.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Zygote {
    /// Writes a branch as a snapshot into a new folder, while it may be forked. What it has of its own is
    /// compared with the snapshot that its family began with.
    ///
    /// # Errors
    /// See [`SaveError`]; what was written is no snapshot then.
    pub async fn save(&self, folder: &Path) -> Result<Manifest, SaveError> {
        let (snapshot, store) = self.snapshot().ok_or(ZygoteError::Gone)?.clone();
        let ours = self.begin_to_send().await?;
        let folder = folder.to_owned();
        let work = move || write(ours, &snapshot, &store, &folder);
        let written = tokio::task::spawn_blocking(work).await;
        written.unwrap_or(Err(SaveError::Nonsense))
    }

    /// Has a branch send what it has of its own; see [`pages`].
    pub(crate) async fn begin_to_send(&self) -> Result<UnixStream, SaveError> {
        let process = self.process().ok_or(ZygoteError::Gone)?;
        let pagemap = pid(process).and_then(|pid| File::open(format!("/proc/{pid}/pagemap")));
        let pagemap = pagemap.map_err(SaveError::PageMap)?;
        // Else that could be another process's.
        pid(process).map_err(|_| ZygoteError::Gone)?;
        let (ours, theirs) = UnixStream::pair().map_err(ZygoteError::Start)?;
        self.send(theirs.into(), pagemap.into()).await?;
        ours.set_read_timeout(Some(PIECE_MAX))
            .map_err(SaveError::Stream)?;
        Ok(ours)
    }
}

fn write(
    mut stream: UnixStream,
    snapshot: &Path,
    pieces: &Path,
    folder: &Path,
) -> Result<Manifest, SaveError> {
    let opened = Snapshot::open(snapshot, pieces)?;
    let manifest = opened.manifest().clone();
    // A snapshot that differs from another one is not what others differ from.
    let own = match &manifest.base {
        None => relative(snapshot, pieces)?,
        Some(_) => String::new(),
    };
    let (base, path) = opened.into_whole(own);
    let mut writer = Writer::create(folder)?;
    let mut memory = writer.delta(&base, &path, true)?;
    let state = loop {
        match pages::receive(&mut stream).map_err(SaveError::Stream)? {
            Piece::Pages { offset, bytes } => memory.pages(offset, &bytes)?,
            Piece::State(bytes) => break bytes,
        }
    };
    memory.finish()?;
    // What becoming somebody touches is much the same.
    writer.working_sets(base.manifest().working_sets.clone());
    let state = decode_machine(&state, manifest.vcpus).ok_or(SaveError::Nonsense)?;
    writer.machine(&state)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(writer.finish(Origin {
        created_unix_s: now.unwrap_or_default().as_secs(),
        zygote_version: env!("CARGO_PKG_VERSION").to_owned(),
        ..manifest.origin
    })?)
}

/// A snapshot's folder, from that in which the folder of its pieces lies.
fn relative(snapshot: &Path, pieces: &Path) -> Result<String, SaveError> {
    let root = pieces.parent().unwrap_or(pieces);
    let path = snapshot.strip_prefix(root).map(PathBuf::from);
    let path = path.ok().and_then(|path| path.to_str().map(str::to_owned));
    path.ok_or(SaveError::Nonsense)
}
