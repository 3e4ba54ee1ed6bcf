//! The engine's side of a zygote process: starting it, asking it for forks, seeing it end.

mod owned;
mod process;
mod runner;

pub use runner::Runner;

use self::owned::{Held, Owned, receive, send};
use self::process::{Process, spawn};
use self::runner::Life;
use crate::admission::{Admission, NoRoom, Place};
use crate::held::{Entry, Holder};
use crate::socket::ControlSocket;
use crate::walls::{list, remedy};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use uuid::Uuid;
use zygote_jail::cgroup::{Group, Limits};
use zygote_runner::control::{FromZygote, Load, MissingWall, ToZygote};
use zygote_runner::packet;
use zygote_snapshot::{RunKind, Snapshot};

/// How the keys of held zygotes begin.
const KEY: &str = "zygote/";
/// Fork requests that wait for the zygote's owner task.
const REQUESTS_MAX: usize = 64;
/// Forks that the process has been asked for and has not answered. A socket takes 278 small packets
/// (`net.core.wmem_default`), so neither side ever finds it full.
const UNANSWERED_MAX: usize = 32;
/// Processes and threads of a zygote and its runners: a thousand machines of a few vCPUs.
const PROCESSES_MAX: u32 = 8192;
/// Half of what other programs of the host get.
const CPU_WEIGHT: u32 = 50;
/// A snapshot that is not loaded by then never will be: each of its bytes is compared with a digest
/// at first, which for 16 GiB takes minutes on a slow disk.
const LOAD_MAX: Duration = Duration::from_secs(900);
/// Samples of forks' generators that are remembered, so that a repetition is noticed: 32 MiB.
const SAMPLES_MAX: usize = 1 << 20;
/// Bytes in a sample.
const SAMPLE_BYTES: usize = 32;

/// How long the end of a process is waited for: of a killed runner, of a zygote that has lost its
/// socket (it is killed then), and of a killed zygote.
pub const END_MAX: Duration = Duration::from_secs(5);

/// How zygote processes are started.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Program and arguments that end in [`zygote_runner::zygote_main`].
    pub command: Vec<OsString>,
    /// The snapshot, and where its pieces lie.
    pub load: Load,
    /// Who lets sandboxes in; one for all zygotes of an engine.
    pub admission: Arc<Admission>,
    /// Whether to run although main walls of the jail are missing.
    pub allow_missing_walls: bool,
    /// How long a step of a sandbox may take that takes milliseconds: a fork, an activation, an
    /// end. [`PATIENCE`], or [`PATIENCE_EMULATED`].
    pub patience: Duration,
}

/// For a host with hardware for virtual machines: thousands of pages from a cold, slow disk.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// For an emulated host with hundreds of sandboxes.
pub const PATIENCE_EMULATED: Duration = Duration::from_secs(180);

/// Why there is no zygote, or no fork of it.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// The process could not be started or talked to.
    #[error("cannot start the zygote process")]
    Start(#[source] io::Error),
    /// The snapshot is not usable; the sentence names cause and remedy.
    #[error("{0}")]
    Refused(String),
    /// It ended, or was killed.
    #[error("the zygote process has ended")]
    Gone,
    /// This host does not allow what must stand between it and untrusted code.
    #[error("this host does not allow {}, so untrusted code could reach it. {}", list(.0), remedy(.0))]
    MissingWalls(Vec<MissingWall>),
    /// There is no room for one more.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// It cannot fork now.
    #[error("{0}")]
    Fork(String),
    /// It does not answer.
    #[error("the zygote process did not {operation} within {limit:?}")]
    Late {
        /// What it should have done.
        operation: &'static str,
        /// How long that may take.
        limit: Duration,
    },
}

/// What is written down of a zygote that is held.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    group: Option<PathBuf>,
    /// The key of the first of its family, if it is another.
    first: Option<String>,
    /// What that has loaded.
    snapshot: Option<(PathBuf, PathBuf)>,
}

/// A loaded snapshot, or a branch of a running machine, ready to be forked. Dropping it lets the process
/// end by itself; [`Zygote::shut_down`] waits for that.
pub struct Zygote {
    requests: mpsc::Sender<Request>,
    family: Family,
    /// By which it is known to who holds it.
    key: String,
    /// Its pidfd, unless it is a child of ours.
    process: Option<OwnedFd>,
    owner: JoinHandle<()>,
}

/// What a zygote has from the one with which its family began.
struct Family {
    /// That one, which ends last: its process is the first of a namespace, with which all of them end. Those
    /// in between may go: the kernel gives their children to the first.
    first: Option<Arc<Zygote>>,
    /// The snapshot that the first one has loaded, and where its pieces lie.
    snapshot: Option<(PathBuf, PathBuf)>,
    missing_walls: Vec<MissingWall>,
    /// What forks have shown: a branch's must differ from those of its source, too.
    samples: Arc<Mutex<HashSet<[u8; SAMPLE_BYTES]>>>,
    patience: Duration,
    admission: Arc<Admission>,
}

impl Family {
    fn of_branch(parent: &Arc<Zygote>) -> Self {
        let Self {
            first,
            snapshot,
            missing_walls,
            samples,
            patience,
            admission,
        } = &parent.family;
        Self {
            first: Some(Arc::clone(first.as_ref().unwrap_or(parent))),
            snapshot: snapshot.clone(),
            missing_walls: missing_walls.clone(),
            samples: Arc::clone(samples),
            patience: *patience,
            admission: Arc::clone(admission),
        }
    }
}

enum Request {
    Fork(ForkRequest),
    /// Have it held under this key, beyond this engine's end.
    Hold(
        Arc<Holder>,
        String,
        Option<(PathBuf, PathBuf)>,
        oneshot::Sender<io::Result<()>>,
    ),
    /// Have it send what it holds into this stream, as its page map tells.
    Send(OwnedFd, OwnedFd),
}

struct ForkRequest {
    kind: RunKind,
    place: Place,
    agent: OwnedFd,
    control: OwnedFd,
    reply: oneshot::Sender<Result<Runner, ZygoteError>>,
}

impl Zygote {
    /// Starts a zygote process and waits until its snapshot is checked and mapped.
    ///
    /// # Errors
    /// If it cannot be started, or refuses the snapshot.
    pub async fn load(config: &EngineConfig) -> Result<Self, ZygoteError> {
        let (group, why_not) = match group(config) {
            Ok(group) => (Some(group), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let (ours, theirs) = packet::pair().map_err(ZygoteError::Start)?;
        let child = spawn(config, theirs).map_err(ZygoteError::Start)?;
        let socket = ControlSocket::new(ours).map_err(ZygoteError::Start)?;
        let load = Load {
            group: group.as_ref().map(|group| group.path().to_owned()),
            ..config.load.clone()
        };
        send(&socket, &ToZygote::Load(load), &[]).await?;
        let late = |_| ZygoteError::Late {
            operation: "load its snapshot",
            limit: LOAD_MAX,
        };
        let answer = timeout(LOAD_MAX, receive(&socket)).await.map_err(late)?;
        let (answer, _) = answer?;
        let mut missing_walls = match answer {
            FromZygote::Loaded { missing_walls, .. } => missing_walls,
            FromZygote::Refused { message } => return Err(ZygoteError::Refused(message)),
            _ => return Err(ZygoteError::Gone),
        };
        missing_walls.extend(why_not.map(|why| MissingWall {
            wall: "limits by cgroup".to_owned(),
            why,
            is_main: false,
        }));
        if !config.allow_missing_walls && missing_walls.iter().any(|wall| wall.is_main) {
            return Err(ZygoteError::MissingWalls(missing_walls));
        }
        let process = Process::Child(child);
        let (patience, admission) = (config.patience, &config.admission);
        let key = format!("{KEY}{}", Uuid::new_v4().simple());
        let owned = Owned {
            socket,
            process,
            group,
            runners: HashMap::new(),
            held: None,
            first: None,
            admission: Arc::clone(admission),
        };
        let Load {
            snapshot, pieces, ..
        } = config.load.clone();
        let family = Family {
            first: None,
            snapshot: Some((whole(snapshot, &pieces), pieces)),
            missing_walls,
            samples: Arc::default(),
            patience,
            admission: Arc::clone(admission),
        };
        Ok(Self::of(owned, family, key, None))
    }

    fn of(owned: Owned, family: Family, key: String, process: Option<OwnedFd>) -> Self {
        let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
        Self {
            requests,
            family,
            key,
            process,
            owner: tokio::spawn(owned.live(inbox)),
        }
    }

    /// Goes on with the process that a runner of `parent`'s has forked, over its control socket; `process`:
    /// its pidfd.
    ///
    /// # Errors
    /// If it ends, or says nothing.
    pub async fn branched(
        parent: &Arc<Self>,
        socket: OwnedFd,
        process: OwnedFd,
    ) -> Result<Self, ZygoteError> {
        let socket = ControlSocket::new(socket).map_err(ZygoteError::Start)?;
        let late = |_| ZygoteError::Late {
            operation: "hold a branch",
            limit: parent.family.patience,
        };
        let answer = timeout(parent.family.patience, receive(&socket)).await;
        let (FromZygote::Loaded { .. }, _) = answer.map_err(late)?? else {
            return Err(ZygoteError::Gone);
        };
        let own = process.try_clone().map_err(ZygoteError::Start)?;
        let owned = Owned {
            socket,
            process: Process::Known(process),
            group: None,
            runners: HashMap::new(),
            held: None,
            first: Some(parent.first_key().to_owned()),
            admission: Arc::clone(&parent.family.admission),
        };
        let key = format!("{KEY}{}", Uuid::new_v4().simple());
        Ok(Self::of(owned, Family::of_branch(parent), key, Some(own)))
    }

    /// Whether something that is held is a zygote.
    pub(crate) fn is_entry(entry: &Entry) -> bool {
        entry.key.starts_with(KEY)
    }

    /// The key of the first of the family of something that is held, if it is another.
    pub(crate) fn first_of(entry: &Entry) -> Option<String> {
        let record: Result<Record, _> = serde_json::from_slice(&entry.record);
        record.ok()?.first
    }

    /// Goes on with one that another engine has left, and with these runners of it, by their process ids
    /// among its own; gives each back with its number in `runners`. `first`: see [`Zygote::first_of`].
    ///
    /// # Errors
    /// If what is held is no zygote.
    pub(crate) fn adopt(
        entry: Entry,
        first: Option<&Arc<Self>>,
        runners: Vec<(u32, OwnedFd)>,
        holder: &Arc<Holder>,
        patience: Duration,
        admission: &Arc<Admission>,
    ) -> io::Result<(Self, Vec<Runner>)> {
        let record: Record = serde_json::from_slice(&entry.record)?;
        let missing = || io::Error::other("not all of a zygote is held");
        let mut descriptors = entry.descriptors.into_iter();
        let socket = descriptors.next().ok_or_else(missing)?;
        let process = descriptors.next().ok_or_else(missing)?;
        let own = process.try_clone()?;
        let group = record.group.zip(descriptors.next());
        let mut known = HashMap::new();
        let runners = runners.into_iter().map(|(pid, process)| {
            let (sender, ended) = oneshot::channel();
            // It has its place, whatever the budget is now.
            known.insert(pid, (sender, admission.admit().ok()));
            Runner {
                pid,
                life: Life::Running(ended),
                process,
            }
        });
        let runners = runners.collect();
        let owned = Owned {
            socket: ControlSocket::new(socket)?,
            process: Process::Known(process),
            first: record.first,
            group: group.map(|(path, lock)| Group::adopt(path, lock)),
            runners: known,
            admission: Arc::clone(admission),
            held: Some(Held {
                holder: Arc::clone(holder),
                key: entry.key.clone(),
                losses: *holder.losses().borrow(),
            }),
        };
        let family = first.map_or_else(
            || Family {
                first: None,
                snapshot: record.snapshot,
                missing_walls: Vec::new(),
                samples: Arc::default(),
                patience,
                admission: Arc::clone(admission),
            },
            Family::of_branch,
        );
        Ok((Self::of(owned, family, entry.key, Some(own)), runners))
    }

    /// Has it held beyond this engine's end, under the key that is given back.
    ///
    /// # Errors
    /// If it cannot be, or has ended.
    pub(crate) async fn hold(&self, holder: &Arc<Holder>) -> io::Result<String> {
        if let Some(first) = &self.family.first {
            Box::pin(first.hold(holder)).await?;
        }
        let gone = || io::Error::other("the zygote process has ended");
        let (reply, answer) = oneshot::channel();
        let snapshot = self.family.snapshot.clone();
        let request = Request::Hold(Arc::clone(holder), self.key.clone(), snapshot, reply);
        self.requests.send(request).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())??;
        Ok(self.key.clone())
    }

    /// Forks a runner for a kind of run, that talks over these two sockets.
    ///
    /// # Errors
    /// If the process is gone, cannot fork or does not answer.
    pub async fn fork(
        &self,
        kind: RunKind,
        agent: OwnedFd,
        control: OwnedFd,
    ) -> Result<Runner, ZygoteError> {
        let (reply, answer) = oneshot::channel();
        let request = ForkRequest {
            kind,
            place: self.family.admission.admit()?,
            agent,
            control,
            reply,
        };
        let forked = async {
            let sent = self.requests.send(Request::Fork(request)).await;
            sent.map_err(|_| ZygoteError::Gone)?;
            answer.await.map_err(|_| ZygoteError::Gone)?
        };
        let late = |_| ZygoteError::Late {
            operation: "fork",
            limit: self.family.patience,
        };
        timeout(self.family.patience, forked).await.map_err(late)?
    }

    /// Whether its process has not ended yet, as far as is known.
    pub fn is_alive(&self) -> bool {
        !self.owner.is_finished() && !self.requests.is_closed()
    }

    /// The snapshot that its family has begun with, and where its pieces lie.
    pub(crate) fn snapshot(&self) -> Option<&(PathBuf, PathBuf)> {
        self.family.snapshot.as_ref()
    }

    /// Has it send what it holds: see [`zygote_runner::pages`].
    pub(crate) async fn send(&self, stream: OwnedFd, pagemap: OwnedFd) -> Result<(), ZygoteError> {
        let sent = self.requests.send(Request::Send(stream, pagemap)).await;
        sent.map_err(|_| ZygoteError::Gone)
    }

    /// Itself, or, once its process has ended, the first of its family: the kernel gives that the runners that
    /// are left.
    pub(crate) fn or_first(self: &Arc<Self>) -> Arc<Self> {
        match &self.family.first {
            Some(first) if !self.is_alive() => Arc::clone(first),
            _ => Arc::clone(self),
        }
    }

    /// The key of the first of its family.
    pub(crate) fn first_key(&self) -> &str {
        self.family
            .first
            .as_ref()
            .map_or(&self.key, |first| &first.key)
    }

    /// The pidfd of its process, if it is a branch.
    pub(crate) fn process(&self) -> Option<&OwnedFd> {
        self.process.as_ref()
    }

    /// How long a step of a sandbox may take.
    pub fn patience(&self) -> Duration {
        self.family.patience
    }

    /// Walls of its jail that this host did not allow.
    pub fn missing_walls(&self) -> &[MissingWall] {
        &self.family.missing_walls
    }

    /// Whether no fork of this zygote has shown this sample of its generator before.
    pub fn is_new_sample(&self, sample: &[u8]) -> bool {
        let Ok(sample) = <[u8; SAMPLE_BYTES]>::try_from(sample) else {
            return false;
        };
        let mut seen = self
            .family
            .samples
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= SAMPLES_MAX {
            seen.clear();
        }
        seen.insert(sample)
    }

    /// Ends the process and its runners, and waits until they are gone; kills it if that takes too
    /// long.
    pub async fn shut_down(self) {
        drop(self.requests);
        // Fails only if the owner task panicked; the process ends with its socket all the same.
        let _ = self.owner.await;
    }
}

/// The snapshot that one differs from, if it is not whole itself: what is saved later differs from that.
fn whole(snapshot: PathBuf, pieces: &Path) -> PathBuf {
    let opened = Snapshot::open(&snapshot, pieces);
    let base = opened
        .ok()
        .and_then(|opened| opened.manifest().base.clone());
    match base {
        Some(base) => pieces.parent().unwrap_or(pieces).join(base.folder),
        None => snapshot,
    }
}

/// The cgroup of one zygote and its runners.
fn group(config: &EngineConfig) -> io::Result<Group> {
    let budget = config.admission.budget();
    Group::create(&Limits {
        memory_max_bytes: budget.memory_max_bytes,
        processes_max: PROCESSES_MAX,
        cpu_weight: CPU_WEIGHT,
    })
}
