//! Programs of this host that make an image: each with a deadline, its words in a log, and no longer
//! there than this one.

use super::error::{RootfsError, at};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Most of a tool's complaint that is repeated.
const COMPLAINT_LINES: usize = 15;
/// A tool that has not ended by then hangs; the longest, mmdebstrap, takes a minute, and over a slow
/// line many.
pub(super) const TOOL_MAX_S: &str = "3600";
/// How timeout(1) exits when the time is over.
const TIMED_OUT: i32 = 124;
/// How unshare(1), setpriv(1) and timeout(1) exit if there is no such program.
const NOT_FOUND: i32 = 127;

/// A program that may give files any owner: as root itself, else in a user namespace where the
/// user is root and has the ids of /etc/subuid (user_namespaces(7), subuid(5)).
pub(super) fn rooted(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return dependent(program);
    }
    let mut command = dependent("unshare");
    command.args(["--map-root-user", "--map-auto", program]);
    command
}

/// A program that is told to end when this one is killed, so that it leaves nothing behind.
/// mmdebstrap then signals its process group, which is why that is its own.
pub(super) fn dependent(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM"])
        .args(["timeout", "--kill-after=30", TOOL_MAX_S, program])
        .process_group(0);
    command
}

/// Whether this user can make a root file system, whose files have many owners.
pub fn has_user_ids() -> bool {
    let mut command = rooted("true");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

pub(super) fn tool(
    mut command: Command,
    program: &'static str,
    package: &'static str,
    log: &Path,
) -> Result<(), RootfsError> {
    let output = File::create(log).map_err(at("create", log))?;
    let again = output.try_clone().map_err(at("create", log))?;
    command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(again);
    let status = command.status().map_err(at("start", Path::new(program)))?;
    match status.code() {
        Some(0) => return Ok(()),
        Some(NOT_FOUND) => return Err(RootfsError::Missing { program, package }),
        Some(TIMED_OUT) => {
            let log = log.to_owned();
            return Err(RootfsError::Late { program, log });
        }
        _ => {}
    }
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    Err(RootfsError::Tool {
        program,
        status,
        log: log.to_owned(),
        complaint: lines[lines.len().saturating_sub(COMPLAINT_LINES)..].join("\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_is_missing_or_fails_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let missing = tool(dependent("no-such-program"), "no-such-program", "pkg", &log);
        let sentence = missing.unwrap_err().to_string();
        assert!(sentence.contains("apt-get install pkg"), "{sentence}");
        let mut failing = dependent("ls");
        failing.arg("/no/such/file");
        let sentence = tool(failing, "ls", "coreutils", &log)
            .unwrap_err()
            .to_string();
        assert!(sentence.contains("/no/such/file"), "{sentence}");
    }
}
