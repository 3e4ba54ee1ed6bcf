//! `/v1/sandboxes/{id}/branch`: children of a sandbox that go on where it is.

use crate::sandbox::SandboxInfo;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /v1/sandboxes/{id}/branch`: children to make, all or none. The sandbox goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BranchRequest {
    /// How many.
    #[schema(default = 1, minimum = 1)]
    pub count: u32,
    /// A moment that is kept: its name, its number (`@7`), or counted from the newest (`@-1`); absent: now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// A name; of several children, what theirs begin with: `NAME-1`, `NAME-2` …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How long each lives, in seconds, 0: until it is ended; absent: as long as the sandbox was to live from
    /// its making on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<f64>,
    /// How long each lives without being used, in seconds, 0: for any time; absent: as the sandbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_seconds: Option<f64>,
    /// Whether its interpreters draw random numbers that are not those that the sandbox will draw. The kernel
    /// and TLS always do.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reseed: bool,
    /// How long its processes may take to stop, in seconds.
    #[schema(default = 5.0)]
    pub freeze_seconds: f64,
    /// Whether to go on although some have not stopped by then. Those are in the guest's kernel, and stop
    /// before they come out of it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// What an object with no field says.
impl Default for BranchRequest {
    fn default() -> Self {
        Self {
            count: 1,
            at: None,
            name: None,
            ttl_seconds: None,
            idle_seconds: None,
            reseed: false,
            freeze_seconds: 5.0,
            force: false,
        }
    }
}

/// `POST /v1/sandboxes/{id}/pause`: to disk, where it costs no memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PauseRequest {
    /// How long its processes may take to stop, in seconds.
    #[schema(default = 5.0)]
    pub freeze_seconds: f64,
    /// Whether to go on although some have not stopped by then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// What an object with no field says.
impl Default for PauseRequest {
    fn default() -> Self {
        Self {
            freeze_seconds: 5.0,
            force: false,
        }
    }
}

/// The children, and what they have cost their source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Branched {
    /// They run.
    pub sandboxes: Vec<SandboxInfo>,
    /// How long the source stood still when they parted from it, in microseconds.
    pub pause_us: u32,
    /// What for.
    pub pause: BranchPause,
    /// How long its processes took to stop before that, in microseconds.
    pub freeze_us: u64,
    /// Whether all of them had stopped.
    pub all_frozen: bool,
    /// Milliseconds from the request until all children had answered.
    pub total_time_ms: f64,
}

/// What a machine stands still for, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BranchPause {
    /// Until its vCPUs had left the guest.
    pub stop_us: u32,
    /// Reading the state of vCPUs and devices.
    pub save_us: u32,
    /// fork(2) of its process.
    pub fork_us: u32,
    /// Until its vCPUs could go on.
    pub resume_us: u32,
}
