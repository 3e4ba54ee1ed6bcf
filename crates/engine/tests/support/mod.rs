//! Machines of a few instructions for tests: any host whose /dev/kvm opens runs them.

#[allow(dead_code, reason = "not of all who share this")]
pub mod branch;

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;
use tokio::runtime::{Builder, Runtime};
use vm_memory::{Bytes, GuestAddress};
use zygote_engine::{Admission, Budget, EngineConfig, PATIENCE};
use zygote_runner::control::{self, FromRunner, Load, PACKET_MAX_BYTES};
use zygote_runner::packet;
use zygote_snapshot::state::{MachineState, VcpuState};
use zygote_snapshot::{Origin, Writer};
use zygote_vmm::{BootConfig, Machine};

/// How a test's program becomes a zygote process.
pub const ZYGOTE_VERB: &str = "--zygote-process";
/// Where the guest's program is loaded and begins.
pub const START: u64 = 0x100_0000;
/// Where the second vCPU begins, if there is one.
pub const SECOND: u64 = START + 0x1000;
/// Offset of RIP in `struct kvm_regs`.
const RIP: usize = 16 * 8;
const RUNNABLE: u32 = 0;

/// Ends this process as a zygote's, if it was started as one.
pub fn become_zygote() {
    if std::env::args()
        .nth(1)
        .is_some_and(|word| word == ZYGOTE_VERB)
    {
        std::process::exit(zygote_runner::zygote_main().into());
    }
}

/// An ELF kernel (System V ABI, chapters 4 and 5) with one segment: the code of each vCPU.
pub fn kernel(first: &[u8], second: &[u8]) -> File {
    let mut code = first.to_vec();
    code.resize((SECOND - START) as usize, 0xf4);
    code.extend(second);
    let length = code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [START, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(b"\0\0\0\0\x40\0\x38\0\x01\0\x40\0\0\0\0\0\x01\0\0\0\x07\0\0\0");
    for word in [120, START, START, length, length, 0x1000] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&code);
    content(&file)
}

fn content(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A machine to make a snapshot of.
pub struct Tiny<'a> {
    pub memory_bytes: u64,
    /// Those without code wait for ever.
    pub vcpus: u8,
    /// The code of the first vCPUs: of one or two.
    pub code: &'a [&'a [u8]],
    /// Where the first one writes something once it is set up.
    pub ready: u64,
    pub protocol_version: u32,
}

/// Writes the snapshot of a machine whose vCPUs run, the second from its beginning; `change` is done to its
/// state.
pub fn snapshot(folder: &Path, tiny: &Tiny<'_>, change: impl FnOnce(&mut MachineState)) {
    let config = BootConfig {
        memory_bytes: tiny.memory_bytes,
        vcpus: tiny.vcpus,
        kernel: kernel(tiny.code[0], tiny.code.get(1).copied().unwrap_or_default()),
        initramfs: content(b"initramfs"),
        command_line: "quiet".into(),
        disks: vec![],
    };
    let (agent, _host) = UnixStream::pair().unwrap();
    agent.set_nonblocking(true).unwrap();
    let mut machine = Machine::boot(config, agent.into(), Box::new(std::io::sink())).unwrap();
    machine.start().unwrap();
    let ready = |machine: &Machine| -> u32 {
        let map = machine.memory().map_ref();
        map.read_obj(GuestAddress(tiny.ready)).unwrap()
    };
    let begun = Instant::now();
    while ready(&machine) == 0 {
        assert!(begun.elapsed() < PATIENCE, "the guest is not set up");
        std::thread::yield_now();
    }
    machine.pause().unwrap();
    let mut state = machine.save().unwrap();
    if let ([first, second], [_, _]) = (&mut state.vcpus[..], tiny.code) {
        (second.regs, second.sregs) = (first.regs.clone(), first.sregs.clone());
        send_to_second(second);
        second.mp_state = RUNNABLE;
    }
    change(&mut state);
    let mut writer = Writer::create(folder).unwrap();
    writer.memory(machine.paused_memory().unwrap()).unwrap();
    writer.machine(&state).unwrap();
    writer
        .finish(Origin {
            template: "tiny".into(),
            recipe_digest: String::new(),
            replica: 0,
            created_unix_s: 0,
            zygote_version: String::new(),
            protocol_version: tiny.protocol_version,
            kernel_release: String::new(),
            interpreter: String::new(),
            cpu_vendor: zygote_snapshot::cpu::vendor(&state.vcpus[0].cpuid),
        })
        .unwrap();
}

/// Has a vCPU begin at the second one's code.
pub fn send_to_second(vcpu: &mut VcpuState) {
    vcpu.regs[RIP..RIP + 8].copy_from_slice(&SECOND.to_le_bytes());
}

/// For the snapshot that lies in `snapshot` of a folder.
pub fn config(folder: &Path) -> EngineConfig {
    EngineConfig {
        command: vec![std::env::current_exe().unwrap().into(), ZYGOTE_VERB.into()],
        load: Load {
            snapshot: folder.join("snapshot"),
            pieces: folder.to_owned(),
            stamps: folder.join("stamps"),
            group: None,
        },
        admission: Admission::new(Budget::default()),
        allow_missing_walls: false,
        patience: PATIENCE,
    }
}

pub fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// What a runner says next, with its descriptor.
pub fn hear(control: &std::os::fd::OwnedFd) -> (FromRunner, Option<std::os::fd::OwnedFd>) {
    let mut bytes = [0; PACKET_MAX_BYTES];
    let (length, descriptors) = packet::receive(control, &mut bytes).unwrap();
    let heard = control::decode(&bytes[..length]).unwrap();
    (heard, descriptors.into_iter().next())
}
