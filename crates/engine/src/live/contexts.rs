//! Contexts: interpreters of a live sandbox that stay, each with a name, which run one cell after the
//! other. A context is a process like others; this is what there is beside that.

use super::attachment::Attachment;
use super::error::LiveError;
use super::note::{CellNote, Note, decode, encode};
use super::owner::Owner;
use super::process::{Piece, Process, ProcessSpec, ProcessState};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use tokio::time::Instant;
use zygote_protocol::{
    CellEvent, ExitStatus, HostMessage, Keep, ProcessId, Program, ReaderId, Resumed, Start,
};

/// The context that is there from the start: the warm interpreter, once it is used.
pub const DEFAULT: &str = "default";
/// The only language, so far.
pub const LANGUAGE: &str = "python";
/// How long a cell that was interrupted may take to end before its interpreter is killed.
const INTERRUPT_MAX: Duration = Duration::from_secs(5);
/// Ctrl-C.
const INTERRUPT: u8 = 2;
const KILL: u8 = 9;
/// Who reads a cell whose reader has gone with its engine.
const NOBODY: ReaderId = ReaderId::MAX;

/// What a context is made with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextSpec {
    /// Its name.
    pub name: String,
    /// [`LANGUAGE`]; empty: that.
    pub language: String,
    /// Its directory; empty: the user's home.
    pub cwd: String,
}

/// What is known of a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextInfo {
    /// What it was made with.
    pub spec: ContextSpec,
    /// Its process.
    pub process: ProcessId,
    /// Cells that have ended.
    pub count: u32,
    /// Whether one runs.
    pub is_busy: bool,
    /// How its interpreter has ended, if it has.
    pub dead: Option<String>,
}

/// Code to run in a context.
#[derive(Clone, Debug, Default)]
pub struct CellSpec {
    /// Which context; it is made if it is not there.
    pub context: String,
    /// Source text.
    pub code: Vec<u8>,
    /// How long it may run; then it is interrupted.
    pub timeout: Option<Duration>,
    /// Whether it is interrupted when its reader goes before its end.
    pub ends_with_reader: bool,
}

type CellReply = oneshot::Sender<Result<Attachment, LiveError>>;

/// What can be asked of contexts.
pub enum ContextCommand {
    Create(ContextSpec, oneshot::Sender<Result<ContextInfo, LiveError>>),
    List(oneshot::Sender<Vec<ContextInfo>>),
    Run(CellSpec, CellReply),
    Interrupt(String, oneshot::Sender<Result<(), LiveError>>),
    Restart(String, oneshot::Sender<Result<ContextInfo, LiveError>>),
    Remove(String, oneshot::Sender<Result<(), LiveError>>),
}

/// All of a sandbox's.
#[derive(Default)]
pub struct Contexts {
    by_name: BTreeMap<String, Context>,
}

struct Context {
    spec: ContextSpec,
    process: ProcessId,
    count: u32,
    running: Option<Running>,
    waiting: VecDeque<(CellSpec, CellReply)>,
    /// An event whose parts are coming.
    assembling: Vec<u8>,
    /// Whether something was displayed that nobody has taken yet: its interpreter waits for that.
    untaken: bool,
    /// Up to where its output belongs to cells that have ended.
    seen: u64,
    dead: Option<String>,
}

struct Running {
    reader: ReaderId,
    deadline: Option<Instant>,
    was_interrupted: bool,
    ends_with_reader: bool,
}

impl Context {
    fn info(&self) -> ContextInfo {
        ContextInfo {
            spec: self.spec.clone(),
            process: self.process,
            count: self.count,
            is_busy: self.running.is_some(),
            dead: self.dead.clone(),
        }
    }
}

impl Contexts {
    fn of(&mut self, process: ProcessId) -> Option<&mut Context> {
        let mut all = self.by_name.values_mut();
        all.find(|context| context.process == process)
    }

    /// The next time that a cell is to be interrupted, or killed.
    pub fn next_deadline(&self) -> Option<Instant> {
        let running = self
            .by_name
            .values()
            .filter_map(|context| context.running.as_ref());
        running.filter_map(|running| running.deadline).min()
    }

    /// Whether a cell runs.
    pub fn is_busy(&self) -> bool {
        self.by_name
            .values()
            .any(|context| context.running.is_some())
    }
}

impl Contexts {
    /// For the record.
    pub fn written(&self) -> Vec<(ContextSpec, ProcessId)> {
        let all = self.by_name.values();
        all.map(|context| (context.spec.clone(), context.process))
            .collect()
    }

    /// One that another engine had made, as its guest tells of it. A cell that runs has nobody who reads.
    pub fn resume(&mut self, spec: ContextSpec, resumed: &Resumed) {
        let told = resumed.context.clone();
        let cell = told.as_ref().and_then(|told| told.cell.as_ref());
        let running = cell.map(|note| {
            let note: Option<CellNote> = decode(note);
            let left = |at: SystemTime| at.duration_since(SystemTime::now()).unwrap_or_default();
            Running {
                reader: NOBODY,
                deadline: note
                    .and_then(|note| note.deadline)
                    .and_then(|at| Instant::now().checked_add(left(at))),
                was_interrupted: false,
                ends_with_reader: false,
            }
        });
        let status = resumed.described.status;
        let context = Context {
            process: resumed.described.process,
            count: told.map_or(0, |told| told.count),
            running: running.filter(|_| status.is_none()),
            waiting: VecDeque::new(),
            assembling: Vec::new(),
            untaken: false,
            seen: resumed.described.kept_to,
            dead: status.map(describe),
            spec: spec.clone(),
        };
        self.by_name.insert(spec.name, context);
    }
}

fn check(spec: &ContextSpec) -> Result<(), LiveError> {
    super::registry::check_name(&spec.name)?;
    if !["", LANGUAGE].contains(&&spec.language[..]) {
        return Err(LiveError::NoLanguage(spec.language.clone()));
    }
    Ok(())
}

impl Owner {
    pub(super) fn obey_context(&mut self, command: ContextCommand) {
        match command {
            ContextCommand::Create(spec, reply) => {
                let _ = reply.send(self.create_context(spec));
            }
            ContextCommand::List(reply) => {
                let all = self.contexts.by_name.values().map(Context::info);
                let _ = reply.send(all.collect());
            }
            ContextCommand::Run(spec, reply) => self.run_cell(spec, reply),
            ContextCommand::Interrupt(name, reply) => {
                let _ = reply.send(self.interrupt(&name));
            }
            ContextCommand::Restart(name, reply) => {
                let _ = reply.send(self.restart(&name));
            }
            ContextCommand::Remove(name, reply) => {
                let _ = reply.send(self.remove_context(&name));
            }
        }
    }

    fn create_context(&mut self, spec: ContextSpec) -> Result<ContextInfo, LiveError> {
        check(&spec)?;
        if self.contexts.by_name.contains_key(&spec.name) {
            return Err(LiveError::ContextTaken(spec.name));
        }
        let limit = self.sandbox.limits.contexts_max;
        if self.contexts.by_name.len() >= limit {
            return Err(LiveError::TooMany {
                what: "contexts are there",
                count: limit,
            });
        }
        let process = self.start_interpreter(&spec)?;
        let spec = ContextSpec {
            language: LANGUAGE.to_owned(),
            ..spec
        };
        let context = Context {
            process,
            count: 0,
            running: None,
            waiting: VecDeque::new(),
            assembling: Vec::new(),
            untaken: false,
            seen: 0,
            dead: None,
            spec: spec.clone(),
        };
        let info = context.info();
        self.contexts.by_name.insert(spec.name, context);
        self.is_written = false;
        Ok(info)
    }

    fn start_interpreter(&mut self, spec: &ContextSpec) -> Result<ProcessId, LiveError> {
        self.check_processes()?;
        let python = ProcessSpec {
            command: vec![b"python3".to_vec()],
            ..ProcessSpec::default()
        };
        let process = Process::new(self.next_process, &python);
        let start = Start {
            note: Note::of(&python).encode(),
            env: self.sandbox.spec.env.clone(),
            cwd: spec.cwd.clone(),
            keep: Some(Keep {
                bytes: self.sandbox.limits.ring_bytes,
                limit: 0,
            }),
            ..Start::new(process.info.id, Program::Context)
        };
        self.begin(process, start)
    }

    fn context(&mut self, name: &str) -> Result<&mut Context, LiveError> {
        let context = self.contexts.by_name.get_mut(name);
        context.ok_or_else(|| LiveError::NoContext(name.to_owned()))
    }

    fn run_cell(&mut self, spec: CellSpec, reply: CellReply) {
        let name = spec.context.clone();
        if !self.contexts.by_name.contains_key(&name) {
            let made = self.create_context(ContextSpec {
                name: name.clone(),
                ..ContextSpec::default()
            });
            if let Err(error) = made {
                let _ = reply.send(Err(error));
                return;
            }
        }
        let limit = self.sandbox.limits.cells_max;
        let Ok(context) = self.context(&name) else {
            return;
        };
        let refused = if let Some(why) = &context.dead {
            Some(LiveError::ContextDead(name.clone(), why.clone()))
        } else if context.waiting.len() >= limit {
            let what = "cells wait for this context";
            Some(LiveError::TooMany { what, count: limit })
        } else {
            None
        };
        if let Some(error) = refused {
            let _ = reply.send(Err(error));
            return;
        }
        context.waiting.push_back((spec, reply));
        self.next_cell(&name);
    }

    /// Begins the next cell of a context that has none.
    fn next_cell(&mut self, name: &str) {
        loop {
            let Ok(context) = self.context(name) else {
                return;
            };
            if context.running.is_some() || context.dead.is_some() {
                return;
            }
            let Some((spec, reply)) = context.waiting.pop_front() else {
                return;
            };
            // Who waited for it may have gone.
            if reply.is_closed() {
                continue;
            }
            let (process, seen) = (context.process, context.seen);
            let number = match self.processes.get_mut(&process) {
                Some(known) => {
                    known.next_reader += 1;
                    known.next_reader - 1
                }
                None => return,
            };
            let (attachment, mut reader) = self.reader(process, number, seen, None);
            reader.ends_itself = true;
            let said = self.say(&HostMessage::Cell {
                process,
                code: spec.code,
                reader: number,
                from: seen,
                limit: reader.limit,
                note: encode(&CellNote {
                    deadline: spec.timeout.map(|limit| SystemTime::now() + limit),
                }),
            });
            if let Err(error) = said {
                let _ = reply.send(Err(error));
                continue;
            }
            if let Some(known) = self.processes.get_mut(&process) {
                known.readers.insert(number, reader);
            }
            if let Ok(context) = self.context(name) {
                context.running = Some(Running {
                    reader: number,
                    deadline: spec.timeout.map(|limit| Instant::now() + limit),
                    was_interrupted: false,
                    ends_with_reader: spec.ends_with_reader,
                });
            }
            let _ = reply.send(Ok(attachment));
            return;
        }
    }

    fn interrupt(&mut self, name: &str) -> Result<(), LiveError> {
        let context = self.context(name)?;
        if let Some(why) = &context.dead {
            return Err(LiveError::ContextDead(name.to_owned(), why.clone()));
        }
        let process = context.process;
        if context.running.is_some() {
            self.send_signal(process, INTERRUPT);
        }
        Ok(())
    }

    fn send_signal(&mut self, process: ProcessId, signal: u8) {
        self.say_small(&HostMessage::Signal {
            process,
            signal,
            group: true,
        });
    }

    /// A new interpreter under the same name. Cells that run or wait are told.
    fn restart(&mut self, name: &str) -> Result<ContextInfo, LiveError> {
        let context = self.context(name)?;
        let (spec, old, is_dead) = (
            context.spec.clone(),
            context.process,
            context.dead.is_some(),
        );
        self.end_cells(name, "it was restarted");
        if !is_dead {
            self.send_signal(old, KILL);
        }
        let process = self.start_interpreter(&spec)?;
        let context = self.context(name)?;
        (context.process, context.count, context.seen) = (process, 0, 0);
        (context.dead, context.assembling, context.untaken) = (None, Vec::new(), false);
        let info = context.info();
        self.is_written = false;
        Ok(info)
    }

    fn remove_context(&mut self, name: &str) -> Result<(), LiveError> {
        let context = self.context(name)?;
        let (process, is_dead) = (context.process, context.dead.is_some());
        self.end_cells(name, "it was removed");
        if !is_dead {
            self.send_signal(process, KILL);
        }
        self.contexts.by_name.remove(name);
        self.is_written = false;
        Ok(())
    }

    /// Tells cells that run or wait that there is no more to come.
    fn end_cells(&mut self, name: &str, why: &str) {
        let Ok(context) = self.context(name) else {
            return;
        };
        let process = context.process;
        let running = context.running.take();
        let waiting = std::mem::take(&mut context.waiting);
        for (_, reply) in waiting {
            let error = LiveError::ContextDead(name.to_owned(), why.to_owned());
            let _ = reply.send(Err(error));
        }
        let known = self.processes.get_mut(&process);
        if let (Some(running), Some(known)) = (running, known)
            && let Some(reader) = known.readers.remove(&running.reader)
        {
            let _ = reader.pieces.send(Piece::End);
            let reader = running.reader;
            self.say_small(&HostMessage::Unfollow { process, reader });
        }
    }

    /// A part of an event has come.
    pub(super) fn take_part(
        &mut self,
        process: ProcessId,
        offset: u64,
        last: bool,
        data: &[u8],
    ) -> Result<(), String> {
        let Some(context) = self.contexts.of(process) else {
            // Removed, or started anew, while this was on its way.
            return Ok(());
        };
        if context.assembling.len() + data.len() > CellEvent::MAX_BYTES {
            return Err("an event of a context that is too long".to_owned());
        }
        context.assembling.extend_from_slice(data);
        if !last {
            return Ok(());
        }
        let bytes = std::mem::take(&mut context.assembling);
        let Some(event) = CellEvent::decode(&bytes) else {
            self.give_up(process);
            return Ok(());
        };
        self.take_event(process, offset, event)
    }

    /// An interpreter is the user's: one that sends nonsense harms its own context alone.
    fn give_up(&mut self, process: ProcessId) {
        let Some(context) = self.contexts.of(process) else {
            return;
        };
        let name = context.spec.name.clone();
        context.dead = Some("its interpreter sent nonsense".to_owned());
        self.end_cells(&name, "its interpreter sent nonsense");
        self.send_signal(process, KILL);
    }

    fn take_event(
        &mut self,
        process: ProcessId,
        offset: u64,
        event: CellEvent,
    ) -> Result<(), String> {
        let Some(context) = self.contexts.of(process) else {
            return Ok(());
        };
        let name = context.spec.name.clone();
        if context.untaken {
            return Err("an event of a context before what it displayed was taken".to_owned());
        }
        context.untaken = matches!(event, CellEvent::Display { .. });
        let Some(running) = &context.running else {
            // What is shown between cells, by a thread, is for nobody.
            self.shown(process);
            return Ok(());
        };
        let number = running.reader;
        let done = match &event {
            CellEvent::Done { count, .. } => Some(*count),
            CellEvent::Display { .. } => None,
        };
        let known = self.processes.get_mut(&process);
        let reader = known.and_then(|known| known.readers.get_mut(&number));
        match reader {
            Some(reader) if offset < reader.at => {
                return Err(format!("an event at {offset}, behind {}", reader.at));
            }
            Some(reader) => {
                reader.events.push_back((offset, event));
                reader.tell_events();
                if done.is_some() {
                    reader.until = Some(offset);
                    // Up to there, whatever its window.
                    reader.limit = reader.limit.min(offset);
                }
            }
            // Nobody listens any more; the cell goes on.
            None => self.shown(process),
        }
        if let Some(count) = done {
            self.cell_done(&name, process, offset, count);
        }
        Ok(())
    }

    fn cell_done(&mut self, name: &str, process: ProcessId, offset: u64, count: u32) {
        self.last_used = Instant::now();
        if let Ok(context) = self.context(name) {
            context.running = None;
            context.seen = offset;
            context.count = count;
        }
        self.end_readers(process);
        self.next_cell(name);
    }

    /// What a context has displayed has been passed on to who listens.
    pub(super) fn shown(&mut self, process: ProcessId) {
        let context = self.contexts.of(process);
        if context.is_some_and(|context| std::mem::take(&mut context.untaken)) {
            self.say_small(&HostMessage::CellTaken { process });
        }
    }

    /// Has a cell interrupted at once whose reader has gone, if it is for that one alone.
    pub(super) fn end_cell_of(&mut self, process: ProcessId, reader: ReaderId) {
        let context = self.contexts.of(process);
        let running = context.and_then(|context| context.running.as_mut());
        let running = running.filter(|running| running.reader == reader);
        if let Some(running) = running.filter(|it| it.ends_with_reader && !it.was_interrupted) {
            running.deadline = Some(Instant::now());
        }
    }

    /// Interrupts cells at their time limit, and kills those that do not heed that.
    pub(super) fn interrupt_late_cells(&mut self, now: Instant) {
        let mut signals = Vec::new();
        for context in self.contexts.by_name.values_mut() {
            let Some(running) = &mut context.running else {
                continue;
            };
            if running.deadline.is_none_or(|deadline| deadline > now) {
                continue;
            }
            if running.was_interrupted {
                running.deadline = None;
                signals.push((context.process, KILL));
            } else {
                running.was_interrupted = true;
                running.deadline = Some(now + INTERRUPT_MAX);
                signals.push((context.process, INTERRUPT));
            }
        }
        for (process, signal) in signals {
            self.send_signal(process, signal);
        }
    }

    /// A process has ended, or has not started: if it was a context's, that is dead.
    pub(super) fn context_ended(&mut self, process: ProcessId, how: &ProcessState, why: &str) {
        let Some(context) = self.contexts.of(process) else {
            return;
        };
        let name = context.spec.name.clone();
        let why = context.dead.get_or_insert_with(|| match how {
            ProcessState::Ended { status, .. } => describe(*status),
            _ => why.to_owned(),
        });
        let why = why.clone();
        // Its output has come; then its reader is told that it has ended.
        context.running = None;
        let waiting = std::mem::take(&mut context.waiting);
        for (_, reply) in waiting {
            let error = LiveError::ContextDead(name.clone(), why.clone());
            let _ = reply.send(Err(error));
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match status {
        ExitStatus::Code(code) => format!("its interpreter has ended (exit status {code})"),
        ExitStatus::Signal {
            out_of_memory: true,
            ..
        } => "its interpreter was killed because the guest ran out of memory".to_owned(),
        ExitStatus::Signal { signal, .. } => {
            format!("its interpreter was killed by signal {signal}")
        }
    }
}
