//! The engine's side: starting the holder when there is first something to hold, giving it things,
//! getting them back.

use super::process::{Place, endpoint};
use super::wire::{FromHolder, ToHolder};
use crate::socket::ControlSocket;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::connect;
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use zygote_runner::control::{decode, encode};
use zygote_runner::packet;

/// How long an answer of the holder may take, which does nothing else.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// One that has lived so long has begun to work.
const LIFE_MIN: Duration = Duration::from_secs(1);
/// When another is tried after one that has not.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// How the holder is started, and found.
#[derive(Clone, Debug)]
pub struct HolderConfig {
    /// Program and arguments that end in [`super::holder_main`] with the path and the time below.
    pub command: Vec<OsString>,
    /// Where the next engine finds it; one for each place where engines are.
    pub socket: PathBuf,
    /// The version of this engine: only one of the same goes on with its sandboxes.
    pub version: String,
}

/// Something that is held.
#[derive(Debug)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// What was written about it.
    pub record: Vec<u8>,
    /// What has been kept open; none if it was let go of.
    pub descriptors: Vec<OwnedFd>,
}

/// See the module.
pub struct Holder {
    config: Option<HolderConfig>,
    line: Mutex<Line>,
    starting: tokio::sync::Mutex<()>,
    /// How often one was lost that held something.
    losses: watch::Sender<u64>,
    /// Why something is not held, if that was tried last and failed.
    failure: Mutex<Option<String>>,
}

#[derive(Default)]
enum Line {
    #[default]
    None,
    To(Arc<ControlSocket>),
    /// It ended as soon as it was started.
    Broken,
}

fn ends_at_once() -> io::Error {
    io::Error::other("what holds sandboxes ends as soon as it is started")
}

impl Holder {
    /// Not started; never will be without a configuration: nothing outlives this engine then.
    pub fn new(config: Option<HolderConfig>) -> Arc<Self> {
        Arc::new(Self {
            config,
            line: Mutex::default(),
            starting: tokio::sync::Mutex::default(),
            losses: watch::Sender::new(0),
            failure: Mutex::default(),
        })
    }

    /// The version of this engine, by which the next one knows what it can go on with.
    pub fn version(&self) -> &str {
        self.config.as_ref().map_or("", |config| &config.version)
    }

    /// Whether there is one.
    pub fn is_up(&self) -> bool {
        matches!(*self.line(), Line::To(_))
    }

    /// Notes what has come of trying to have something held.
    pub fn note(&self, tried: io::Result<()>) {
        let failure = tried.err().map(|error| error.to_string());
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// Why something is not held and ends with this engine, if it is so.
    pub fn failure(&self) -> Option<String> {
        let failure = self.failure.lock();
        failure.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever a holder was lost: whoever has given it something gives it again.
    pub fn losses(&self) -> watch::Receiver<u64> {
        self.losses.subscribe()
    }

    /// Goes on with a holder that another engine has left; gives back what it holds.
    ///
    /// # Errors
    /// If there is one that does not answer as it should.
    pub async fn resume(self: &Arc<Self>) -> io::Result<Vec<Entry>> {
        let Some(config) = &self.config else {
            return Ok(Vec::new());
        };
        let Ok(place) = Place::of(&config.socket) else {
            return Ok(Vec::new());
        };
        let socket = endpoint()?;
        // One that hangs is not waited for.
        rustix::io::ioctl_fionbio(&socket, true)?;
        match connect(&socket, &place.address()?) {
            Ok(()) => {}
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => {
                if error == Errno::CONNREFUSED {
                    // Its holder was killed, and who holds nothing is not to be looked for.
                    place.leave();
                }
                return Ok(Vec::new());
            }
        }
        if socket_peercred(&socket)?.uid != geteuid() {
            let path = config.socket.display();
            return Err(io::Error::other(format!("{path} is somebody else's")));
        }
        let line = Arc::new(ControlSocket::new(socket)?);
        let listed = timeout(ANSWER_MAX, list(&line)).await;
        let listed = listed.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let Some(entries) = listed else {
            // It was just ending, as one does that holds nothing.
            return Ok(Vec::new());
        };
        self.watch(Arc::clone(&line));
        *self.line() = Line::To(line);
        Ok(entries)
    }

    /// Waits for its end.
    fn watch(self: &Arc<Self>, line: Arc<ControlSocket>) {
        let holder = Arc::clone(self);
        let since = Instant::now();
        tokio::spawn(async move {
            // It says nothing by itself.
            let _ = line.receive().await;
            if since.elapsed() < LIFE_MIN {
                holder.give_up_for_now();
            } else {
                *holder.line() = Line::None;
                holder.losses.send_modify(|losses| *losses += 1);
            }
        });
    }

    /// Another one would not do better; later, who has something to hold tries again.
    fn give_up_for_now(self: &Arc<Self>) {
        *self.line() = Line::Broken;
        let holder = Arc::clone(self);
        tokio::spawn(async move {
            sleep(AGAIN_AFTER).await;
            *holder.line() = Line::None;
            holder.losses.send_modify(|losses| *losses += 1);
        });
    }

    /// Starts one, and waits until another engine would find it.
    async fn start(self: &Arc<Self>, config: &HolderConfig) -> io::Result<Arc<ControlSocket>> {
        let [program, arguments @ ..] = &config.command[..] else {
            return Err(io::Error::other("no program to start it with"));
        };
        let (ours, theirs) = packet::pair()?;
        Command::new(program)
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let line = Arc::new(ControlSocket::new(ours)?);
        let ready = timeout(ANSWER_MAX, line.receive()).await;
        let ready = ready.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        match ready.map(|bytes| decode(&bytes)) {
            Some(Ok(FromHolder::Ready)) => {}
            _ => return Err(ends_at_once()),
        }
        self.watch(Arc::clone(&line));
        Ok(line)
    }

    async fn started(self: &Arc<Self>) -> io::Result<Option<Arc<ControlSocket>>> {
        let Some(config) = &self.config else {
            return Ok(None);
        };
        // Who comes while it is started waits for that.
        let _starting = self.starting.lock().await;
        match &*self.line() {
            Line::To(line) => return Ok(Some(Arc::clone(line))),
            Line::Broken => return Err(ends_at_once()),
            Line::None => {}
        }
        let started = self.start(config).await;
        match &started {
            Ok(line) => *self.line() = Line::To(Arc::clone(line)),
            Err(_) => self.give_up_for_now(),
        }
        started.map(Some)
    }

    /// Has something held, in place of what had this key. It is let go of at `expires` if there is no
    /// engine then.
    ///
    /// # Errors
    /// If it cannot be: it ends with this engine then.
    pub async fn put(
        self: &Arc<Self>,
        key: &str,
        record: &[u8],
        expires: Option<SystemTime>,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let Some(line) = self.started().await? else {
            return Ok(());
        };
        let mut file = File::from(memfd_create("zygote-record", MemfdFlags::CLOEXEC)?);
        file.write_all(record)?;
        let since = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let message = ToHolder::Put {
            key: key.to_owned(),
            expires_unix_ms: expires
                .map(|at| u64::try_from(since(at).as_millis()).unwrap_or(u64::MAX)),
        };
        let all: Vec<_> = [file.as_fd()]
            .into_iter()
            .chain(descriptors.iter().copied())
            .collect();
        say(&line, &message, &all).await
    }

    /// Has it let go of.
    pub async fn remove(&self, key: &str) {
        let line = match &*self.line() {
            Line::To(line) => Arc::clone(line),
            Line::None | Line::Broken => return,
        };
        let key = key.to_owned();
        // One that is gone holds nothing.
        let _ = say(&line, &ToHolder::Remove { key }, &[]).await;
    }
}

async fn say(
    line: &ControlSocket,
    message: &ToHolder,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = encode(message).map_err(io::Error::other)?;
    let said = timeout(ANSWER_MAX, line.send(&bytes, descriptors)).await;
    said.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// All that is held; `None` if the holder ends.
async fn list(line: &ControlSocket) -> io::Result<Option<Vec<Entry>>> {
    if say(line, &ToHolder::List, &[]).await.is_err() {
        return Ok(None);
    }
    let mut entries = Vec::new();
    loop {
        let Some((bytes, descriptors)) = line.receive_with_descriptors().await? else {
            return Ok(None);
        };
        match decode(&bytes).map_err(io::Error::other)? {
            FromHolder::Entry { key } => {
                let mut descriptors = descriptors.into_iter();
                let missing = || io::Error::other("something is held without a record");
                let mut file = File::from(descriptors.next().ok_or_else(missing)?);
                let mut record = Vec::new();
                file.rewind()?;
                file.read_to_end(&mut record)?;
                entries.push(Entry {
                    key,
                    record,
                    descriptors: descriptors.collect(),
                });
            }
            FromHolder::ListEnd => return Ok(Some(entries)),
            FromHolder::Ready => return Err(io::Error::other("a word that does not belong here")),
        }
    }
}
