//! The contract that every verb keeps: with --json one object and no other word on standard output,
//! failures included; one exit code for every failure of our own; remedies that work when typed.

#![allow(clippy::unwrap_used, reason = "a test")]

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use zygote_api::{ErrorCode, Failure};

fn zygote(state: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_zygote"))
        .args(arguments)
        .env("ZYGOTE_STATE_DIR", state)
        .env_remove("ZYGOTE_HOST")
        .current_dir(state)
        .output()
        .unwrap()
}

/// The only object on standard output.
fn object(output: &Output, of: &[&str]) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 1, "{of:?}: {text}");
    let value: Value = serde_json::from_str(lines[0]).unwrap();
    assert!(value.is_object(), "{of:?}: {text}");
    value
}

/// A template that is there and cannot run: nothing here needs that.
fn with_template(state: &Path, name: &str) {
    let generation = state.join(format!("generations/{name}-1"));
    fs::create_dir_all(&generation).unwrap();
    fs::create_dir_all(state.join("templates")).unwrap();
    let description = json!({
        "name": name, "created_unix_s": 1_795_613_887, "memory_bytes": 512 << 20, "vcpus": 1,
        "replicas": 0, "kernel_release": "6.12", "interpreter": "python", "base": "bookworm",
        "packages": ["python3"], "digest": "ab", "disk_bytes": 4096,
        "recipe": {"path": null, "text": format!("name = \"{name}\"\nwarm = \"import json\"")},
        "contents": {"debian": {"python3": "3.11.2-1+b1"}, "files": ["/root/a.py"],
                     "pip": [{"name": "six", "version": "1.16.0", "file": "six.whl", "sha256": "00"}]},
    });
    fs::write(generation.join("template.json"), description.to_string()).unwrap();
    let target = format!("../generations/{name}-1");
    std::os::unix::fs::symlink(target, state.join("templates").join(name)).unwrap();
}

#[test]
fn every_failure_is_one_object_with_a_code_that_is_known() {
    let state = tempfile::tempdir().unwrap();
    let bad_recipe = state.path().join("bad.toml");
    fs::write(&bad_recipe, "name = \"x\"\npackage = [\"python3\"]\n").unwrap();
    let cases: [(&[&str], &str); 40] = [
        (&["run", "--json"], "usage"),
        (&["run", "--json", "-c"], "usage"),
        (&["run", "--json", "nofile.py"], "file"),
        (&["run", "--json", "--copy", "nope", "-c", "1"], "file"),
        (
            &["run", "--json", "-t", "nope", "-c", "1"],
            "template_not_found",
        ),
        (&["run", "--json", "-t", "../x", "-c", "1"], "bad_request"),
        (&["run", "--json", "--env", "FOO", "-c", "1"], "usage"),
        (&["run", "--json", "--count", "0", "-c", "1"], "usage"),
        (&["run", "--json", "--timeout", "soon", "-c", "1"], "usage"),
        (&["run", "--json", "--tiemout", "2s", "-c", "1"], "usage"),
        (&["run", "--json", "--host", "moon", "-c", "1"], "usage"),
        (
            &["template", "inspect", "nope", "--json"],
            "template_not_found",
        ),
        (
            &["template", "verify", "nope", "--json"],
            "template_not_found",
        ),
        (&["template", "rm", "nope", "--json"], "template_not_found"),
        (
            &["template", "build", "nope", "--json"],
            "template_not_found",
        ),
        (&["template", "build", "no.toml", "--json"], "bad_request"),
        (&["template", "build", "bad.toml", "--json"], "bad_request"),
        (&["template", "build", "--json"], "usage"),
        (&["template", "init", "Nope!", "--json"], "bad_request"),
        (&["template", "--json", "frobnicate"], "usage"),
        (&["--json", "doctor"], "usage"),
        (&["rnu", "--json"], "usage"),
        (&["stop", "--json", "--socket", "/dev/null/x"], "internal"),
        (&["serve", "--json"], "usage"),
        (&["bench", "--json", "--runs", "0"], "usage"),
        (&["prune", "--json", "--al"], "usage"),
        (&["lab", "up", "--json", "now"], "usage"),
        (&["create", "--json", "-t", "nope"], "template_not_found"),
        (&["create", "--json", "--ttl", "soon"], "usage"),
        (
            &["exec", "--json", "nope", "--", "true"],
            "sandbox_not_found",
        ),
        (&["exec", "--json", "nope"], "usage"),
        (
            &["python", "--json", "nope", "-c", "1"],
            "sandbox_not_found",
        ),
        (&["python", "--json", "nope"], "usage"),
        (&["logs", "--json", "nope"], "sandbox_not_found"),
        (&["ps", "--json", "nope"], "sandbox_not_found"),
        (&["inspect", "--json", "nope"], "sandbox_not_found"),
        (&["kill", "--json", "--signal", "NOPE", "box"], "usage"),
        (&["rm", "--json", "nope"], "sandbox_not_found"),
        (&["wait", "--json", "nope"], "sandbox_not_found"),
        (&["cp", "--json", "here", "there"], "usage"),
    ];
    for (case, code) in cases {
        let output = zygote(state.path(), case);
        assert_eq!(output.status.code(), Some(125), "{case:?}: {output:?}");
        let value = object(&output, case);
        let failure: Failure = serde_json::from_value(value["error"].clone()).unwrap();
        let expected: ErrorCode = serde_json::from_value(json!(code)).unwrap();
        assert_eq!(failure.code, expected, "{case:?}: {failure}");
        assert!(!failure.message.is_empty(), "{case:?}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let first = failure.message.split_whitespace().next().unwrap();
        assert!(told.contains(first), "{case:?}: {told} / {failure}");
        for rust in ["os error", "struct ", "expected u", "Error {"] {
            assert!(!told.contains(rust), "{case:?}: {told}");
        }
        assert!(!failure.message.contains('\u{1b}'), "{case:?}: {failure}");
    }
}

#[test]
fn every_answer_is_one_object_and_a_template_has_one_name_in_all() {
    let state = tempfile::tempdir().unwrap();
    with_template(state.path(), "mine");
    let good = |arguments: &[&str]| {
        let output = zygote(state.path(), arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        object(&output, arguments)
    };
    let list = good(&["template", "ls", "--json"]);
    let listed = &list["templates"][0];
    assert_eq!(listed["template"], "mine");
    assert_eq!(listed["created"], "2026-11-25T13:38:07Z");
    assert_eq!(listed["created_unix_s"], 1_795_613_887);
    let detail = good(&["template", "inspect", "mine", "--json"]);
    for field in listed.as_object().unwrap().keys() {
        assert_eq!(detail[field], listed[field], "{field}");
    }
    assert_eq!(detail["debian_packages"]["python3"], "3.11.2-1+b1");
    assert_eq!(detail["pip_packages"][0]["name"], "six");
    assert_eq!(
        (&detail["files"][0], &detail["warm"]),
        (&json!("/root/a.py"), &json!("import json"))
    );
    let usage = good(&["df", "--json"]);
    assert_eq!(usage["parts"][0]["what"], "template mine");
    assert!(usage["bytes"].as_u64().unwrap() >= usage["reclaimable_bytes"].as_u64().unwrap());
    assert_eq!(good(&["prune", "--dry-run", "--json"])["removed"], false);
    assert_eq!(
        good(&["version", "--json"])["version"],
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(good(&["stop", "--json"])["stopped"], false);
    assert_eq!(good(&["lab", "status", "--json"])["state"], "down");
    assert_eq!(good(&["lab", "down", "--json"])["was_up"], false);
    assert_eq!(
        good(&["template", "init", "fresh", "--json"])["template"],
        "fresh"
    );
    assert_eq!(good(&["ps", "--json"])["sandboxes"], json!([]));
    assert_eq!(good(&["stats", "--json"])["sandboxes"], json!([]));
    assert_eq!(good(&["rm", "--all", "--json"])["removed"], json!([]));
    let removed = good(&["template", "rm", "mine", "--json"]);
    assert_eq!(removed["template"], "mine");
    assert!(removed["freed_bytes"].as_u64().unwrap() > 0, "{removed}");
    let status = zygote(state.path(), &["status", "--json"]);
    assert_eq!(status.status.code(), Some(3));
    assert_eq!(object(&status, &["status"])["status"], "none");
}

#[test]
fn a_remedy_that_is_printed_works_when_typed() {
    let state = tempfile::tempdir().unwrap();
    with_template(state.path(), "mine");
    let cases: [&[&str]; 5] = [
        &["run", "-t", "ruby", "-c", "1"],
        &["template", "inspect", "ruby"],
        &["template", "build", "ruby"],
        &["run", "-t", "mien", "-c", "1"],
        &["template", "inspct", "mine"],
    ];
    for case in cases {
        let output = zygote(state.path(), case);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let typed = told.split("zygote ").last().unwrap();
        let typed = typed.lines().next().unwrap();
        let typed: Vec<&str> = typed.split_whitespace().collect();
        let again = zygote(state.path(), &typed);
        let is_good = again.status.success() || typed == ["template", "inspect"];
        assert!(is_good, "{case:?}: {told}: {typed:?}: {again:?}");
        let _ = fs::remove_file(state.path().join("ruby.toml"));
    }
}

#[test]
fn nothing_that_is_there_is_overwritten_by_a_recipe_to_begin_with() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().join("mine.toml");
    fs::write(&path, "precious").unwrap();
    let output = zygote(state.path(), &["template", "init", "mine"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("mine.toml"));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_variable_that_is_empty_counts_as_unset() {
    let output = Command::new(env!("CARGO_BIN_EXE_zygote"))
        .args(["version"])
        .envs([
            ("ZYGOTE_STATE_DIR", ""),
            ("ZYGOTE_SOCKET", ""),
            ("ZYGOTE_HOST", ""),
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
