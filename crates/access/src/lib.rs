//! Who may ask an engine for what, and how much of it: keys, the tenants that they stand for, and limits.
//! Knows nothing of HTTP, nor of sandboxes.

mod audit;
mod caller;
mod door;
mod file;
mod gate;
mod key;
mod secret;

pub use audit::{Audit, Entry};
pub use caller::{Caller, Role};
pub use door::{Access, KeysWanted, Refusal};
pub use file::{KeyFile, KeyFileError};
pub use gate::Held;
pub use key::{Key, Limits, NewKey};
pub use secret::Secret;
