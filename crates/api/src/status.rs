//! `GET /v1/health`, `GET /v1/status`, `POST /v1/stop`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Where machines run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlaceKind {
    /// On this host's KVM.
    Kvm,
    /// On an emulated host.
    Lab,
}

impl PlaceKind {
    /// `kvm` or `lab`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Lab => "lab",
        }
    }
}

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`, or `stopping`.
    pub status: String,
    /// The program's version.
    pub version: String,
    /// Tells two programs of one version apart.
    pub program: String,
    /// Its process.
    pub pid: u32,
    /// Where machines run.
    pub host: PlaceKind,
    /// Its state directory.
    pub state_dir: String,
}

/// `GET /v1/health`: who answers, and what can be forked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthAnswer {
    /// Who answers.
    #[serde(flatten)]
    pub health: Health,
    /// Templates, by name.
    #[serde(default)]
    pub templates: BTreeMap<String, TemplateHealth>,
}

/// `GET /v1/health` for those who have no key, or one of a tenant: whether it is there, and what they can fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublicHealth {
    /// `ok`, or `stopping`.
    pub status: String,
    /// The program's version.
    pub version: String,
    /// Templates, by name.
    pub templates: BTreeMap<String, TemplateHealth>,
}

/// Whether a template can be forked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateHealth {
    /// Whether it is one of this version, and not damaged.
    pub ready: bool,
    /// Whether numpy is in it.
    pub numpy: bool,
}

/// What the engine holds and has done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Who answers.
    #[serde(flatten)]
    pub health: Health,
    /// Its socket.
    pub socket: String,
    /// Where its log is; none in the foreground.
    pub log: Option<String>,
    /// For how long it has been there.
    pub uptime_seconds: u64,
    /// When it began (RFC 3339, UTC).
    pub started: String,
    /// The same, in seconds since 1970-01-01T00:00:00Z.
    pub started_unix_s: u64,
    /// It ends by itself after so long without work; `null`: it stays.
    pub idle_exit_seconds: Option<u64>,
    /// Runs.
    pub runs: RunsStatus,
    /// Sandboxes that live until they are ended.
    #[serde(default)]
    pub sandboxes: u64,
    /// Why they would end with the engine, should it be killed; none: they would not, another engine goes
    /// on with them.
    #[serde(default)]
    pub sandboxes_not_held: Option<String>,
    /// Templates that are loaded.
    pub templates: Vec<PoolStatus>,
    /// The emulated host, where machines run on one.
    pub lab: Option<LabStatus>,
}

/// Runs, now and so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunsStatus {
    /// That run now.
    pub running: u64,
    /// At most.
    pub running_max: u64,
    /// That wait for one of those to end.
    pub waiting: u64,
    /// At most.
    pub waiting_max: u64,
    /// That have ended.
    pub ended: u64,
    /// That were refused because too many waited.
    pub refused: u64,
    /// Whose client went away before their end.
    pub cancelled: u64,
}

/// A loaded snapshot, and the forks that were made of it ahead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolStatus {
    /// The template.
    pub template: String,
    /// Which build of it.
    pub build: String,
    /// Which of its replicas.
    pub replica: u32,
    /// Forks that wait.
    pub idle: u64,
    /// Requests that found one.
    pub hits: u64,
    /// Requests that found none, and got one forked for them.
    pub misses: u64,
    /// Forks made ahead.
    pub refills: u64,
    /// What making those has taken, in microseconds.
    #[serde(default)]
    pub refills_us: u64,
    /// Forks that could not be made, or died waiting.
    pub lost: u64,
}

/// The emulated host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LabStatus {
    /// `starting`, `up` or `down`.
    pub state: String,
    /// Its emulator's process, if there is one.
    pub pid: Option<u32>,
    /// For how long it has been up.
    pub uptime_seconds: Option<u64>,
    /// Its memory, all that it can ever take.
    pub memory_max_bytes: u64,
    /// What it takes of the real host now.
    pub memory_bytes: Option<u64>,
    /// Why the last one ended, if it did not end well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<String>,
}

/// How to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Kill what runs, instead of waiting for it.
    #[serde(default)]
    pub now: bool,
    /// Only if nothing runs.
    #[serde(default)]
    pub if_idle: bool,
}

/// It stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stopped {
    /// Its process; it is gone once this one is.
    pub pid: u32,
    /// Runs that it waits for.
    pub running: u64,
}
