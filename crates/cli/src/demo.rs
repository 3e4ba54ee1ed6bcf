//! `zygote demo`: two forks of one template, what differs between them, and what they cost.

use crate::args::Global;
use crate::out::say;
use anyhow::{Context, bail};
use serde_json::Value;
use std::process::{Command, Stdio};

const TEMPLATE: &str = "python";
const CODE: &str = "\
import os, numpy, socket
print('numpy.random.rand(3)  ', numpy.random.rand(3))
print('os.urandom(8)         ', os.urandom(8).hex())
print('host name             ', socket.gethostname())";

/// Shows it; gives back the exit code.
pub fn run(global: &Global, as_json: bool) -> anyhow::Result<u8> {
    let runs = forks(global)?;
    if as_json {
        say!("{}", serde_json::json!({ "runs": runs }));
        return Ok(0);
    }
    show(&runs)
}

/// Two runs, as any user would get them.
fn forks(global: &Global) -> anyhow::Result<Vec<Value>> {
    // Builds and loads the template, which is not what is shown.
    run_json(global, &["-c", "pass"])?;
    run_json(global, &["--count", "2", "-c", CODE])
}

fn run_json(global: &Global, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    if let Some(state) = global.state_dir() {
        command.arg("--state-dir").arg(state);
    }
    if let Some(socket) = global.socket() {
        command.arg("--socket").arg(socket);
    }
    command.arg("--host").arg(global.host.word());
    command
        .args(["run", "-t", TEMPLATE, "--json"])
        .args(arguments);
    // What it says about a template's build is for whoever waits; a run has its own time limits.
    command.stderr(Stdio::inherit());
    let output = command.output().context("cannot start a run")?;
    if !output.status.success() {
        bail!("a fork failed: {}", String::from_utf8_lossy(&output.stdout));
    }
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let lines = lines.filter(|line| !line.is_empty());
    let values: Result<Vec<Value>, _> = lines.map(serde_json::from_slice).collect();
    values.context("a run printed no JSON")
}

fn show(runs: &[Value]) -> anyhow::Result<u8> {
    say!("One machine was booted and snapshotted, with numpy imported. Two forks of it:\n");
    for (number, run) in runs.iter().enumerate() {
        say!("fork {}", number + 1);
        for line in run["stdout"].as_str().unwrap_or_default().lines() {
            say!("    {line}");
        }
        say!(
            "    {:<22} {:.1} ms",
            "ready after",
            run["fork_time_ms"].as_f64().unwrap_or(0.0)
        );
        say!(
            "    {:<22} {:.1} ms",
            "program ran for",
            run["exec_time_ms"].as_f64().unwrap_or(0.0)
        );
        let kib = run["memory_private_kib"].as_f64().unwrap_or(0.0);
        say!("    {:<22} {:.1} MiB\n", "private memory", kib / 1024.0);
    }
    say!("{}\n", place(&runs[0]));
    say!(
        "An engine stays for a quarter of an hour, so the next run is quicker: zygote status, zygote stop."
    );
    say!("Try: zygote run -c 'import numpy; print(numpy.arange(3).sum())'");
    Ok(0)
}

fn place(run: &Value) -> &'static str {
    if run["host"] == "lab" {
        "They ran in the lab, an emulated computer, because this host's KVM cannot run a kernel: \
         times are those of\nan emulator, a hundred times slower than hardware."
    } else {
        "They ran on this host's KVM."
    }
}
