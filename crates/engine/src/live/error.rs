//! Why something could not be done with a live sandbox.

use crate::engine::EngineError;
use crate::share::OverQuota;
use zygote_protocol::StartFailure;

/// See the sentences.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// Nothing is known of it.
    #[error("there is no sandbox {0}")]
    NotFound(String),
    /// The beginning of an id, of several sandboxes.
    #[error("{0} is the beginning of the ids of {1} sandboxes")]
    Ambiguous(String, usize),
    /// Another one has it.
    #[error("the name {0} is taken by the sandbox {1}")]
    NameTaken(String, String),
    /// It cannot be a name.
    #[error("{0:?} is no name for a sandbox")]
    BadName(String),
    /// It has ended.
    #[error("the sandbox {id} has ended: {why}")]
    Ended {
        /// Which.
        id: String,
        /// Why.
        why: String,
    },
    /// It could not be made, or died at once.
    #[error("the sandbox has died: {0}")]
    NotMade(String),
    /// It has no such process.
    #[error("the sandbox has no process {0}, or has forgotten it")]
    NoProcess(u32),
    /// The process has ended.
    #[error("process {0} has ended")]
    ProcessEnded(u32),
    /// Its input has ended, or it never had one.
    #[error("process {0} takes no input")]
    NoInput(u32),
    /// It runs without a terminal.
    #[error("process {0} has no terminal")]
    NoTerminal(u32),
    /// A limit.
    #[error("{count} {what}, as many as there may be")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        count: usize,
    },
    /// It has no such context.
    #[error("the sandbox has no context {0}")]
    NoContext(String),
    /// There is one already.
    #[error("the sandbox has a context {0} already")]
    ContextTaken(String),
    /// Its interpreter has ended.
    #[error("the context {0} has died: {1}")]
    ContextDead(String, String),
    /// A language that there is no interpreter for.
    #[error("there is no interpreter for {0:?}")]
    NoLanguage(String),
    /// The program did not start.
    #[error("{message}")]
    StartFailed {
        /// As a shell tells it apart.
        reason: StartFailure,
        /// The guest's sentence.
        message: String,
    },
    /// It could not be forked.
    #[error("the sandbox could not be branched: {0}")]
    NotBranched(String),
    /// No such moment is kept.
    #[error("the sandbox has no moment {0}")]
    NoMoment(String),
    /// There is one already.
    #[error("the sandbox has a moment {0} already")]
    MomentTaken(String),
    /// It is on disk.
    #[error("the sandbox {0} is paused")]
    Paused(String),
    /// It is not.
    #[error("the sandbox {0} is not paused")]
    NotAsleep(String),
    /// It could not be put there.
    #[error("the sandbox could not be paused, and goes on: {0}")]
    NotPaused(String),
    /// It could not be compared.
    #[error("the sandbox could not be compared: {0}")]
    NotCompared(String),
    /// No template could be made of it.
    #[error("no template could be made of the sandbox: {0}")]
    NotPublished(String),
    /// It could not be had back.
    #[error("the sandbox could not be resumed, and stays paused: {0}")]
    NotResumed(String),
    /// The guest does not answer.
    #[error("the guest did not answer within {0} s")]
    Late(u64),
    /// The request does not fit into a message.
    #[error("the request is too large for the guest: {0}")]
    TooLarge(String),
    /// An idempotency key, used for something else before.
    #[error("this idempotency key was used for another request")]
    KeyReused,
    /// Its tenant may not have more at once.
    #[error(transparent)]
    OverQuota(#[from] OverQuota),
    /// No sandbox could be made.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
