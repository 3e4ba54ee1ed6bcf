//! `/v1/sandboxes` and `/v1/events`: sandboxes that live.

mod branch;
mod code;
mod diff;
mod errno;
mod events;
mod files;
mod machine;
mod moment;
mod process;
mod routes;
mod socket;
mod words;

pub use branch::freeze_limit;
pub use moment::policy as moment_policy;
pub use process::attached;
pub use routes::router;
pub use words::{live_failure, sandbox_info};
