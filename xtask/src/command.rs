//! Commands with a deadline: whatever hangs ends here, with its name.

use anyhow::{Context, bail};
use std::fs;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use wait_timeout::ChildExt;

/// Longer than anything that works: a first build of everything, a template in a lab.
pub const COMMAND_MAX: Duration = Duration::from_secs(45 * 60);
/// Commands that only ask.
pub const QUESTION_MAX: Duration = Duration::from_secs(10 * 60);

/// Runs a command; an error if it does not succeed in time.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let child = start(command)?;
    let status = finish(child, command, COMMAND_MAX)?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Starts a command, in our process group: Ctrl-C ends all.
pub fn start(command: &mut Command) -> anyhow::Result<Child> {
    command
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))
}

/// Waits for what [`start`] has started; ends it when the time is over.
pub fn finish(mut child: Child, command: &Command, limit: Duration) -> anyhow::Result<ExitStatus> {
    let waited = child.wait_timeout(limit).context("cannot wait")?;
    if let Some(status) = waited {
        return Ok(status);
    }
    kill_tree(child.id());
    // SIGKILL is not refused: the wait ends.
    let _ = child.wait();
    bail!("{command:?} did not end within {limit:?} and was killed")
}

/// Kills a process that has not been reaped, and all that it has started (proc_pid_task(5)).
fn kill_tree(pid: u32) {
    let pid = pid.to_string();
    let _ = Command::new("kill").args(["-STOP", &pid]).status();
    let children = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(children).unwrap_or_default();
    for child in children.split_whitespace() {
        if let Ok(child) = child.parse() {
            kill_tree(child);
        }
    }
    let _ = Command::new("kill").args(["-KILL", &pid]).status();
}

/// What a short command prints; its errors pass through.
pub fn ask(command: &mut Command) -> anyhow::Result<Output> {
    let child = start(command.stdout(Stdio::piped()))?;
    let pid = child.id();
    let (done, over) = channel::<()>();
    let watch = std::thread::spawn(move || {
        if over.recv_timeout(QUESTION_MAX) == Err(RecvTimeoutError::Timeout) {
            kill_tree(pid);
        }
    });
    let output = child.wait_with_output();
    drop(done);
    let _ = watch.join();
    output.with_context(|| format!("cannot run {command:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_hangs_is_killed_with_all_that_it_started_and_named() {
        let mut command = Command::new("sh");
        // The pipe ends when the last of them has ended.
        command.args(["-c", "echo started; sleep 1000 & wait"]);
        let mut child = start(command.stdout(Stdio::piped())).unwrap();
        let mut output = child.stdout.take().unwrap();
        let mut started = [0; 8];
        output.read_exact(&mut started).unwrap();
        let error = finish(child, &command, Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("sleep 1000"), "{error}");
        assert_eq!(output.read(&mut started).unwrap(), 0);
    }
}
