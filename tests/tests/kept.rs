//! The engine that stays, where machines run in a lab that it keeps. These tests run on the host itself,
//! and share an engine: its lab takes ten seconds to be up. Where the host's KVM can run a kernel there
//! is no lab, and they check the engine alone.

#![allow(clippy::unwrap_used, reason = "a test")]

use serde_json::Value;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zygote_tests::*;

fn status() -> Value {
    zygote(&["status", "--json"]).json().remove(0)
}

/// The emulator's process, if there is one.
fn emulator() -> Option<u64> {
    status()["lab"]["pid"].as_u64()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "not in time: {what}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits for `up`.
fn is_up(run: &mut Child) {
    let mut first = [0; 3];
    std::io::Read::read_exact(run.stdout.as_mut().unwrap(), &mut first).unwrap();
    assert_eq!(&first, b"up\n");
}

fn signal(pid: u64, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

fn start(code: &str) -> Child {
    Command::new(program())
        .args(["run", "-c", code])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn is_gone(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_none_or(|(_, rest)| rest.starts_with('Z'))
}

#[test]
fn eight_clients_at_once_get_their_own_answers() {
    let clients: Vec<(String, Child)> = (0..8)
        .map(|number| {
            let code = format!("import sys; print({number}); sys.exit({number})");
            (format!("{number}\n"), start(&code))
        })
        .collect();
    for (number, (expected, client)) in clients.into_iter().enumerate() {
        let output = client.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(number as i32), "{output:?}");
        assert_eq!(output.stdout, expected.as_bytes());
    }
    let runs = &status()["runs"];
    assert_eq!(runs["running"], 0, "{runs}");
}

#[test]
fn output_input_and_files_come_through_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("data.bin");
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n.wrapping_mul(7919) >> 5) as u8)
        .collect();
    std::fs::write(&file, &bytes).unwrap();
    let code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read() + open('data.bin', 'rb').read())";
    let code = format!("{code}; import shutil; shutil.copy('data.bin', '/srv/out')");
    let (copy, back) = (file.to_str().unwrap(), folder.path().join("back"));
    let get = format!("/srv/out:{}", back.display());
    let arguments = ["run", "--copy", copy, "--get", &get, "-c", &code];
    let ran = zygote_with_input(&arguments, &bytes).good();
    assert!(std::fs::read(&back).unwrap() == bytes);
    assert!(
        ran.stdout == [&bytes[..], &bytes].concat(),
        "{} bytes",
        ran.stdout.len()
    );
}

#[test]
fn a_killed_engine_or_lab_is_told_to_those_who_wait_and_replaced_for_the_next() {
    zygote(&["run", "-c", "print(1)"]).good();
    let engine = status()["pid"].as_u64().unwrap();
    let victims = emulator().into_iter().chain([engine]);
    for victim in victims {
        let mut waiting = start("print('up', flush=True); import time; time.sleep(600)");
        is_up(&mut waiting);
        let lab = emulator();
        signal(victim, "-9");
        let output = waiting.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains("again"), "{said}");
        until("the lab's process has gone", || lab.is_none_or(is_gone));
        let next = zygote(&["run", "-c", "print(2)"]).good();
        assert_eq!((next.text(), next.error()), ("2\n".into(), String::new()));
    }
}

#[test]
fn an_interrupt_is_the_programs_and_a_killed_client_ends_its_run() {
    let code = "import time\nprint('up', flush=True)\ntry:\n  while True: time.sleep(0.05)\n\
                except KeyboardInterrupt:\n  print('caught', flush=True); raise SystemExit(7)";
    let mut run = start(code);
    is_up(&mut run);
    signal(run.id().into(), "-INT");
    let output = run.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(7), &b"caught\n"[..])
    );
    let given_up = || status()["runs"]["cancelled"].as_u64().unwrap();
    let before = given_up();
    let mut run = start(code);
    is_up(&mut run);
    signal(run.id().into(), "-KILL");
    run.wait().unwrap();
    until("the run is given up", || {
        given_up() == before + 1 && status()["runs"]["running"] == 0
    });
}

#[test]
fn a_sandbox_lives_behind_the_host_s_engine() {
    zygote(&["create", "--name", "kept-box"]).good();
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n.wrapping_mul(7919) >> 5) as u8)
        .collect();
    let cat = zygote_with_input(&["exec", "-i", "kept-box", "--", "cat"], &bytes).good();
    assert!(cat.stdout == bytes, "{} bytes", cat.stdout.len());
    zygote(&["python", "kept-box", "-c", "x = 20"]).good();
    assert_eq!(
        zygote(&["python", "kept-box", "-c", "x + 22"])
            .good()
            .text(),
        "42\n"
    );
    let folder = tempfile::tempdir().unwrap();
    let (data, back) = (folder.path().join("data"), folder.path().join("back"));
    std::fs::write(&data, &bytes).unwrap();
    zygote(&["cp", data.to_str().unwrap(), "kept-box:/srv/"]).good();
    zygote(&["cp", "kept-box:/srv/data", back.to_str().unwrap()]).good();
    assert!(std::fs::read(&back).unwrap() == bytes);
    assert_eq!(status()["sandboxes"], 1);
    // What lives is not ended without a word, and refusals come through as they are.
    let refused = zygote(&["stop"]);
    assert_eq!(refused.code, 125);
    assert!(refused.error().contains("zygote rm"), "{refused:?}");
    assert_eq!(
        zygote(&["exec", "kept-box", "--", "no-such-program"]).code,
        127
    );
    let missing = zygote(&["cp", "kept-box:/no/such", "."]);
    assert!(missing.error().contains("No such file"), "{missing:?}");
    zygote(&["rm", "kept-box"]).good();
    assert_eq!(status()["sandboxes"], 0);
    let gone = zygote(&["exec", "kept-box", "--", "true"]);
    assert!(gone.error().contains("removed"), "{gone:?}");
}

#[test]
fn ended_it_leaves_nothing() {
    zygote(&["run", "-c", "print(1)"]).good();
    let (engine, lab) = (status()["pid"].as_u64().unwrap(), emulator());
    let socket = status()["socket"].as_str().unwrap().to_owned();
    zygote(&["stop"]).good();
    assert!(is_gone(engine) && lab.is_none_or(is_gone));
    assert!(!std::path::Path::new(&socket).exists());
    assert!(!std::path::Path::new(&format!("{socket}.lock")).exists());
    assert_eq!(zygote(&["status"]).code, 3);
}
