//! The owner task of a live sandbox: the only one who talks to its guest and moves it from one phase to
//! the next. It never waits for a client: what a reader has not taken is bounded by its window, what is
//! said to the guest by the commands that are let in.

use super::attachment::{Attachment, Notice};
use super::contexts::Contexts;
use super::error::LiveError;
use super::journal::{Happening, Journal};
use super::limits::INPUT_WINDOW_BYTES;
use super::phase::{End, EndReason, Phase, Step};
use super::process::{Piece, Process, ProcessSpec, ProcessState, Reader};
use super::sandbox::{Attach, Command, RingState, Sandbox, Seen, StartReply};
use crate::conversation::{Broken, Listener};
use crate::sandbox::last_words;
use crate::socket::ControlSocket;
use crate::usage::Meter;
use crate::zygote::Runner;
use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use zygote_protocol::{
    AgentMessage, CellEvent, Described, HostMessage, Keep, ProcessId, Program, ReaderId, Start,
    StartFailure, encode,
};

/// Messages to the guest that wait to be written before commands wait too.
const OUTGOING_MAX: usize = 64;
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
    outgoing: VecDeque<Vec<u8>>,
    /// What of the first has been written.
    written: usize,
    control: ControlSocket,
    runner: Runner,
    pub(super) processes: BTreeMap<ProcessId, Process>,
    pub(super) next_process: ProcessId,
    pub(super) contexts: Contexts,
    asked: VecDeque<Asked>,
    expires: Option<Instant>,
    idle: Option<Duration>,
    pub(super) last_used: Instant,
}

/// A sandbox's process, and the ways to it.
pub struct Guest {
    pub listener: Listener,
    pub writer: OwnedWriteHalf,
    pub control: ControlSocket,
    pub runner: Runner,
}

/// What it is told from outside.
pub struct Inbox {
    pub commands: mpsc::Receiver<Command>,
    pub notices: mpsc::UnboundedReceiver<Notice>,
}

impl Owner {
    /// Of a guest that is somebody.
    pub fn new(
        sandbox: Arc<Sandbox>,
        journal: Arc<Journal>,
        guest: Guest,
        expires: Option<Instant>,
    ) -> Self {
        let idle = sandbox.spec.idle;
        Self {
            sandbox,
            journal,
            listener: guest.listener,
            writer: guest.writer,
            outgoing: VecDeque::new(),
            written: 0,
            control: guest.control,
            runner: guest.runner,
            processes: BTreeMap::new(),
            next_process: 1,
            contexts: Contexts::default(),
            asked: VecDeque::new(),
            expires,
            idle,
            last_used: Instant::now(),
        }
    }

    /// From its first moment to its end.
    pub async fn live(mut self, mut inbox: Inbox) {
        let reason = self.serve(&mut inbox).await;
        self.end(reason, inbox).await;
    }

    async fn serve(&mut self, inbox: &mut Inbox) -> EndReason {
        loop {
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
                written = write(&mut self.writer, &self.outgoing, self.written) => match written {
                    Ok(count) => self.has_written(count),
                    Err(_) => return self.why(Broken::Ended).await,
                },
                Some(notice) = inbox.notices.recv() => self.take_notice(notice),
                command = inbox.commands.recv(), if self.outgoing.len() < OUTGOING_MAX => {
                    match command {
                        Some(Command::End(reason)) => return reason,
                        Some(command) => self.obey(command),
                        // The registry holds one for as long as it lives.
                        None => return EndReason::EngineStopped,
                    }
                }
                () = at(deadline) => if let Some(reason) = self.is_due() {
                    return reason;
                },
            }
        }
    }

    async fn why(&mut self, broken: Broken) -> EndReason {
        EndReason::Died(match broken {
            Broken::Nonsense(what) => format!("the guest sent nonsense: {what}"),
            Broken::Ended => last_words(&self.control, &mut self.runner).await,
        })
    }

    fn has_written(&mut self, count: usize) {
        self.written += count;
        if let Some(front) = self.outgoing.front()
            && self.written >= front.len()
        {
            self.outgoing.pop_front();
            self.written = 0;
        }
    }

    pub(super) fn say(&mut self, message: &HostMessage) -> Result<(), LiveError> {
        let bytes = encode(message).map_err(|error| LiveError::TooLarge(error.to_string()))?;
        self.outgoing.push_back(bytes);
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

    // What clients want.

    fn obey(&mut self, command: Command) {
        self.last_used = Instant::now();
        match command {
            Command::Start(spec, reply) => self.start(spec, reply),
            Command::Attach(attach, reply) => self.ask(Asked::Reader(attach, reply)),
            Command::Describe(reply) => self.ask(Asked::Rings(reply)),
            Command::Input(process, data) => self.input(process, data),
            Command::InputEnd(process) => {
                if let Some(known) = self.processes.get(&process) {
                    known.input.close();
                    self.say_small(&HostMessage::StdinClose { process });
                }
            }
            Command::Signal {
                process,
                signal,
                group,
            } => self.say_small(&HostMessage::Signal {
                process,
                signal,
                group,
            }),
            Command::Resize(process, size) => {
                self.say_small(&HostMessage::Resize { process, size });
            }
            Command::Extend { ttl, idle } => self.extend(ttl, idle),
            Command::Measure(reply) => self.measure(reply),
            Command::Context(command) => self.obey_context(command),
            // Taken care of before.
            Command::End(_) => {}
        }
    }

    fn ask(&mut self, asked: Asked) {
        self.asked.push_back(asked);
        self.say_small(&HostMessage::Describe);
    }

    fn extend(&mut self, ttl: Option<Option<Duration>>, idle: Option<Option<Duration>>) {
        if let Some(idle) = idle {
            self.idle = idle;
        }
        if let Some(ttl) = ttl {
            self.expires = ttl.map(|ttl| Instant::now() + ttl);
        }
        let own_idle = self.idle;
        self.sandbox.status.send_modify(|status| {
            status.idle = own_idle;
            if let Some(ttl) = ttl {
                status.expires = ttl.map(|ttl| SystemTime::now() + ttl);
            }
        });
    }

    fn measure(&self, reply: oneshot::Sender<Option<crate::Usage>>) {
        let meter = Meter::open(&self.runner.process);
        tokio::task::spawn_blocking(move || {
            let usage = meter.ok().and_then(Meter::measure);
            // Who asked may have gone.
            let _ = reply.send(usage);
        });
    }

    fn start(&mut self, spec: ProcessSpec, reply: oneshot::Sender<StartReply>) {
        let (starting, started) = oneshot::channel();
        let id = self.next_process;
        let checked = match &spec.task {
            Some(_) => self.check_tasks(),
            None => self.check_processes(),
        };
        if let Err(error) = checked {
            let _ = starting.send(Err(error));
            let output = None;
            let _ = reply.send(StartReply { started, output });
            return;
        }
        let mut process = Process::new(id, &spec);
        let (output, limit) = if spec.follow {
            let (attachment, reader) = self.reader(id, 0, 0, None);
            let limit = reader.limit;
            process.readers.insert(0, reader);
            (Some(attachment), limit)
        } else {
            (None, 0)
        };
        process.deadline = spec.timeout.map(|limit| Instant::now() + limit);
        process.starting = Some(starting);
        let own_env = self.sandbox.spec.env.iter();
        let env = own_env.filter(|(key, _)| !spec.env.iter().any(|(name, _)| name == key));
        let start = Start {
            env: env.chain(&spec.env).cloned().collect(),
            cwd: spec.cwd,
            stdin: spec.stdin,
            user: spec.user,
            terminal: spec.terminal,
            keep: Some(Keep {
                bytes: self.sandbox.limits.ring_bytes,
                limit,
            }),
            ..Start::new(
                id,
                match spec.task {
                    Some(task) => Program::Files(task),
                    None => Program::Command(spec.command),
                },
            )
        };
        let _ = reply.send(StartReply { started, output });
        // What does not fit has been told to who waits for the start.
        let _ = self.begin(process, start);
    }

    /// Whether one more process may run.
    pub(super) fn check_processes(&self) -> Result<(), LiveError> {
        let limit = self.sandbox.limits.processes_max;
        let running = self.processes.values();
        let running = running.filter(|process| !process.is_task && !process.info.state.is_over());
        if running.count() < limit {
            return Ok(());
        }
        self.note(Happening::LimitHit { limit: "processes" });
        Err(LiveError::TooMany {
            what: "processes run in this sandbox",
            count: limit,
        })
    }

    fn check_tasks(&self) -> Result<(), LiveError> {
        let limit = self.sandbox.limits.files_max;
        let tasks = self.processes.values().filter(|process| process.is_task);
        if tasks.count() < limit {
            return Ok(());
        }
        self.note(Happening::LimitHit { limit: "files" });
        Err(LiveError::TooMany {
            what: "files are in flight",
            count: limit,
        })
    }

    /// Asks the guest for a process, and enters it.
    pub(super) fn begin(
        &mut self,
        mut process: Process,
        start: Start,
    ) -> Result<ProcessId, LiveError> {
        let id = process.info.id;
        if let Err(error) = self.say(&HostMessage::Start(start)) {
            return Err(match process.starting.take() {
                Some(starting) => {
                    let _ = starting.send(Err(error));
                    LiveError::NoProcess(id)
                }
                None => error,
            });
        }
        self.next_process += 1;
        self.show(&process);
        self.processes.insert(id, process);
        self.forget_old();
        Ok(id)
    }

    pub(super) fn reader(
        &self,
        process: ProcessId,
        reader: ReaderId,
        at: u64,
        until: Option<u64>,
    ) -> (Attachment, Reader) {
        let (sender, pieces) = mpsc::unbounded_channel();
        let record = Reader::new(sender, at, until);
        let attachment = Attachment {
            process,
            reader,
            pieces,
            notices: self.sandbox.notices.clone(),
            at,
            limit: record.limit,
        };
        (attachment, record)
    }

    /// The oldest of those that have ended give way.
    fn forget_old(&mut self) {
        let over = self.processes.values().filter(|process| !process.is_task);
        let over =
            over.filter(|process| process.info.state.is_over() && process.readers.is_empty());
        let over: Vec<ProcessId> = over.map(|process| process.info.id).collect();
        let excess = over
            .len()
            .saturating_sub(self.sandbox.limits.ended_processes_max);
        for process in over.into_iter().take(excess) {
            self.forget(process);
        }
    }

    fn forget(&mut self, process: ProcessId) {
        self.processes.remove(&process);
        self.sandbox.table().remove(&process);
        self.say_small(&HostMessage::Forget { process });
    }

    /// A task with files is for its reader alone.
    fn end_task(&mut self, process: ProcessId) {
        let known = self.processes.get(&process);
        let Some(task) = known.filter(|known| known.is_task && known.is_abandoned) else {
            return;
        };
        if task.info.state.is_over() {
            self.forget(process);
        } else {
            self.say_small(&HostMessage::Signal {
                process,
                signal: KILL,
                group: true,
            });
        }
    }

    fn input(&mut self, process: ProcessId, data: Vec<u8>) {
        let Some(known) = self.processes.get_mut(&process) else {
            return;
        };
        known.input_sent += data.len() as u64;
        // At most a chunk, which fits.
        let _ = self.say(&HostMessage::Stdin { process, data });
    }

    fn take_notice(&mut self, notice: Notice) {
        match notice {
            Notice::More {
                process,
                reader,
                limit,
            } => {
                let known = self.processes.get_mut(&process);
                let Some(known) = known.and_then(|known| known.readers.get_mut(&reader)) else {
                    return;
                };
                let limit = known.until.map_or(limit, |until| limit.min(until));
                if limit <= known.limit {
                    return;
                }
                known.limit = limit;
                let from = known.at;
                self.say_small(&HostMessage::Follow {
                    process,
                    reader,
                    from,
                    limit,
                    holds: false,
                });
            }
            Notice::Shown { process } => self.shown(process),
            Notice::Gone { process, reader } => {
                let known = self.processes.get_mut(&process);
                let gone = known.and_then(|known| known.readers.remove(&reader));
                if let Some(gone) = gone {
                    self.last_used = Instant::now();
                    self.say_small(&HostMessage::Unfollow { process, reader });
                    let is_display = |event: &CellEvent| matches!(event, CellEvent::Display { .. });
                    if gone.events.iter().any(|(_, event)| is_display(event)) {
                        self.shown(process);
                    }
                }
                if let Some(known) = self.processes.get_mut(&process) {
                    known.is_abandoned = true;
                }
                self.end_task(process);
            }
        }
    }

    // What the guest says.

    fn hear(&mut self, message: AgentMessage) -> Result<(), String> {
        match message {
            AgentMessage::Started { process, pid } => {
                let known = self.known(process)?;
                known.info.pid = Some(pid);
                known.set(ProcessState::Running);
                let (info, is_task) = (known.info.clone(), known.is_task);
                if let Some(starting) = known.starting.take() {
                    let _ = starting.send(Ok(info.clone()));
                }
                self.show_change(process);
                if !is_task {
                    let command = info.command;
                    self.note(Happening::ProcessStarted { process, command });
                }
            }
            AgentMessage::StartFailed {
                process,
                reason,
                message,
            } => self.start_failed(process, reason, message)?,
            AgentMessage::Output {
                process,
                reader,
                offset,
                stream,
                data,
            } => {
                let end = offset + data.len() as u64;
                let piece = Piece::Output {
                    offset,
                    stream,
                    data,
                };
                self.pass(process, reader, offset, end, piece)?;
            }
            AgentMessage::Skipped {
                process,
                reader,
                from,
                to,
            } => self.pass(process, reader, from, to, Piece::Skipped { from, to })?,
            AgentMessage::InputTaken { process, total } => self.input_taken(process, total)?,
            AgentMessage::Ended {
                process,
                status,
                output_end,
            } => {
                let known = self.known(process)?;
                let timed_out = known.timed_out;
                known.output_end = Some(output_end);
                known.set(ProcessState::Ended { status, timed_out });
                let (state, is_task) = (known.info.state.clone(), known.is_task);
                self.end_readers(process);
                self.context_ended(process, &state, "");
                self.last_used = Instant::now();
                self.show_change(process);
                if is_task {
                    self.end_task(process);
                } else {
                    self.note(Happening::ProcessEnded {
                        process,
                        status,
                        timed_out,
                    });
                }
            }
            AgentMessage::CellPiece {
                process,
                offset,
                last,
                data,
            } => self.take_part(process, offset, last, &data)?,
            AgentMessage::Described { processes } => self.described(&processes)?,
            AgentMessage::Refused { message } => return Err(format!("it refuses: {message}")),
            _ => return Err("a message that does not belong here".to_owned()),
        }
        Ok(())
    }

    fn known(&mut self, process: ProcessId) -> Result<&mut Process, String> {
        let known = self.processes.get_mut(&process);
        known.ok_or_else(|| format!("it tells of a process {process}, which nobody asked for"))
    }

    fn start_failed(
        &mut self,
        process: ProcessId,
        reason: StartFailure,
        message: String,
    ) -> Result<(), String> {
        let known = self.known(process)?;
        known.set(ProcessState::Lost);
        for reader in known.readers.values() {
            let _ = reader.pieces.send(Piece::End);
        }
        if let Some(starting) = known.starting.take() {
            let message = message.clone();
            let _ = starting.send(Err(LiveError::StartFailed { reason, message }));
        }
        self.context_ended(process, &ProcessState::Lost, &message);
        // It never was.
        self.processes.remove(&process);
        self.sandbox.table().remove(&process);
        Ok(())
    }

    fn pass(
        &mut self,
        process: ProcessId,
        reader: ReaderId,
        from: u64,
        to: u64,
        piece: Piece,
    ) -> Result<(), String> {
        let Some(known) = self.processes.get_mut(&process) else {
            // Forgotten, while this was on its way.
            return Ok(());
        };
        let Some(entry) = known.readers.get_mut(&reader) else {
            return Ok(());
        };
        let is_gap = matches!(piece, Piece::Skipped { .. });
        if from != entry.at || to < from || (to > entry.limit && !is_gap) {
            return Err(format!(
                "output from {from} to {to} for a reader at {} who may have up to {}",
                entry.at, entry.limit
            ));
        }
        entry.pass(piece, to);
        self.end_readers(process);
        Ok(())
    }

    /// Readers that have had all are ended, here and in the guest, where one could hold the process.
    pub(super) fn end_readers(&mut self, process: ProcessId) {
        let known = self.processes.get_mut(&process);
        let done = known.map(Process::end_readers).unwrap_or_default();
        for reader in done {
            self.say_small(&HostMessage::Unfollow { process, reader });
        }
    }

    fn input_taken(&mut self, process: ProcessId, total: u64) -> Result<(), String> {
        let Some(known) = self.processes.get_mut(&process) else {
            return Ok(());
        };
        if total < known.input_taken || total > known.input_sent.saturating_add(1) {
            return Err(format!("input taken: {total} of {}", known.input_sent));
        }
        let more = total.min(known.input_sent) - known.input_taken;
        known.input_taken += more;
        let more = usize::try_from(more).unwrap_or(0).min(INPUT_WINDOW_BYTES);
        known.input.add_permits(more);
        Ok(())
    }

    fn described(&mut self, all: &[Described]) -> Result<(), String> {
        let asked = self.asked.pop_front();
        match asked.ok_or("a description that nobody asked for")? {
            Asked::Rings(reply) => {
                let states = all.iter().map(|one| RingState {
                    process: one.process,
                    dropped_bytes: one.kept_from,
                    kept_bytes: one.kept_to.saturating_sub(one.kept_from),
                });
                let _ = reply.send(states.collect());
            }
            Asked::Reader(attach, reply) => {
                let found = all.iter().find(|one| one.process == attach.process);
                let attachment = match found {
                    Some(found) => self.attach(attach, found),
                    None => Err(LiveError::NoProcess(attach.process)),
                };
                let _ = reply.send(attachment);
            }
        }
        Ok(())
    }

    fn attach(&mut self, attach: Attach, found: &Described) -> Result<Attachment, LiveError> {
        let id = attach.process;
        let readers_max = self.sandbox.limits.readers_max;
        let at = attach.from.unwrap_or(found.kept_from).min(found.kept_to);
        let until = (!attach.follow).then_some(found.kept_to);
        let Some(process) = self.processes.get(&id) else {
            return Err(LiveError::NoProcess(id));
        };
        if process.readers.len() >= readers_max {
            self.note(Happening::LimitHit { limit: "streams" });
            return Err(LiveError::TooMany {
                what: "streams of this process are open",
                count: readers_max,
            });
        }
        let number = process.next_reader;
        let (attachment, reader) = self.reader(id, number, at, until);
        let limit = reader.limit;
        if let Some(process) = self.processes.get_mut(&id) {
            process.next_reader += 1;
            process.readers.insert(number, reader);
        }
        self.say_small(&HostMessage::Follow {
            process: id,
            reader: number,
            from: at,
            limit,
            holds: attach.holds,
        });
        self.end_readers(id);
        Ok(attachment)
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

    fn note(&self, what: Happening) {
        let name = self.sandbox.spec.name.as_deref();
        self.journal.note(self.sandbox.id, name, what);
    }

    // Its end.

    async fn end(mut self, reason: EndReason, mut inbox: Inbox) {
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
        let Self {
            sandbox,
            journal,
            runner,
            ..
        } = self;
        runner.end().await;
        step(&sandbox, Step::Gone, None);
        let happening = Happening::Ended {
            reason: end.reason.name(),
            message: end.reason.to_string(),
        };
        journal.note(sandbox.id, sandbox.spec.name.as_deref(), happening);
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
async fn write(
    writer: &mut OwnedWriteHalf,
    outgoing: &VecDeque<Vec<u8>>,
    written: usize,
) -> std::io::Result<usize> {
    match outgoing.front() {
        Some(front) => writer.write(&front[written..]).await,
        None => pending().await,
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
