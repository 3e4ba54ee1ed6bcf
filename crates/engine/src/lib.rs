//! The engine: zygotes, sandboxes, their limits and lifecycles. Policy lives here; `/dev/kvm`,
//! guest memory and machine state do not.
//!
//! One owner task a sandbox, one a zygote process; everything else sends them messages.

mod admission;
mod census;
mod conversation;
mod engine;
mod fork;
mod held;
mod identity;
pub mod live;
mod loaded;
mod pool;
mod pressure;
mod queue;
mod sandbox;
mod saved;
mod share;
mod socket;
mod usage;
mod walls;
mod zygote;

pub use admission::{Admission, Budget, Ended, NoRoom};
pub use census::{Census, Taken};
pub use engine::{Engine, EngineError, LoadedStatus, Note, Order, Settings};
pub use fork::ForkError;
pub use held::{HolderConfig, holder_main};
pub use pool::{Pool, PoolConfig, PoolStats};
pub use queue::{NoTurn, QueueLimits, QueueStats};
pub use sandbox::{Event, Outcome, RunRequest, RunResult, Stdin, run};
pub use saved::SaveError;
pub use share::{Allowance, OverQuota, Quota};
pub use usage::Usage;
pub use walls::remedy as walls_remedy;
pub use zygote::{EngineConfig, PATIENCE, PATIENCE_EMULATED, Runner, Zygote, ZygoteError};
pub use zygote_protocol::{
    Buffering, CellError, CellEvent, ExitStatus, FileAnswer, FileChange, FileEntry, FileFailure,
    FileKind, FileTask, Got, PROTOCOL_VERSION, Program, Put, PythonSource, Representation,
    STREAM_CHUNK_MAX_BYTES, StartFailure, Stream, TerminalSize, WriteHow, take_answer,
};
pub use zygote_runner::control::{MissingWall, Pause};
pub use zygote_snapshot::RunKind;
