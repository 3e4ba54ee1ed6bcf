//! `/v1/sandboxes`: sandboxes that live until they are ended.

use crate::error::Failure;
use crate::moment::MomentPolicy;
use crate::octets::Octets;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// `POST /v1/sandboxes`: what to make. With the header `idempotency-key` the same request may be sent
/// again: it is answered with the sandbox that the first has made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SandboxRequest {
    /// The template to fork.
    #[serde(default = "default_template")]
    #[schema(default = "python")]
    pub template: String,
    /// One build of it; without, the one that its name stands for now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
    /// A name, free for another sandbox once this one has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Variables for all of its processes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How long it lives, in seconds; 0: until it is ended.
    #[serde(default)]
    pub ttl_seconds: f64,
    /// How long it lives without being used, in seconds; 0: for any time. A process whose output nobody
    /// reads is no use.
    #[serde(default)]
    pub idle_seconds: f64,
    /// What becomes of it when its time is over.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Run although this host does not allow all walls between it and untrusted code.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_missing_walls: bool,
    /// Moments that are kept without being asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moments: Option<MomentPolicy>,
}

fn default_template() -> String {
    "python".to_owned()
}

/// What an object with no field says.
impl Default for SandboxRequest {
    fn default() -> Self {
        Self {
            template: default_template(),
            build: None,
            name: None,
            env: BTreeMap::new(),
            ttl_seconds: 0.0,
            idle_seconds: 0.0,
            on_timeout: OnTimeout::Kill,
            allow_missing_walls: false,
            moments: None,
        }
    }
}

/// What happens while a sandbox is made; one of `created` and `error` is the last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CreateEvent {
    /// Something takes its time.
    Progress {
        /// What, for people.
        message: String,
    },
    /// Something that whoever asked should know.
    Warning {
        /// A sentence.
        message: String,
    },
    /// It runs.
    Created(Box<SandboxInfo>),
    /// It could not be made.
    Error {
        /// Why.
        error: Failure,
    },
}

/// What becomes of a sandbox when its time is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It ends.
    #[default]
    Kill,
}

/// `PATCH /v1/sandboxes/{id}`: another time to live, or idle time; absent: as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SandboxChange {
    /// How long it lives from now on, in seconds; 0: until it is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<f64>,
    /// How long it lives without being used, in seconds; 0: for any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_seconds: Option<f64>,
}

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Its fork is being made.
    Making,
    /// It runs.
    #[default]
    Running,
    /// It is on disk, and costs no memory.
    Paused,
    /// It is being ended.
    Ending,
    /// It is no more.
    Ended,
}

impl SandboxState {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Making => "making",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ending => "ending",
            Self::Ended => "ended",
        }
    }

    /// The one of a name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let all = [
            Self::Making,
            Self::Running,
            Self::Paused,
            Self::Ending,
            Self::Ended,
        ];
        all.into_iter().find(|state| state.name() == name)
    }
}

/// Why a sandbox has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SandboxEnd {
    /// `removed`, `ttl`, `idle`, `engine_stopped`, `not_made`, `died`, or `not_adopted`: the engine that had
    /// made it was killed, and the one after it could not go on with it.
    pub reason: String,
    /// In words.
    pub message: String,
    /// When, RFC 3339.
    pub at: String,
}

/// A sandbox.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxInfo {
    /// Its id.
    pub id: String,
    /// Its name.
    #[serde(default)]
    pub name: Option<String>,
    /// Whose it is; none: the engine's owner's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Its template.
    pub template: String,
    /// The build of that.
    pub build: String,
    /// The sandbox that it is a branch of: its id.
    #[serde(default)]
    pub parent: Option<String>,
    /// Where it is in its life.
    pub state: SandboxState,
    /// Why it has ended.
    #[serde(default)]
    pub end: Option<SandboxEnd>,
    /// When it was asked for, RFC 3339.
    pub created: String,
    /// The same, in seconds since 1970.
    pub created_unix_s: u64,
    /// When its time to live is over, in seconds since 1970.
    #[serde(default)]
    pub expires_unix_s: Option<u64>,
    /// How long it lives without being used.
    #[serde(default)]
    pub idle_seconds: Option<f64>,
    /// Processes that run because somebody asked for them.
    pub processes: u64,
    /// Variables for all of its processes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Milliseconds from the request to a fork that has taken its identity.
    #[serde(default)]
    pub fork_time_ms: Option<f64>,
    /// What it takes on disk, in bytes, if it is paused.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
}

/// A page of sandboxes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxList {
    /// In the order of their making.
    pub sandboxes: Vec<SandboxInfo>,
    /// For `after`, if there are more.
    #[serde(default)]
    pub next: Option<String>,
}

/// What a sandbox costs the host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxStats {
    /// Its id.
    pub id: String,
    /// Its name.
    #[serde(default)]
    pub name: Option<String>,
    /// KiB that its process shares with nobody.
    pub memory_private_kib: u64,
    /// KiB of page tables.
    pub page_tables_kib: u64,
    /// Seconds of processor time that it has used.
    pub cpu_seconds: f64,
    /// Processes that run because somebody asked for them.
    pub processes: u64,
}

/// A terminal's size, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// `POST /v1/sandboxes/{id}/exec`: a process to start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProcessRequest {
    /// The program, with its arguments.
    pub command: Vec<Octets>,
    /// Variables, beside those of the sandbox.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Directory in the guest; the user's home when absent.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cwd: String,
    /// `USER` or `USER:GROUP` of the guest, by name or number; root when absent.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// All of its standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<Octets>,
    /// Standard input comes later: as lines after this object, or by `…/input`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stdin_stream: bool,
    /// A terminal in place of its three streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// How long it may run, in seconds; 0: as long as it likes.
    #[serde(default)]
    pub timeout_seconds: f64,
    /// Answer as soon as it runs; its output is kept, the newest of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detach: bool,
    /// Kill it, and what it has started, if the client goes away before its end; else it goes on, and `…/attach` reads
    /// on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kill_on_disconnect: bool,
}

/// A line to a process that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ProcessInput {
    /// Standard input.
    Stdin {
        /// Some of it.
        data: Octets,
    },
    /// Its end.
    StdinEnd,
    /// Its terminal has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters in a line.
        columns: u16,
    },
    /// A signal for it and for what it has started.
    Signal {
        /// Linux signal number, 1 to 64.
        signal: u8,
    },
}

/// `POST …/attach`: the first line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// From which offset on; the first byte that is kept when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
    /// Whether the process waits when this client does not keep up; else it misses some.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hold: bool,
}

/// What happens to a process; one of `result` and `error` is the last, unless only what was kept was
/// asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ProcessEvent {
    /// It runs.
    Started {
        /// Its number in its sandbox.
        process: u32,
        /// Its pid in the guest.
        pid: Option<u32>,
    },
    /// Standard output, or what a terminal shows.
    Stdout {
        /// Some of it.
        data: Octets,
        /// Where it lies in all of its output, both streams counted together.
        offset: u64,
    },
    /// Standard error.
    Stderr {
        /// Some of it.
        data: Octets,
        /// Likewise.
        offset: u64,
    },
    /// Output that is no longer kept.
    Skipped {
        /// Where the gap begins.
        from: u64,
        /// Where it ends.
        to: u64,
    },
    /// How it ended.
    Result(Box<ProcessResult>),
    /// Its end is not known.
    Error {
        /// Why.
        error: Failure,
    },
}

/// How a process ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessResult {
    /// The sandbox's id.
    pub sandbox: String,
    /// Its number there.
    pub process: u32,
    /// Standard output; absent in streams, and when the bytes are not UTF-8: then they are in
    /// `stdout_base64`.
    #[serde(default)]
    pub stdout: Option<String>,
    /// Standard output that is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// Standard error, likewise.
    #[serde(default)]
    pub stderr: Option<String>,
    /// Standard error that is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    /// As a shell tells it: the program's own; 128+n for signal n; 124 at its time limit.
    pub exit_code: u8,
    /// The signal that ended it, if one did.
    pub signal: Option<u8>,
    /// Whether it was killed at its time limit.
    pub timed_out: bool,
    /// Whether some of its output was thrown away.
    pub truncated: bool,
    /// Whether the kernel of the guest killed it because its memory was used up.
    pub out_of_memory: bool,
    /// Milliseconds from the request to its end.
    pub total_time_ms: f64,
    /// What there is to say beside the program's own words, if there is something.
    pub error: Option<Failure>,
}

impl ProcessResult {
    /// Puts output in.
    pub fn set_output(&mut self, stdout: Vec<u8>, stderr: Vec<u8>) {
        (self.stdout, self.stdout_base64) = crate::octets::text_or_base64(stdout);
        (self.stderr, self.stderr_base64) = crate::octets::text_or_base64(stderr);
    }
}

/// What is kept of a process's output, for who wants no stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessOutput {
    /// Its number in its sandbox.
    pub process: u32,
    /// Standard output; absent when the bytes are not UTF-8: then they are in `stdout_base64`.
    #[serde(default)]
    pub stdout: Option<String>,
    /// Standard output that is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// Standard error, likewise.
    #[serde(default)]
    pub stderr: Option<String>,
    /// Standard error that is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    /// Bytes from where it was to begin that are no longer kept.
    pub skipped_bytes: u64,
    /// Where to go on the next time.
    pub next: u64,
}

impl ProcessOutput {
    /// Puts output in.
    pub fn set_output(&mut self, stdout: Vec<u8>, stderr: Vec<u8>) {
        (self.stdout, self.stdout_base64) = crate::octets::text_or_base64(stdout);
        (self.stderr, self.stderr_base64) = crate::octets::text_or_base64(stderr);
    }
}

/// A process of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessInfo {
    /// Its number in its sandbox.
    pub process: u32,
    /// Its pid in the guest.
    pub pid: Option<u32>,
    /// Its program and arguments.
    pub command: Vec<Octets>,
    /// Who it runs as, as asked for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// `starting`, `running`, `ended`, or `lost`: its sandbox ended before it.
    pub state: String,
    /// When it was asked for, in seconds since 1970.
    pub started_unix_s: u64,
    /// How it ended.
    #[serde(default)]
    pub result: Option<Box<ProcessResult>>,
    /// Bytes of its output that are kept.
    #[serde(default)]
    pub output_kept_bytes: Option<u64>,
    /// Bytes of its output that are kept no longer: the offset of the first that is.
    #[serde(default)]
    pub output_dropped_bytes: Option<u64>,
}

/// The processes of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessList {
    /// In the order of their starts.
    pub processes: Vec<ProcessInfo>,
}

/// `POST …/processes/{n}/signal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProcessSignal {
    /// Linux signal number, 1 to 64.
    pub signal: u8,
    /// To itself alone, and not to what it has started.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_process: bool,
}

/// `GET /v1/events`: something that has happened to a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxEvent {
    /// Counts from 1 since the engine started; after one that was killed, it counts on.
    pub number: u64,
    /// When, RFC 3339.
    pub at: String,
    /// To which sandbox.
    pub sandbox: String,
    /// Its name.
    #[serde(default)]
    pub name: Option<String>,
    /// What.
    #[serde(flatten)]
    pub what: SandboxHappening,
}

/// What can happen to a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum SandboxHappening {
    /// It runs.
    Made,
    /// It was branched, and goes on.
    Branched {
        /// The ids of the branches.
        into: Vec<String>,
    },
    /// A moment of it is kept, with a name.
    MomentKept {
        /// Its number.
        number: u64,
        /// Its name.
        moment: String,
    },
    /// It has gone back to a moment.
    RolledBack {
        /// Its number.
        to: u64,
    },
    /// It has been written to disk.
    Paused,
    /// It runs again.
    Resumed,
    /// It runs on: the engine that had made it was killed, and this one goes on with it.
    Adopted,
    /// It has ended.
    Ended {
        /// See [`SandboxEnd`].
        reason: String,
        /// In words.
        message: String,
    },
    /// A process has started.
    ProcessStarted {
        /// Which.
        process: u32,
        /// Its program and arguments.
        command: Vec<Octets>,
    },
    /// A process has ended.
    ProcessEnded {
        /// Which.
        process: u32,
        /// As a shell tells it.
        exit_code: u8,
        /// The signal that ended it.
        signal: Option<u8>,
        /// Whether at its time limit.
        timed_out: bool,
        /// Whether for want of memory.
        out_of_memory: bool,
    },
    /// Something was refused at a limit.
    LimitHit {
        /// Which.
        limit: String,
    },
}

/// Events, for who wants no stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SandboxEvents {
    /// In the order in which they happened.
    pub events: Vec<SandboxEvent>,
}
