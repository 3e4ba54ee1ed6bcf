//! The pages that every run of a kind touches, recorded in rehearsals.

use crate::guest::{Guest, GuestError};
use crate::rehearsal::{activate, python, rehearse};
use std::collections::BTreeSet;
use std::fs::File;
use zygote_protocol::Program;
use zygote_snapshot::state::MachineState;
use zygote_snapshot::{Ahead, RunKind, WorkingSet};
use zygote_vmm::{Disk, GuestMemory, Touches};

/// Runs of which only that counts which all of them do.
const REHEARSALS: usize = 4;

/// A snapshot that has just been written.
pub struct Fresh<'a> {
    /// Guest memory.
    pub memory: File,
    /// Registers and devices.
    pub state: &'a MachineState,
    /// Its length.
    pub memory_bytes: u64,
    /// Its root.
    pub root: Disk,
}

type Pages = BTreeSet<u32>;

impl Fresh<'_> {
    /// The pages of the shortest programs.
    pub fn working_sets(&self) -> Result<Vec<WorkingSet>, GuestError> {
        [RunKind::Python, RunKind::Command, RunKind::Sandbox]
            .into_iter()
            .map(|kind| self.working_set(kind))
            .collect()
    }

    fn working_set(&self, of: RunKind) -> Result<WorkingSet, GuestError> {
        let written = self.always_written(of)?;
        let read = self.touched(of)?;
        let read = read.difference(&written).copied().collect();
        Ok(WorkingSet {
            of,
            written: ranges(&written),
            read: ranges(&read),
        })
    }

    fn always_written(&self, kind: RunKind) -> Result<Pages, GuestError> {
        let mut written = self.written(kind)?;
        for _ in 1..REHEARSALS {
            let again = self.written(kind)?;
            written.retain(|page| again.contains(page));
        }
        Ok(written)
    }

    fn written(&self, kind: RunKind) -> Result<Pages, GuestError> {
        let memory = GuestMemory::private(&self.memory, self.memory_bytes);
        let memory = memory.map_err(std::io::Error::other)?;
        self.run(kind, memory.clone())?;
        let ranges = memory.copied()?;
        let pages = ranges
            .iter()
            .flat_map(|[first, count]| *first..first + count);
        Ok(pages.collect())
    }

    /// Nothing if this user may not watch page faults: then what is only read is mapped when it is read.
    fn touched(&self, kind: RunKind) -> Result<Pages, GuestError> {
        let Ok((memory, touches)) = Touches::watch(&self.memory, self.memory_bytes) else {
            return Ok(Pages::new());
        };
        self.run(kind, memory)?;
        Ok(touches.taken()?.into_iter().collect())
    }

    fn run(&self, kind: RunKind, memory: GuestMemory) -> Result<(), GuestError> {
        let program = match kind {
            RunKind::Python => Some(python("print(1)")),
            RunKind::Command => Some(Program::Command(vec![b"true".to_vec()])),
            RunKind::Sandbox => None,
        };
        let mut guest = Guest::restore(
            self.state,
            memory,
            vec![self.root.try_clone()?],
            &Ahead::default(),
        )?;
        match program {
            Some(program) => rehearse(&mut guest, program, None),
            None => {
                activate(&mut guest)?;
                Ok(guest.machine.pause()?)
            }
        }
    }
}

fn ranges(pages: &Pages) -> Vec<[u32; 2]> {
    let mut ranges: Vec<[u32; 2]> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some([first, count]) if *first + *count == *page => *count += 1,
            _ => ranges.push([*page, 1]),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_a_range() {
        let pages = Pages::from([1, 2, 3, 7, 9, 10]);
        assert_eq!(ranges(&pages), [[1, 3], [7, 1], [9, 2]]);
        assert_eq!(ranges(&Pages::new()), [[0; 2]; 0]);
    }
}
