//! The owner task of a live sandbox: the only one who talks to its guest and moves it from one phase to
//! the next. It never waits for a client: what a reader has not taken is bounded by its window, what is
//! said to the guest by the commands that are let in.

mod branch;
mod commands;
mod guest;
mod rollback;
mod written;

pub(super) use self::branch::BranchRequest;
use self::branch::Branches;
use super::asleep::Asleep;
use super::attachment::Attachment;
use super::contexts::Contexts;
use super::error::LiveError;
use super::journal::{Happening, Journal};
use super::moments::Moments;
use super::phase::{End, EndReason, Phase, Step};
use super::process::{Piece, Process, ProcessState};
use super::sandbox::{Attach, Command, Inbox, RingState, Sandbox, Seen};
use crate::conversation::{Broken, Listener};
use crate::held::Holder;
use crate::loaded::Loaded;
use crate::pool::Pool;
use crate::sandbox::last_words;
use crate::socket::ControlSocket;
use crate::zygote::{Runner, Zygote};
use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use zygote_protocol::{HostMessage, ProcessId, encode};

/// Bytes for the guest that wait to be written before commands wait too.
const OUTGOING_MAX_BYTES: usize = 256 * 1024;
/// The signal at a process's time limit.
const KILL: u8 = 9;

/// Whose answer a description is.
enum Asked {
    Rings(oneshot::Sender<Vec<RingState>>),
    Reader(Attach, oneshot::Sender<Result<Attachment, LiveError>>),
}

/// See the module.
pub struct Owner {
    pub(super) sandbox: Arc<Sandbox>,
    journal: Arc<Journal>,
    listener: Listener,
    writer: OwnedWriteHalf,
    /// What is to be said to the guest, in one piece if it takes it so.
    outgoing: VecDeque<u8>,
    control: ControlSocket,
    runner: Runner,
    source: Source,
    holder: Arc<Holder>,
    /// Whether the holder has what is to be known by the next engine.
    pub(super) is_written: bool,
    pub(super) processes: BTreeMap<ProcessId, Process>,
    pub(super) next_process: ProcessId,
    pub(super) contexts: Contexts,
    branches: Branches,
    pub(super) moments: Moments,
    asked: VecDeque<Asked>,
    expires: Option<Instant>,
    idle: Option<Duration>,
    pub(super) last_used: Instant,
}

/// How its owner has done with it.
enum Over {
    End(EndReason),
    Sleep(Asleep),
}

/// A sandbox's process, and the ways to it.
pub struct Guest {
    pub listener: Listener,
    pub writer: OwnedWriteHalf,
    pub control: ControlSocket,
    pub runner: Runner,
}

/// Where a sandbox's process has been forked, kept for as long as that lives: who has a share of it is
/// not unloaded.
pub enum Source {
    Pool(
        Arc<Pool>,
        #[expect(dead_code, reason = "kept to be dropped")] Arc<Loaded>,
    ),
    /// A branch, or another engine's.
    Zygote(Arc<Zygote>),
}

impl Source {
    /// Where its process belongs.
    fn zygote(&self) -> Arc<Zygote> {
        match self {
            Self::Pool(pool, _) => pool.zygote_arc(),
            Self::Zygote(zygote) => zygote.or_first(),
        }
    }
}

impl Owner {
    /// Of a guest that is somebody.
    pub fn new(
        sandbox: Arc<Sandbox>,
        journal: Arc<Journal>,
        guest: Guest,
        expires: Option<Instant>,
        source: Source,
        holder: Arc<Holder>,
    ) -> Self {
        let idle = sandbox.status.borrow().idle;
        Self {
            sandbox,
            journal,
            listener: guest.listener,
            writer: guest.writer,
            outgoing: VecDeque::new(),
            control: guest.control,
            runner: guest.runner,
            source,
            holder,
            is_written: false,
            processes: BTreeMap::new(),
            next_process: 1,
            contexts: Contexts::default(),
            branches: Branches::default(),
            moments: Moments::default(),
            asked: VecDeque::new(),
            expires,
            idle,
            last_used: Instant::now(),
        }
    }

    /// From its first moment to its end.
    pub async fn live(mut self, mut inbox: Inbox) {
        let keeping = tokio::spawn(Arc::clone(&self.sandbox).keep_regularly());
        let over = self.serve(&mut inbox).await;
        keeping.abort();
        match over {
            Over::End(reason) => self.end(reason, inbox).await,
            Over::Sleep(asleep) => self.fall_asleep(asleep, inbox).await,
        }
    }

    async fn serve(&mut self, inbox: &mut Inbox) -> Over {
        let mut asleep = None;
        let reason = self.serve_until(inbox, &mut asleep).await;
        asleep.map_or_else(|| Over::End(reason), Over::Sleep)
    }

    /// Why it ends; unless it is asleep: then there is a folder.
    async fn serve_until(&mut self, inbox: &mut Inbox, asleep: &mut Option<Asleep>) -> EndReason {
        let mut losses = self.holder.losses();
        loop {
            if !self.is_written {
                self.write_down().await;
            }
            while let Some(command) = self.branches.next_held_back() {
                self.do_command(command).await;
            }
            self.begin_branch();
            let deadline = self.next_deadline();
            tokio::select! {
                message = self.listener.next() => {
                    match message {
                        Ok(message) => if let Err(why) = self.hear(message) {
                            return EndReason::Died(format!("the guest sent nonsense: {why}"));
                        },
                        Err(broken) => return self.why(broken).await,
                    }
                }
                written = write(&mut self.writer, &self.outgoing) => match written {
                    Ok(count) => drop(self.outgoing.drain(..count)),
                    Err(_) => return self.why(Broken::Ended).await,
                },
                Some(notice) = inbox.notices.recv() => self.take_notice(notice),
                heard = self.control.receive_with_descriptors(), if self.branches.is_forking() => {
                    if let Some(reason) = self.hear_runner(heard) {
                        return reason;
                    }
                }
                command = inbox.commands.recv(), if self.takes_commands() => {
                    match command {
                        Some(Command::End(reason)) => return reason,
                        Some(Command::Sleep(folder)) => {
                            *asleep = Some(folder);
                            return EndReason::EngineStopped;
                        }
                        Some(command) => {
                            // Nobody's use of it.
                            if !matches!(command, Command::Branch(_) | Command::Keep { .. }) {
                                self.last_used = Instant::now();
                            }
                            if let Some(command) = self.branches.hold_back(command) {
                                self.do_command(command).await;
                            }
                        }
                        // The registry holds one for as long as it lives.
                        None => return EndReason::EngineStopped,
                    }
                }
                // It lives as long as this does.
                Ok(()) = losses.changed() => self.is_written = false,
                () = at(deadline) => if let Some(reason) = self.is_due() {
                    return reason;
                },
            }
        }
    }

    /// The only one that the guest's other words wait for is the way back, which ends them.
    async fn do_command(&mut self, command: Command) {
        match command {
            Command::Rollback { to, reseed, reply } => {
                // Who asked may have gone; it is done all the same.
                let _ = reply.send(self.roll_back(&to, reseed).await);
            }
            command => self.obey(command),
        }
    }

    fn takes_commands(&self) -> bool {
        self.outgoing.len() < OUTGOING_MAX_BYTES && !self.branches.is_full()
    }

    async fn why(&mut self, broken: Broken) -> EndReason {
        EndReason::Died(match broken {
            Broken::Nonsense(what) => format!("the guest sent nonsense: {what}"),
            Broken::Ended => last_words(&self.control, &mut self.runner).await,
        })
    }

    pub(super) fn say(&mut self, message: &HostMessage) -> Result<(), LiveError> {
        let bytes = encode(message).map_err(|error| LiveError::TooLarge(error.to_string()))?;
        self.outgoing.extend(bytes);
        Ok(())
    }

    /// Says what always fits.
    pub(super) fn say_small(&mut self, message: &HostMessage) {
        // Numbers alone.
        let _ = self.say(message);
    }

    // Deadlines.

    fn is_used(&self) -> bool {
        let is_used = |process: &Process| {
            !process.readers.is_empty() || process.info.state == ProcessState::Starting
        };
        self.processes.values().any(is_used) || self.contexts.is_busy()
    }

    fn idle_at(&self) -> Option<Instant> {
        self.idle
            .filter(|_| !self.is_used())
            .map(|idle| self.last_used + idle)
    }

    fn next_deadline(&self) -> Option<Instant> {
        let of_processes = self
            .processes
            .values()
            .filter_map(|process| process.deadline);
        let of_cells = self.contexts.next_deadline();
        of_processes
            .chain(of_cells)
            .chain(self.expires)
            .chain(self.branches.deadline())
            .chain(self.idle_at())
            .min()
    }

    /// Why it ends now, if it does; kills processes at their time limit.
    fn is_due(&mut self) -> Option<EndReason> {
        let now = Instant::now();
        let is_past = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_past(self.expires) {
            return Some(EndReason::Ttl);
        }
        if is_past(self.idle_at()) {
            return Some(EndReason::Idle);
        }
        self.interrupt_late_cells(now);
        self.end_late_branch(now);
        let due = |process: &&mut Process| is_past(process.deadline);
        let mut kills = Vec::new();
        for process in self.processes.values_mut().filter(due) {
            (process.deadline, process.timed_out) = (None, true);
            kills.push(process.info.id);
        }
        for process in kills {
            self.say_small(&HostMessage::Signal {
                process,
                signal: KILL,
                group: true,
            });
        }
        None
    }

    // What others see.

    fn show(&self, process: &Process) {
        let seen = Seen {
            info: process.info.clone(),
            state: process.state.subscribe(),
            input: Arc::clone(&process.input),
            is_task: process.is_task,
        };
        self.sandbox.table().insert(process.info.id, seen);
    }

    fn show_change(&self, process: ProcessId) {
        let known = self.processes.get(&process);
        if let (Some(known), Some(seen)) = (known, self.sandbox.table().get_mut(&process)) {
            seen.info = known.info.clone();
        }
    }

    /// It was on disk, and runs again.
    pub(super) fn note_resumed(&self) {
        self.note(Happening::Resumed);
    }

    fn note(&self, what: Happening) {
        self.journal.note(&self.sandbox, what);
    }

    // Its end.

    pub(super) async fn end(mut self, reason: EndReason, mut inbox: Inbox) {
        let end = End {
            reason,
            at: SystemTime::now(),
        };
        step(&self.sandbox, Step::End, Some(&end));
        // Who comes from here on is told that it has ended.
        inbox.commands.close();
        for process in self.processes.values_mut() {
            if !process.info.state.is_over() {
                process.set(ProcessState::Lost);
            }
            for reader in process.readers.values() {
                let _ = reader.pieces.send(Piece::Lost);
            }
        }
        let ids: Vec<ProcessId> = self.processes.keys().copied().collect();
        ids.into_iter().for_each(|id| self.show_change(id));
        // Nobody goes on with it, whatever becomes of this engine now.
        self.write_end(&end).await;
        let Self {
            sandbox,
            journal,
            runner,
            listener,
            writer,
            control,
            source,
            ..
        } = self;
        // What ends it, should killing it take its time.
        drop((listener, writer, control));
        runner.end().await;
        drop(source);
        step(&sandbox, Step::Gone, None);
        let happening = Happening::Ended {
            reason: end.reason.name(),
            message: end.reason.to_string(),
        };
        journal.note(&sandbox, happening);
    }
}

/// Moves a sandbox on, if that step means something.
pub fn step(sandbox: &Sandbox, step: Step, end: Option<&End>) {
    sandbox.status.send_if_modified(|status| {
        let Some(next) = status.phase.after(step) else {
            return false;
        };
        status.phase = next;
        if let Some(end) = end {
            status.end.get_or_insert_with(|| end.clone());
        }
        true
    });
    debug_assert!(step != Step::Gone || sandbox.status.borrow().phase == Phase::Ended);
}

/// Writes some of what waits; for ever, if nothing does.
async fn write(writer: &mut OwnedWriteHalf, outgoing: &VecDeque<u8>) -> std::io::Result<usize> {
    match outgoing.as_slices().0 {
        [] => pending().await,
        front => writer.write(front).await,
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
