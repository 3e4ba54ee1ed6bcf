//! Branches of running machines, with real zygote processes and guests of a few instructions: any host
//! whose /dev/kvm opens runs them. The program that starts a zygote also is one.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use libtest_mimic::{Arguments, Trial};
use rustix::process::{Signal, pidfd_send_signal};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::branch::{Fork, Memory, fork, pid, start};
use support::{Tiny, become_zygote, hear, runtime};
use zygote_engine::{PATIENCE, RunKind, Zygote, ZygoteError};
use zygote_protocol::PROTOCOL_VERSION;
use zygote_runner::control::{FromRunner, Pause};
use zygote_runner::packet;
use zygote_snapshot::state::MachineState;

const MEMORY_BYTES: u64 = 128 << 20;
/// Each vCPU counts in a register, and writes that to two words, one after the other; the second vCPU's lie
/// on the next page.
const COUNTERS: u32 = 0x200_0000;
const SECOND: u32 = COUNTERS + 0x1000;
/// Where a guest that writes says that it has, and what it writes to.
const WRITTEN: u32 = COUNTERS + 0x2000;
const PRIVATE: u32 = 0x240_0000;
const PRIVATE_PAGES: u32 = 16 * 256;

fn main() -> ExitCode {
    become_zygote();
    let tests = [
        trial("a_branch_goes_on_where_its_source_was", one_vcpu),
        trial("a_branch_has_all_vcpus_of_one_moment", two_vcpus),
        trial("branches_of_branches_are_as_fast", depth),
        trial(
            "a_hundred_children_share_what_none_of_them_changes",
            sharing,
        ),
        trial("what_cannot_be_branched_says_so_and_goes_on", refusals),
        trial("a_branch_outlives_its_source", outlives),
        trial("a_branch_on_disk_goes_on_where_it_was", on_disk),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests.into()).exit_code()
}

fn trial(name: &str, check: fn()) -> Trial {
    Trial::test(name, move || {
        check();
        Ok(())
    })
}

/// xor eax, eax; loop: inc rax; mov [AT], rax; mov [AT + 8], rax; jmp loop
fn counting(at: u32) -> Vec<u8> {
    let mut code = vec![0x31, 0xc0, 0x48, 0xff, 0xc0];
    for word in [at, at + 8] {
        code.extend_from_slice(&[0x48, 0x89, 0x04, 0x25]);
        code.extend_from_slice(&word.to_le_bytes());
    }
    code.extend_from_slice(&[0xeb, 0xeb]);
    code
}

/// mov edi, PRIVATE; mov ecx, PAGES; loop: mov [rdi], rcx; add rdi, 4096; dec ecx; jnz loop; then counts, and
/// says so.
fn writing() -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend_from_slice(&PRIVATE.to_le_bytes());
    code.push(0xb9);
    code.extend_from_slice(&PRIVATE_PAGES.to_le_bytes());
    code.extend_from_slice(&[0x48, 0x89, 0x0f, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00]);
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xf2]);
    // mov qword [WRITTEN], 1
    code.extend_from_slice(&[0x48, 0xc7, 0x04, 0x25]);
    code.extend_from_slice(&WRITTEN.to_le_bytes());
    code.extend_from_slice(&1_u32.to_le_bytes());
    code.extend(counting(COUNTERS));
    code
}

/// One that writes to much of its memory before it counts.
async fn load_writing(folder: &Path) -> Arc<Zygote> {
    let tiny = Tiny {
        memory_bytes: MEMORY_BYTES,
        vcpus: 1,
        code: &[&counting(COUNTERS), &writing()],
        ready: COUNTERS.into(),
        protocol_version: PROTOCOL_VERSION,
    };
    let begin = |state: &mut MachineState| support::send_to_second(&mut state.vcpus[0]);
    support::snapshot(&folder.join("snapshot"), &tiny, begin);
    Arc::new(Zygote::load(&support::config(folder)).await.unwrap())
}

async fn load(folder: &Path, vcpus: usize) -> Arc<Zygote> {
    let (first, second) = (counting(COUNTERS), counting(SECOND));
    let tiny = Tiny {
        memory_bytes: MEMORY_BYTES,
        vcpus: vcpus as u8,
        code: &[&first[..], &second[..]][..vcpus],
        ready: COUNTERS.into(),
        protocol_version: PROTOCOL_VERSION,
    };
    support::snapshot(&folder.join("snapshot"), &tiny, |_| ());
    Arc::new(Zygote::load(&support::config(folder)).await.unwrap())
}

/// Both of a vCPU's words, of one that stands still.
fn still(memory: &Memory, counters: u32) -> u64 {
    let (first, second) = (memory.word(counters), memory.word(counters + 8));
    assert!(first == second || first == second + 1, "{first} {second}");
    first
}

/// A fork whose guest runs.
async fn running(zygote: &Zygote) -> Fork {
    start(zygote, COUNTERS).await
}

fn one_vcpu() {
    goes_on(1);
}

fn two_vcpus() {
    goes_on(2);
}

/// The source goes on, the branch stands still, and each fork of it counts from there.
fn goes_on(vcpus: usize) {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let zygote = load(folder.path(), vcpus).await;
        let source = running(&zygote).await;
        let all = &[COUNTERS, SECOND][..vcpus];
        for counters in all {
            source.memory().await_count(*counters, 1000);
        }
        let branch = source.branch(&zygote).await;
        let Pause {
            stop_us,
            save_us,
            fork_us,
            resume_us,
        } = branch.pause;
        assert!(save_us > 0 && fork_us > 0);
        let whole = stop_us + save_us + fork_us + resume_us;
        assert_eq!(branch.pause.total_us(), whole);
        let first = running(&branch.zygote).await;
        let second = running(&branch.zygote).await;
        for counters in all {
            let at = still(&branch.memory, *counters);
            assert!(at >= 1000);
            for other in [&source, &first, &second] {
                let memory = other.memory();
                // From the register that was the source's: it never counts less.
                memory.await_count(*counters, at + 1000);
            }
            assert_eq!(still(&branch.memory, *counters), at);
        }
        // A branch of a branch, and one more of the source.
        for (fork, parent) in [(&first, &branch.zygote), (&source, &zygote)] {
            let another = fork.branch(parent).await;
            let at = still(&another.memory, COUNTERS);
            running(&another.zygote)
                .await
                .memory()
                .await_count(COUNTERS, at + 1000);
        }
    });
}

/// How long the hundredth may take, beside the first ten.
fn depth() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let zygote = load(folder.path(), 1).await;
        let mut kept = Vec::new();
        let mut parent = Arc::clone(&zygote);
        let mut fork = running(&zygote).await;
        let mut times = Vec::new();
        let mut least = 1000;
        for _ in 0..100 {
            fork.memory().await_count(COUNTERS, least);
            let begun = Instant::now();
            let branch = fork.branch(&parent).await;
            let next = running(&branch.zygote).await;
            times.push(begun.elapsed());
            least = still(&branch.memory, COUNTERS) + 10;
            parent = Arc::clone(&branch.zygote);
            kept.push(branch);
            // It would take the processor's time.
            std::mem::replace(&mut fork, next).runner.end().await;
        }
        let median = |times: &[Duration]| {
            let mut sorted = times.to_vec();
            sorted.sort();
            sorted[sorted.len() / 2]
        };
        let (first, last) = (median(&times[..20]), median(&times[80..]));
        println!("depth 1 to 20: {first:?}, 81 to 100: {last:?}");
        // What grew with the depth would be more than that; on a busy host no less can be said.
        assert!(last < first * 4, "{first:?} {last:?}");
    });
}

/// KiB of a process's share of its pages (proc_pid_smaps(5)).
fn pss_kib(fork: &Fork) -> u64 {
    let pid = pid(fork.runner.process());
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let pss = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss_Anon:"));
    let pss = pss.unwrap().split_whitespace().next().unwrap();
    pss.parse().unwrap()
}

/// Sixteen MiB that the source has written are there once, whoever has come from it.
fn sharing() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let zygote = load_writing(folder.path()).await;
        let source = running(&zygote).await;
        source.memory().await_count(WRITTEN, 1);
        let alone = pss_kib(&source);
        assert!(alone > 16 << 10, "{alone} KiB");
        let branch = source.branch(&zygote).await;
        let mut children = Vec::new();
        let mut times = Vec::new();
        for _ in 0..100 {
            let begun = Instant::now();
            children.push(fork(&branch.zygote, RunKind::Sandbox).await);
            times.push(begun.elapsed());
        }
        let all: u64 = children.iter().map(pss_kib).sum();
        // Each has some pages of its own for its stacks, its heap and its machine.
        assert!(
            all < alone + 100 * 400,
            "{all} KiB, of which the source had {alone}"
        );
        let median = |times: &[Duration]| {
            let mut sorted = times.to_vec();
            sorted.sort();
            sorted[sorted.len() / 2]
        };
        let (first, last) = (median(&times[..20]), median(&times[80..]));
        println!(
            "{alone} KiB alone, {all} KiB of 100; child 1 to 20: {first:?}, 81 to 100: {last:?}"
        );
        assert!(last < first * 4, "{first:?} {last:?}");
    });
}

fn refusals() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let zygote = load(folder.path(), 1).await;
        let parked = fork(&zygote, RunKind::Sandbox).await;
        assert!(parked.refusal().contains("not begun"));
        let mut program = fork(&zygote, RunKind::Python).await;
        program.agent.write_all(b"go").unwrap();
        assert!(program.refusal().contains("one program"));
        let counted = program.memory().word(COUNTERS);
        program.memory().await_count(COUNTERS, counted + 1);
        // Its engine goes in the middle of it.
        let source = running(&zygote).await;
        drop(source.ask());
        match hear(&source.control) {
            (FromRunner::Branched { .. }, Some(process)) => {
                let (ours, theirs) = packet::pair().unwrap();
                drop(theirs);
                let gone = Zygote::branched(&zygote, ours, process).await;
                assert!(matches!(gone, Err(ZygoteError::Gone)));
            }
            // It had ended before it could be told of.
            (FromRunner::BranchFailed { message, .. }, None) => {
                assert!(message.contains("ended at once"), "{message}");
            }
            other => panic!("{other:?}"),
        }
        let counted = source.memory().word(COUNTERS);
        source.memory().await_count(COUNTERS, counted + 1000);
    });
}

fn on_disk() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let zygote = load_writing(folder.path()).await;
        let source = running(&zygote).await;
        source.memory().await_count(WRITTEN, 1);
        source.memory().await_count(COUNTERS, 1000);
        let branch = source.branch(&zygote).await;
        let saved = folder.path().join("saved");
        let manifest = branch.zygote.save(&saved).await.unwrap();
        // The pages that it has written, and a few of its own; in less room than a tenth of them.
        let delta = manifest.base.unwrap().delta;
        let pages = u64::from(PRIVATE_PAGES);
        assert!(
            (pages..pages + 64).contains(&delta.page_count()),
            "{}",
            delta.page_count()
        );
        assert!(delta.bytes() < pages * 4096 / 10, "{}", delta.bytes());
        let (at, own) = (
            still(&branch.memory, COUNTERS),
            branch.memory.word(PRIVATE + 4096 * 7),
        );
        source.runner.end().await;
        drop((branch, zygote));
        // From its files alone, and once more from what that has come to.
        let mut config = support::config(folder.path());
        config.load.snapshot = saved.clone();
        let again = Arc::new(Zygote::load(&config).await.unwrap());
        let resumed = running(&again).await;
        resumed.memory().await_count(COUNTERS, at + 1000);
        assert_eq!(resumed.memory().word(PRIVATE + 4096 * 7), own);
        let second = resumed.branch(&again).await;
        let next = folder.path().join("next");
        let manifest = second.zygote.save(&next).await.unwrap();
        assert!(manifest.base.unwrap().folder.ends_with("/snapshot"));
        let later = still(&second.memory, COUNTERS);
        assert!(later > at);
        // There is one of this name.
        assert!(second.zygote.save(&next).await.is_err());
        config.load.snapshot = next.clone();
        let third = Arc::new(Zygote::load(&config).await.unwrap());
        running(&third)
            .await
            .memory()
            .await_count(COUNTERS, later + 1000);
        // A single bit, anywhere.
        for file in ["manifest", "machine.bin", "delta.bin"] {
            let path = next.join(file);
            let good = std::fs::read(&path).unwrap();
            let mut bad = good.clone();
            bad[good.len() / 2] ^= 1;
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, &bad).unwrap();
            let refused = Zygote::load(&config).await.err().unwrap().to_string();
            assert!(refused.contains("snapshot"), "{refused}");
            std::fs::write(&path, &good).unwrap();
        }
        std::fs::remove_file(folder.path().join("snapshot/manifest")).unwrap();
        let refused = Zygote::load(&config).await.err().unwrap().to_string();
        assert!(refused.contains("snapshot/manifest"), "{refused}");
    });
}

/// The source is killed, then the process that holds the branch: each takes nobody else with it.
fn outlives() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let zygote = load(folder.path(), 1).await;
        let source = running(&zygote).await;
        let branch = source.branch(&zygote).await;
        let mut child = running(&branch.zygote).await;
        source.runner.end().await;
        let at = still(&branch.memory, COUNTERS);
        child.memory().await_count(COUNTERS, at + 1000);
        let other = running(&branch.zygote).await;
        other.memory().await_count(COUNTERS, at + 1000);
        pidfd_send_signal(&branch.process, Signal::KILL).unwrap();
        let begun = Instant::now();
        while branch.zygote.is_alive() {
            assert!(begun.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Its forks are no part of it.
        let counted = child.memory().word(COUNTERS);
        child.memory().await_count(COUNTERS, counted + 1000);
        // Nobody is left to tell how it ends.
        assert_eq!(child.runner.ended().await, None);
        running(&zygote).await;
    });
}
