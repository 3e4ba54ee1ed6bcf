//! A live sandbox from outside: what is known of it, and what it can be told.

use super::asleep::Asleep;
use super::attachment::{Attachment, Notice};
use super::branch::Moment;
use super::contexts::{CellSpec, ContextCommand, ContextInfo, ContextSpec};
use super::error::LiveError;
use super::limits::LiveLimits;
use super::moments::{MomentInfo, MomentPolicy};
use super::owner::BranchRequest;
use super::phase::{End, Phase};
use super::process::{ProcessInfo, ProcessSpec, ProcessState};
use crate::usage::Usage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use uuid::Uuid;
use zygote_protocol::{ProcessId, TerminalSize};

/// Commands that wait for a sandbox's owner.
const COMMANDS_MAX: usize = 64;

/// What a sandbox is made from, and how long it may live.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// The template's name.
    pub template: String,
    /// One build of it; `None`: what the name stands for now.
    pub build: Option<String>,
    /// A name of its own: nobody else's of its tenant.
    pub name: Option<String>,
    /// Whose it is; `None`: the engine's owner's.
    #[serde(default)]
    pub tenant: Option<String>,
    /// Variables for all of its processes.
    pub env: Vec<(String, String)>,
    /// How long it lives, from its making on; `None`: until it is ended.
    pub ttl: Option<Duration>,
    /// How long it lives without being used; `None`: for any time.
    pub idle: Option<Duration>,
    /// Whether it may run although main walls of the jail are missing.
    pub allow_missing_walls: bool,
    /// Moments that are kept without being asked for.
    pub moments: Option<MomentPolicy>,
}

/// What changes in a sandbox's life.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where it is.
    pub phase: Phase,
    /// Its end, once it is on its way or over.
    pub end: Option<End>,
    /// When its time to live is over.
    pub expires: Option<SystemTime>,
    /// How long it lives without being used.
    pub idle: Option<Duration>,
    /// Request to activation.
    pub fork_time: Option<Duration>,
    /// What it takes on disk, in bytes, if it is paused.
    pub disk_bytes: Option<u64>,
}

/// A process as others see it.
#[derive(Clone)]
pub(super) struct Seen {
    pub info: ProcessInfo,
    pub state: watch::Receiver<ProcessState>,
    pub input: Arc<Semaphore>,
    pub is_task: bool,
}

/// A live sandbox. It lives on when this is dropped.
pub struct Sandbox {
    /// Its id.
    pub id: Uuid,
    /// What it was made from.
    pub spec: SandboxSpec,
    /// The build of its template.
    pub build: String,
    /// When it was asked for.
    pub created: SystemTime,
    /// The sandbox that it is a branch of.
    pub parent: Option<Uuid>,
    /// The idempotency key that it was made with.
    pub(super) key: Option<String>,
    pub(super) limits: LiveLimits,
    pub(super) status: watch::Sender<Status>,
    pub(super) processes: Mutex<BTreeMap<ProcessId, Seen>>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) notices: mpsc::UnboundedSender<Notice>,
}

/// What its owner can be asked for.
pub(super) enum Command {
    Start(ProcessSpec, oneshot::Sender<StartReply>),
    Attach(Attach, oneshot::Sender<Result<Attachment, LiveError>>),
    Describe(oneshot::Sender<Vec<RingState>>),
    Input(ProcessId, Vec<u8>),
    InputEnd(ProcessId),
    Signal {
        process: ProcessId,
        signal: u8,
        group: bool,
    },
    Resize(ProcessId, TerminalSize),
    Extend {
        ttl: Option<Option<Duration>>,
        idle: Option<Option<Duration>>,
        reply: oneshot::Sender<()>,
    },
    Measure(oneshot::Sender<Option<Usage>>),
    /// Somebody uses it.
    Touch,
    Branch(BranchRequest),
    GoOn,
    Sleep(Asleep),
    Wake(oneshot::Sender<Result<(), LiveError>>),
    Keep {
        name: Option<String>,
        moment: Box<Moment>,
        reply: oneshot::Sender<Result<MomentInfo, LiveError>>,
    },
    Moments(oneshot::Sender<Vec<MomentInfo>>),
    Moment(String, oneshot::Sender<Result<Arc<Moment>, LiveError>>),
    ForgetMoment(String, oneshot::Sender<Result<(), LiveError>>),
    Rollback {
        to: String,
        reseed: bool,
        reply: oneshot::Sender<Result<(), LiveError>>,
    },
    Context(ContextCommand),
    End(super::EndReason),
}

/// A process that has been asked for, and its output if that was.
pub(super) struct StartReply {
    pub started: oneshot::Receiver<Result<ProcessInfo, LiveError>>,
    pub output: Option<Attachment>,
}

/// Somebody wants to read a process's output.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attach {
    /// Which process.
    pub process: ProcessId,
    /// From which offset on; `None`: from the first byte that is kept.
    pub from: Option<u64>,
    /// Whether to wait for more, to the process's end.
    pub follow: bool,
    /// Whether the process waits when this reader does not keep up; else it misses some.
    pub holds: bool,
}

/// What is kept of a process's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingState {
    /// Which process.
    pub process: ProcessId,
    /// Bytes that are no longer kept: the offset of the first that is.
    pub dropped_bytes: u64,
    /// Bytes that are kept.
    pub kept_bytes: u64,
}

/// What a sandbox's owner is told from outside.
pub(super) struct Inbox {
    pub commands: mpsc::Receiver<Command>,
    pub notices: mpsc::UnboundedReceiver<Notice>,
}

/// What a sandbox is, from its making on.
pub(super) struct Birth {
    pub id: Uuid,
    pub spec: SandboxSpec,
    pub build: String,
    pub created: SystemTime,
    pub parent: Option<Uuid>,
    pub key: Option<String>,
}

impl Sandbox {
    /// One without an owner so far.
    pub(super) fn new(birth: Birth, limits: LiveLimits, status: Status) -> (Arc<Self>, Inbox) {
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (notices, told) = mpsc::unbounded_channel();
        let sandbox = Arc::new(Self {
            id: birth.id,
            spec: birth.spec,
            build: birth.build,
            created: birth.created,
            parent: birth.parent,
            key: birth.key,
            limits,
            status: watch::Sender::new(status),
            processes: Mutex::default(),
            commands,
            notices,
        });
        let inbox = Inbox {
            commands: inbox,
            notices: told,
        };
        (sandbox, inbox)
    }

    /// What changes in its life, as of now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Whether it is there for somebody of a tenant; `None`: for somebody who has all.
    pub fn belongs_to(&self, tenant: Option<&str>) -> bool {
        tenant.is_none() || self.spec.tenant.as_deref() == tenant
    }

    /// In whose line it waits.
    pub(crate) fn whose(&self) -> &str {
        self.spec.tenant.as_deref().unwrap_or_default()
    }

    /// Its id as text.
    pub fn id_text(&self) -> String {
        self.id.to_string()
    }

    pub(super) fn table(&self) -> MutexGuard<'_, BTreeMap<ProcessId, Seen>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// All processes that are known of it, in the order of their starts.
    pub fn processes(&self) -> Vec<ProcessInfo> {
        let table = self.table();
        let shown = table.values().filter(|seen| !seen.is_task);
        shown.map(|seen| seen.info.clone()).collect()
    }

    /// Shows a process of a sandbox that has ended, of which that is all there is.
    pub(super) fn show_ended(&self, info: ProcessInfo) {
        let input = Semaphore::new(0);
        input.close();
        let seen = Seen {
            state: watch::Sender::new(info.state.clone()).subscribe(),
            info,
            input: Arc::new(input),
            is_task: false,
        };
        self.table().insert(seen.info.id, seen);
    }

    fn seen(&self, process: ProcessId) -> Result<Seen, LiveError> {
        let seen = self.table().get(&process).cloned();
        seen.ok_or(LiveError::NoProcess(process))
    }

    /// One of them.
    ///
    /// # Errors
    /// If there is none of that number.
    pub fn process(&self, process: ProcessId) -> Result<ProcessInfo, LiveError> {
        Ok(self.seen(process)?.info)
    }

    /// Why it takes no more commands.
    pub(super) fn gone(&self) -> LiveError {
        let status = self.status.borrow();
        if status.phase == Phase::Paused {
            return LiveError::Paused(self.id_text());
        }
        let why = status.end.as_ref().map(|end| end.reason.to_string());
        LiveError::Ended {
            id: self.id_text(),
            why: why.unwrap_or_else(|| "its owner has gone".to_owned()),
        }
    }

    pub(super) async fn tell(&self, command: Command) -> Result<(), LiveError> {
        let told = self.commands.send(command).await;
        told.map_err(|_| self.gone())
    }

    pub(super) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, LiveError> {
        let (reply, answer) = oneshot::channel();
        self.tell(command(reply)).await?;
        let limit = self.limits.start_max;
        let answered = tokio::time::timeout(limit, answer).await;
        let answered = answered.map_err(|_| LiveError::Late(limit.as_secs()))?;
        answered.map_err(|_| self.gone())
    }

    /// Starts a process. Its output is given back if the spec says so; dropping that does not end it.
    ///
    /// # Errors
    /// If it does not start, a limit is reached, or the sandbox has ended.
    pub async fn start(
        &self,
        spec: ProcessSpec,
    ) -> Result<(ProcessInfo, Option<Attachment>), LiveError> {
        if spec.task.is_none() {
            self.keep_before().await;
        }
        let reply = self.ask(|reply| Command::Start(spec, reply)).await?;
        let limit = self.limits.start_max;
        let started = tokio::time::timeout(limit, reply.started).await;
        let started = started.map_err(|_| LiveError::Late(limit.as_secs()))?;
        let info = started.map_err(|_| self.gone())??;
        Ok((info, reply.output))
    }

    /// Reads a process's output.
    ///
    /// # Errors
    /// If there is no such process, too many read already, or the sandbox has ended.
    pub async fn attach(&self, attach: Attach) -> Result<Attachment, LiveError> {
        self.seen(attach.process)?;
        self.ask(|reply| Command::Attach(attach, reply)).await?
    }

    /// What is kept of its processes' output.
    ///
    /// # Errors
    /// If the sandbox has ended.
    pub async fn rings(&self) -> Result<Vec<RingState>, LiveError> {
        self.ask(Command::Describe).await
    }

    /// Gives a process input, once it has room for it.
    ///
    /// # Errors
    /// If it takes none, or none any more.
    pub async fn input(&self, process: ProcessId, data: Vec<u8>) -> Result<(), LiveError> {
        let seen = self.seen(process)?;
        for piece in data.chunks(zygote_protocol::STREAM_CHUNK_MAX_BYTES) {
            let room = seen.input.acquire_many(piece.len() as u32).await;
            room.map_err(|_| self.no_input(process))?.forget();
            self.tell(Command::Input(process, piece.to_vec())).await?;
        }
        Ok(())
    }

    fn no_input(&self, process: ProcessId) -> LiveError {
        match self.seen(process) {
            Ok(seen) if seen.info.state == ProcessState::Lost => self.gone(),
            Ok(seen) if seen.info.state.is_over() => LiveError::ProcessEnded(process),
            _ => LiveError::NoInput(process),
        }
    }

    /// Ends a process's input.
    ///
    /// # Errors
    /// If there is no such process, or the sandbox has ended.
    pub async fn end_input(&self, process: ProcessId) -> Result<(), LiveError> {
        self.seen(process)?;
        self.tell(Command::InputEnd(process)).await
    }

    /// Sends a signal to a process, or to all of its group.
    ///
    /// # Errors
    /// If there is no such process, or it has ended.
    pub async fn signal(
        &self,
        process: ProcessId,
        signal: u8,
        group: bool,
    ) -> Result<(), LiveError> {
        if self.seen(process)?.info.state.is_over() {
            return Err(LiveError::ProcessEnded(process));
        }
        self.tell(Command::Signal {
            process,
            signal,
            group,
        })
        .await
    }

    /// Gives a process's terminal another size.
    ///
    /// # Errors
    /// If there is no such process, or it has no terminal.
    pub async fn resize(&self, process: ProcessId, size: TerminalSize) -> Result<(), LiveError> {
        if !self.seen(process)?.info.has_terminal {
            return Err(LiveError::NoTerminal(process));
        }
        self.tell(Command::Resize(process, size)).await
    }

    /// Waits for a process's end.
    ///
    /// # Errors
    /// If there is no such process.
    pub async fn wait(&self, process: ProcessId) -> Result<ProcessInfo, LiveError> {
        let Seen {
            info, mut state, ..
        } = self.seen(process)?;
        // Its sender is dropped only once it is over.
        let over = state.wait_for(ProcessState::is_over).await;
        let over = over.map_or(ProcessState::Lost, |state| state.clone());
        if over == ProcessState::Lost {
            // The sandbox may have gone back, to where there is another of this number.
            return Ok(ProcessInfo {
                state: over,
                ..info
            });
        }
        self.process(process)
    }

    /// Waits until it has ended; gives back why.
    pub async fn ended(&self) -> Option<End> {
        let mut status = self.status.subscribe();
        let ended = status.wait_for(|status| status.phase == Phase::Ended).await;
        ended.ok().and_then(|status| status.end.clone())
    }

    /// Gives it another time to live from now on, or another idle time; `Some(None)`: none.
    ///
    /// # Errors
    /// If it has ended.
    pub async fn extend(
        &self,
        ttl: Option<Option<Duration>>,
        idle: Option<Option<Duration>>,
    ) -> Result<(), LiveError> {
        self.ask(|reply| Command::Extend { ttl, idle, reply }).await
    }

    /// Makes a context.
    ///
    /// # Errors
    /// If there is one of that name, or a limit is reached.
    pub async fn create_context(&self, spec: ContextSpec) -> Result<ContextInfo, LiveError> {
        let command = |reply| Command::Context(ContextCommand::Create(spec, reply));
        self.ask(command).await?
    }

    /// Its contexts, by name.
    ///
    /// # Errors
    /// If it has ended.
    pub async fn contexts(&self) -> Result<Vec<ContextInfo>, LiveError> {
        self.ask(|reply| Command::Context(ContextCommand::List(reply)))
            .await
    }

    /// Runs code in a context, once those before it have ended: as long as that takes.
    ///
    /// # Errors
    /// If the context has died, a limit is reached, or the sandbox has ended.
    pub async fn run_cell(&self, spec: CellSpec) -> Result<Attachment, LiveError> {
        self.keep_before().await;
        let (reply, answer) = oneshot::channel();
        let command = Command::Context(ContextCommand::Run(spec, reply));
        self.tell(command).await?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Interrupts the cell that a context runs, if it runs one.
    ///
    /// # Errors
    /// If there is no such context, or it has died.
    pub async fn interrupt(&self, name: &str) -> Result<(), LiveError> {
        let command = |reply| ContextCommand::Interrupt(name.to_owned(), reply);
        self.ask(|reply| Command::Context(command(reply))).await?
    }

    /// Gives a context a new interpreter.
    ///
    /// # Errors
    /// If there is no such context, or none can be started.
    pub async fn restart(&self, name: &str) -> Result<ContextInfo, LiveError> {
        let command = |reply| ContextCommand::Restart(name.to_owned(), reply);
        self.ask(|reply| Command::Context(command(reply))).await?
    }

    /// Ends a context.
    ///
    /// # Errors
    /// If there is no such context.
    pub async fn remove_context(&self, name: &str) -> Result<(), LiveError> {
        let command = |reply| ContextCommand::Remove(name.to_owned(), reply);
        self.ask(|reply| Command::Context(command(reply))).await?
    }

    /// What it costs the host now.
    ///
    /// # Errors
    /// If it has ended.
    pub async fn usage(&self) -> Result<Option<Usage>, LiveError> {
        self.ask(Command::Measure).await
    }

    /// Has it forked as it is now, once the branches before that are there.
    pub(super) async fn branch(&self, limit: Duration, anyway: bool) -> Result<Moment, LiveError> {
        self.branch_and(limit, anyway, false).await
    }

    /// The same; with `stays` its guest stays as it is then, until [`Command::GoOn`] or [`Command::Sleep`].
    pub(super) async fn branch_and(
        &self,
        limit: Duration,
        anyway: bool,
        stays: bool,
    ) -> Result<Moment, LiveError> {
        let (reply, answer) = oneshot::channel();
        let request = BranchRequest {
            limit,
            anyway,
            stays,
            reply,
        };
        self.tell(Command::Branch(request)).await?;
        // Its owner has the deadlines.
        answer.await.map_err(|_| self.gone())?
    }

    /// It is used, though its guest is asked for nothing.
    pub(super) async fn touch(&self) {
        // One that has ended needs no word.
        let _ = self.tell(Command::Touch).await;
    }

    /// Keeps this moment of it, with a name or without; that is a use of it.
    ///
    /// # Errors
    /// If it cannot be branched, or there is one of that name.
    pub async fn keep(
        &self,
        name: Option<String>,
        limit: Duration,
        anyway: bool,
    ) -> Result<MomentInfo, LiveError> {
        self.touch().await;
        self.keep_unused(name, limit, anyway).await
    }

    pub(super) async fn keep_unused(
        &self,
        name: Option<String>,
        limit: Duration,
        anyway: bool,
    ) -> Result<MomentInfo, LiveError> {
        let moment = Box::new(self.branch(limit, anyway).await?);
        let command = |reply| Command::Keep {
            name,
            moment,
            reply,
        };
        self.ask(command).await?
    }

    /// Its moments that are kept, in their order.
    ///
    /// # Errors
    /// If it has ended.
    pub async fn moments(&self) -> Result<Vec<MomentInfo>, LiveError> {
        self.ask(Command::Moments).await
    }

    pub(super) async fn moment(&self, words: &str) -> Result<Arc<Moment>, LiveError> {
        self.ask(|reply| Command::Moment(words.to_owned(), reply))
            .await?
    }

    /// Keeps a moment no longer.
    ///
    /// # Errors
    /// If there is none of that name.
    pub async fn forget_moment(&self, words: &str) -> Result<(), LiveError> {
        self.ask(|reply| Command::ForgetMoment(words.to_owned(), reply))
            .await?
    }

    /// Goes back to a moment that is kept: by its name, its number (`@7`), or counted from the newest
    /// (`@-1`). What has run since is gone, and whoever waits for it is told. With `reseed`, interpreters
    /// draw other random numbers than they have drawn from there.
    ///
    /// # Errors
    /// If there is none, or it cannot be forked: then nothing has changed.
    pub async fn roll_back(&self, to: &str, reseed: bool) -> Result<(), LiveError> {
        let (reply, answer) = oneshot::channel();
        let to = to.to_owned();
        self.tell(Command::Rollback { to, reseed, reply }).await?;
        // Its owner has the deadlines.
        answer.await.map_err(|_| self.gone())?
    }

    /// Ends it, and waits until nothing is left of it.
    pub async fn end(&self, reason: super::EndReason) -> Option<End> {
        self.ask_to_end(reason).await;
        self.ended().await
    }

    pub(super) async fn ask_to_end(&self, reason: super::EndReason) {
        // One that takes no commands is ending already.
        let _ = self.commands.send(Command::End(reason)).await;
    }
}
