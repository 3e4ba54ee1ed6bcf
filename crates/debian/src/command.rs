//! Running Debian's tools: quiet when they succeed, their last words in the error when not.

use std::io;
use std::process::{Command, Stdio};

/// A tool that has not ended by then hangs: a download over a slow line takes minutes.
const TOOL_MAX_S: u32 = 30 * 60;
/// timeout(1)'s own exit codes: the time is over; the program cannot be run; there is none.
const TIMED_OUT: i32 = 124;
const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;
/// Most of a tool's complaint that is repeated.
const COMPLAINT_MAX_BYTES: usize = 2000;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It is not there.
    #[error("{program} is not installed; install it with: apt-get install {package}")]
    Missing {
        /// The tool.
        program: String,
        /// The package that has it.
        package: &'static str,
    },
    /// It cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// The tool.
        program: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// It hangs.
    #[error(
        "{program} did not end within {TOOL_MAX_S} s and was ended; is the network slow, or another apt at work?"
    )]
    Late {
        /// The tool with its arguments.
        program: String,
    },
    /// It failed.
    #[error("{program} failed ({status}): {complaint}")]
    Failed {
        /// The tool with its arguments.
        program: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it wrote.
        complaint: String,
    },
}

/// Runs a tool to its end, or to the end of its time (timeout(1)), and gives back its standard
/// output.
pub fn output(command: &Command, package: &'static str) -> Result<Vec<u8>, CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut timed = Command::new("timeout");
    timed
        .args(["--kill-after=10", &TOOL_MAX_S.to_string()])
        .arg(command.get_program())
        .args(command.get_args())
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    if let Some(folder) = command.get_current_dir() {
        timed.current_dir(folder);
    }
    let output = timed.output().map_err(|source| CommandError::Start {
        program: program.clone(),
        source,
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    match output.status.code() {
        Some(CANNOT_RUN | NOT_FOUND) => return Err(CommandError::Missing { program, package }),
        Some(TIMED_OUT) => {
            let program = format!("{program} {}", words.join(" "));
            return Err(CommandError::Late { program });
        }
        _ => {}
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let start = said.len().saturating_sub(COMPLAINT_MAX_BYTES);
    let start = (start..=said.len()).find(|at| said.is_char_boundary(*at));
    Err(CommandError::Failed {
        program: format!("{program} {}", words.join(" ")),
        status: output.status,
        complaint: said[start.unwrap_or(0)..].trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_told_with_its_package() {
        let error = output(&Command::new("no-such-tool"), "some-package");
        let sentence = error.unwrap_err().to_string();
        assert!(sentence.contains("apt-get install some-package"));
    }

    #[test]
    fn a_failing_tool_is_quoted() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo out; echo why >&2; exit 3"]);
        let sentence = output(&shell, "dash").unwrap_err().to_string();
        assert!(sentence.contains("why") && sentence.contains('3'));
        assert_eq!(output(&Command::new("true"), "coreutils").unwrap(), b"");
    }
}
