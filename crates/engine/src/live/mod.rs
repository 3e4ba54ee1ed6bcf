//! Sandboxes that live: each has an id, perhaps a name, processes, and a life that ends when its owner
//! says so, or when its time is over. One owner task each ([`owner`]), which is told by messages what
//! is wanted; what is known of a sandbox can be looked at without asking it.

mod adopt;
mod asleep;
mod attachment;
mod branch;
mod contexts;
mod create;
mod diff;
mod error;
mod journal;
mod limits;
mod moments;
mod note;
mod owner;
mod phase;
mod process;
mod publish;
mod record;
mod registry;
mod sandbox;

pub use adopt::Adopted;
pub use attachment::Attachment;
pub use branch::{BranchSpec, Branched, Held};
pub use contexts::{CellSpec, ContextInfo, ContextSpec, DEFAULT as DEFAULT_CONTEXT};
pub use diff::{DiffSpec, Difference, FileDifference, Side};
pub use error::LiveError;
pub use journal::{Entry, Happening, Journal};
pub use limits::{INPUT_WINDOW_BYTES, LiveLimits, READER_WINDOW_BYTES};
pub use moments::{MomentInfo, MomentPolicy};
pub use phase::{End, EndReason, Phase};
pub use process::{Piece, ProcessInfo, ProcessSpec, ProcessState};
pub use publish::PublishSpec;
pub(crate) use publish::{Contexts, contexts_of};
pub use registry::Registry;
pub use sandbox::{Attach, RingState, Sandbox, SandboxSpec, Status};
