//! `POST /v1/exec`: a program in a fresh fork.

use crate::error::Failure;
use crate::octets::{Octets, bytes_of, text_or_base64};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// What to run. Exactly one of `code`, `file`, `command` and `program_from_stdin` says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The template to fork.
    #[serde(default = "default_template")]
    #[schema(default = "python")]
    pub template: String,
    /// One build of it; without, the one that its name stands for now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
    /// Python code, as `python3 -c` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Octets>,
    /// The language of `code`: `python`, which it is without this, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// A Python program among the files that are put into the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<ProgramFile>,
    /// Any program of the guest, with its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<Octets>>,
    /// The Python program is read from standard input, as by `python3 -`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub program_from_stdin: bool,
    /// The Python program's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<Octets>,
    /// Variables for its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Directory in the guest; relative to `/root`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cwd: String,
    /// All of its standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<Octets>,
    /// Standard input comes as `stdin` lines after this object, which is a line too.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stdin_stream: bool,
    /// Files that are put into the sandbox first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<SentFile>,
    /// More files come as lines after this object, up to a `start` line.
    #[serde(default, skip_serializing_if = "is_false")]
    pub files_stream: bool,
    /// Python's output comes line by line, as on a terminal.
    #[serde(default, skip_serializing_if = "is_false")]
    pub line_buffered: bool,
    /// Python's output comes as it is written, as by `python3 -u`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub unbuffered: bool,
    /// Files and folders that are wanted once the program has ended, whether well or not: paths in the
    /// guest, relative ones in the program's directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub get: Vec<Octets>,
    /// How long the program may run, in seconds; 0: as long as it likes.
    #[serde(default = "default_timeout")]
    #[schema(default = 300.0)]
    pub timeout_seconds: f64,
    /// Measure at its end what the sandbox has cost.
    #[serde(default, skip_serializing_if = "is_false")]
    pub measure: bool,
    /// Run although this host does not allow all walls between it and untrusted code.
    #[serde(default, skip_serializing_if = "is_false")]
    pub allow_missing_walls: bool,
}

fn default_template() -> String {
    "python".to_owned()
}

fn default_timeout() -> f64 {
    300.0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What an object with no field says.
impl Default for ExecRequest {
    fn default() -> Self {
        Self {
            template: default_template(),
            build: None,
            code: None,
            language: None,
            file: None,
            command: None,
            program_from_stdin: false,
            args: Vec::new(),
            env: BTreeMap::new(),
            cwd: String::new(),
            stdin: None,
            stdin_stream: false,
            files: Vec::new(),
            files_stream: false,
            line_buffered: false,
            unbuffered: false,
            get: vec![],
            timeout_seconds: default_timeout(),
            measure: false,
            allow_missing_walls: false,
        }
    }
}

/// `POST /v1/exec/batch`: programs, each in a fork of its own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchRequest {
    /// 1 to 1000; their input and files come with them, not in lines.
    pub executions: Vec<ExecRequest>,
}

/// What has come of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BatchResult {
    /// One for each, in their order. One that had no sandbox has the exit code 125, and an `error`.
    pub results: Vec<ExecResult>,
}

/// A Python program, or a zip application, or a folder with a `__main__.py`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProgramFile {
    /// Absolute path in the guest.
    pub path: Octets,
    /// `sys.argv[0]`, if it is another word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argv0: Option<Octets>,
}

/// A file that goes into the sandbox whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SentFile {
    /// Where; relative to `/root`. Folders on the way are made.
    pub path: Octets,
    /// What is in it.
    pub content: Octets,
    /// Permissions.
    #[serde(default = "default_mode")]
    #[schema(default = 0o644)]
    pub mode: u32,
}

fn default_mode() -> u32 {
    0o644
}

/// A line after the request, while the program is prepared and runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ExecInput {
    /// A folder of the sandbox; if it is there, its permissions are set.
    Folder {
        /// Where.
        path: Octets,
        /// Permissions.
        mode: u32,
    },
    /// An empty file in place of what is there; `data` follows.
    File {
        /// Where.
        path: Octets,
        /// Permissions.
        mode: u32,
    },
    /// More bytes of the file before it.
    Data {
        /// Some of them.
        data: Octets,
    },
    /// A symbolic link in place of what is there.
    Link {
        /// Where.
        path: Octets,
        /// Where it leads to.
        target: Octets,
    },
    /// What was to be put could not be read: the program does not start.
    Failed {
        /// The sentence for its user.
        message: String,
    },
    /// All files are there.
    Start,
    /// Standard input.
    Stdin {
        /// Some of them.
        data: Octets,
    },
    /// Its end.
    StdinEnd,
}

/// `POST /v1/exec/{id}/signal`: a signal for a program that runs, and for what it has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SignalRequest {
    /// Linux signal number, 1 to 64.
    pub signal: u8,
}

/// `POST /v1/lab/exec`: any command on the emulated host. Input and events are those of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandRequest {
    /// Program and arguments.
    pub command: Vec<Octets>,
    /// Its whole environment: names and values.
    #[serde(default)]
    pub env: Vec<(Octets, Octets)>,
    /// Its directory; `/` where that does not exist.
    #[serde(default)]
    pub cwd: Octets,
    /// Standard input comes as `stdin` lines.
    #[serde(default)]
    pub stdin_stream: bool,
}

/// What happens while a program runs; one of `result` and `error` is the last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecEvent {
    /// Something takes its time before there is a sandbox.
    Progress {
        /// What, for people.
        message: String,
    },
    /// Something that whoever asked should know.
    Warning {
        /// A sentence.
        message: String,
    },
    /// The sandbox is somebody, and the program can begin.
    Ready {
        /// The sandbox's id.
        id: String,
    },
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
    /// A piece of what was asked for with `get`; all of it comes before `result`.
    Get {
        /// Which of those that were asked for, from 0.
        index: usize,
        /// The piece.
        #[serde(flatten)]
        piece: GetPiece,
    },
    /// How it ended.
    Result(Box<ExecResult>),
    /// It came to no end of its own.
    Error {
        /// Why.
        error: Failure,
    },
}

/// A piece of a file or folder that was asked for. Paths are relative to that; its own is empty. They
/// are the guest's word: who writes them to a disk sees to it that they do not lead elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "piece", rename_all = "snake_case")]
pub enum GetPiece {
    /// A folder; what is in it follows.
    Folder {
        /// Where.
        path: Octets,
        /// Permissions.
        mode: u32,
    },
    /// A file; its bytes follow as `data`.
    File {
        /// Where.
        path: Octets,
        /// Permissions.
        mode: u32,
        /// How long it was when it was opened.
        bytes: u64,
    },
    /// More bytes of the file before it.
    Data {
        /// Some of them.
        data: Octets,
    },
    /// A symbolic link.
    Link {
        /// Where.
        path: Octets,
        /// Where it leads to.
        target: Octets,
    },
    /// That was all.
    End,
    /// It cannot be had, or not all of it.
    Failed {
        /// Why.
        error: Failure,
    },
}

/// A file that was asked for, in a result that is one object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GotFile {
    /// Where it was in the guest, as asked for, and below that.
    pub path: Octets,
    /// How long it is.
    #[serde(default)]
    pub bytes: u64,
    /// Its SHA-256, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// All of it; absent when there is too much (over 64 MiB in all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Octets>,
    /// Why it could not be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

/// How a run ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// The sandbox's id.
    pub id: String,
    /// The template.
    pub template: String,
    /// Where machines run: `kvm`, or `lab` on an emulated host.
    pub host: String,
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
    /// As a shell tells it: the program's own; 128+n for signal n; 124 at the time limit; 127, 126 for
    /// a program that is not there or not executable; 125 if the sandbox failed.
    pub exit_code: u8,
    /// The signal that ended the program, if one did.
    pub signal: Option<u8>,
    /// Whether it was killed at its time limit.
    pub timed_out: bool,
    /// Whether some of its output was thrown away.
    pub truncated: bool,
    /// Whether the kernel of the guest killed it because its memory was used up.
    #[serde(default)]
    pub out_of_memory: bool,
    /// Milliseconds from the request to a fork that has taken its identity.
    pub fork_time_ms: Option<f64>,
    /// From the request to the first byte of output, if there was one.
    #[serde(default)]
    pub first_output_time_ms: Option<f64>,
    /// From the fork to the program's end.
    pub exec_time_ms: Option<f64>,
    /// From the request to the program's end.
    pub total_time_ms: f64,
    /// KiB that the sandbox's process shares with nobody, if that was measured.
    pub memory_private_kib: Option<u64>,
    /// Files that were asked for; in streams they come as events.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<GotFile>,
    /// What there is to say beside the program's own words, if there is something.
    pub error: Option<Failure>,
}

impl ExecResult {
    /// Puts output in.
    pub fn set_output(&mut self, stdout: Vec<u8>, stderr: Vec<u8>) {
        (self.stdout, self.stdout_base64) = text_or_base64(stdout);
        (self.stderr, self.stderr_base64) = text_or_base64(stderr);
    }

    /// Standard output and error as bytes; `None` if they are no base64.
    #[must_use]
    pub fn output(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let stdout = bytes_of(self.stdout.as_ref(), self.stdout_base64.as_ref())?;
        let stderr = bytes_of(self.stderr.as_ref(), self.stderr_base64.as_ref())?;
        Some((stdout, stderr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_as_short_as_what_it_asks_for() {
        let request: ExecRequest = serde_json::from_str(r#"{"code":"print(1)"}"#).unwrap();
        assert_eq!(request.template, "python");
        assert_eq!(request.code, Some("print(1)".into()));
        assert!((request.timeout_seconds - 300.0).abs() < f64::EPSILON);
        let error = serde_json::from_str::<ExecRequest>(r#"{"cod":"print(1)"}"#).unwrap_err();
        assert!(error.to_string().contains("cod"), "{error}");
        assert_eq!(
            serde_json::from_str::<ExecRequest>("{}").unwrap(),
            ExecRequest::default()
        );
    }

    #[test]
    fn lines_say_what_they_are() {
        let line = serde_json::to_string(&ExecInput::Stdin {
            data: vec![0xff].into(),
        });
        assert_eq!(
            line.unwrap(),
            r#"{"type":"stdin","data":{"base64":"/w=="}}"#
        );
        let result = ExecEvent::Result(Box::new(ExecResult {
            exit_code: 3,
            ..ExecResult::default()
        }));
        let json = serde_json::to_value(&result).unwrap();
        assert_eq!(
            (&json["type"], &json["exit_code"]),
            (&"result".into(), &3.into())
        );
        assert_eq!(serde_json::from_value::<ExecEvent>(json).unwrap(), result);
    }

    #[test]
    fn output_of_any_bytes_comes_back() {
        let mut result = ExecResult::default();
        result.set_output(b"text".to_vec(), vec![0xff, 1]);
        let json = serde_json::to_value(&result).unwrap();
        assert_eq!(
            (&json["stdout"], &json["stderr_base64"]),
            (&"text".into(), &"/wE=".into())
        );
        assert!(json["stderr"].is_null() && json.get("stdout_base64").is_none());
        assert_eq!(result.output(), Some((b"text".to_vec(), vec![0xff, 1])));
    }
}
