//! The engine with real zygote processes and real machines, whose guests are of a few instructions:
//! any host whose /dev/kvm opens runs them. The program that starts a zygote also is one.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use libtest_mimic::{Arguments, Trial};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::{Tiny, become_zygote, hear, runtime};
use zygote_engine::{EngineConfig, RunKind, Runner, Zygote};
use zygote_protocol::PROTOCOL_VERSION;
use zygote_runner::control::FromRunner;
use zygote_runner::packet;
use zygote_vmm::layout::{VIRTIO_MMIO, VIRTIO_MMIO_SLOT_BYTES};

const MEMORY_BYTES: u64 = 128 << 20;
/// The guest writes here once it is set up.
const READY: u64 = 0x200_0000;
/// The rings of the socket device's transmit queue, each on a page of its own.
const RING: u64 = 0x210_0000;
/// A machine with no disk has its socket device in the second slot.
const VSOCK: u64 = VIRTIO_MMIO + VIRTIO_MMIO_SLOT_BYTES;
const TRANSMIT: u32 = 1;

fn main() -> ExitCode {
    become_zygote();
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

/// A snapshot of a machine whose first vCPU rings and whose second fills the ring. `spoil`: an MSR
/// gets a value that no CPU takes.
fn snapshot(folder: &Path, spoil: bool, protocol_version: u32) {
    let tiny = Tiny {
        memory_bytes: MEMORY_BYTES,
        vcpus: 2,
        code: &[&ringing(), &filling()],
        ready: READY,
        protocol_version,
    };
    support::snapshot(folder, &tiny, |state| {
        if spoil {
            let apic = zygote_snapshot::state::MsrEntry {
                index: 0xc000_0080,
                value: u64::MAX,
            };
            state.vcpus[1].msrs.push(apic);
        }
    });
}

fn config(folder: &Path, spoil: bool) -> EngineConfig {
    config_of(folder, spoil, PROTOCOL_VERSION)
}

fn config_of(folder: &Path, spoil: bool, protocol_version: u32) -> EngineConfig {
    snapshot(&folder.join("snapshot"), spoil, protocol_version);
    support::config(folder)
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
        assert_eq!(hear(&self.control).0, FromRunner::Parked);
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
