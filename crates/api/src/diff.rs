//! `POST /v1/sandboxes/{id}/diff`: what differs between two moments.

use crate::file::FileInfo;
use crate::octets::Octets;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What to compare with what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiffRequest {
    /// The later moment: one that the sandbox keeps; without, now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// The earlier one; without, the sandbox's beginning, as its template has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<DiffSide>,
    /// How long a sandbox's processes may take to stop, in seconds.
    #[schema(default = 5.0)]
    pub freeze_seconds: f64,
    /// Whether to go on although some have not stopped by then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// What an object with no field says.
impl Default for DiffRequest {
    fn default() -> Self {
        Self {
            at: None,
            from: None,
            freeze_seconds: 5.0,
            force: false,
        }
    }
}

/// A moment of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiffSide {
    /// The sandbox: its id or name.
    pub sandbox: String,
    /// One that it keeps; without, now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}

/// What differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Diff {
    /// Files, folders and links, in the order of their paths; at most 100000.
    pub files: Vec<FileDiff>,
    /// How many more there are.
    pub more_files: u64,
    /// Pages of memory, of 4 KiB; `null` if the two have not come from the same boot of a template.
    pub pages: Option<u64>,
}

/// Something that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileDiff {
    /// Its path.
    pub path: Octets,
    /// How it differs.
    pub change: DiffChange,
    /// As it was; its path is relative to `/`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<FileInfo>,
    /// As it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<FileInfo>,
}

/// How something differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiffChange {
    /// It was not there.
    Added,
    /// Its content, permissions, owner or kind is another one.
    Changed,
    /// It is not there any more.
    Removed,
}
