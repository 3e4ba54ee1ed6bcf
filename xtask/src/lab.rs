//! `xtask lab`: one command on an emulated host; what it writes below target/ stays.

use anyhow::Context;
use std::ffi::OsString;
use std::path::PathBuf;
use zygote_lab::{LabCommand, LabConfig, LabError, Streams};

/// Memory of the emulated host.
const MEMORY_MIB: u32 = 6144;

/// Runs the command and exits with its status.
pub fn run(icount: bool, command: Vec<OsString>) -> anyhow::Result<()> {
    let target = PathBuf::from("target");
    std::fs::create_dir_all(&target).context("cannot make target/")?;
    let target = target.canonicalize().context("cannot find target/")?;
    let files = zygote_lab::prepare(&target.join("lab-cache"), &mut |line| {
        eprintln!("xtask: {line}")
    })
    .context("cannot prepare the lab")?;
    let config = LabConfig {
        files,
        writable: vec![target],
        memory_mib: MEMORY_MIB,
        cpus: 1,
        icount,
    };
    let command = LabCommand {
        arguments: command,
        environment: std::env::vars_os().collect(),
        directory: std::env::current_dir().context("cannot find the current directory")?,
        stdin: true,
        // Whoever types it sees it, and ends it.
        timeout: None,
    };
    let status = match zygote_lab::run(&config, &command, Streams::inherited()) {
        Ok(status) => status,
        Err(LabError::Program { message, status }) => {
            eprintln!("xtask: {message}");
            status
        }
        Err(error) => return Err(error).context("the lab failed"),
    };
    std::process::exit(status.into())
}
