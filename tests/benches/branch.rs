//! How long a running machine stands still for a branch, and what for, with a guest of a few instructions:
//! any host whose /dev/kvm opens measures it. Whole processes, jail included.
//!
//!     cargo bench -p zygote-tests --bench branch
//!
//! A line for each machine: its memory, its vCPUs, its private pages; then medians in microseconds: the
//! pause's parts and the pause, its 95th percentile, and the time from the request until a fork of the
//! branch has run its first instructions.

#![allow(clippy::unwrap_used, reason = "a bench")]

#[path = "../../crates/engine/tests/support/mod.rs"]
mod support;

use std::time::Instant;
use support::branch::{Branch, Memory, start};
use support::{Tiny, become_zygote, runtime};
use zygote_engine::Zygote;
use zygote_protocol::PROTOCOL_VERSION;
use zygote_runner::control::Pause;

/// The guest counts here once it has written to its private memory.
const COUNTER: u32 = 0x200_0000;
/// What it writes to.
const PRIVATE: u32 = 0x240_0000;
const PAGE_BYTES: u32 = 4096;
const BRANCHES: usize = 60;

/// Memory in MiB, vCPUs, and private memory in MiB.
const MACHINES: [(u64, u8, u32); 9] = [
    (128, 1, 1),
    (128, 1, 16),
    (512, 1, 16),
    (2048, 1, 16),
    (8192, 1, 16),
    (512, 1, 128),
    (8192, 1, 128),
    (512, 2, 16),
    (512, 8, 16),
];

fn main() {
    become_zygote();
    println!(" memory vcpus private    stop   save   fork resume   pause    p95   first");
    MACHINES.iter().for_each(measure);
}

/// mov edi, PRIVATE; mov ecx, PAGES; loop: mov [rdi], rcx; add rdi, 4096; dec ecx; jnz loop; then counts.
fn writing(private_mib: u32) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend_from_slice(&PRIVATE.to_le_bytes());
    code.push(0xb9);
    code.extend_from_slice(&(private_mib * 256).to_le_bytes());
    code.extend_from_slice(&[0x48, 0x89, 0x0f, 0x48, 0x81, 0xc7]);
    code.extend_from_slice(&PAGE_BYTES.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xf2]);
    code.extend(counting());
    code
}

/// loop: inc qword [COUNTER]; jmp loop
fn counting() -> Vec<u8> {
    let mut code = vec![0x48, 0xff, 0x04, 0x25];
    code.extend_from_slice(&COUNTER.to_le_bytes());
    code.extend_from_slice(&[0xeb, 0xf6]);
    code
}

/// A snapshot of a guest that has not written yet.
fn snapshot(folder: &std::path::Path, machine: &(u64, u8, u32)) {
    let (memory_mib, vcpus, private_mib) = *machine;
    let tiny = Tiny {
        memory_bytes: memory_mib << 20,
        vcpus,
        code: &[&counting(), &writing(private_mib)],
        ready: COUNTER.into(),
        protocol_version: PROTOCOL_VERSION,
    };
    support::snapshot(folder, &tiny, |state| {
        support::send_to_second(&mut state.vcpus[0])
    });
}

fn measure(machine: &(u64, u8, u32)) {
    let folder = tempfile::tempdir().unwrap();
    snapshot(&folder.path().join("snapshot"), machine);
    let mut pauses = Vec::new();
    let mut firsts = Vec::new();
    runtime().block_on(async {
        let zygote = Zygote::load(&support::config(folder.path())).await.unwrap();
        let zygote = std::sync::Arc::new(zygote);
        let source = start(&zygote, COUNTER).await;
        for _ in 0..BRANCHES {
            let begun = Instant::now();
            let branch = source.branch(&zygote).await;
            let child = start(&branch.zygote, COUNTER).await;
            firsts.push(begun.elapsed().as_micros() as u32);
            pauses.push(branch.pause);
            child.runner.end().await;
            let Branch { zygote, .. } = branch;
            // Its end is not the next one's time.
            std::sync::Arc::into_inner(zygote)
                .unwrap()
                .shut_down()
                .await;
            // What is shared no longer is written again.
            let memory: Memory = source.memory();
            memory.await_count(COUNTER, memory.word(COUNTER) + 1000);
        }
    });
    show(machine, &pauses, &firsts);
}

fn show((memory, vcpus, private): &(u64, u8, u32), pauses: &[Pause], firsts: &[u32]) {
    let at = |percent: usize, mut all: Vec<u32>| {
        all.sort_unstable();
        all[(all.len() - 1) * percent / 100]
    };
    let of = |part: fn(&Pause) -> u32| pauses.iter().map(part).collect::<Vec<_>>();
    let all = of(Pause::total_us);
    println!(
        "{memory:7} {vcpus:5} {private:7} {:7} {:6} {:6} {:6} {:7} {:6} {:7}",
        at(50, of(|pause| pause.stop_us)),
        at(50, of(|pause| pause.save_us)),
        at(50, of(|pause| pause.fork_us)),
        at(50, of(|pause| pause.resume_us)),
        at(50, all.clone()),
        at(95, all),
        at(50, firsts.to_vec()),
    );
}
