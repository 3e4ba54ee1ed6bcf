//! `/v1/templates`.

use crate::error::Failure;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// All templates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateList {
    /// Those that can be forked, by name.
    pub templates: Vec<TemplateInfo>,
    /// Those that cannot.
    pub unusable: Vec<UnusableTemplate>,
}

/// A template that cannot be forked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnusableTemplate {
    /// Its name.
    pub template: String,
    /// Why.
    pub error: Failure,
}

/// What a template is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateInfo {
    /// Its name.
    pub template: String,
    /// The build that its name stands for.
    pub build: String,
    /// When it was built (RFC 3339, UTC).
    pub created: String,
    /// The same, in seconds since 1970-01-01T00:00:00Z.
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
    /// Whose it is; none: everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// What it takes on disk, holes not counted, in bytes; of a derived one, without the files that it differs
    /// from.
    pub disk_bytes: u64,
    /// The template that it is derived from; `null` if it was booted.
    #[serde(default)]
    pub from: Option<String>,
    /// The sandbox that it is a moment of; `null` if it is none's.
    #[serde(default)]
    pub sandbox: Option<String>,
}

/// All that is known of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateDetail {
    /// What it is.
    #[serde(flatten)]
    pub info: TemplateInfo,
    /// The file of the recipe that it was built from; `null` for a built-in one.
    pub recipe_path: Option<String>,
    /// The recipe's text; `null` in templates of earlier versions.
    pub recipe_toml: Option<String>,
    /// Commands that were run before the snapshot.
    #[serde(default)]
    pub run: Vec<String>,
    /// Python that was run before the snapshot.
    pub warm: String,
    /// All Debian packages in it, with their versions.
    pub debian_packages: BTreeMap<String, String>,
    /// Packages of the Python Package Index in it.
    pub pip_packages: Vec<PipPackage>,
    /// Paths in the guest of files that the recipe added.
    pub files: Vec<String>,
    /// Folders of its snapshots on the engine's host, one a replica.
    pub snapshots: Vec<String>,
}

/// A package of the Python Package Index, as it was downloaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PipPackage {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The file.
    pub file: String,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
}

/// How to remove a template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RemoveTemplate {
    /// With those that are derived from it.
    pub derived: bool,
}

/// What to build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildRequest {
    /// A built-in recipe by name; a template by name, to build it again from its recipe; or the absolute
    /// path of a recipe on the engine's host, which ends in .toml.
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
    Built(Box<Built>),
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
    #[serde(flatten)]
    pub info: TemplateInfo,
}

/// A template that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// Its name.
    pub template: String,
    /// What its own files took on disk, in bytes.
    pub freed_bytes: u64,
    /// What its root image takes and goes on taking, because other templates use it, or the next build of
    /// its recipe.
    pub kept_bytes: u64,
}
