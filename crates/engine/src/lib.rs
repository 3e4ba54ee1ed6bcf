//! The engine: zygotes, sandboxes, their limits and lifecycles. Policy lives here; `/dev/kvm`,
//! guest memory and machine state do not.
//!
//! One owner task a sandbox, one a zygote process; everything else sends them messages.

mod capture;
mod conversation;
mod identity;
mod sandbox;
mod socket;
mod zygote;

pub use capture::{CAPTURE_MAX_BYTES, Captured, capture};
pub use sandbox::{Event, Outcome, RunRequest, RunResult, Stdin, run};
pub use zygote::{EngineConfig, Runner, Zygote, ZygoteError};
pub use zygote_protocol::{ExitStatus, Program, PythonSource, StartFailure};
