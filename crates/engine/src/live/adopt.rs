//! Going on with the live sandboxes of an engine that was killed.

use super::Happening;
use super::branch::Moment;
use super::moments::{Kept, Moments};
use super::owner::{Guest, Owner, Source};
use super::phase::{End, EndReason, Phase};
use super::record::{self, MomentRecord, Read, Record};
use super::sandbox::{Birth, Inbox, Sandbox};
use crate::conversation::Listener;
use crate::engine::Engine;
use crate::held::Entry;
use crate::socket::ControlSocket;
use crate::zygote::{Runner, Zygote};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use zygote_runner::control::{ToRunner, encode};

/// How long an engine waits with its clients for guests to answer; those that take longer are adopted
/// meanwhile.
const BEGIN_MAX: Duration = Duration::from_secs(5);
/// The key of the events' number.
const JOURNAL: &str = "journal";
/// So many numbers of events are taken at once, so that none is given twice.
const NUMBERS: u64 = 1000;

/// What has become of the sandboxes that another engine has left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Those that live on.
    pub sandboxes: usize,
    /// Those that could not be gone on with, and have ended.
    pub ended: usize,
}

/// A sandbox that may be gone on with.
struct Found {
    record: Record,
    control: OwnedFd,
    process: OwnedFd,
}

#[derive(Serialize, Deserialize)]
struct Numbers {
    last: u64,
}

impl Engine {
    /// Goes on with what another engine has left, and waits a while until its guests have answered. Once,
    /// before anybody asks for anything.
    ///
    /// # Errors
    /// If what it has left cannot be had.
    pub async fn adopt(self: &Arc<Self>) -> io::Result<Adopted> {
        let entries = self.holder().resume().await?;
        // First: what is found may be an event.
        let numbers = entries.iter().find(|entry| entry.key == JOURNAL);
        let numbers = numbers.and_then(|entry| serde_json::from_slice(&entry.record).ok());
        if let Some(Numbers { last }) = numbers {
            self.live().journal.go_on_after(last);
        }
        let mut adopted = Adopted::default();
        let mut zygotes = HashMap::new();
        let mut found: HashMap<String, Vec<Found>> = HashMap::new();
        for entry in entries {
            if Zygote::is_entry(&entry) {
                zygotes.insert(entry.key.clone(), entry);
            } else if record::is_entry(&entry) {
                match self.read(entry).await {
                    Some(one) => found
                        .entry(one.record.zygote.clone())
                        .or_default()
                        .push(one),
                    None => adopted.ended += 1,
                }
            }
        }
        tokio::spawn(keep_numbers(Arc::clone(self)));
        for key in lost(&zygotes, found.keys()) {
            for one in found.remove(&key).unwrap_or_default() {
                let family = one.record.family.clone();
                found.entry(family).or_default().push(one);
            }
        }
        let (mut living, mut adoptable) = (Vec::new(), Vec::new());
        let mut adopted_zygotes: HashMap<String, Arc<Zygote>> = HashMap::new();
        let of_moments = found.values().flatten().flat_map(|one| &one.record.moments);
        let of_moments: Vec<String> = of_moments.map(|moment| moment.zygote.clone()).collect();
        for key in first_ones_first(&zygotes, found.keys().chain(&of_moments)) {
            let sandboxes = found.remove(&key).unwrap_or_default();
            let zygote = zygotes.remove(&key);
            let first = zygote.as_ref().and_then(Zygote::first_of);
            let first = first.map(|first| adopted_zygotes.get(&first));
            let (zygote, those) = self.adopt_family(zygote, first, sandboxes).await;
            adoptable.extend(those);
            adopted_zygotes.extend(zygote.map(|zygote| (key, zygote)));
        }
        for (record, guest, source) in adoptable {
            living.push(self.adopt_one(record, guest, source, &adopted_zygotes));
        }
        for key in zygotes.into_keys() {
            // It has nobody left.
            self.holder().remove(&key).await;
        }
        adopted.sandboxes = living.len();
        let answered = async {
            for sandbox in living {
                let mut status = sandbox.status.subscribe();
                // Their owners have deadlines of their own.
                let _ = status.wait_for(|now| now.phase != Phase::Making).await;
            }
        };
        let _ = timeout(BEGIN_MAX, answered).await;
        Ok(adopted)
    }

    /// A sandbox that may be gone on with; otherwise it is entered as one that has ended.
    async fn read(&self, entry: Entry) -> Option<Found> {
        let (key, engine) = (entry.key, self.holder().version());
        let record = match record::read(&entry.record, engine) {
            Read::Whole(record) => record,
            Read::Nothing => {
                self.holder().remove(&key).await;
                return None;
            }
            Read::Head(head, why) => {
                self.enter_ended(head.birth(), EndReason::NotAdopted(why))
                    .await;
                return None;
            }
        };
        let mut descriptors = entry.descriptors.into_iter();
        match (descriptors.next(), descriptors.next(), &record.end) {
            (Some(control), Some(process), None) => {
                return Some(Found {
                    record: *record,
                    control,
                    process,
                });
            }
            // Nobody was there when its time was over.
            (.., None) => self.enter_ended(record.birth(), EndReason::Ttl).await,
            (.., Some(_)) => {
                let status = record.status(Phase::Ended);
                let (sandbox, _) = Sandbox::new(record.birth(), self.live().limits, status);
                for info in record.processes {
                    sandbox.show_ended(info);
                }
                self.live().enter_adopted(&sandbox);
            }
        }
        None
    }

    /// Goes on with a zygote; gives back those of its sandboxes that can be gone on with. `first`:
    /// if that is another, the first of its family, unless that could not be gone on with.
    async fn adopt_family(
        self: &Arc<Self>,
        zygote: Option<Entry>,
        first: Option<Option<&Arc<Zygote>>>,
        sandboxes: Vec<Found>,
    ) -> (Option<Arc<Zygote>>, Vec<(Record, Guest, Source)>) {
        let patience = self.settings().patience;
        let mut records = Vec::new();
        let mut runners = Vec::new();
        for Found {
            record,
            control,
            process,
        } in sandboxes
        {
            runners.push((record.runner, process));
            records.push((record, control));
        }
        let not_held = || io::Error::other("its zygote has not been held");
        let adopted = zygote.ok_or_else(not_held).and_then(|entry| {
            let first = first.map(|first| first.ok_or_else(not_held));
            let (holder, admission) = (self.holder(), self.admission());
            Zygote::adopt(
                entry,
                first.transpose()?,
                runners,
                holder,
                patience,
                admission,
            )
        });
        let (zygote, runners) = match adopted {
            Ok((zygote, runners)) => (Arc::new(zygote), runners),
            Err(error) => {
                for (record, control) in records {
                    drop(control);
                    let why = EndReason::NotAdopted(error.to_string());
                    self.enter_ended(record.birth(), why).await;
                }
                return (None, Vec::new());
            }
        };
        let mut living = Vec::new();
        for ((record, control), runner) in records.into_iter().zip(runners) {
            let source = Source::Zygote(Arc::clone(&zygote));
            match connect(control, runner) {
                Ok(guest) => living.push((record, guest, source)),
                Err(error) => {
                    let why = EndReason::NotAdopted(error.to_string());
                    self.enter_ended(record.birth(), why).await;
                }
            }
        }
        (Some(zygote), living)
    }

    fn adopt_one(
        self: &Arc<Self>,
        mut record: Record,
        guest: Guest,
        source: Source,
        zygotes: &HashMap<String, Arc<Zygote>>,
    ) -> Arc<Sandbox> {
        let status = record.status(Phase::Making);
        let expires = status.expires.map(|at| {
            let left = at.duration_since(SystemTime::now()).unwrap_or_default();
            Instant::now() + left
        });
        let (sandbox, inbox) = Sandbox::new(record.birth(), self.live().limits, status);
        self.live().enter_adopted(&sandbox);
        let journal = Arc::clone(&self.live().journal);
        let (own, holder) = (Arc::clone(&sandbox), Arc::clone(self.holder()));
        let mut owner = Owner::new(own, journal, guest, expires, source, holder);
        let moments = std::mem::take(&mut record.moments).into_iter();
        // One that cannot be gone on with is kept no longer.
        owner.moments = Moments::resume(moments.filter_map(|one| resumed(one, zygotes)).collect());
        let limit = self.settings().patience;
        tokio::spawn(go_on(owner, record, inbox, limit));
        sandbox
    }

    /// Enters a sandbox that another engine had made, and that has ended with that or since.
    async fn enter_ended(&self, birth: Birth, reason: EndReason) {
        let happening = Happening::Ended {
            reason: reason.name(),
            message: reason.to_string(),
        };
        let (sandbox, _) = Sandbox::new(birth, self.live().limits, ended(reason));
        self.live().enter_adopted(&sandbox);
        self.live().journal.note(&sandbox, happening);
        self.holder().remove(&record::key(sandbox.id)).await;
    }
}

/// Those of the keys whose zygotes have ended, though others may have come from them.
fn lost<'a>(
    zygotes: &HashMap<String, Entry>,
    used: impl Iterator<Item = &'a String>,
) -> Vec<String> {
    let is_lost = |key: &&String| !zygotes.contains_key(*key);
    used.filter(is_lost).cloned().collect()
}

/// The keys of the zygotes that somebody needs, the first of a family before the others.
fn first_ones_first<'a>(
    zygotes: &HashMap<String, Entry>,
    used: impl Iterator<Item = &'a String>,
) -> Vec<String> {
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    for key in used {
        let first = zygotes.get(key).and_then(Zygote::first_of);
        let both = first.into_iter().chain([key.clone()]);
        all.extend(both.filter(|key| seen.insert(key.clone())));
    }
    all
}

fn resumed(record: MomentRecord, zygotes: &HashMap<String, Arc<Zygote>>) -> Option<Kept> {
    let zygote = Arc::clone(zygotes.get(&record.zygote)?);
    let moment = Moment {
        zygote,
        contexts: record.contexts,
        at: record.at,
        held: record.held,
        pause: record.pause,
    };
    Some(Kept {
        number: record.number,
        name: record.name,
        moment: Arc::new(moment),
    })
}

fn ended(reason: EndReason) -> super::Status {
    super::Status {
        phase: Phase::Ended,
        end: Some(End {
            reason,
            at: SystemTime::now(),
        }),
        expires: None,
        idle: None,
        fork_time: None,
        disk_bytes: None,
    }
}

/// Gives a runner's agent a stream to this engine.
fn connect(control: OwnedFd, runner: Runner) -> io::Result<Guest> {
    let (ours, agent) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    agent.set_nonblocking(true)?;
    let message = encode(&ToRunner::NewStream).map_err(io::Error::other)?;
    // One that has ended does not take it; its stream has ended then.
    let _ = zygote_runner::packet::send(&control, &message, &[agent.as_fd()]);
    let (read, writer) = UnixStream::from_std(ours)?.into_split();
    Ok(Guest {
        listener: Listener::new(read),
        writer,
        control: ControlSocket::new(control)?,
        runner,
    })
}

async fn go_on(mut owner: Owner, record: Record, inbox: Inbox, limit: Duration) {
    match owner.resume(&record, limit).await {
        Ok(()) => owner.live(inbox).await,
        Err(reason) => owner.end(reason, inbox).await,
    }
}

/// Takes numbers of events ahead of their use, for as long as the engine lives.
async fn keep_numbers(engine: Arc<Engine>) {
    let journal = Arc::clone(&engine.live().journal);
    let mut taken = journal.last();
    let holder = Arc::clone(engine.holder());
    drop(engine);
    let mut losses = holder.losses();
    loop {
        tokio::select! {
            () = journal.wait(taken.saturating_sub(NUMBERS / 2)) => {}
            // The sender lives as long as the holder's handle.
            Ok(()) = losses.changed() => if journal.last() == 0 { continue },
        }
        taken = journal.last() + NUMBERS;
        let numbers = Numbers { last: taken };
        if let Ok(record) = serde_json::to_vec(&numbers) {
            let _ = holder.put(JOURNAL, &record, None, &[]).await;
        }
    }
}
