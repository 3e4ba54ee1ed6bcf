//! The engine with real zygote processes and real machines, whose guests are of a few instructions:
//! any host whose /dev/kvm opens runs them. The program that starts a zygote also is one.

#![allow(clippy::unwrap_used, reason = "a test")]

use libtest_mimic::{Arguments, Trial};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use vm_memory::{Bytes, GuestAddress};
use zygote_engine::{Admission, Budget, EngineConfig, PATIENCE, RunKind, Runner, Zygote};
use zygote_protocol::PROTOCOL_VERSION;
use zygote_runner::control::{self, FromRunner, Load, PACKET_MAX_BYTES};
use zygote_runner::packet;
use zygote_snapshot::{Origin, Writer};
use zygote_vmm::layout::{VIRTIO_MMIO, VIRTIO_MMIO_SLOT_BYTES};
use zygote_vmm::{BootConfig, Machine};

/// How this program becomes a zygote process.
const ZYGOTE_VERB: &str = "--zygote-process";
const MEMORY_BYTES: u64 = 128 << 20;
/// Where the guest's program is loaded and begins; its second vCPU begins a page further.
const START: u64 = 0x100_0000;
const SECOND: u64 = START + 0x1000;
/// The guest writes here once it is set up.
const READY: u64 = 0x200_0000;
/// The rings of the socket device's transmit queue, each on a page of its own.
const RING: u64 = 0x210_0000;
/// A machine with no disk has its socket device in the second slot.
const VSOCK: u64 = VIRTIO_MMIO + VIRTIO_MMIO_SLOT_BYTES;
const TRANSMIT: u32 = 1;

fn main() -> ExitCode {
    if std::env::args()
        .nth(1)
        .is_some_and(|word| word == ZYGOTE_VERB)
    {
        return ExitCode::from(zygote_runner::zygote_main());
    }
    let tests = [
        trial(
            "a_guest_that_keeps_a_ring_full_is_gone_within_a_second",
            a_guest_that_keeps_a_ring_full_is_gone_within_a_second,
        ),
        trial(
            "a_thousand_forks_at_once_are_made_and_end",
            a_thousand_forks_at_once_are_made_and_end,
        ),
        trial(
            "a_snapshot_of_another_version_is_refused",
            a_snapshot_of_another_version_is_refused,
        ),
        trial(
            "a_snapshot_that_this_host_refuses_is_refused_at_its_loading",
            a_snapshot_that_this_host_refuses_is_refused_at_its_loading,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests.into()).exit_code()
}

fn trial(name: &str, check: fn()) -> Trial {
    Trial::test(name, move || {
        check();
        Ok(())
    })
}

/// mov rbx, ADDRESS; mov dword [rbx], VALUE
fn write(address: u64, value: u32) -> Vec<u8> {
    let mut code = vec![0x48, 0xbb];
    code.extend_from_slice(&address.to_le_bytes());
    code.extend_from_slice(&[0xc7, 0x03]);
    code.extend_from_slice(&value.to_le_bytes());
    code
}

/// Sets the transmit queue up, says that it is ready, and rings for ever: what a driver may do
/// (virtio 1.3 §4.2.2, §3.1.1).
fn ringing() -> Vec<u8> {
    let registers = [
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, TRANSMIT),
        (0x38, 256),
        (0x80, RING as u32),
        (0x90, RING as u32 + 0x1000),
        (0xa0, RING as u32 + 0x2000),
        (0x44, 1),
        (0x70, 15),
    ];
    let mut code: Vec<u8> = registers
        .into_iter()
        .flat_map(|(offset, value)| write(VSOCK + offset, value))
        .collect();
    code.extend(write(READY, 1));
    let ring = write(VSOCK + 0x50, TRANSMIT);
    let back = -(ring.len() as i8) - 2;
    code.extend(ring);
    code.extend_from_slice(&[0xeb, back as u8]);
    code
}

/// Keeps the transmit ring full: its available index is 256 ahead of the used one, for ever.
fn filling() -> Vec<u8> {
    let mut code = vec![0x48, 0xbb];
    code.extend_from_slice(&(RING + 0x2002).to_le_bytes()); // mov rbx, used
    code.extend_from_slice(&[0x48, 0xb9]);
    code.extend_from_slice(&(RING + 0x1002).to_le_bytes()); // mov rcx, available
    // mov ax, [rbx]; add ax, 256; mov [rcx], ax; jmp back
    code.extend_from_slice(&[
        0x66, 0x8b, 0x03, 0x66, 0x05, 0x00, 0x01, 0x66, 0x89, 0x01, 0xeb, 0xf4,
    ]);
    code
}

/// An ELF kernel (System V ABI, chapters 4 and 5) with one segment.
fn kernel() -> File {
    let mut code = ringing();
    code.resize((SECOND - START) as usize, 0xf4);
    code.extend(filling());
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

/// Offsets in `struct kvm_regs` and of the wanted value in `mp_state`.
const RIP: usize = 16 * 8;
const RUNNABLE: u32 = 0;

/// A snapshot of a machine whose first vCPU rings and whose second fills the ring. `spoil`: an MSR
/// gets a value that no CPU takes.
fn snapshot(folder: &Path, spoil: bool, protocol_version: u32) {
    let config = BootConfig {
        memory_bytes: MEMORY_BYTES,
        vcpus: 2,
        kernel: kernel(),
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
        map.read_obj(GuestAddress(READY)).unwrap()
    };
    let begun = Instant::now();
    while ready(&machine) == 0 {
        assert!(begun.elapsed() < PATIENCE, "the guest is not set up");
        std::thread::yield_now();
    }
    machine.pause().unwrap();
    let mut state = machine.save().unwrap();
    let first = state.vcpus[0].clone();
    let second = &mut state.vcpus[1];
    (second.regs, second.sregs) = (first.regs, first.sregs);
    second.regs[RIP..RIP + 8].copy_from_slice(&SECOND.to_le_bytes());
    second.mp_state = RUNNABLE;
    if spoil {
        let apic = zygote_snapshot::state::MsrEntry {
            index: 0xc000_0080,
            value: u64::MAX,
        };
        second.msrs.push(apic);
    }
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
            protocol_version,
            kernel_release: String::new(),
            interpreter: String::new(),
            cpu_vendor: zygote_snapshot::cpu::vendor(&state.vcpus[0].cpuid),
        })
        .unwrap();
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn config(folder: &Path, spoil: bool) -> EngineConfig {
    config_of(folder, spoil, PROTOCOL_VERSION)
}

fn config_of(folder: &Path, spoil: bool, protocol_version: u32) -> EngineConfig {
    snapshot(&folder.join("snapshot"), spoil, protocol_version);
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

struct Fork {
    runner: Runner,
    agent: UnixStream,
    control: std::os::fd::OwnedFd,
}

async fn fork(zygote: &Zygote) -> Fork {
    let (agent, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let (control, runner_control) = packet::pair().unwrap();
    let runner = zygote
        .fork(RunKind::Python, theirs.into(), runner_control)
        .await
        .unwrap();
    Fork {
        runner,
        agent,
        control,
    }
}

impl Fork {
    fn await_parked(&self) {
        let mut bytes = [0; PACKET_MAX_BYTES];
        let (length, _) = packet::receive(&self.control, &mut bytes).unwrap();
        let heard: FromRunner = control::decode(&bytes[..length]).unwrap();
        assert_eq!(heard, FromRunner::Parked);
    }
}

fn a_guest_that_keeps_a_ring_full_is_gone_within_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), false);
    runtime().block_on(async {
        let zygote = Zygote::load(&config).await.unwrap();
        let mut forks = Vec::new();
        for _ in 0..2 {
            let mut fork = fork(&zygote).await;
            fork.await_parked();
            fork.agent.write_all(b"go").unwrap();
            forks.push(fork);
        }
        // It rings by now, and its main thread is in the device as often as not; from outside of it
        // there is nothing to see.
        tokio::time::sleep(Duration::from_millis(300)).await;
        for mut fork in forks {
            assert!(fork.runner.is_alive());
            let begun = Instant::now();
            // With the engine's ends still open: it is not asked.
            fork.runner.end().await;
            assert!(
                begun.elapsed() < Duration::from_secs(1),
                "{:?}",
                begun.elapsed()
            );
        }
        zygote.shut_down().await;
    });
}

fn a_thousand_forks_at_once_are_made_and_end() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, most).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path(), false);
    // On a slow host with two processors the last waits for 999 others.
    config.patience = Duration::from_secs(100);
    runtime().block_on(async {
        let zygote = Zygote::load(&config).await.unwrap();
        let forks = futures_util::future::join_all((0..1000).map(|_| fork(&zygote))).await;
        let (agent, _theirs) = UnixStream::pair().unwrap();
        let (control, _) = packet::pair().unwrap();
        let refused = zygote
            .fork(RunKind::Python, agent.into(), control)
            .await
            .err()
            .unwrap();
        assert!(refused.to_string().contains("1000 sandboxes"), "{refused}");
        let mut runners: Vec<Runner> = forks.into_iter().map(|fork| fork.runner).collect();
        for runner in &mut runners {
            // Its sockets are closed: it ends by itself.
            assert!(runner.ended().await.is_some());
        }
        drop(runners);
        fork(&zygote).await.await_parked();
        zygote.shut_down().await;
    });
}

fn a_snapshot_that_this_host_refuses_is_refused_at_its_loading() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), true);
    let refused = runtime().block_on(Zygote::load(&config)).err().unwrap();
    let sentence = refused.to_string();
    assert!(sentence.contains("0xc0000080"), "{sentence}");
}

fn a_snapshot_of_another_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = config_of(folder.path(), false, PROTOCOL_VERSION - 1);
    let refused = runtime().block_on(Zygote::load(&config)).err().unwrap();
    let sentence = refused.to_string();
    assert!(sentence.contains("another version"), "{sentence}");
}
