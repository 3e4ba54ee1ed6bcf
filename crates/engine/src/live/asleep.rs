//! Sandboxes on disk: paused, they cost no memory, and outlive engines and hosts. Each has a folder in the
//! store: its record, and a snapshot that differs from its template's.

use super::contexts::ContextSpec;
use super::create::activate;
use super::error::LiveError;
use super::journal::Happening;
use super::owner::{Owner, Source, step};
use super::phase::{End, EndReason, Phase, Step};
use super::record::{Head, Read, Record, read};
use super::sandbox::{Command, Inbox, Sandbox};
use crate::engine::Engine;
use crate::fork::Fork;
use crate::share::Quota;
use crate::zygote::{EngineConfig, Zygote};
use std::error::Error;
use std::fs::{self, File};
use std::future::pending;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;
use zygote_protocol::ProcessId;
use zygote_runner::chain;
use zygote_runner::control::Load;
use zygote_snapshot::RunKind;

/// What is being written; nobody's yet.
const FRESH: &str = ".new-";
const RECORD_FILE: &str = "sandbox.json";
const SNAPSHOT: &str = "snapshot";

/// A sandbox on disk.
pub(super) struct Asleep {
    engine: Weak<Engine>,
    folder: PathBuf,
    contexts: Vec<(ContextSpec, ProcessId)>,
    /// What it takes.
    pub bytes: u64,
    /// Why this engine cannot have it go on.
    refused: Option<String>,
}

/// A guest that stays as it is until it is on disk; it goes on if it does not get there.
struct Staying(Option<Arc<Sandbox>>);

impl Drop for Staying {
    fn drop(&mut self) {
        if let Some(sandbox) = self.0.take() {
            tokio::spawn(async move {
                // One that has ended needs no word.
                let _ = sandbox.tell(Command::GoOn).await;
            });
        }
    }
}

impl Engine {
    /// Writes a sandbox to disk and ends its process. It goes to its end, whoever waits for that.
    ///
    /// # Errors
    /// If it cannot be written: then it goes on.
    pub async fn pause(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        limit: Duration,
        anyway: bool,
    ) -> Result<(), LiveError> {
        let (engine, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        let pausing = async move { engine.put_to_sleep(&sandbox, limit, anyway).await };
        let paused = tokio::spawn(pausing).await;
        paused.unwrap_or_else(|error| Err(LiveError::NotPaused(error.to_string())))
    }

    async fn put_to_sleep(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        limit: Duration,
        anyway: bool,
    ) -> Result<(), LiveError> {
        // First: its guest may stay as it is although there is no branch.
        let mut staying = Staying(Some(Arc::clone(sandbox)));
        let moment = sandbox.branch_and(limit, anyway, true).await?;
        let all = self.settings().store.sandboxes();
        let fresh = all.join(format!("{FRESH}{}", sandbox.id));
        let folder = all.join(sandbox.id_text());
        let failed = |error: &dyn Error| LiveError::NotPaused(chain(error));
        // What an engine that was killed has left.
        let _ = fs::remove_dir_all(&fresh);
        let written = async {
            fs::create_dir_all(&fresh).map_err(|error| failed(&error))?;
            let snapshot = fresh.join(SNAPSHOT);
            let saved = moment.zygote.save(&snapshot).await;
            saved.map_err(|error| failed(&error))?;
            let record = record(sandbox, &moment.contexts, self.holder().version());
            publish(&fresh, &folder, &record).map_err(|error| failed(&error))
        };
        if let Err(error) = written.await {
            let _ = fs::remove_dir_all(&fresh);
            return Err(error);
        }
        let asleep = Asleep {
            engine: Arc::downgrade(self),
            contexts: moment.contexts.clone(),
            bytes: disk_bytes(&folder),
            folder: folder.clone(),
            refused: None,
        };
        let told = sandbox.tell(Command::Sleep(asleep)).await;
        if told.is_err() {
            // It has ended meanwhile.
            let _ = fs::remove_dir_all(&folder);
            return told;
        }
        staying.0 = None;
        let mut status = sandbox.status.subscribe();
        // Its owner says so, or that it has ended.
        let _ = status
            .wait_for(|status| status.phase != Phase::Running)
            .await;
        if sandbox.status().phase == Phase::Paused {
            return Ok(());
        }
        let _ = fs::remove_dir_all(&folder);
        Err(sandbox.gone())
    }

    /// Has a paused sandbox go on.
    ///
    /// # Errors
    /// If it is not paused, its tenant's machines have as much as they may, or it cannot go on here: then it stays
    /// paused.
    pub async fn wake(&self, sandbox: &Sandbox, quota: Quota) -> Result<(), LiveError> {
        if sandbox.status().phase == Phase::Paused {
            let build = (&*sandbox.spec.template, &*sandbox.build);
            self.check_quota(sandbox.spec.tenant.as_deref(), build, 1, quota)?;
        }
        let (reply, answer) = oneshot::channel();
        sandbox.tell(Command::Wake(reply)).await?;
        // Who sleeps has the deadlines.
        answer.await.map_err(|_| sandbox.gone())?
    }

    /// Enters the sandboxes that are on disk. Once, after those that live on ([`Engine::adopt`]) and before
    /// anybody asks for anything; gives back how many there are.
    pub fn find_asleep(self: &Arc<Self>) -> usize {
        let mut found = 0;
        for entry in fs::read_dir(self.settings().store.sandboxes())
            .into_iter()
            .flatten()
            .flatten()
        {
            let folder = entry.path();
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(FRESH) {
                let _ = fs::remove_dir_all(&folder);
            } else if let Ok(id) = Uuid::try_parse(&name.to_string_lossy()) {
                found += usize::from(self.find_one(id, folder));
            }
        }
        found
    }

    fn find_one(self: &Arc<Self>, id: Uuid, folder: PathBuf) -> bool {
        if let Ok(known) = self.live().find(&id.to_string(), None) {
            // Its engine was killed as it fell asleep, or as it woke up.
            tokio::spawn(keep_one(known, folder));
            return false;
        }
        let bytes = fs::read(folder.join(RECORD_FILE)).unwrap_or_default();
        let record = match read(&bytes, self.holder().version()) {
            Read::Whole(record) if record.head.id == id => *record,
            Read::Head(head, why) if head.id == id => {
                self.enter_refused(&head, why, folder);
                return true;
            }
            Read::Whole(_) | Read::Head(..) | Read::Nothing => return false,
        };
        let mut status = record.status(Phase::Paused);
        status.disk_bytes = Some(disk_bytes(&folder));
        let (sandbox, inbox) = Sandbox::new(record.birth(), self.live().limits, status);
        self.live().enter_adopted(&sandbox);
        let asleep = Asleep {
            engine: Arc::downgrade(self),
            bytes: disk_bytes(&folder),
            contexts: record.contexts,
            folder,
            refused: None,
        };
        tokio::spawn(asleep.sleep(sandbox, inbox));
        true
    }

    /// One of another version's: it can be removed, and stays for an engine of that one.
    fn enter_refused(self: &Arc<Self>, head: &Head, why: String, folder: PathBuf) {
        let bytes = disk_bytes(&folder);
        let status = super::Status {
            phase: Phase::Paused,
            end: None,
            expires: None,
            idle: None,
            fork_time: None,
            disk_bytes: Some(bytes),
        };
        let (sandbox, inbox) = Sandbox::new(head.birth(), self.live().limits, status);
        self.live().enter_adopted(&sandbox);
        let asleep = Asleep {
            engine: Arc::downgrade(self),
            bytes,
            contexts: Vec::new(),
            folder,
            refused: Some(why),
        };
        tokio::spawn(asleep.sleep(sandbox, inbox));
    }

    /// Makes a process of what is in a folder.
    async fn wake_from(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        folder: &Path,
        contexts: &[(ContextSpec, ProcessId)],
    ) -> Result<Owner, LiveError> {
        let failed = |error: &dyn Error| LiveError::NotResumed(chain(error));
        let begun = Instant::now();
        let turn = self.turn(sandbox.whose()).await?;
        let (settings, store) = (self.settings(), &self.settings().store);
        let config = EngineConfig {
            command: settings.command.clone(),
            load: Load {
                snapshot: folder.join(SNAPSHOT),
                pieces: store.pieces_under(&folder.join(SNAPSHOT)),
                stamps: store.stamps(),
                group: None,
            },
            admission: Arc::clone(self.admission()),
            allow_missing_walls: sandbox.spec.allow_missing_walls || settings.allow_missing_walls,
            patience: settings.patience,
        };
        let zygote = Zygote::load(&config)
            .await
            .map_err(|error| failed(&error))?;
        let fork = Fork::of(&zygote, RunKind::Sandbox).await;
        let fork = fork.map_err(|error| failed(&error))?;
        let made = activate(sandbox, &zygote, fork).await;
        let guest = made.map_err(LiveError::NotResumed)?;
        let expires = sandbox.status().expires.map(|at| {
            let left = at.duration_since(SystemTime::now()).unwrap_or_default();
            Instant::now() + left
        });
        let patience = zygote.patience();
        let mut owner = Owner::new(
            Arc::clone(sandbox),
            Arc::clone(&self.live().journal),
            guest,
            expires,
            Source::Zygote(Arc::new(zygote)),
            Arc::clone(self.holder()),
        );
        let taken = owner.take_over(contexts, patience).await;
        taken.map_err(|why| LiveError::NotResumed(why.to_string()))?;
        drop(turn);
        sandbox.status.send_modify(|status| {
            status.fork_time = Some(begun.elapsed());
            status.disk_bytes = None;
        });
        owner.write_down().await;
        Ok(owner)
    }
}

impl Asleep {
    /// Until it is wanted, or its time is over. Boxed: what wakes up may fall asleep again.
    pub fn sleep(
        self,
        sandbox: Arc<Sandbox>,
        inbox: Inbox,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.sleep_on(sandbox, inbox))
    }

    async fn sleep_on(self, sandbox: Arc<Sandbox>, mut inbox: Inbox) {
        loop {
            let expires = sandbox.status().expires;
            tokio::select! {
                command = inbox.commands.recv() => match command {
                    Some(Command::Wake(reply)) => match self.wake(&sandbox).await {
                        Ok(owner) => {
                            step(&sandbox, Step::Wake, None);
                            let _ = fs::remove_dir_all(&self.folder);
                            owner.note_resumed();
                            let _ = reply.send(Ok(()));
                            return owner.live(inbox).await;
                        }
                        Err(error) => drop(reply.send(Err(error))),
                    },
                    Some(Command::Extend { ttl, idle, reply }) => {
                        self.extend(&sandbox, ttl, idle);
                        let _ = reply.send(());
                    }
                    Some(Command::End(reason)) => return self.end(&sandbox, reason),
                    // What needs a guest: whoever asked sees that it is dropped, and why.
                    Some(_) => {}
                    None => return,
                },
                Some(_) = inbox.notices.recv() => {}
                () = at(expires) => return self.end(&sandbox, EndReason::Ttl),
            }
        }
    }

    async fn wake(&self, sandbox: &Arc<Sandbox>) -> Result<Owner, LiveError> {
        if let Some(why) = &self.refused {
            return Err(LiveError::NotResumed(why.clone()));
        }
        let engine = self.engine.upgrade();
        let engine = engine.ok_or_else(|| LiveError::NotResumed("its engine ends".to_owned()))?;
        engine
            .wake_from(sandbox, &self.folder, &self.contexts)
            .await
    }

    fn extend(
        &self,
        sandbox: &Sandbox,
        ttl: Option<Option<Duration>>,
        idle: Option<Option<Duration>>,
    ) {
        sandbox.status.send_modify(|status| {
            if let Some(idle) = idle {
                status.idle = idle;
            }
            if let Some(ttl) = ttl {
                status.expires = ttl.map(|ttl| SystemTime::now() + ttl);
            }
        });
        // What is on disk of one that is refused is another version's.
        let engine = self.engine.upgrade().filter(|_| self.refused.is_none());
        if let Some(engine) = engine {
            let record = record(sandbox, &self.contexts, engine.holder().version());
            // Until the next time; this engine knows it.
            let _ = write_record(&self.folder, &record);
        }
    }

    /// An engine that stops leaves it to the next one; anything else is its end.
    fn end(&self, sandbox: &Sandbox, reason: EndReason) {
        if reason != EndReason::EngineStopped {
            let _ = fs::remove_dir_all(&self.folder);
        }
        let end = End {
            reason,
            at: SystemTime::now(),
        };
        step(sandbox, Step::End, Some(&end));
        step(sandbox, Step::Gone, None);
        if let Some(engine) = self.engine.upgrade() {
            let happening = Happening::Ended {
                reason: end.reason.name(),
                message: end.reason.to_string(),
            };
            engine.live().journal.note(sandbox, happening);
        }
    }
}

async fn at(time: Option<SystemTime>) {
    match time {
        Some(time) => {
            let left = time.duration_since(SystemTime::now()).unwrap_or_default();
            sleep_until(Instant::now() + left).await;
        }
        None => pending().await,
    }
}

fn record(sandbox: &Sandbox, contexts: &[(ContextSpec, ProcessId)], engine: &str) -> Record {
    Record {
        contexts: contexts.to_vec(),
        ..Record::of(sandbox, engine)
    }
}

/// Of a sandbox that may live and is on disk, too: what is on disk goes once it is sure that it lives. If it
/// does not, that is all there is of it, and the next engine finds it.
async fn keep_one(sandbox: Arc<Sandbox>, folder: PathBuf) {
    let mut status = sandbox.status.subscribe();
    // Its owner has the deadlines.
    let begun = status.wait_for(|now| now.phase != Phase::Making).await;
    if begun.is_ok_and(|now| now.phase == Phase::Running) {
        let _ = fs::remove_dir_all(&folder);
    }
}

/// Content first, the name last.
fn publish(fresh: &Path, folder: &Path, record: &Record) -> io::Result<()> {
    write_record(fresh, record)?;
    let sync = |folder: &Path| File::open(folder)?.sync_all();
    sync(fresh)?;
    // One of this id that has woken up since is of no use.
    let _ = fs::remove_dir_all(folder);
    fs::rename(fresh, folder)?;
    folder.parent().map_or(Ok(()), sync)
}

fn write_record(folder: &Path, record: &Record) -> io::Result<()> {
    let bytes = serde_json::to_vec_pretty(record)?;
    let fresh = folder.join(format!("{FRESH}record"));
    let mut file = File::create(&fresh)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&fresh, folder.join(RECORD_FILE))
}

/// What a folder takes on disk.
fn disk_bytes(folder: &Path) -> u64 {
    zygote_template::disk_bytes(folder)
}
