//! The program's words where no machine is needed: help, usage, errors with remedies, JSON.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::process::{Command, Output};

fn zygote(state: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_zygote"))
        .args(arguments)
        .env("ZYGOTE_STATE_DIR", state)
        .output()
        .unwrap()
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn words(arguments: &[&str]) -> (Option<i32>, String, String) {
    let state = tempfile::tempdir().unwrap();
    said(&zygote(state.path(), arguments))
}

#[test]
fn every_verb_has_help_and_the_main_ones_have_examples() {
    let verbs: [&[&str]; 9] = [
        &[],
        &["run"],
        &["serve"],
        &["status"],
        &["stop"],
        &["template", "build"],
        &["doctor"],
        &["lab"],
        &["completions"],
    ];
    for verb in verbs {
        let (code, out, _) = words(&[verb, &["--help"]].concat());
        assert_eq!(code, Some(0));
        assert!(out.contains("Usage: zygote"), "{verb:?}: {out}");
        assert!(out.contains("Example"), "{verb:?}: {out}");
    }
    assert!(words(&["--version"]).1.starts_with("zygote 0."));
}

#[test]
fn bad_usage_is_told_and_is_no_programs_exit_code() {
    let cases: [&[&str]; 6] = [
        &["run", "--timeout", "soon", "-c", "1"],
        &["run", "--env", "nothing", "-c", "1"],
        &["run", "--count", "0", "-c", "1"],
        &["template", "build", "python", "--memory", "1M"],
        &["template", "build", "python", "--vcpus", "33"],
        &["nonsense"],
    ];
    for case in cases {
        let (code, _, err) = words(case);
        assert_eq!(code, Some(125), "{case:?}");
        assert!(err.starts_with("error:"), "{case:?}: {err}");
    }
    let (code, _, err) = words(&["run"]);
    assert_eq!(code, Some(125));
    assert!(err.contains("nothing to run"), "{err}");
}

#[test]
fn what_is_not_there_is_told_with_its_remedy() {
    let cases: [(&[&str], i32, &str); 6] = [
        (
            &["run", "-t", "nope", "-c", "1"],
            125,
            "zygote template init nope",
        ),
        (&["run", "/no/such/file.py"], 125, "/no/such/file.py"),
        (&["template", "inspect", "nope"], 125, "there are none yet"),
        (
            &["template", "rm", "nope"],
            125,
            "there is no template nope",
        ),
        (
            &["template", "verify", "../x"],
            125,
            "no name of a template",
        ),
        (
            &["template", "build", "ruby"],
            125,
            "built-in recipes: python",
        ),
    ];
    for (case, expected, sentence) in cases {
        let (code, out, err) = words(case);
        assert_eq!(code, Some(expected), "{case:?}: {err}");
        assert!(
            err.contains(sentence) && out.is_empty(),
            "{case:?}: {out}{err}"
        );
    }
}

#[test]
fn an_engine_that_is_not_there_is_told_and_none_is_started_for_that() {
    let state = tempfile::tempdir().unwrap();
    let (code, out, _) = said(&zygote(state.path(), &["status"]));
    assert_eq!(code, Some(3));
    assert!(out.contains("there is no engine") && out.contains("zygote serve"));
    let (code, out, _) = said(&zygote(state.path(), &["status", "--json"]));
    let status: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, status["status"].as_str()), (Some(3), Some("none")));
    let (code, out, _) = said(&zygote(state.path(), &["stop"]));
    assert!(code == Some(0) && out.contains("there is no engine"));
    let (code, out, _) = said(&zygote(state.path(), &["lab", "status"]));
    assert!(code == Some(0) && out.contains("down"), "{out}");
    assert!(std::fs::read_dir(state.path()).unwrap().next().is_none());
}

#[test]
fn settings_that_an_engine_cannot_have_are_told_by_name() {
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("zygote.toml");
    std::fs::write(&file, "run_max = 3\n").unwrap();
    let long = state.path().join("x".repeat(120));
    let cases: [(&[&str], &str); 6] = [
        (&["serve", "--config", file.to_str().unwrap()], "run_max"),
        (&["serve", "--config", "/no/such.toml"], "/no/such.toml"),
        (&["serve", "--idle-exit", "soon"], "idle_exit"),
        (&["serve", "--keys", "sometimes"], "always"),
        (
            &[
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--tls-cert",
                "/no/such.pem",
                "--tls-key",
                "/no",
            ],
            "/no/such.pem",
        ),
        (&["serve", "--socket", long.to_str().unwrap()], "--socket"),
    ];
    for (case, word) in cases {
        let (code, _, err) = said(&zygote(state.path(), &[case, &["--host", "lab"]].concat()));
        assert_eq!(code, Some(125), "{case:?}: {err}");
        assert!(err.contains(word), "{case:?}: {err}");
    }
}

#[test]
fn an_empty_store_is_an_empty_list_and_nothing_is_created() {
    let state = tempfile::tempdir().unwrap();
    let inside = state.path().join("never-made");
    let (code, out, _) = said(&zygote(&inside, &["template", "ls", "--json"]));
    assert_eq!(
        (code, out.trim()),
        (Some(0), r#"{"templates":[],"unusable":[]}"#)
    );
    let (_, out, _) = said(&zygote(&inside, &["template", "ls"]));
    assert!(out.contains("zygote template build python"));
    assert!(!inside.exists());
}

#[test]
fn the_doctor_judges_by_measuring_and_each_finding_has_its_grade() {
    let (_, out, _) = words(&["doctor", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&out).unwrap();
    let checks = value["checks"].as_array().unwrap();
    assert!(checks.iter().any(|check| check["name"] == "KVM"));
    for check in checks {
        assert!(["ok", "note", "no"].contains(&check["grade"].as_str().unwrap()));
        assert!(
            check["grade"] != "no" || check["remedy"].is_string(),
            "{check}"
        );
    }
    let host = &value["host"];
    assert!(host.is_null() || host == "kvm" || host == "lab", "{host}");
}

/// What bash offers for a line's last word.
fn completed(state: &Path, line: &str) -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_zygote"));
    let path = format!("{}:/usr/bin:/bin", program.parent().unwrap().display());
    let script = format!(
        "eval \"$(zygote completions bash)\"; COMP_WORDS=({line} ''); \
         COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _clap_complete_zygote zygote '' ''; \
         printf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let output = Command::new("bash")
        .args(["-c", &script])
        .env("PATH", path)
        .env("ZYGOTE_STATE_DIR", state)
        .current_dir(state)
        .output()
        .unwrap();
    said(&output).1
}

#[test]
fn shells_complete_verbs_and_the_names_of_templates() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, _) = words(&["completions", shell]);
        assert_eq!(code, Some(0));
        assert!(out.contains("COMPLETE"), "{shell}: {out}");
    }
    let state = tempfile::tempdir().unwrap();
    std::fs::create_dir(state.path().join("templates")).unwrap();
    std::os::unix::fs::symlink("x", state.path().join("templates/mine")).unwrap();
    std::fs::write(state.path().join("own.toml"), "").unwrap();
    assert!(completed(state.path(), "zygote").contains("template"));
    for line in [
        "zygote template inspect",
        "zygote run -t",
        "zygote template rm",
    ] {
        let offered = completed(state.path(), line);
        assert!(offered.contains("mine"), "{line}: {offered}");
    }
    let offered = completed(state.path(), "zygote template build");
    for name in ["mine", "python", "own.toml"] {
        assert!(offered.contains(name), "{name}: {offered}");
    }
}

#[test]
fn an_installed_program_finds_its_agent_wherever_both_lie() {
    let prefix = tempfile::tempdir().unwrap();
    for folder in ["bin", "lib/zygote"] {
        std::fs::create_dir_all(prefix.path().join(folder)).unwrap();
    }
    let program = prefix.path().join("bin/zygote");
    std::fs::copy(env!("CARGO_BIN_EXE_zygote"), &program).unwrap();
    let found = || {
        let output = Command::new(&program)
            .args(["doctor", "--json"])
            .env("ZYGOTE_STATE_DIR", prefix.path().join("state"))
            .output()
            .unwrap();
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let checks = value["checks"].as_array().unwrap().clone();
        checks
            .into_iter()
            .find(|check| check["name"] == "build: agent")
            .unwrap()
    };
    let missing = found();
    assert_eq!(missing["grade"], "note");
    assert!(
        missing["finding"]
            .as_str()
            .unwrap()
            .contains("make install")
    );
    // A static program for x86-64, as far as its header goes (System V ABI, chapter 4).
    let mut header = [0; 64];
    header[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (header[18], header[32], header[54]) = (62, 64, 56);
    let agent = prefix.path().join("lib/zygote/zygote-agent");
    std::fs::write(&agent, header).unwrap();
    let good = found();
    assert_eq!(good["grade"], "ok", "{good}");
    assert!(
        good["finding"]
            .as_str()
            .unwrap()
            .ends_with("lib/zygote/zygote-agent")
    );
}

#[test]
fn output_that_cannot_be_written_is_told_and_a_reader_that_has_gone_is_not() {
    let state = tempfile::tempdir().unwrap();
    for words in ["completions bash", "template ls", "doctor --json"] {
        let shell = |rest: &str| {
            let line = format!("{} {words} {rest}", env!("CARGO_BIN_EXE_zygote"));
            Command::new("bash")
                .args(["-c", &line])
                .env("ZYGOTE_STATE_DIR", state.path())
                .output()
                .unwrap()
        };
        let (code, _, err) = said(&shell("> /dev/full"));
        assert_eq!(code, Some(125), "{words}: {err}");
        assert!(err.contains("No space left"), "{words}: {err}");
        // `true` may have gone before or after the words were written.
        let (code, out, err) = said(&shell("| true; echo ${PIPESTATUS[0]}"));
        assert!(
            out == "141\n" || out == "0\n",
            "{words}: {code:?} {out} {err}"
        );
        assert_eq!(err, "", "{words}");
    }
}

#[test]
fn a_parent_that_ignores_its_children_is_no_reason_to_fail() {
    let state = tempfile::tempdir().unwrap();
    let judge = |arguments: &[&str]| {
        let output = Command::new("env")
            .args(arguments)
            .args([env!("CARGO_BIN_EXE_zygote"), "doctor", "--json"])
            .env("ZYGOTE_STATE_DIR", state.path())
            .output()
            .unwrap();
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let jail = value["checks"].as_array().unwrap().iter();
        jail.filter(|check| check["name"] == "jail")
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(judge(&["--ignore-signal=CHLD"]), judge(&[]));
}

#[test]
fn settings_come_from_options_variables_and_a_file_and_are_printed_as_one() {
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("zygote.toml");
    std::fs::write(&file, "runs_max = 3\nwaiting_max = 4\nidle_exit = \"1h\"\n").unwrap();
    let print = |variables: &[(&str, &str)], options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zygote"));
        command.args(["serve", "--print-config", "--host", "lab"]);
        command.args(options).envs(variables.iter().copied());
        command.env("ZYGOTE_STATE_DIR", state.path());
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let config = ["--config", file.to_str().unwrap(), "--runs-max", "5"];
    let variables = [
        ("ZYGOTE_RUNS_MAX", "6"),
        ("ZYGOTE_WAITING_MAX", "7"),
        ("ZYGOTE_LISTEN", ""),
        ("ZYGOTE_KEY_RATE", "8"),
    ];
    let (code, printed, err) = print(&variables, &config);
    assert_eq!(code, Some(0), "{err}");
    let table: toml::Table = printed.parse().unwrap();
    let number = |name: &str| table.get(name).and_then(toml::Value::as_integer);
    assert_eq!(
        ["runs_max", "waiting_max", "key_rate"].map(number),
        [Some(5), Some(7), Some(8)]
    );
    assert_eq!(table["idle_exit"].as_str(), Some("1h"));
    assert!(printed.contains("# listen =") && !table.contains_key("listen"));
    // What is printed can be read, and says the same.
    std::fs::write(&file, &printed).unwrap();
    assert_eq!(print(&[], &config[..2]).1, printed);
    let (code, _, err) = print(&[("ZYGOTE_RUNS_MAX", "many")], &[]);
    assert!(code == Some(125) && err.contains("ZYGOTE_"), "{err}");
}

#[test]
fn keys_are_made_listed_and_revoked_and_shown_once() {
    let state = tempfile::tempdir().unwrap();
    let object = |arguments: &[&str]| -> serde_json::Value {
        let (code, out, err) = said(&zygote(state.path(), &[arguments, &["--json"]].concat()));
        assert!(code == Some(0) || code == Some(125), "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let made = object(&[
        "key",
        "create",
        "--tenant",
        "acme",
        "--rate",
        "5",
        "--expires",
        "1h",
    ]);
    let secret = made["secret"].as_str().unwrap();
    assert!(secret.starts_with(&format!("zyg_{}_", made["key"].as_str().unwrap())));
    assert_eq!(made["limits"], serde_json::json!({"rate": 5}));
    let listed = object(&["key", "ls"]).to_string();
    assert!(listed.contains("acme") && !listed.contains(secret) && !listed.contains("hash"));
    let (_, out, err) = said(&zygote(state.path(), &["key", "create", "--role", "admin"]));
    assert!(out.starts_with("zyg_") && out.lines().count() == 1 && err.contains("only time"));
    assert_eq!(object(&["key", "revoke", secret])["tenant"], "acme");
    let code = |arguments: &[&str]| object(arguments)["error"]["code"].to_string();
    assert_eq!(code(&["key", "revoke", "nothing"]), "\"not_found\"");
    assert_eq!(code(&["key", "create"]), "\"usage\"");
    assert_eq!(
        code(&["key", "create", "--role", "admin", "--tenant", "x"]),
        "\"usage\""
    );
    assert_eq!(code(&["key", "create", "--tenant", "a/b"]), "\"usage\"");
}
