//! A snapshot as a zygote process holds it: checked, decoded, mapped.

use crate::control::Load;
use crate::process::chain;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use zygote_jail::{Filter, FilterError, Role};
use zygote_protocol::PROTOCOL_VERSION;
use zygote_snapshot::state::MachineState;
use zygote_snapshot::{Ahead, Manifest, RunKind, Snapshot, cpu};
use zygote_vmm::{Disk, GuestMemory, Host, Machine, Prepare};

/// Everything that a runner is made of.
pub struct Loaded {
    /// The way to KVM.
    pub host: Host,
    /// What a runner may ask of the kernel.
    filter: Filter,
    /// What a vCPU's thread may.
    vcpu_filter: Filter,
    /// Whether this host has filters.
    pub is_filtered: bool,
    /// Whether each runner gets a user of its own.
    pub has_users: bool,
    /// The guest's memory, mapped copy-on-write.
    pub memory: GuestMemory,
    /// What runs touch whatever their program.
    ahead: Vec<(RunKind, Ahead)>,
    /// Registers and devices.
    pub state: MachineState,
    /// Whether it is a branch of a machine that goes on: the agent's connection stays with that one.
    pub is_branch: bool,
    /// Disk images.
    pub disks: Vec<Disk>,
}

const NOTHING: &Ahead = &Ahead {
    written: Vec::new(),
    touched: Vec::new(),
};

impl Loaded {
    /// What a fork for such a run has ahead.
    pub fn ahead(&self, kind: RunKind) -> &Ahead {
        let found = self.ahead.iter().find(|(of, _)| *of == kind);
        found.map_or(NOTHING, |(_, ahead)| ahead)
    }

    /// Takes from this process, a runner, what it need not ask of the kernel.
    pub fn take_away(&self) -> Result<(), FilterError> {
        if self.is_filtered {
            self.filter.for_process(std::process::id()).install()?;
        }
        Ok(())
    }

    /// The same for a vCPU's thread, which does it itself.
    pub fn prepare_vcpu(&self) -> Prepare {
        if !self.is_filtered {
            return Arc::new(|| Ok(()));
        }
        let filter = self.vcpu_filter.for_process(std::process::id());
        Arc::new(move || filter.install().map_err(|e| chain(&e)))
    }

    /// What is held from here on: a machine's state, over the memory as it is now.
    pub fn become_branch(&mut self, state: MachineState) {
        self.state = state;
        self.is_branch = true;
        // What it has ahead stays: becoming somebody touches much the same in a branch.
        // Its user stays its source's; a process without capabilities has no other.
        self.has_users = false;
    }

    /// The disks, for one machine.
    pub fn open_disks(&self) -> io::Result<Vec<Disk>> {
        self.disks.iter().map(Disk::try_clone).collect()
    }
}

/// Opens a snapshot, checks all of it that has not been checked before, and maps its memory. The
/// error is the sentence for the user: what is wrong, and the remedy. Ends early, with an error,
/// once the other end of `engine` is closed: then nobody waits for it.
pub fn load(load: &Load, engine: &OwnedFd) -> Result<Loaded, String> {
    let snapshot = Snapshot::open(&load.snapshot, &load.pieces).map_err(|e| refuse(&e))?;
    let spoken = snapshot.manifest().origin.protocol_version;
    if spoken != PROTOCOL_VERSION {
        return Err(format!(
            "the snapshot is of another version of Zygote: its agent speaks version {spoken} of the \
             protocol, and this program version {PROTOCOL_VERSION}"
        ));
    }
    snapshot
        .verify_once(&load.stamps, &mut |_, _| is_open(engine))
        .map_err(|e| refuse(&e))?;
    let state = snapshot.machine().map_err(|e| refuse(&e))?;
    let host = Host::open().map_err(|e| chain(&e))?;
    let supported = host.supported_cpuid().map_err(|e| chain(&e))?;
    let guest = state.vcpus.first().map(|vcpu| &vcpu.cpuid[..]);
    if let Some(why) = cpu::refusal(guest.unwrap_or_default(), &supported) {
        return Err(format!("the snapshot cannot run on this host: {why}"));
    }
    let bytes = snapshot.manifest().memory.bytes;
    let memory = GuestMemory::private(snapshot.memory_file(), bytes).map_err(|e| chain(&e))?;
    put_delta(&snapshot, &memory, engine)?;
    let disks: io::Result<Vec<_>> = snapshot
        .disks()
        .map(|(file, digest)| Disk::new(file.try_clone()?, digest.to_owned()))
        .collect();
    let loaded = Loaded {
        host,
        filter: Filter::new(Role::Runner),
        vcpu_filter: Filter::new(Role::Vcpu),
        is_filtered: true,
        has_users: false,
        memory,
        ahead: ahead(snapshot.manifest()),
        state,
        is_branch: snapshot.manifest().is_held(),
        disks: disks.map_err(|e| chain(&e))?,
    };
    try_once(&loaded).map_err(|e| {
        format!(
            "the snapshot cannot run on this host: {}",
            chain(e.as_ref())
        )
    })?;
    Ok(loaded)
}

/// Puts what differs from the memory's file into it.
fn put_delta(snapshot: &Snapshot, memory: &GuestMemory, engine: &OwnedFd) -> Result<(), String> {
    let put = &mut |offset, bytes: &[u8]| memory.write(offset, bytes) && is_open(engine);
    snapshot.read_delta(put).map_err(|e| refuse(&e))
}

fn ahead(manifest: &Manifest) -> Vec<(RunKind, Ahead)> {
    let sets = manifest.working_sets.iter();
    sets.map(|set| (set.of, set.ahead())).collect()
}

/// Makes a machine and throws it away: what this host refuses is told now, and not by each fork.
fn try_once(loaded: &Loaded) -> Result<(), Box<dyn Error>> {
    let (agent, _engine) = UnixStream::pair()?;
    agent.set_nonblocking(true)?;
    Machine::restore(
        &loaded.host,
        &loaded.state,
        loaded.memory.clone(),
        loaded.open_disks()?,
        agent.into(),
        Box::new(io::sink()),
    )?;
    Ok(())
}

/// Whether the other end of a socket is open.
fn is_open(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().is_empty()
}

fn refuse(error: &dyn Error) -> String {
    format!("the snapshot is not usable: {}", chain(error))
}
