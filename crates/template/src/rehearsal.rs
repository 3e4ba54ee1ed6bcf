//! A run of the shortest program, in a fork of a snapshot that has just been written: what it writes,
//! every run writes.

use crate::guest::{Guest, GuestError};
use std::fs::File;
use std::path::Path;
use std::time::Duration;
use zygote_protocol::{
    AgentMessage, HostMessage, Identity, ProcessId, Program, PythonSource, Start,
};
use zygote_snapshot::MEMORY_FILE;
use zygote_snapshot::state::MachineState;
use zygote_vmm::{Disk, GuestMemory};

/// How long it may take; emulated hosts are a hundred times slower than real ones.
const STEP_MAX: Duration = Duration::from_secs(300);
const PROCESS: ProcessId = 1;
const SEED_BYTES: usize = 64;

/// The pages that it has written; `[first, count]` each.
pub fn working_set(
    directory: &Path,
    state: &MachineState,
    memory_bytes: u64,
    root: Disk,
) -> Result<Vec<[u32; 2]>, GuestError> {
    let file = File::open(directory.join(MEMORY_FILE))?;
    let memory = GuestMemory::private(&file, memory_bytes)
        .map_err(|error| std::io::Error::other(error.to_string()))?;
    let mut guest = Guest::restore(state, memory.clone(), root)?;
    run(&mut guest)?;
    guest.machine.pause()?;
    Ok(memory.copied()?)
}

fn run(guest: &mut Guest) -> Result<(), GuestError> {
    let stage = "run its first program";
    let identity = HostMessage::Activate(identity()?);
    guest.send(&identity, stage, STEP_MAX)?;
    guest.send(&HostMessage::Start(start()), stage, STEP_MAX)?;
    loop {
        match guest.next(stage, STEP_MAX)? {
            AgentMessage::Activated { .. }
            | AgentMessage::Started { .. }
            | AgentMessage::Stdout { .. } => {}
            AgentMessage::Exited { .. } => return Ok(()),
            other => return Err(GuestError::Unexpected(format!("{other:?}"))),
        }
    }
}

fn start() -> Start {
    Start {
        process: PROCESS,
        program: Program::Python {
            source: PythonSource::Code(b"print(1)".to_vec()),
            arguments: vec![],
        },
        env: vec![],
        cwd: String::new(),
        stdin: false,
        line_buffered: false,
    }
}

/// Nobody's: the fork is thrown away, and nothing of it is kept but which pages it wrote.
fn identity() -> std::io::Result<Identity> {
    let mut seed = vec![0; SEED_BYTES];
    let flags = rustix::rand::GetRandomFlags::empty();
    let filled = rustix::rand::getrandom(&mut seed[..], flags)?;
    seed.truncate(filled);
    Ok(Identity {
        hostname: "zygote-rehearsal".to_owned(),
        machine_id: [1; 16],
        boot_id: [1; 16],
        kernel_seed: seed.clone(),
        interpreter_seed: Some(seed),
    })
}
