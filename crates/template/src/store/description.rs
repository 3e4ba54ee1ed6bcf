//! What a template is, beside its snapshots.

use crate::recipe::{Recipe, RecipeOrigin};
use crate::rootfs::Contents;
use serde::{Deserialize, Serialize};

/// What a template is, for people and for the next build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its name.
    pub name: String,
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
    /// Debian release and packages.
    pub base: String,
    /// Debian packages beside the base system.
    pub packages: Vec<String>,
    /// A digest of everything that it was built from.
    pub digest: String,
    /// What it takes on disk, holes not counted, in bytes.
    pub disk_bytes: u64,
    /// Version of the messages that its agent speaks; 0 in those of earlier versions.
    #[serde(default)]
    pub protocol_version: u32,
    /// The recipe that it was built from; none in those of earlier versions.
    #[serde(default)]
    pub recipe: Option<RecipeOrigin>,
    /// What has been installed into it.
    #[serde(default)]
    pub contents: Contents,
    /// Whose it is; `None`: everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// What it is derived from, if it was not booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub derived: Option<Derived>,
}

/// How a template has come from another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Derived {
    /// The other one.
    pub from: String,
    /// Which build of it.
    pub build: String,
    /// Commands that were run.
    pub run: Vec<String>,
    /// All that its interpreter was warmed up with.
    pub warm: String,
    /// The sandbox that it is a moment of, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

impl Template {
    /// Whether it is for somebody of a tenant; `None`: for somebody who has all.
    #[must_use]
    pub fn is_for(&self, tenant: Option<&str>) -> bool {
        self.tenant.is_none() || tenant.is_none() || self.tenant.as_deref() == tenant
    }

    /// What its interpreter was warmed up with, if that is known.
    #[must_use]
    pub fn warm_code(&self) -> Option<String> {
        if let Some(derived) = &self.derived {
            return Some(derived.warm.clone());
        }
        let origin = self.recipe.as_ref()?;
        let recipe = Recipe::parse(&self.name, &origin.text, origin.path.as_deref());
        Some(recipe.ok()?.warm)
    }
}
