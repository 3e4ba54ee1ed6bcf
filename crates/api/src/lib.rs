//! The types of the API, version 1: what the engine's server and its clients say to each other. JSON
//! over HTTP; streams are NDJSON (one object a line) or, from the server, server-sent events. No I/O.

mod behalf;
mod branch;
mod code;
mod collect;
mod diff;
mod error;
mod exec;
mod file;
mod lines;
mod moment;
mod octets;
mod sandbox;
mod status;
mod template;
mod time;

pub use behalf::{ON_BEHALF, OnBehalf};
pub use branch::{BranchPause, BranchRequest, Branched, PauseRequest};
pub use code::{
    Bundle, CodeEvent, CodeRequest, CodeResult, ContextInfo, ContextList, ContextRequest, Exception,
};
pub use collect::{COLLECTED_MAX_BYTES, Collected, OutputBudget};
pub use diff::{Diff, DiffChange, DiffRequest, DiffSide, FileDiff};
pub use error::{ErrorBody, ErrorCode, Failure, with_causes};
pub use exec::{
    BatchRequest, BatchResult, CommandRequest, ExecEvent, ExecInput, ExecRequest, ExecResult,
    GetPiece, GotFile, ProgramFile, SentFile, SignalRequest,
};
pub use file::{Done, FileAction, FileEvent, FileInfo, FileList, FileResult, FileType};
pub use lines::{LineSplitter, LineTooLong};
pub use moment::{
    MomentInfo, MomentList, MomentPolicy, MomentRequest, PublishRequest, RollbackRequest,
};
pub use octets::{Octets, base64, from_base64};
pub use sandbox::{
    AttachRequest, CreateEvent, OnTimeout, ProcessEvent, ProcessInfo, ProcessInput, ProcessList,
    ProcessOutput, ProcessRequest, ProcessResult, ProcessSignal, SandboxChange, SandboxEnd,
    SandboxEvent, SandboxEvents, SandboxHappening, SandboxInfo, SandboxList, SandboxRequest,
    SandboxState, SandboxStats, TerminalSize,
};
pub use status::{
    Health, HealthAnswer, LabStatus, PlaceKind, PoolStatus, PublicHealth, RunsStatus, Status,
    StopRequest, Stopped, TemplateHealth,
};
pub use template::{
    BuildEvent, BuildRequest, Built, PipPackage, RemoveTemplate, Removed, TemplateDetail,
    TemplateInfo, TemplateList, UnusableTemplate,
};
pub use time::rfc3339;

/// Content type of a stream of objects, one a line.
pub const NDJSON: &str = "application/x-ndjson";
/// Content type of server-sent events.
pub const SSE: &str = "text/event-stream";
/// Bytes of a file or of standard input that our own clients send in one line.
pub const CHUNK_MAX_BYTES: usize = 64 * 1024;
/// Longest line of a stream, and longest request that is not a stream: files go in as `data` lines.
pub const LINE_MAX_BYTES: usize = 16 << 20;
