//! Forks of tiny guests that count, and branches of them, seen from outside of their processes.

use super::hear;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;
use zygote_engine::{PATIENCE, RunKind, Runner, Zygote};
use zygote_runner::control::{FromRunner, Pause, ToRunner, encode};
use zygote_runner::packet;

/// An engine's ends of a fork.
pub struct Fork {
    pub runner: Runner,
    pub agent: UnixStream,
    pub control: OwnedFd,
}

/// A fork whose machine is made.
pub async fn fork(zygote: &Zygote, kind: RunKind) -> Fork {
    let (agent, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let (control, runner_control) = packet::pair().unwrap();
    let runner = zygote
        .fork(kind, theirs.into(), runner_control)
        .await
        .unwrap();
    assert_eq!(hear(&control).0, FromRunner::Parked);
    Fork {
        runner,
        agent,
        control,
    }
}

/// One whose guest runs, and counts in this word.
pub async fn start(zygote: &Zygote, counter: u32) -> Fork {
    let mut fork = fork(zygote, RunKind::Sandbox).await;
    let (memory, counted) = (fork.memory(), fork.memory().word(counter));
    fork.agent.write_all(b"go").unwrap();
    memory.await_count(counter, counted + 1);
    fork
}

/// A process that holds a branch.
pub struct Branch {
    pub zygote: Arc<Zygote>,
    pub memory: Memory,
    pub pause: Pause,
    pub process: OwnedFd,
}

impl Fork {
    pub fn memory(&self) -> Memory {
        Memory::of(self.runner.process())
    }

    pub fn ask(&self) -> OwnedFd {
        let (ours, theirs) = packet::pair().unwrap();
        let message = encode(&ToRunner::Branch { number: 7 }).unwrap();
        packet::send(&self.control, &message, &[theirs.as_fd()]).unwrap();
        ours
    }

    pub async fn branch(&self, parent: &Arc<Zygote>) -> Branch {
        let ours = self.ask();
        let (pause, process) = match hear(&self.control) {
            (FromRunner::Branched { number: 7, pause }, Some(process)) => (pause, process),
            (other, _) => panic!("{other:?}"),
        };
        let (memory, ended) = (Memory::of(process.as_fd()), process.try_clone().unwrap());
        let zygote = Zygote::branched(parent, ours, process).await.unwrap();
        Branch {
            zygote: Arc::new(zygote),
            memory,
            pause,
            process: ended,
        }
    }

    pub fn refusal(&self) -> String {
        let _ours = self.ask();
        match hear(&self.control).0 {
            FromRunner::BranchFailed { number: 7, message } => message,
            other => panic!("{other:?}"),
        }
    }
}

/// The id of the process behind a pidfd.
pub fn pid(process: impl AsFd) -> u32 {
    let number = process.as_fd().as_raw_fd();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    pid.unwrap().trim().parse().unwrap()
}

/// A guest's memory, seen from outside of its process.
pub struct Memory {
    file: File,
    start: u64,
}

impl Memory {
    pub fn of(process: impl AsFd) -> Self {
        let pid = pid(process);
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let span = |line: &str| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let from = u64::from_str_radix(from, 16).ok()?;
            Some((u64::from_str_radix(to, 16).ok()? - from, from))
        };
        // All of a small guest's, the low memory of a large one.
        let spans = maps.lines().filter_map(span);
        let low = spans.filter(|(bytes, _)| *bytes <= zygote_vmm::memory::HOLE_START);
        let (_, start) = low.max().unwrap();
        let file = File::open(format!("/proc/{pid}/mem")).unwrap();
        Self { file, start }
    }

    pub fn word(&self, address: u32) -> u64 {
        let mut word = [0; 8];
        let at = self.start + u64::from(address);
        self.file.read_exact_at(&mut word, at).unwrap();
        u64::from_le_bytes(word)
    }

    pub fn await_count(&self, counter: u32, least: u64) {
        let begun = Instant::now();
        while self.word(counter) < least {
            assert!(begun.elapsed() < PATIENCE, "the guest stands still");
            std::thread::yield_now();
        }
    }
}
