//! The engine that stays: a socket, a backend behind it, and its end. Where the host has no KVM the
//! machines are in a lab, and so is the engine that has them; this one passes on what needs it.
//!
//! Also the other side: finding the engine that is there, or starting one.

mod activated;
mod activity;
mod build;
mod build_process;
mod command;
mod config;
mod door;
mod embedded;
mod host;
mod keeper;
mod log;
mod port;
mod program;
mod serve;
mod socket;
mod start;
mod telemetry;
mod tls;

pub use axum::http::HeaderValue;
pub use build_process::{BuildsLock, build_main, builds_lock};
pub use config::{Again, Config, Door, LabSettings, Machines, TlsFiles, keys};
pub use embedded::Embedded;
pub use serve::{Ready, serve};
pub use socket::{SocketError, default_socket};
pub use start::{Found, READY, Starter, find};
pub use telemetry::Telemetry;
pub use tracing_subscriber::filter::LevelFilter;
pub use zygote_access::{Key, KeyFile, KeyFileError, KeysWanted, Limits, NewKey, Role};
pub use zygote_client::{Client, ClientError, Events, Octets};
pub use zygote_server::{recipe_failure, template_detail, template_failure, template_list};

/// Tells the program in a lab who holds the lock of builds.
pub const BUILDS_LOCK_HINT: &str = "ZYGOTE_BUILDS_LOCK";
