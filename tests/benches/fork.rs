//! What the host pays for a fork, with a guest of a few instructions: any host whose /dev/kvm opens
//! measures it, also one that cannot run a kernel. Whole processes, jail included; beside them the
//! classic recipe, in one process, with KVM's own interrupt chips and timer.
//!
//!     cargo bench -p zygote-tests
//!
//! The clock of `first_instruction` runs from the request for a fork until the engine knows that
//! the guest has run (its last instruction resets the machine, and the runner tells).

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "a bench, with KVM at its barest"
)]

use divan::Bencher;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use tokio::runtime::{Builder, Runtime};
use vm_memory::{Bytes, GuestAddress};
use zygote_engine::{Admission, Budget, EngineConfig, PATIENCE, RunKind, Runner, Zygote};
use zygote_runner::control::{self, FromRunner, Load, PACKET_MAX_BYTES};
use zygote_runner::packet;
use zygote_snapshot::{Origin, Writer};
use zygote_vmm::{BootConfig, GuestMemory, Machine};

/// How this program becomes a zygote process.
const ZYGOTE_VERB: &str = "--zygote-process";
/// Where the guest's program is loaded and begins.
const START: u64 = 0x100_0000;
/// The guest counts here until the word after it is not zero.
const COUNTER: u32 = 0x200_0000;
const FLAG: u32 = COUNTER + 8;

/// Memory in MiB and vCPUs.
const MACHINES: [(u64, u8); 6] = [(128, 1), (512, 1), (2048, 1), (8192, 1), (512, 2), (512, 8)];

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == ZYGOTE_VERB)
    {
        return ExitCode::from(zygote_runner::zygote_main());
    }
    divan::main();
    ExitCode::SUCCESS
}

/// loop: inc qword [COUNTER]; cmp qword [FLAG], 0; je loop; then a reset by the keyboard controller.
fn guest() -> Vec<u8> {
    let mut code = vec![0x48, 0xff, 0x04, 0x25];
    code.extend_from_slice(&COUNTER.to_le_bytes());
    code.extend_from_slice(&[0x48, 0x83, 0x3c, 0x25]);
    code.extend_from_slice(&FLAG.to_le_bytes());
    code.extend_from_slice(&[0, 0x74, 0xed]);
    code.extend_from_slice(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd]);
    code
}

/// An ELF kernel (System V ABI, chapters 4 and 5) with one segment.
fn elf(code: &[u8]) -> File {
    let length = code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [START, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(b"\0\0\0\0\x40\0\x38\0\x01\0\x40\0\0\0\0\0\x01\0\0\0\x07\0\0\0");
    for word in [120, START, START, length, length, 0x1000] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(code);
    content(&file)
}

fn content(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A snapshot of a machine that resets itself as soon as it goes on.
fn snapshot(folder: &Path, memory_mib: u64, vcpus: u8) {
    let config = BootConfig {
        memory_bytes: memory_mib << 20,
        vcpus,
        kernel: elf(&guest()),
        initramfs: content(b"initramfs"),
        command_line: "quiet".into(),
        disks: vec![],
    };
    let (agent, _host) = UnixStream::pair().unwrap();
    let mut machine = Machine::boot(config, agent.into(), Box::new(std::io::sink())).unwrap();
    machine.start().unwrap();
    let word = |machine: &Machine| -> u64 {
        let map = machine.memory().map_ref();
        map.read_obj(GuestAddress(COUNTER.into())).unwrap()
    };
    while word(&machine) < 1000 {
        std::thread::yield_now();
    }
    machine.pause().unwrap();
    let map = machine.memory().map_ref();
    map.write_obj(1_u64, GuestAddress(FLAG.into())).unwrap();
    let state = machine.save().unwrap();
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
            protocol_version: zygote_protocol::PROTOCOL_VERSION,
            kernel_release: String::new(),
            interpreter: String::new(),
            cpu_vendor: zygote_snapshot::cpu::vendor(&state.vcpus[0].cpuid),
        })
        .unwrap();
}

/// A zygote process with the runtime that its owner task needs.
struct Loaded {
    runtime: Runtime,
    zygote: Zygote,
    last: RefCell<Option<Fork>>,
    _folder: tempfile::TempDir,
}

fn loaded(machine: (u64, u8)) -> Rc<Loaded> {
    thread_local! {
        static ALL: RefCell<HashMap<(u64, u8), Rc<Loaded>>> = RefCell::default();
    }
    ALL.with_borrow_mut(|all| {
        Rc::clone(all.entry(machine).or_insert_with(|| Rc::new(load(machine))))
    })
}

fn load((memory_mib, vcpus): (u64, u8)) -> Loaded {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    snapshot(&path, memory_mib, vcpus);
    let config = EngineConfig {
        command: vec![std::env::current_exe().unwrap().into(), ZYGOTE_VERB.into()],
        load: Load {
            snapshot: path,
            pieces: folder.path().to_owned(),
            stamps: folder.path().join("stamps"),
            group: None,
        },
        admission: Admission::new(Budget::default()),
        allow_missing_walls: false,
        patience: PATIENCE,
    };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let zygote = runtime.block_on(Zygote::load(&config)).unwrap();
    Loaded {
        runtime,
        zygote,
        last: RefCell::default(),
        _folder: folder,
    }
}

/// A fork that has not been activated, with the engine's ends of its sockets.
struct Fork {
    runner: Runner,
    agent: UnixStream,
    control: OwnedFd,
}

impl Loaded {
    fn fork(&self) -> Fork {
        let (agent, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (control, runner_control) = packet::pair().unwrap();
        let forked = self
            .zygote
            .fork(RunKind::Python, theirs.into(), runner_control);
        let runner = self.runtime.block_on(forked).unwrap();
        Fork {
            runner,
            agent,
            control,
        }
    }

    /// A runner tells when it is parked.
    fn parked(&self) -> Fork {
        let fork = self.fork();
        assert_eq!(fork.heard(), FromRunner::Parked);
        fork
    }

    /// Keeps a fork to be ended before the next is timed: ending it is work for a processor too.
    fn leave(&self, fork: Fork) {
        *self.last.borrow_mut() = Some(fork);
    }

    fn settle(&self) {
        if let Some(fork) = self.last.take() {
            self.end(fork);
        }
    }

    fn end(&self, fork: Fork) {
        let Fork {
            mut runner,
            agent,
            control,
        } = fork;
        drop((agent, control));
        self.runtime.block_on(runner.ended()).unwrap();
    }
}

impl Fork {
    fn heard(&self) -> FromRunner {
        let mut bytes = [0; PACKET_MAX_BYTES];
        let (length, _) = packet::receive(&self.control, &mut bytes).unwrap();
        control::decode(&bytes[..length]).unwrap()
    }

    /// The first byte for the agent starts the machine; this one's guest then ends it.
    fn run(&mut self) {
        self.agent.write_all(&[0]).unwrap();
        loop {
            if let FromRunner::Stopped { .. } = self.heard() {
                return;
            }
        }
    }
}

/// Request → the guest has run, without a pool.
#[divan::bench(args = MACHINES, sample_count = 100, sample_size = 1)]
fn first_instruction(bencher: Bencher<'_, '_>, machine: (u64, u8)) {
    let loaded = loaded(machine);
    bencher
        .with_inputs(|| loaded.settle())
        .bench_local_values(|()| {
            let mut fork = loaded.fork();
            fork.run();
            loaded.leave(fork);
        });
}

/// The same for a fork that was parked ahead.
#[divan::bench(args = MACHINES, sample_count = 100, sample_size = 1)]
fn first_instruction_of_a_parked_fork(bencher: Bencher<'_, '_>, machine: (u64, u8)) {
    let loaded = loaded(machine);
    bencher
        .with_inputs(|| {
            loaded.settle();
            loaded.parked()
        })
        .bench_local_values(|mut fork| {
            fork.run();
            loaded.leave(fork);
        });
}

/// The engine lets go of a parked fork → its process has been reaped.
#[divan::bench(args = MACHINES, sample_count = 100, sample_size = 1)]
fn teardown(bencher: Bencher<'_, '_>, machine: (u64, u8)) {
    let loaded = loaded(machine);
    bencher
        .with_inputs(|| loaded.parked())
        .bench_local_values(|fork| loaded.end(fork));
}

/// mov al, 0xfe; out 0x64, al: in real mode, at 0x1000.
fn classic_image(memory_mib: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(memory_mib << 20).unwrap();
    file.write_all_at(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], 0x1000)
        .unwrap();
    file
}

/// The classic recipe, from the image to the guest's first exit: no process, no jail, and KVM's
/// own interrupt chips and PIT.
fn classic(image: &File, memory_mib: u64) -> impl Sized {
    let memory = GuestMemory::private(image, memory_mib << 20).unwrap();
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    for (slot, region) in memory.kvm_regions().into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            ..region
        };
        // SAFETY: the memory is given back after the VM, below.
        unsafe { vm.set_user_memory_region(region).unwrap() };
    }
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    let mut special = vcpu.get_sregs().unwrap();
    (special.cs.base, special.cs.selector) = (0, 0);
    vcpu.set_sregs(&special).unwrap();
    let mut registers = vcpu.get_regs().unwrap();
    (registers.rip, registers.rflags) = (0x1000, 2);
    vcpu.set_regs(&registers).unwrap();
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, VcpuExit::IoOut(0x64, _)), "{exit:?}");
    (vcpu, vm, memory)
}

/// The classic recipe's request → the guest has run.
#[divan::bench(args = [128, 512, 2048, 8192], sample_count = 50, sample_size = 1)]
fn classic_first_instruction(bencher: Bencher<'_, '_>, memory_mib: u64) {
    let image = classic_image(memory_mib);
    bencher.bench_local(|| classic(&image, memory_mib));
}

/// The same, and its end.
#[divan::bench(args = [128, 512, 2048, 8192], sample_count = 50, sample_size = 1)]
fn classic_whole(bencher: Bencher<'_, '_>, memory_mib: u64) {
    let image = classic_image(memory_mib);
    bencher.bench_local(|| drop(classic(&image, memory_mib)));
}
