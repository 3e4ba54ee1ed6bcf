//! The census of a run: which pages it touches and which it makes its own, in which phase, and whose they
//! are.

use crate::owners::Owners;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use zygote_protocol::{ExitStatus, Program};
use zygote_snapshot::state::MachineState;
use zygote_snapshot::{Ahead, DeltaError, OpenError, RunKind, Snapshot, WorkingSet};
use zygote_template::rehearsal::{Moment, rehearse};
use zygote_template::{Guest, GuestError, Store, StoreError, copy_of};
use zygote_vmm::{Disk, GuestMemory, MemoryError, TouchError, Touches};

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The machine is made, and becomes somebody.
    Activation,
    /// The program is started.
    Start,
    /// Until its first output, or its end.
    Output,
    /// From there to its end.
    End,
}

/// What a phase has done to one owner's pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Pages written for the first time, and so copied: the fork's own from then on.
    pub private_pages: u64,
    /// Pages read or written for the first time.
    pub touched_pages: u64,
}

impl Share {
    fn add(&mut self, other: Self) {
        self.private_pages += other.private_pages;
        self.touched_pages += other.touched_pages;
    }
}

/// What a phase has cost.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Course {
    /// By owner.
    pub owners: BTreeMap<String, Share>,
    /// How much KVM's counters have grown, by their names in the kernel; without those that have not.
    pub kvm: BTreeMap<String, u64>,
    /// The same in a fork that has ahead what the template has recorded, as runs do.
    pub kvm_ahead: BTreeMap<String, u64>,
}

impl Course {
    /// All owners together.
    #[must_use]
    pub fn all(&self) -> Share {
        let mut all = Share::default();
        self.owners.values().for_each(|share| all.add(*share));
        all
    }
}

/// The census.
#[derive(Clone, Debug, Serialize)]
pub struct Census {
    /// How the program ended.
    pub exit_code: u8,
    /// What each phase has cost.
    pub phases: BTreeMap<Phase, Course>,
}

impl Census {
    /// All phases together, by owner, those with the most private pages first.
    #[must_use]
    pub fn by_owner(&self) -> Vec<(String, Share)> {
        let mut all: BTreeMap<&str, Share> = BTreeMap::new();
        for (owner, share) in self.phases.values().flat_map(|course| &course.owners) {
            all.entry(owner).or_default().add(*share);
        }
        let mut all: Vec<_> = all
            .into_iter()
            .map(|(owner, share)| (owner.to_owned(), share))
            .collect();
        all.sort_by_key(|(_, share)| std::cmp::Reverse((share.private_pages, share.touched_pages)));
        all
    }
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum CensusError {
    /// The template.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its snapshot.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A guest.
    #[error("the guest that is measured does not work")]
    Guest(#[from] GuestError),
    /// Watching its pages.
    #[error(transparent)]
    Touch(#[from] TouchError),
    /// A file.
    #[error("cannot read the snapshot")]
    Read(#[from] io::Error),
    /// Its processes run on.
    #[error(
        "the template is a snapshot of a sandbox: what its processes touch cannot be told from a run's"
    )]
    Held,
    /// What differs from the template under it.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// An old agent.
    #[error(
        "the template's agent does not tell whose its pages are; build the template again, with --force"
    )]
    NoOwners,
}

/// Runs a program in forks of a template: in one the pages are watched that it touches, in another those
/// that it writes, and KVM's counters; a third has ahead what runs have ahead. Needs a KVM that runs kernels.
///
/// # Errors
/// See [`CensusError`].
pub fn take(store: &Store, template: &str, program: &Program) -> Result<Census, CensusError> {
    let build = store.current(template)?;
    let replicas = store.replicas_of(template, &build)?;
    let Some(directory) = replicas.first() else {
        return Err(io::Error::from(io::ErrorKind::NotFound).into());
    };
    let subject = Subject::open(store, directory)?;
    let owners = subject.owners()?;
    let touched = subject.touched(program.clone())?;
    let mut seen = subject.written(program.clone(), &Ahead::default())?;
    let mut ahead = subject.written(program.clone(), &subject.ahead(program))?;
    let mut phases: BTreeMap<Phase, Course> = BTreeMap::new();
    for (phase, pages) in touched {
        let shares = &mut phases.entry(phase).or_default().owners;
        for page in pages {
            let owner = owners.of(frame(page)).to_owned();
            shares.entry(owner).or_default().touched_pages += 1;
        }
    }
    for (phase, pages) in new_in_each(&seen.written) {
        let course = phases.entry(phase).or_default();
        for page in pages {
            let owner = owners.of(frame(page)).to_owned();
            course.owners.entry(owner).or_default().private_pages += 1;
        }
        course.kvm = seen.kvm.remove(&phase).unwrap_or_default();
        course.kvm_ahead = ahead.kvm.remove(&phase).unwrap_or_default();
    }
    Ok(Census {
        exit_code: seen.exit_code,
        phases,
    })
}

/// What is measured.
struct Subject {
    snapshot: Snapshot,
    /// All of its memory.
    memory: File,
    state: MachineState,
    bytes: u64,
}

/// The file that it maps, or a copy with what differs from that.
fn memory_of(snapshot: &Snapshot, directory: &Path, pieces: &Path) -> Result<File, CensusError> {
    if snapshot.manifest().base.is_none() {
        return Ok(snapshot.memory_file().try_clone()?);
    }
    let (whole, _) = Snapshot::open(directory, pieces)?.into_whole(String::new());
    let copy = copy_of(&whole)?;
    let mut written = Ok(());
    let read = snapshot.read_delta(&mut |offset, bytes| {
        written = copy.write_all_at(bytes, offset);
        written.is_ok()
    });
    written?;
    read?;
    Ok(copy)
}

/// A fork's private pages at the end of each phase, in its backing.
type Written = BTreeMap<Phase, BTreeSet<u32>>;

struct Seen {
    written: Written,
    kvm: BTreeMap<Phase, BTreeMap<String, u64>>,
    exit_code: u8,
}

impl Subject {
    fn open(store: &Store, directory: &Path) -> Result<Self, CensusError> {
        let pieces = store.pieces_of(directory);
        let snapshot = Snapshot::open(directory, &pieces)?;
        if snapshot.manifest().is_held() {
            return Err(CensusError::Held);
        }
        Ok(Self {
            memory: memory_of(&snapshot, directory, &pieces)?,
            state: snapshot.machine()?,
            bytes: snapshot.manifest().memory.bytes,
            snapshot,
        })
    }

    /// What the template has recorded for such runs.
    fn ahead(&self, program: &Program) -> Ahead {
        let kind = match program {
            Program::Python { .. } => RunKind::Python,
            Program::Command(_) | Program::Context | Program::Files(_) => RunKind::Command,
        };
        let sets = &self.snapshot.manifest().working_sets;
        let set = sets.iter().find(|set| set.of == kind);
        set.map(WorkingSet::ahead).unwrap_or_default()
    }

    fn guest(&self, memory: GuestMemory, ahead: &Ahead) -> Result<Guest, CensusError> {
        let disks: io::Result<Vec<Disk>> = self
            .snapshot
            .disks()
            .map(|(file, digest)| Disk::new(file.try_clone()?, digest.to_owned()))
            .collect();
        Ok(Guest::restore(&self.state, memory, disks?, ahead)?)
    }

    fn memory(&self) -> Result<GuestMemory, CensusError> {
        Ok(GuestMemory::private(&self.memory, self.bytes)?)
    }

    /// Asks a fork whose its pages are.
    fn owners(&self) -> Result<Owners, CensusError> {
        let mut guest = self.guest(self.memory()?, &Ahead::default())?;
        let mut text = Vec::new();
        let words = ["/proc/1/exe", "owners"].map(|word| word.as_bytes().to_vec());
        let program = Program::Command(words.to_vec());
        rehearse(
            &mut guest,
            program,
            Some(&mut |_, moment| {
                if let Moment::Output(data) = moment {
                    text.extend(data);
                }
                Ok(())
            }),
        )?;
        let owners = Owners::parse(&String::from_utf8_lossy(&text));
        if owners.is_empty() {
            return Err(CensusError::NoOwners);
        }
        Ok(owners)
    }

    /// The pages that each phase touches first.
    fn touched(&self, program: Program) -> Result<Vec<(Phase, Vec<u32>)>, CensusError> {
        let (memory, touches) = Touches::watch(&self.memory, self.bytes)?;
        let mut guest = self.guest(memory, &Ahead::default())?;
        let mut clock = PhaseClock::default();
        let mut ends = Vec::new();
        rehearse(
            &mut guest,
            program,
            Some(&mut |_, moment| {
                if let Some(phase) = clock.ended(&moment) {
                    ends.push((phase, touches.count()));
                }
                Ok(())
            }),
        )?;
        // Nothing may wait for the watcher when it goes.
        drop(guest);
        let pages = touches.taken()?;
        let mut begin = 0;
        let piece = |(phase, end): (Phase, usize)| {
            let piece = pages[begin..end].to_vec();
            begin = end;
            (phase, piece)
        };
        Ok(ends.into_iter().map(piece).collect())
    }

    fn written(&self, program: Program, ahead: &Ahead) -> Result<Seen, CensusError> {
        let memory = self.memory()?;
        let mut guest = self.guest(memory.clone(), ahead)?;
        let mut clock = PhaseClock::default();
        let mut seen = Seen {
            written: Written::new(),
            kvm: BTreeMap::new(),
            exit_code: 0,
        };
        let mut before = BTreeMap::new();
        rehearse(
            &mut guest,
            program,
            Some(&mut |guest, moment| {
                if let Moment::Exited(status) = moment {
                    seen.exit_code = exit_code(status);
                }
                let Some(phase) = clock.ended(&moment) else {
                    return Ok(());
                };
                let ranges = memory.copied()?;
                let pages = ranges
                    .iter()
                    .flat_map(|[first, count]| *first..first + count);
                seen.written.insert(phase, pages.collect());
                if let Some(statistics) = &guest.statistics {
                    let now = statistics.read()?;
                    seen.kvm.insert(phase, growth(&before, &now));
                    before = now;
                }
                Ok(())
            }),
        )?;
        Ok(seen)
    }
}

/// Which phase ends with a moment.
#[derive(Default)]
struct PhaseClock {
    has_spoken: bool,
}

impl PhaseClock {
    fn ended(&mut self, moment: &Moment) -> Option<Phase> {
        match moment {
            Moment::Activated => Some(Phase::Activation),
            Moment::Started => Some(Phase::Start),
            Moment::Output(_) if self.has_spoken => None,
            Moment::Output(_) => {
                self.has_spoken = true;
                Some(Phase::Output)
            }
            Moment::Exited(_) => Some(Phase::End),
        }
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    match status {
        ExitStatus::Code(code) => code,
        ExitStatus::Signal { signal, .. } => 128 + signal,
    }
}

fn growth(before: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let was = |name: &String| before.get(name).copied().unwrap_or_default();
    now.iter()
        .map(|(name, value)| (name.clone(), value.saturating_sub(was(name))))
        .filter(|(_, value)| *value > 0)
        .collect()
}

/// What each phase has that the one before it had not.
fn new_in_each(written: &Written) -> Vec<(Phase, Vec<u32>)> {
    let mut known = BTreeSet::new();
    let mut new = Vec::new();
    for (phase, pages) in written {
        new.push((*phase, pages.difference(&known).copied().collect()));
        known.extend(pages);
    }
    new
}

/// The guest-physical page of a page of the memory's backing: the hole lies between.
fn frame(page: u32) -> u32 {
    let hole_start = (zygote_vmm::memory::HOLE_START >> 12) as u32;
    let hole_pages = ((zygote_vmm::memory::HOLE_END >> 12) as u32) - hole_start;
    if page < hole_start {
        page
    } else {
        page + hole_pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_new_once() {
        let written = Written::from([
            (Phase::Activation, BTreeSet::from([1, 2])),
            (Phase::Start, BTreeSet::from([1, 2])),
            (Phase::End, BTreeSet::from([1, 2, 9])),
        ]);
        let new = [
            (Phase::Activation, vec![1, 2]),
            (Phase::Start, vec![]),
            (Phase::End, vec![9]),
        ];
        assert_eq!(new_in_each(&written), new);
    }

    #[test]
    fn a_phase_ends_with_the_first_output_and_not_with_the_second() {
        let mut clock = PhaseClock::default();
        let output = Moment::Output(vec![]);
        assert_eq!(clock.ended(&output), Some(Phase::Output));
        assert_eq!(clock.ended(&output), None);
    }

    #[test]
    fn counters_that_have_not_grown_are_left_out() {
        let map = |pairs: &[(&str, u64)]| {
            let pairs = pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), *value));
            pairs.collect::<BTreeMap<_, _>>()
        };
        let grown = growth(
            &map(&[("a", 1), ("b", 2)]),
            &map(&[("a", 1), ("b", 5), ("c", 1)]),
        );
        assert_eq!(grown, map(&[("b", 3), ("c", 1)]));
    }

    #[test]
    fn pages_above_the_hole_are_numbered_as_the_guest_does() {
        assert_eq!(frame(0xb_ffff), 0xb_ffff);
        assert_eq!(frame(0xc_0000), 0x10_0000);
    }
}
