//! The processes of sandboxes: what they may see, and what is left when one is killed.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use zygote_engine::*;
use zygote_runner::control::Load;
use zygote_template::Store;
use zygote_tests::*;

/// Until the kernel shows what has been asked for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends the engine that other tests have left, with its forks: here processes are counted.
fn alone() {
    zygote_tests::zygote(&["stop", "--now"]).good();
}

async fn zygote() -> Zygote {
    alone();
    let store = Store::open(state());
    let load = Load {
        snapshot: store.replicas("python").unwrap().remove(0),
        pieces: store.pieces(),
        stamps: store.stamps(),
        group: None,
    };
    let config = EngineConfig {
        command: vec![program().into(), "zygote-process".into()],
        load,
        admission: Admission::new(Budget::default()),
        allow_missing_walls: false,
        patience: PATIENCE_EMULATED,
    };
    Zygote::load(&config).await.unwrap()
}

fn sleep() -> RunRequest {
    RunRequest {
        program: Program::Command(vec![b"sleep".to_vec(), b"1000".to_vec()]),
        env: vec![],
        cwd: String::new(),
        stdin: Stdin::Empty,
        buffering: Buffering::Full,
        gets: Vec::new(),
        puts: None,
        signals: None,
        timeout: None,
        measure: false,
    }
}

/// Folders in /proc of the processes with this name.
fn processes(name: &str) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let named = all.map(|entry| entry.path()).filter(|path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    });
    named.collect()
}

fn kill(process: &std::path::Path) {
    let pid = process.file_name().unwrap();
    assert!(
        Command::new("kill")
            .arg("-9")
            .arg(pid)
            .status()
            .unwrap()
            .success()
    );
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "not seen: {what}");
        std::thread::yield_now();
    }
}

/// Runs `sleep` in a fork, does something once that runs, and gives the run's result.
async fn meanwhile(zygote: &Zygote, act: impl FnOnce()) -> RunResult {
    let (sender, mut events) = mpsc::channel(4);
    let acting = async {
        assert!(matches!(events.recv().await, Some(Event::Activated { .. })));
        act();
    };
    let (result, ()) = tokio::join!(run(zygote, sleep(), sender), acting);
    result
}

#[tokio::test]
async fn a_live_runner_has_nothing_of_the_host() {
    let zygote = zygote().await;
    assert_eq!(zygote.missing_walls(), []);
    meanwhile(&zygote, || {
        let runners = processes("zygote-runner");
        assert_eq!(runners.len(), 1);
        let runner = &runners[0];
        let status = fs::read_to_string(runner.join("status")).unwrap();
        for line in [
            "Seccomp:\t2",
            "NoNewPrivs:\t1",
            "CapPrm:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "Groups:\t \n",
        ] {
            assert!(status.contains(line), "no `{line}` in {status}");
        }
        assert!(!status.contains("Uid:\t0\t"), "{status}");
        for kind in ["mnt", "net", "ipc", "uts", "cgroup", "pid"] {
            let own = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
            assert_ne!(fs::read_link(runner.join("ns").join(kind)).unwrap(), own);
        }
        assert_eq!(fs::read_dir(runner.join("root")).unwrap().count(), 0);
        let environment = fs::read(runner.join("environ")).unwrap();
        assert_eq!(environment, b"LD_BIND_NOW=1\0", "nothing of the engine's");
        for entry in fs::read_dir(runner.join("fd")).unwrap().flatten() {
            let target = fs::read_link(entry.path()).unwrap();
            let target = target.to_string_lossy();
            let needed = ["anon_inode:", "socket:", "/dev/null", "/proc/", "/pieces/"];
            assert!(needed.iter().any(|part| target.contains(part)), "{target}");
            assert!(
                !target.ends_with("/proc") && !target.contains("/dev/kvm"),
                "{target}"
            );
        }
        kill(runner);
    })
    .await;
    zygote.shut_down().await;
}

#[tokio::test]
async fn a_killed_runner_ends_its_sandbox_alone_and_at_once() {
    let zygote = zygote().await;
    let result = meanwhile(&zygote, || kill(&processes("zygote-runner")[0])).await;
    let Outcome::Failed(sentence) = result.outcome else {
        panic!("{:?}", result.outcome);
    };
    assert!(sentence.contains("killed by signal 9"), "{sentence}");
    let again = meanwhile(&zygote, || kill(&processes("zygote-runner")[0])).await;
    assert!(again.fork_time.is_some(), "the zygote lives on");
    zygote.shut_down().await;
    assert_eq!(processes("zygote-runner"), Vec::<PathBuf>::new());
}

/// The zygote's process id namespace ends with it, and its runners with that.
#[tokio::test]
async fn a_killed_zygote_ends_its_sandboxes_with_a_sentence() {
    let zygote = zygote().await;
    let result = meanwhile(&zygote, || {
        // The keeper has no runner among its children.
        let runner = processes("zygote-runner").remove(0);
        let status = fs::read_to_string(runner.join("status")).unwrap();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t"));
        kill(&PathBuf::from("/proc").join(parent.unwrap()));
    })
    .await;
    assert!(
        matches!(result.outcome, Outcome::Failed(_)),
        "{:?}",
        result.outcome
    );
    zygote.shut_down().await;
    wait_until("the end of the runners", || {
        processes("zygote-runner").is_empty()
    });
}

#[test]
fn nothing_outlives_a_killed_engine() {
    alone();
    // The lab's first process is this program too.
    let before = processes("zygote");
    let mut engine = Command::new(program())
        .args(["run", "--no-daemon", "--", "sleep", "1000"])
        .env("ZYGOTE_STATE_DIR", state())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("a runner", || !processes("zygote-runner").is_empty());
    engine.kill().unwrap();
    engine.wait().unwrap();
    wait_until("the end of all", || {
        processes("zygote-runner").is_empty() && processes("zygote") == before
    });
}

#[test]
fn guests_that_eat_ten_times_what_there_is_take_nothing_but_themselves() {
    alone();
    let eat =
        "b = bytearray(150 << 20)\nfor at in range(0, len(b), 4096): b[at] = 1\nprint('full')";
    let arguments = [
        "run",
        "--count",
        "8",
        "--json",
        "--memory-max",
        "120M",
        "--timeout",
        "0",
        "-c",
        eat,
    ];
    let records = zygote_tests::zygote(&arguments).json();
    assert_eq!(records.len(), 8);
    for record in &records {
        let error = record["error"]["message"].as_str().unwrap();
        assert!(error.contains("out of memory"), "{record}");
        assert_eq!(record["stdout"], "", "{record}");
    }
    let next = zygote_tests::zygote(&["run", "--no-daemon", "-c", "print(1)"]);
    assert_eq!(next.good().text(), "1\n");
    assert!(!std::path::Path::new("/sys/fs/cgroup/zygote").exists());
}

#[test]
fn a_host_without_a_wall_is_refused_unless_that_is_allowed() {
    let limit = "/proc/sys/user/max_mnt_namespaces";
    let before = fs::read_to_string(limit).unwrap();
    fs::write(limit, "0").unwrap();
    let refused = python("print(1)");
    let allowed = zygote_tests::zygote(&["run", "--allow-missing-walls", "-c", "print(2)"]);
    fs::write(limit, before).unwrap();
    assert_eq!((refused.code, refused.text()), (125, String::new()));
    for word in ["mount namespace", "empty root", "--allow-missing-walls"] {
        assert!(refused.error().contains(word), "no {word} in {refused:?}");
    }
    // An engine that has loaded it without walls does not keep that for those who want them.
    assert_eq!(python("print(3)").good().text(), "3\n");
    assert_eq!(allowed.text(), "2\n", "{allowed:?}");
    assert!(allowed.error().contains("warning"), "{allowed:?}");
    assert!(
        fs::exists("/proc/self/root/etc/passwd").unwrap(),
        "the root is still there"
    );
}

#[test]
fn an_engine_whose_output_nobody_reads_can_be_ended() {
    alone();
    // More than the pipe takes, and less than waits in the engine: the program ends.
    let mut engine = Command::new(program())
        .args(["run", "--no-daemon", "-c", "print('x' * 1000000)"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    std::io::Read::read_exact(engine.stdout.as_mut().unwrap(), &mut first).unwrap();
    wait_until("its end", || processes("zygote-runner").is_empty());
    let pid = rustix::process::Pid::from_child(&engine);
    // The first may still have been the program's.
    wait_until("the end of the engine", || {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        engine.try_wait().unwrap().is_some()
    });
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(engine.wait().unwrap().signal(), Some(15));
}

fn stop(process: &std::path::Path) {
    let pid = process.file_name().unwrap();
    let stopped = Command::new("kill").arg("-STOP").arg(pid).status();
    assert!(stopped.unwrap().success());
}

fn parent(process: &std::path::Path) -> PathBuf {
    let status = fs::read_to_string(process.join("status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t"));
    PathBuf::from("/proc").join(parent.unwrap())
}

/// Each step of an end has a deadline of five seconds, and then somebody is killed.
#[test]
fn a_stopped_process_holds_nobody_up() {
    alone();
    let victims: [fn(PathBuf) -> PathBuf; 3] = [
        |runner| runner,
        |runner| parent(&runner),
        |runner| parent(&parent(&runner)),
    ];
    for (number, victim) in victims.into_iter().enumerate() {
        let mut engine = Command::new(program())
            .args([
                "run",
                "--no-daemon",
                "--timeout",
                "3s",
                "-c",
                "print('up', flush=True)\nwhile True: pass",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut up = [0; 3];
        std::io::Read::read_exact(engine.stdout.as_mut().unwrap(), &mut up).unwrap();
        stop(&victim(processes("zygote-runner").remove(0)));
        let begun = Instant::now();
        let code = engine.wait().unwrap().code();
        assert_eq!(code, Some(124), "victim {number}");
        assert!(begun.elapsed() < Duration::from_secs(60), "victim {number}");
        wait_until("the end of all", || processes("zygote-runner").is_empty());
    }
}
