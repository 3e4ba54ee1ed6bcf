//! The kept lab, from the host's side. It boots emulated computers, so there are few checks. This
//! program is also what runs in the lab, and the engine in there.

#![allow(clippy::unwrap_used, reason = "a test")]

use libtest_mimic::{Arguments, Trial};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use tempfile::TempDir;
use tokio::sync::mpsc;
use zygote_api::*;
use zygote_daemon::{Config, Embedded, Events, LabSettings, Machines, Telemetry, serve};
use zygote_engine::Settings;
use zygote_template::Store;

const INNER_VERB: &str = "--inner";
const NO_QEMU_VERB: &str = "--no-qemu";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some(zygote_lab::INIT_VERB) => zygote_lab::init_main(),
        Some(INNER_VERB) => {
            let state = std::env::var_os("ZYGOTE_STATE_DIR").unwrap();
            let mut config = config(Path::new(&state));
            config.machines = Machines::Here;
            config.lab_port = true;
            config.socket = "/run/zygote/test.sock".into();
            serve(config, |_| {}).unwrap();
            return ExitCode::SUCCESS;
        }
        Some(NO_QEMU_VERB) => return without_qemu(Path::new(&words[2])),
        _ => {}
    }
    let tests = [
        Trial::test(
            "a_kept_lab_runs_one_command_after_the_other_and_is_replaced",
            || {
                a_kept_lab_runs_one_command_after_the_other_and_is_replaced();
                Ok(())
            },
        ),
        Trial::test("a_host_without_qemu_is_told_how_to_get_it", || {
            a_host_without_qemu_is_told_how_to_get_it();
            Ok(())
        }),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests.into()).exit_code()
}

/// Kernels are kept between runs of the tests; the rest goes.
fn state() -> TempDir {
    let own = std::env::current_exe().unwrap();
    let target = own.ancestors().find(|path| path.ends_with("target"));
    let cache = target.unwrap_or(Path::new("/var/tmp")).join("lab-cache");
    fs::create_dir_all(&cache).unwrap();
    let state = tempfile::tempdir_in(&cache).unwrap();
    std::os::unix::fs::symlink(&cache, state.path().join("cache")).unwrap();
    state
}

fn config(state: &Path) -> Config {
    let program = std::env::current_exe().unwrap();
    Config {
        door: zygote_daemon::Door::default(),
        socket: "/nowhere".into(),
        listen: None,
        lab_port: false,
        idle_exit: None,
        place: PlaceKind::Lab,
        machines: Machines::InLab,
        engine: Settings::new(vec!["false".into()], Store::open(state.to_owned())),
        builder: vec!["false".into()],
        lab: LabSettings {
            memory_mib: 1024,
            command: vec![program.into(), INNER_VERB.into()],
        },
        log: None,
        telemetry: Telemetry::default(),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

fn shell(words: &str) -> CommandRequest {
    CommandRequest {
        command: ["sh", "-c", words].map(Octets::from).to_vec(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        cwd: "/tmp".into(),
        stdin_stream: false,
    }
}

/// Output, error and result, or the failure.
async fn end(events: &mut Events<ExecEvent>) -> Result<(String, String, ExecResult), Failure> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match events.next().await.unwrap().unwrap() {
            ExecEvent::Stdout { data } => out.extend(data.0),
            ExecEvent::Stderr { data } => err.extend(data.0),
            ExecEvent::Result(result) => {
                let text = |bytes| String::from_utf8(bytes).unwrap();
                return Ok((text(out), text(err), *result));
            }
            ExecEvent::Error { error } => return Err(error),
            _ => {}
        }
    }
}

async fn run(engine: &Embedded, request: &CommandRequest) -> (String, String, ExecResult) {
    let mut events = engine.client.lab_exec(request, None).await.unwrap();
    end(&mut events).await.unwrap()
}

fn a_kept_lab_runs_one_command_after_the_other_and_is_replaced() {
    let state = state();
    runtime().block_on(async {
        let engine = Embedded::start(config(state.path())).await.unwrap();
        let (out, err, result) = run(&engine, &shell("echo out; echo err >&2; exit 7")).await;
        assert_eq!(
            (&out[..], &err[..], result.exit_code),
            ("out\n", "err\n", 7)
        );
        files_are_as_fresh_as_on_the_host(&engine, state.path()).await;
        input_and_signals_reach_a_command(&engine).await;
        let nothing = CommandRequest {
            command: vec!["/no/such/program".into()],
            ..shell("")
        };
        assert_eq!(run(&engine, &nothing).await.2.exit_code, 127);
        a_killed_lab_is_told_and_replaced(&engine).await;
        engine.client.lab_down().await.unwrap();
        let lab = engine.client.status().await.unwrap().lab.unwrap();
        assert_eq!((lab.state.as_str(), lab.pid), ("down", None));
        engine.shut_down().await;
    });
}

/// Also a file of the host that the lab has seen before.
async fn files_are_as_fresh_as_on_the_host(engine: &Embedded, state: &Path) {
    for folder in [state, Path::new("/var/tmp")] {
        let file = tempfile::NamedTempFile::new_in(folder).unwrap();
        let show = shell(&format!("cat {}", file.path().display()));
        for content in ["first", "and then a longer one"] {
            fs::write(file.path(), content).unwrap();
            assert_eq!(run(engine, &show).await.0, content, "{}", folder.display());
        }
        let path = file.path().to_owned();
        drop(file);
        assert_ne!(run(engine, &show).await.2.exit_code, 0);
        fs::write(&path, "new").unwrap();
        assert_eq!(run(engine, &show).await.0, "new");
        fs::remove_file(&path).unwrap();
    }
}

async fn input_and_signals_reach_a_command(engine: &Embedded) {
    let (sender, input) = mpsc::channel(4);
    let request = CommandRequest {
        stdin_stream: true,
        ..shell("cat; trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done")
    };
    let mut events = engine.client.lab_exec(&request, Some(input)).await.unwrap();
    let data = "input ".into();
    sender.send(ExecInput::Stdin { data }).await.unwrap();
    sender.send(ExecInput::StdinEnd).await.unwrap();
    let (mut id, mut seen) = (String::new(), Vec::new());
    while !String::from_utf8_lossy(&seen).contains("ready") {
        match events.next().await.unwrap().unwrap() {
            ExecEvent::Ready { id: own } => id = own,
            ExecEvent::Stdout { data } => seen.extend(data.0),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, b"input ready\n");
    engine.client.signal(&id, 15).await.unwrap();
    let (out, _, result) = end(&mut events).await.unwrap();
    assert_eq!((&out[..], result.exit_code), ("caught\n", 5));
}

async fn a_killed_lab_is_told_and_replaced(engine: &Embedded) {
    let mut events = engine
        .client
        .lab_exec(&shell("echo up; sleep 1000"), None)
        .await
        .unwrap();
    let lab = engine.client.status().await.unwrap().lab.unwrap();
    assert_eq!(lab.state, "up");
    assert!(
        lab.memory_bytes.unwrap() < lab.memory_max_bytes + (512 << 20),
        "{lab:?}"
    );
    let pid = Pid::from_raw(lab.pid.unwrap().cast_signed()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    let failure = end(&mut events).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::LabDied);
    assert!(failure.remedy.unwrap().contains("again"));
    let (out, _, _) = run(engine, &shell("echo another")).await;
    assert_eq!(out, "another\n");
}

fn a_host_without_qemu_is_told_how_to_get_it() {
    let state = state();
    // The kernel is there already: what it takes to fetch one is not on that path either.
    zygote_lab::prepare(&state.path().join("cache"), &mut |_| {}).unwrap();
    let own: PathBuf = std::env::current_exe().unwrap();
    let output = Command::new(own)
        .args([NO_QEMU_VERB.as_ref(), state.path().as_os_str()])
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("apt-get install qemu-system-x86"),
        "{output:?}"
    );
}

fn without_qemu(state: &Path) -> ExitCode {
    runtime().block_on(async {
        let engine = Embedded::start(config(state)).await.unwrap();
        let asked = engine.client.lab_exec(&shell("true"), None).await;
        let failure = match asked {
            Ok(mut events) => end(&mut events).await.unwrap_err(),
            Err(error) => error.failure().unwrap().clone(),
        };
        println!("{failure}");
        engine.shut_down().await;
    });
    ExitCode::SUCCESS
}
