//! `/v1/templates`.

use crate::error::Failure;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a template is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateInfo {
    /// Its name.
    pub name: String,
    /// The build that its name stands for.
    pub build: String,
    /// When it was built, in seconds since 1970-01-01T00:00:00Z.
    pub created_unix_s: u64,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// How many times it was booted, so that forks do not all share one address-space layout.
    pub replicas: u32,
    /// Guest's `uname -r`.
    pub kernel_release: String,
    /// Its warm interpreter.
    pub interpreter: String,
    /// Debian release.
    pub base: String,
    /// Debian packages beside the base system.
    pub packages: Vec<String>,
    /// A digest of everything that it was built from.
    pub digest: String,
    /// What it takes on disk, holes not counted, in bytes.
    pub disk_bytes: u64,
}

/// What to build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildRequest {
    /// A built-in recipe by name, or the absolute path of one on the engine's host, which ends in
    /// .toml.
    pub recipe: String,
    /// The text of the recipe, in place of what the path leads to; files that it adds are looked for
    /// beside the path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe_toml: Option<String>,
    /// Guest memory in bytes; without, the recipe's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Number of vCPUs; without, the recipe's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u8>,
    /// Boot it this many times, so that forks do not all share one address-space layout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// Build it even if it is there.
    #[serde(default)]
    pub force: bool,
}

/// What happens while a template is built; one of `built` and `error` is the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BuildEvent {
    /// What is being done.
    Progress {
        /// For people.
        message: String,
        /// How much of it is done, if that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        done: Option<u64>,
        /// Of how much, in the same unit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        total: Option<u64>,
    },
    /// It is there.
    Built(Built),
    /// It is not.
    Error {
        /// Why.
        error: Failure,
    },
}

/// A template that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Built {
    /// False if it was there already, made of the same.
    pub is_new: bool,
    /// What it is.
    pub template: TemplateInfo,
}

/// A template that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// Its name.
    pub removed: String,
}
