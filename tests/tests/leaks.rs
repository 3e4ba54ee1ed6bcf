//! What three hundred forks leave behind: nothing.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashSet;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;
use zygote_engine::*;
use zygote_runner::control::Load;
use zygote_runner::packet;
use zygote_template::Store;
use zygote_tests::*;

fn load(template: &str) -> Load {
    let store = Store::open(state());
    Load {
        snapshot: store.replicas(template).unwrap().remove(0),
        pieces: store.pieces(),
        stamps: store.stamps(),
        group: None,
    }
}

/// What a host has of processes, descriptors, mounts, cgroups and temporary files.
#[derive(Debug, PartialEq, Eq)]
struct Belongings {
    children: usize,
    descriptors: usize,
    mounts: usize,
    cgroups: usize,
    temporary: HashSet<PathBuf>,
}

fn count(folder: &str) -> usize {
    fs::read_dir(folder).unwrap().count()
}

fn belongings() -> Belongings {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let ours = processes.filter(|entry| {
        let status = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        status.starts_with("zygote")
    });
    // In the lab, /tmp shows the real host's, where others come and go: ours have our name.
    let of_ours = |path: &PathBuf| path.to_string_lossy().contains("zygote");
    let own = ["/dev/shm", "/run"]
        .into_iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap());
    let shared = ["/tmp", "/var/tmp"]
        .into_iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap());
    let own = own.flatten().map(|entry| entry.path());
    let shared = shared.flatten().map(|entry| entry.path()).filter(of_ours);
    Belongings {
        children: ours.count(),
        descriptors: count("/proc/self/fd"),
        mounts: fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .lines()
            .count(),
        cgroups: count("/sys/fs/cgroup"),
        temporary: own.chain(shared).collect(),
    }
}

fn resident_kib(pid: &Path) -> u64 {
    let text = fs::read_to_string(pid.join("status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.map_or(0, |rest| {
        rest.split_whitespace().next().unwrap().parse().unwrap()
    })
}

#[tokio::test]
async fn three_hundred_forks_leave_nothing_behind() {
    let before = belongings();
    let config = EngineConfig {
        command: vec![program().into(), "zygote-process".into()],
        load: load("python"),
        admission: Admission::new(Budget::default()),
        allow_missing_walls: false,
        patience: PATIENCE_EMULATED,
    };
    let zygote = Zygote::load(&config).await.unwrap();
    let mut memory = Vec::new();
    for number in 0..300 {
        let request = RunRequest {
            program: Program::Command(vec![b"true".to_vec()]),
            env: vec![],
            cwd: String::new(),
            stdin: Stdin::Empty,
            buffering: Buffering::Full,
            gets: Vec::new(),
            puts: None,
            signals: None,
            timeout: None,
            measure: false,
        };
        let (sender, mut events) = mpsc::channel(4);
        let reading = async { while events.recv().await.is_some() {} };
        let (result, ()) = tokio::join!(run(&zygote, request, sender), reading);
        let good = Outcome::Exited(ExitStatus::Code(0));
        assert_eq!(result.outcome, good, "fork {number}");
        if number % 100 == 99 {
            memory.push(resident_kib(Path::new("/proc/self")));
        }
    }
    assert!(
        memory[2] < memory[0] + 4096,
        "resident KiB after each hundred: {memory:?}"
    );
    // One that nobody ends: its sockets stay open.
    let (_agent, theirs) = UnixStream::pair().unwrap();
    let (_control, runner_control) = packet::pair().unwrap();
    zygote
        .fork(RunKind::Python, theirs.into(), runner_control)
        .await
        .unwrap();
    zygote.shut_down().await;
    // The runtime keeps descriptors of its own from its first use on.
    let mut after = belongings();
    assert!(
        after.descriptors <= before.descriptors + 8,
        "{before:?} {after:?}"
    );
    after.descriptors = before.descriptors;
    assert_eq!(after, before);
}
