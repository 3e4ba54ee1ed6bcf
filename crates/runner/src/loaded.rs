//! A snapshot as a zygote process holds it: checked, decoded, mapped.

use crate::control::Load;
use crate::process::chain;
use std::error::Error;
use std::fs::File;
use std::io;
use zygote_jail::Filter;
use zygote_snapshot::state::MachineState;
use zygote_snapshot::{Snapshot, cpu};
use zygote_vmm::{Disk, GuestMemory, Host};

const REBUILD: &str = "Build it again: zygote template build NAME --force";

/// Everything that a runner is made of.
pub struct Loaded {
    /// The way to KVM.
    pub host: Host,
    /// The folder /proc, to which there is no other way from a jail.
    pub processes: File,
    /// What a runner may ask of the kernel.
    pub filter: Filter,
    /// The guest's memory, mapped copy-on-write.
    pub memory: GuestMemory,
    /// Registers and devices.
    pub state: MachineState,
    /// Disk images with their digests.
    pub disks: Vec<(File, String)>,
}

impl Loaded {
    /// The disks, for one machine.
    pub fn open_disks(&self) -> io::Result<Vec<Disk>> {
        let open = |(file, digest): &(File, String)| {
            Ok(Disk {
                file: file.try_clone()?,
                digest: digest.clone(),
            })
        };
        self.disks.iter().map(open).collect()
    }
}

/// Opens a snapshot, checks all of it that has not been checked before, and maps its memory. The
/// error is the sentence for the user: what is wrong, and the remedy.
pub fn load(load: &Load) -> Result<Loaded, String> {
    let snapshot = Snapshot::open(&load.snapshot, &load.pieces).map_err(|e| refuse(&e))?;
    snapshot
        .verify_once(&load.stamps, &mut |_, _| {})
        .map_err(|e| refuse(&e))?;
    let state = snapshot.machine().map_err(|e| refuse(&e))?;
    let host = Host::open().map_err(|e| chain(&e))?;
    let supported = host.supported_cpuid().map_err(|e| chain(&e))?;
    let guest = state.vcpus.first().map(|vcpu| &vcpu.cpuid[..]);
    if let Some(why) = cpu::refusal(guest.unwrap_or_default(), &supported) {
        return Err(format!(
            "the snapshot cannot run on this host: {why}. {REBUILD}"
        ));
    }
    let bytes = snapshot.manifest().memory.bytes;
    let memory = GuestMemory::private(snapshot.memory_file(), bytes).map_err(|e| chain(&e))?;
    let disks: io::Result<Vec<_>> = snapshot
        .disks()
        .map(|(file, digest)| Ok((file.try_clone()?, digest.to_owned())))
        .collect();
    Ok(Loaded {
        host,
        processes: File::open("/proc").map_err(|e| chain(&e))?,
        filter: Filter::runner().map_err(|e| chain(&e))?,
        memory,
        state,
        disks: disks.map_err(|e| chain(&e))?,
    })
}

fn refuse(error: &dyn Error) -> String {
    format!("the snapshot is not usable: {}. {REBUILD}", chain(error))
}
