//! Branches of a sandbox, one after the other: its guest stops its processes, its runner forks, and both go
//! on.

use super::Owner;
use crate::live::branch::{Held, Moment};
use crate::live::error::LiveError;
use crate::live::phase::EndReason;
use crate::live::sandbox::Command;
use crate::sandbox::told;
use crate::zygote::Zygote;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;
use zygote_protocol::HostMessage;
use zygote_runner::control::{FromRunner, Pause, ToRunner, decode, encode};
use zygote_runner::packet;

/// How long a guest may stay as it is, while it is written to disk.
const STAY_MAX: Duration = Duration::from_secs(3600);
/// Commands that wait for a branch before others wait, too.
const HELD_BACK_MAX: usize = 64;

/// A branch that is wanted.
pub(in crate::live) struct BranchRequest {
    /// How long its processes may take to stop.
    pub limit: Duration,
    /// Whether to go on although some are in the kernel by then.
    pub anyway: bool,
    /// Whether the guest stays as it is then, until it is told to go on or to end.
    pub stays: bool,
    pub reply: oneshot::Sender<Result<Moment, LiveError>>,
}

/// All that are wanted.
#[derive(Default)]
pub(super) struct Branches {
    waiting: VecDeque<BranchRequest>,
    current: Option<Current>,
    /// What could not be done with processes that stand still, in its order.
    held_back: VecDeque<Command>,
}

struct Current {
    request: BranchRequest,
    begun: Instant,
    deadline: Instant,
    stage: Stage,
}

enum Stage {
    /// The guest stops its processes.
    Holding,
    /// The runner forks; the engine's end of the child's control socket.
    Forking {
        number: u64,
        held: Held,
        socket: OwnedFd,
    },
    /// The guest stays as it is.
    Staying,
}

impl Branches {
    pub fn deadline(&self) -> Option<Instant> {
        Some(self.current.as_ref()?.deadline)
    }

    /// Whether the runner is to be listened to.
    pub fn is_forking(&self) -> bool {
        let is_forking = |current: &Current| matches!(current.stage, Stage::Forking { .. });
        self.current.as_ref().is_some_and(is_forking)
    }

    /// Whether there is none on its way.
    pub fn is_idle(&self) -> bool {
        self.current.is_none()
    }

    /// A command that has waited, once it can be done.
    pub fn next_held_back(&mut self) -> Option<Command> {
        if self.is_idle() {
            self.held_back.pop_front()
        } else {
            None
        }
    }

    /// Whether no more commands can be taken.
    pub fn is_full(&self) -> bool {
        self.held_back.len() >= HELD_BACK_MAX
    }

    /// A command that has to wait, unless there is no branch on its way.
    pub fn hold_back(&mut self, command: Command) -> Option<Command> {
        let needs_processes = matches!(
            command,
            Command::Start(..) | Command::Context(_) | Command::Rollback { .. }
        );
        if (self.current.is_none() && self.held_back.is_empty()) || !needs_processes {
            return Some(command);
        }
        self.held_back.push_back(command);
        None
    }
}

impl Owner {
    pub(super) fn branch(&mut self, request: BranchRequest) {
        self.branches.waiting.push_back(request);
        self.begin_branch();
    }

    /// Begins the next one, unless what has waited comes first.
    pub(super) fn begin_branch(&mut self) {
        if self.branches.current.is_some() || !self.branches.held_back.is_empty() {
            return;
        }
        let Some(request) = self.branches.waiting.pop_front() else {
            return;
        };
        self.say_small(&HostMessage::Hold {
            limit_ms: u32::try_from(request.limit.as_millis()).unwrap_or(u32::MAX),
            anyway: request.anyway,
        });
        let begun = Instant::now();
        self.branches.current = Some(Current {
            deadline: begun + request.limit + self.source.zygote().patience(),
            request,
            begun,
            stage: Stage::Holding,
        });
    }

    /// The guest's processes stand still.
    pub(super) fn held(&mut self, all: bool) {
        let Some(current) = &mut self.branches.current else {
            // Too late: it has been told to let them go on.
            return;
        };
        if !matches!(current.stage, Stage::Holding) {
            return;
        }
        let held = Held {
            took: current.begun.elapsed(),
            all,
        };
        match ask(&self.control) {
            Ok((number, socket)) => {
                current.stage = Stage::Forking {
                    number,
                    held,
                    socket,
                };
            }
            Err(error) => self.end_branch(Err(LiveError::NotBranched(error.to_string()))),
        }
    }

    /// They do not.
    pub(super) fn not_held(&mut self, message: String) {
        if let Some(current) = &self.branches.current
            && matches!(current.stage, Stage::Holding)
        {
            self.end_branch(Err(LiveError::NotBranched(message)));
        }
    }

    /// What the runner says while it forks. Gives back why the sandbox ends, if it does.
    pub(super) fn hear_runner(
        &mut self,
        heard: io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>>,
    ) -> Option<EndReason> {
        let died = |why: &str| Some(EndReason::Died(why.to_owned()));
        let Ok(Some((bytes, descriptors))) = heard else {
            return died("its process has ended");
        };
        match decode(&bytes) {
            Ok(FromRunner::Branched { number, pause }) => {
                if let (true, Some(process)) =
                    (self.is_asked(number), descriptors.into_iter().next())
                {
                    self.branched(pause, process);
                }
                None
            }
            Ok(FromRunner::BranchFailed { number, message }) => {
                if self.is_asked(number) {
                    self.end_branch(Err(LiveError::NotBranched(message)));
                }
                None
            }
            // From its beginning.
            Ok(FromRunner::Parked) => None,
            Ok(FromRunner::Stopped { reason, console }) => died(&told(&reason, &console)),
            Err(_) => died("its process sent nonsense"),
        }
    }

    fn is_asked(&self, asked: u64) -> bool {
        match self.branches.current.as_ref().map(|current| &current.stage) {
            Some(Stage::Forking { number, .. }) => *number == asked,
            _ => false,
        }
    }

    fn branched(&mut self, pause: Pause, process: OwnedFd) {
        let Some(current) = self.branches.current.take() else {
            return;
        };
        let Stage::Forking { held, socket, .. } = current.stage else {
            return;
        };
        let at = SystemTime::now();
        let contexts = self.contexts.written();
        let parent = self.source.zygote();
        let (reply, stays) = (current.request.reply, current.request.stays);
        // The source does not wait for that.
        tokio::spawn(async move {
            let zygote = Zygote::branched(&parent, socket, process).await;
            let moment = zygote.map(|zygote| Moment {
                zygote: Arc::new(zygote),
                contexts,
                at,
                held,
                pause,
            });
            // Who asked may have gone; the branch ends then.
            let _ = reply.send(moment.map_err(|error| LiveError::NotBranched(error.to_string())));
        });
        if stays {
            let (reply, _) = oneshot::channel();
            let begun = Instant::now();
            self.branches.current = Some(Current {
                request: BranchRequest {
                    reply,
                    limit: current.request.limit,
                    anyway: current.request.anyway,
                    stays,
                },
                begun,
                deadline: begun + STAY_MAX,
                stage: Stage::Staying,
            });
        } else {
            self.go_on();
        }
    }

    /// A guest that has stayed as it was goes on.
    pub(super) fn stay_no_longer(&mut self) {
        let current = self.branches.current.as_ref();
        if current.is_some_and(|current| matches!(current.stage, Stage::Staying)) {
            self.branches.current = None;
            self.go_on();
        }
    }

    /// What has taken too long.
    pub(super) fn end_late_branch(&mut self, now: Instant) {
        let current = self.branches.current.as_ref();
        if let Some(late) = current.filter(|current| current.deadline <= now) {
            let seconds = (late.deadline - late.begun).as_secs();
            self.end_branch(Err(LiveError::Late(seconds)));
        }
    }

    fn end_branch(&mut self, result: Result<Moment, LiveError>) {
        if let Some(current) = self.branches.current.take() {
            let _ = current.request.reply.send(result);
        }
        self.go_on();
    }

    /// Its processes go on, and what has waited for that is done.
    fn go_on(&mut self) {
        self.say_small(&HostMessage::Release);
        if self.branches.held_back.is_empty() {
            self.begin_branch();
        }
    }
}

/// Has a runner fork; gives back the request's number and the engine's end of the child's control socket.
fn ask(control: &impl AsFd) -> io::Result<(u64, OwnedFd)> {
    let (ours, theirs) = packet::pair()?;
    let (number, _) = Uuid::new_v4().as_u64_pair();
    let message = encode(&ToRunner::Branch { number }).map_err(io::Error::other)?;
    packet::send(control, &message, &[theirs.as_fd()])?;
    Ok((number, ours))
}
