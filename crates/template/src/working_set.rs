//! The pages that every run writes, recorded in a rehearsal.

use crate::guest::{Guest, GuestError};
use crate::rehearsal::{python, rehearse};
use std::fs::File;
use std::path::Path;
use zygote_snapshot::MEMORY_FILE;
use zygote_snapshot::state::MachineState;
use zygote_vmm::{Disk, GuestMemory};

/// What a run of the shortest program has written; `[first, count]` each.
pub fn working_set(
    directory: &Path,
    state: &MachineState,
    memory_bytes: u64,
    root: Disk,
) -> Result<Vec<[u32; 2]>, GuestError> {
    let file = File::open(directory.join(MEMORY_FILE))?;
    let memory = GuestMemory::private(&file, memory_bytes)
        .map_err(|error| std::io::Error::other(error.to_string()))?;
    let mut guest = Guest::restore(state, memory.clone(), vec![root])?;
    rehearse(&mut guest, python("print(1)"), &mut |_, _| Ok(()))?;
    Ok(memory.copied()?)
}
