//! Interpreters of a sandbox that stay, and the cells that they run.

use crate::error::Failure;
use crate::octets::Octets;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// `POST /v1/sandboxes/{id}/contexts`: an interpreter with a state of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextRequest {
    /// Its name: letters, digits, -, _ and .
    pub name: String,
    /// `python`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub language: String,
    /// Its directory in the guest; the user's home when absent.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cwd: String,
}

/// A context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContextInfo {
    /// Its name.
    pub name: String,
    /// Its language.
    pub language: String,
    /// Its directory, as asked for.
    pub cwd: String,
    /// Its process in the sandbox.
    pub process: u32,
    /// `idle`, `busy` or `dead`.
    pub state: String,
    /// The number of the last cell that has ended.
    pub execution_count: u32,
    /// How it has died.
    #[serde(default)]
    pub error: Option<Failure>,
}

/// The contexts of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContextList {
    /// By name.
    pub contexts: Vec<ContextInfo>,
}

/// `POST /v1/sandboxes/{id}/code`: a cell of code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CodeRequest {
    /// Source text. The value of its last expression is the result, unless it ends in a semicolon.
    pub code: Octets,
    /// Which context runs it, once the cells before it have ended; made if it is not there.
    #[serde(default = "default_context")]
    #[schema(default = "default")]
    pub context: String,
    /// How long it may run, in seconds; then it is interrupted. 0: as long as it likes.
    #[serde(default)]
    pub timeout_seconds: f64,
    /// Interrupt it if the client goes away before its end; else it goes on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interrupt_on_disconnect: bool,
}

fn default_context() -> String {
    "default".to_owned()
}

/// What is shown, in each way that there is: media types and their data. Images are base64.
pub type Bundle = BTreeMap<String, String>;

/// What comes of a cell; one of `result` and `error` is the last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CodeEvent {
    /// Standard output.
    Stdout {
        /// Some of it.
        data: Octets,
    },
    /// Standard error.
    Stderr {
        /// Some of it.
        data: Octets,
    },
    /// Something to be shown.
    Display {
        /// In each way that there is.
        data: Bundle,
    },
    /// How it ended.
    Result(Box<CodeResult>),
    /// It came to no end.
    Error {
        /// Why.
        error: Failure,
    },
}

/// An exception that ended a cell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Exception {
    /// Its class.
    pub name: String,
    /// What it says.
    pub value: String,
    /// As Python prints it, by lines.
    pub traceback: Vec<String>,
}

/// How a cell ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CodeResult {
    /// The sandbox's id.
    pub sandbox: String,
    /// The context.
    pub context: String,
    /// The cell's number in its context, from 1.
    pub execution_count: u32,
    /// Standard output; absent in streams.
    #[serde(default)]
    pub stdout: Option<String>,
    /// Standard error; absent in streams.
    #[serde(default)]
    pub stderr: Option<String>,
    /// What was to be shown, in order; absent in streams.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub displays: Vec<Bundle>,
    /// The value of its last expression, in each way that there is.
    #[serde(default)]
    pub result: Option<Bundle>,
    /// What ended it, if that was an exception.
    #[serde(default)]
    pub exception: Option<Exception>,
    /// Whether it was interrupted at its time limit.
    pub timed_out: bool,
    /// Whether some of its output was thrown away.
    pub truncated: bool,
    /// Milliseconds from the request to its end.
    pub total_time_ms: f64,
}
