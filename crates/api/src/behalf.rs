//! On whose behalf an engine asks the one behind it. Only an engine's owner is believed.

use serde::{Deserialize, Serialize};

/// The header, an [`OnBehalf`] as JSON.
pub const ON_BEHALF: &str = "zygote-on-behalf";

/// Somebody whom the engine in front has let in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OnBehalf {
    /// Whose sandboxes are meant; `None`: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The key that was shown, by its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// How many sandboxes the tenant may have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandboxes_max: Option<u32>,
    /// Memory that all of its machines may take at once, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes_max: Option<u64>,
    /// Their processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus_max: Option<u32>,
}
