//! `zygote demo`: two forks of one template, what differs between them, and what they cost.

use crate::args::Global;
use crate::host::{self, Place};
use crate::out::say;
use crate::template;
use anyhow::{Context, bail};
use serde_json::Value;
use std::process::Command;
use std::time::Duration;

const TEMPLATE: &str = "python";
/// How long it may take in a lab, a first build included.
const LAB_MAX: Duration = Duration::from_secs(3600);
const CODE: &str = "\
import os, numpy, socket
print('numpy.random.rand(3)  ', numpy.random.rand(3))
print('os.urandom(8)         ', os.urandom(8).hex())
print('host name             ', socket.gethostname())";

/// Shows it; gives back the exit code.
pub fn run(global: &Global) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    if host::choose(global, &store)? == Place::Lab {
        let _lock = if template::is_missing(&store, TEMPLATE)? {
            Some(template::gather_for(&store, TEMPLATE)?)
        } else {
            None
        };
        return host::again_in_lab(&store, false, Some(LAB_MAX));
    }
    if template::is_missing(&store, TEMPLATE)? {
        template::build_missing(&store, TEMPLATE)?;
    }
    show(&forks(global)?)
}

/// Two runs, as any user would get them.
fn forks(global: &Global) -> anyhow::Result<Vec<Value>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    if let Some(state) = &global.state_dir {
        command.arg("--state-dir").arg(state);
    }
    command.args(["run", "-t", TEMPLATE, "--count", "2", "--json", "-c", CODE]);
    // A run has its own time limits.
    let output = command.output().context("cannot start a run")?;
    if !output.status.success() {
        bail!(
            "a fork failed: {}{}",
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        );
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
    say!("{}\n", place());
    say!("Try: zygote run -c 'import numpy; print(numpy.arange(3).sum())'");
    Ok(0)
}

fn place() -> &'static str {
    if host::in_lab() {
        "They ran in the lab, an emulated computer, because this host's KVM cannot run a kernel: \
         times are those of\nan emulator, a hundred times slower than hardware."
    } else {
        "They ran on this host's KVM."
    }
}
