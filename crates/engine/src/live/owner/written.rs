//! What is written down of a sandbox for the engine after this one, and how that goes on with it.

use super::Owner;
use crate::conversation::{Broken, Listener};
use crate::live::branch::Moment;
use crate::live::contexts::ContextSpec;
use crate::live::journal::Happening;
use crate::live::limits::LiveLimits;
use crate::live::moments::Kept;
use crate::live::note::{Note, decode};
use crate::live::phase::{End, EndReason, Step};
use crate::live::process::Process;
use crate::live::record::{MomentRecord, Record, key};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, SystemTime};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use zygote_protocol::{AgentMessage, HostMessage, NOTE_MAX_BYTES, ProcessId, Resumed};

/// No process reads or writes so many bytes in its life.
const OFFSET_MAX: u64 = 1 << 62;
/// No sandbox has so many processes in its life.
const NUMBER_MAX: ProcessId = 1 << 31;

impl Owner {
    /// Has the sandbox held beyond this engine's end, with all that the next one must know. Where that
    /// cannot be, it ends with this engine, and nothing else changes.
    pub(in crate::live) async fn write_down(&mut self) {
        self.is_written = true;
        let written = self.try_write_down().await;
        self.holder.note(written);
    }

    async fn try_write_down(&self) -> io::Result<()> {
        let source = self.source.zygote();
        let zygote = source.hold(&self.holder).await?;
        let mut moments = Vec::new();
        for kept in self.moments.all() {
            // One whose process has ended is none any more.
            if kept.moment.zygote.is_alive() {
                moments.push(self.hold_moment(kept).await?);
            }
        }
        let record = Record {
            runner: self.runner.pid,
            zygote,
            family: source.first_key().to_owned(),
            contexts: self.contexts.written(),
            moments,
            ..Record::of(&self.sandbox, self.holder.version())
        };
        let expires = record.expires;
        let descriptors = [self.control.as_fd(), self.runner.process.as_fd()];
        self.put(&record, expires, &descriptors).await
    }

    async fn put(
        &self,
        record: &Record,
        expires: Option<SystemTime>,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let bytes = serde_json::to_vec(record)?;
        let key = key(self.sandbox.id);
        self.holder.put(&key, &bytes, expires, descriptors).await
    }

    /// Has it let go of; what is known of its end is kept.
    pub(super) async fn write_end(&self, end: &End) {
        if !self.holder.is_up() {
            return;
        }
        let record = Record {
            contexts: self.contexts.written(),
            end: Some(end.clone()),
            processes: self.sandbox.processes(),
            ..Record::of(&self.sandbox, self.holder.version())
        };
        let written = self.put(&record, None, &[]).await;
        self.holder.note(written);
    }

    async fn hold_moment(&self, kept: &Kept) -> io::Result<MomentRecord> {
        let Moment {
            zygote,
            contexts,
            at,
            held,
            pause,
        } = &*kept.moment;
        Ok(MomentRecord {
            number: kept.number,
            name: kept.name.clone(),
            zygote: zygote.hold(&self.holder).await?,
            contexts: contexts.clone(),
            at: *at,
            held: *held,
            pause: *pause,
        })
    }

    /// Goes on where another engine was: has the guest tell of its processes, and enters them.
    pub(in crate::live) async fn resume(
        &mut self,
        record: &Record,
        limit: Duration,
    ) -> Result<(), EndReason> {
        self.say_small(&HostMessage::Resume);
        let greeting: Vec<u8> = self.outgoing.drain(..).collect();
        // One that has died does not answer either.
        let _ = self.writer.write_all(&greeting).await;
        self.take_over(&record.contexts, limit).await?;
        super::step(&self.sandbox, Step::Activated, None);
        self.note(Happening::Adopted);
        Ok(())
    }

    /// Has the guest's own words of its processes, and enters them; some of them are these contexts.
    pub(in crate::live) async fn take_over(
        &mut self,
        contexts: &[(ContextSpec, ProcessId)],
        limit: Duration,
    ) -> Result<(), EndReason> {
        let limits = self.sandbox.limits;
        let (all, last) = match timeout(limit, list(&mut self.listener, &limits)).await {
            Ok(Ok(told)) => told,
            Ok(Err(broken)) => return Err(self.why(broken).await),
            Err(_) => return Err(EndReason::Died(late(limit))),
        };
        self.enter(contexts, &all, last);
        Ok(())
    }

    /// Enters the processes that a guest has told of.
    pub(super) fn enter(
        &mut self,
        contexts: &[(ContextSpec, ProcessId)],
        all: &[Resumed],
        last: ProcessId,
    ) {
        self.next_process = last.saturating_add(1);
        for (spec, process) in contexts {
            let told = all.iter().find(|told| told.described.process == *process);
            // One that had not begun never was.
            if let Some(told) = told {
                self.contexts.resume(spec.clone(), told);
            }
        }
        for told in all {
            let note = decode(&told.note).unwrap_or_else(Note::of_a_stranger);
            let process = Process::resumed(told, note);
            let id = process.info.id;
            self.show(&process);
            self.processes.insert(id, process);
            self.end_abandoned(id);
        }
    }
}

fn late(limit: Duration) -> String {
    let seconds = limit.as_secs();
    format!("its guest has not told of its processes within {seconds} s")
}

/// All processes of a guest, and the largest number that one has had; why not, otherwise.
pub(super) async fn hear_all(
    listener: &mut Listener,
    limits: &LiveLimits,
    limit: Duration,
) -> Result<(Vec<Resumed>, ProcessId), String> {
    match timeout(limit, list(listener, limits)).await {
        Ok(Ok(told)) => Ok(told),
        Ok(Err(Broken::Nonsense(what))) => Err(format!("the guest sent nonsense: {what}")),
        Ok(Err(Broken::Ended)) => Err("its process has ended".to_owned()),
        Err(_) => Err(late(limit)),
    }
}

async fn list(
    listener: &mut Listener,
    limits: &LiveLimits,
) -> Result<(Vec<Resumed>, ProcessId), Broken> {
    let most = most_processes(limits);
    let nonsense = |what: &str| Err(Broken::Nonsense(what.to_owned()));
    let mut all: Vec<Resumed> = Vec::new();
    loop {
        match listener.next().await? {
            AgentMessage::Resumed(told) => {
                let is_new = all
                    .last()
                    .is_none_or(|before| before.described.process < told.described.process);
                if !is_new || !makes_sense(&told) || all.len() >= most {
                    return nonsense("a list of processes that makes no sense");
                }
                all.push(told);
            }
            AgentMessage::ResumedEnd { last } => {
                let is_last = all.last().is_none_or(|told| told.described.process <= last);
                if is_last && last <= NUMBER_MAX {
                    return Ok((all, last));
                }
                return nonsense("a last process that cannot be");
            }
            _ => return nonsense("something else before its processes"),
        }
    }
}

/// Whether what a guest tells of a process can be: no more than an engine would have let it have.
fn makes_sense(told: &Resumed) -> bool {
    let ring = &told.described;
    let kept = ring.kept_to.checked_sub(ring.kept_from);
    let is_in_order = kept.is_some() && told.input_taken <= told.input_received;
    let ends_within = told.output_end.is_none_or(|end| end <= ring.kept_to);
    let is_possible = ring.kept_to.max(told.input_received) <= OFFSET_MAX;
    is_in_order && ends_within && is_possible && told.note.len() <= NOTE_MAX_BYTES
}

/// What no engine lets a guest have more of; another one may have had higher limits.
fn most_processes(limits: &LiveLimits) -> usize {
    let LiveLimits {
        processes_max,
        ended_processes_max,
        files_max,
        ..
    } = limits;
    10_000 + 2 * (processes_max + ended_processes_max + files_max)
}
