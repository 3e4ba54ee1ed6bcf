//! `/v1/sandboxes/{id}/moments`: earlier moments of a sandbox, and the way back.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// When moments of a sandbox are kept without being asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MomentPolicy {
    /// The newest so many are kept; older ones give way.
    #[schema(default = 10)]
    pub keep: u32,
    /// One each time, in seconds; 0: none.
    #[serde(skip_serializing_if = "is_zero")]
    pub every_seconds: f64,
    /// One before each program, and before each cell of code.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub on_exec: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &f64) -> bool {
    *number == 0.0
}

/// What an object with no field says.
impl Default for MomentPolicy {
    fn default() -> Self {
        Self {
            keep: 10,
            every_seconds: 0.0,
            on_exec: false,
        }
    }
}

/// `POST /v1/sandboxes/{id}/template`: a moment as a template, on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishRequest {
    /// What the template is to be called; one that was derived gives way.
    pub template: String,
    /// A moment that is kept; without, now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// How long the sandbox's processes may take to stop, in seconds.
    #[serde(default = "five")]
    #[schema(default = 5.0)]
    pub freeze_seconds: f64,
    /// Whether to go on although some have not stopped by then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

fn five() -> f64 {
    5.0
}

/// `POST /v1/sandboxes/{id}/moments`: keep this one, as long as the sandbox lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MomentRequest {
    /// What it is to be called; one without a name gives way to newer ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How long the sandbox's processes may take to stop, in seconds.
    #[schema(default = 5.0)]
    pub freeze_seconds: f64,
    /// Whether to go on although some have not stopped by then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// What an object with no field says.
impl Default for MomentRequest {
    fn default() -> Self {
        Self {
            name: None,
            freeze_seconds: 5.0,
            force: false,
        }
    }
}

/// A moment that is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MomentInfo {
    /// Counts from 1 in the sandbox's life.
    pub number: u64,
    /// What it is called.
    #[serde(default)]
    pub name: Option<String>,
    /// When it was, RFC 3339.
    pub at: String,
    /// The same, in seconds since 1970.
    pub at_unix_s: u64,
    /// How long the sandbox stood still for it, in microseconds.
    pub pause_us: u32,
    /// KiB of memory that it shares with nobody; absent if that is not known.
    #[serde(default)]
    pub memory_private_kib: Option<u64>,
}

/// The moments of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MomentList {
    /// In their order.
    pub moments: Vec<MomentInfo>,
}

/// `POST /v1/sandboxes/{id}/rollback`: back to a moment. What has run since is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RollbackRequest {
    /// A moment: by its name, its number (`@7`), or counted from the newest (`@-1`).
    #[schema(default = "@-1")]
    pub to: String,
    /// Whether its interpreters draw other random numbers than they have drawn from there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reseed: bool,
}

/// What an object with no field says.
impl Default for RollbackRequest {
    fn default() -> Self {
        Self {
            to: "@-1".to_owned(),
            reseed: false,
        }
    }
}
