//! Moments of a sandbox, and the way back to one: its runner is replaced by a fork of it.

use super::{Guest, Owner, Source, step};
use crate::fork::Fork;
use crate::live::asleep::Asleep;
use crate::live::branch::Moment;
use crate::live::create::activate;
use crate::live::error::LiveError;
use crate::live::journal::Happening;
use crate::live::moments::{Kept, MomentInfo};
use crate::live::phase::Step;
use crate::live::process::{Piece, ProcessState};
use crate::live::record::key;
use crate::live::sandbox::Inbox;
use crate::usage::Meter;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::time::Instant;
use zygote_protocol::ProcessId;
use zygote_snapshot::RunKind;

/// What those are told who wait for what is no more.
const WHY: &str = "the sandbox was rolled back to an earlier moment";

impl Owner {
    /// Keeps a moment, until it is to be forgotten, or as long as the sandbox lives.
    pub(super) fn keep(
        &mut self,
        name: Option<String>,
        moment: Moment,
    ) -> Result<MomentInfo, LiveError> {
        let limit = self.sandbox.limits.moments_max;
        let policy = self.sandbox.spec.moments;
        let unnamed = policy.map_or(limit, |policy| policy.keep.clamp(1, limit));
        let number = self.moments.add(name, moment, unnamed, limit)?;
        self.is_written = false;
        let kept = self.moments.all().iter().find(|one| one.number == number);
        let kept = kept.ok_or_else(|| LiveError::NoMoment(format!("@{number}")))?;
        if let Some(name) = kept.name.clone() {
            self.note(Happening::MomentKept { number, name });
        }
        Ok(info(kept))
    }

    pub(super) fn forget_moment(&mut self, words: &str) -> Result<(), LiveError> {
        self.moments.forget(words)?;
        self.is_written = false;
        Ok(())
    }

    /// Tells of all that are kept, with what each costs.
    pub(super) fn tell_moments(&self, reply: oneshot::Sender<Vec<MomentInfo>>) {
        let meters = self.moments.all().iter().map(|kept| {
            let process = kept.moment.zygote.process();
            let meter = process.and_then(|process| Meter::open(process).ok());
            (info(kept), meter)
        });
        let meters: Vec<_> = meters.collect();
        tokio::task::spawn_blocking(move || {
            let measured = meters.into_iter().map(|(info, meter)| MomentInfo {
                private_kib: meter
                    .and_then(Meter::measure)
                    .map(|usage| usage.private_kib),
                ..info
            });
            // Who asked may have gone.
            let _ = reply.send(measured.collect());
        });
    }

    /// Goes back to a moment. Nothing has changed if that fails.
    pub(super) async fn roll_back(&mut self, words: &str, reseed: bool) -> Result<(), LiveError> {
        let kept = self.moments.find(words)?;
        let (number, moment) = (kept.number, Arc::clone(&kept.moment));
        let begun = Instant::now();
        let failed = |error: crate::ForkError| LiveError::NotBranched(error.to_string());
        let mut fork = Fork::of(&moment.zygote, RunKind::Sandbox)
            .await
            .map_err(failed)?;
        fork.identity.reseed = reseed;
        let made = activate(&self.sandbox, &moment.zygote, fork).await;
        let mut guest = made.map_err(LiveError::NotBranched)?;
        let limit = moment.zygote.patience();
        let told = super::written::hear_all(&mut guest.listener, &self.sandbox.limits, limit).await;
        let (all, last) = told.map_err(LiveError::NotBranched)?;
        self.leave_processes(WHY);
        self.replace_guest(guest, Source::Zygote(Arc::clone(&moment.zygote)));
        // Numbers are not given twice: who knows one of a process that is gone must not find another.
        let next = self.next_process;
        self.enter(&moment.contexts, &all, last);
        self.next_process = self.next_process.max(next);
        self.moments.go_back_to(number);
        self.last_used = Instant::now();
        self.sandbox
            .status
            .send_modify(|status| status.fork_time = Some(begun.elapsed()));
        self.note(Happening::RolledBack { to: number });
        self.write_down().await;
        Ok(())
    }

    /// Ends its process: what there was of it is on disk.
    pub(super) async fn fall_asleep(mut self, asleep: Asleep, inbox: Inbox) {
        let bytes = asleep.bytes;
        self.sandbox
            .status
            .send_modify(|status| status.disk_bytes = Some(bytes));
        step(&self.sandbox, Step::Sleep, None);
        self.leave_processes("the sandbox was paused");
        self.holder.remove(&key(self.sandbox.id)).await;
        self.note(Happening::Paused);
        let Self {
            sandbox,
            runner,
            listener,
            writer,
            control,
            source,
            moments,
            ..
        } = self;
        drop((listener, writer, control));
        runner.end().await;
        drop((source, moments));
        tokio::spawn(asleep.sleep(sandbox, inbox));
    }

    /// Those who wait for its processes are told that they are gone.
    fn leave_processes(&mut self, why: &str) {
        let ids: Vec<ProcessId> = self.processes.keys().copied().collect();
        for id in &ids {
            self.context_ended(*id, &ProcessState::Lost, why);
        }
        for process in self.processes.values_mut() {
            if let Some(starting) = process.starting.take() {
                let _ = starting.send(Err(LiveError::NotBranched(why.to_owned())));
            }
            if !process.info.state.is_over() {
                process.set(ProcessState::Lost);
            }
            for reader in process.readers.values() {
                let _ = reader.pieces.send(Piece::Lost);
            }
        }
        self.processes.clear();
        self.sandbox.table().clear();
        self.contexts = Default::default();
        self.asked.clear();
    }

    fn replace_guest(&mut self, guest: Guest, source: Source) {
        let Guest {
            listener,
            writer,
            control,
            runner,
        } = guest;
        self.outgoing.clear();
        (self.listener, self.writer, self.control) = (listener, writer, control);
        let old = std::mem::replace(&mut self.runner, runner);
        let old_source = std::mem::replace(&mut self.source, source);
        self.is_written = false;
        // Nobody waits for its end; where it was forked is kept until then.
        tokio::spawn(async move {
            old.end().await;
            drop(old_source);
        });
    }
}

fn info(kept: &Kept) -> MomentInfo {
    let Moment { at, pause, .. } = &*kept.moment;
    MomentInfo {
        number: kept.number,
        name: kept.name.clone(),
        at: *at,
        pause: *pause,
        private_kib: None,
    }
}
