//! Sandboxes that live, by the verbs that a user types.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::{Command, Stdio};
use zygote_tests::*;

#[test]
fn files_and_processes_of_one_call_are_there_for_the_next() {
    let it = Live::with("living", &["--env", "A=1"]);
    it.sh("echo hello > /tmp/file; echo $A > /tmp/variable")
        .good();
    let read = it.sh("cat /tmp/file /tmp/variable; hostname; echo bad >&2; exit 7");
    assert_eq!(read.text(), "hello\n1\nliving\n");
    assert_eq!((read.error(), read.code), ("bad\n".to_owned(), 7));
    // A server in the background, and a request to it.
    let server = "cd /srv && echo page > index.html && exec python3 -u -m http.server 8000";
    let number = zygote(&["exec", "-d", "living", "--", "sh", "-c", server]).good();
    let fetch = "import time, urllib.request as r\n\
        for _ in range(600):\n    \
            try: print(r.urlopen('http://127.0.0.1:8000/').read()); break\n    \
            except OSError: time.sleep(0.1)";
    assert_eq!(
        it.exec(&["python3", "-c", fetch]).good().text(),
        "b'page\\n'\n"
    );
    let number = number.text();
    let logs = zygote(&["logs", "living", number.trim()]).good();
    assert!(
        logs.text().contains("Serving HTTP") && logs.error().contains("GET /"),
        "{logs:?}"
    );
    zygote(&["kill", "--signal", "TERM", "living", number.trim()]).good();
    assert_eq!(zygote(&["wait", "living", number.trim()]).code, 143);
    let listed = zygote(&["ps", "--json"]).json().remove(0);
    let names: Vec<&str> = listed["sandboxes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|one| one["name"].as_str())
        .collect();
    assert!(names.contains(&"living"), "{listed}");
}

#[test]
fn input_is_passed_on_and_programs_differ_as_in_a_shell() {
    let it = Live::new("input");
    let upper = zygote_with_input(&["exec", "-i", "input", "--", "tr", "a-z", "A-Z"], b"hello");
    assert_eq!(upper.good().text(), "HELLO");
    // Without -i there is none.
    let none = zygote_with_input(&["exec", "input", "cat"], b"hello");
    assert_eq!(none.good().text(), "");
    let big: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let sum = zygote_with_input(&["exec", "-i", "input", "--", "cat"], &big).good();
    assert!(sum.stdout == big);
    assert_eq!(it.exec(&["no-such-program"]).code, 127);
    assert_eq!(it.exec(&["/etc/passwd"]).code, 126);
    assert_eq!(it.sh("kill -9 $$").code, 137);
    let late = zygote(&["exec", "--timeout", "1s", "input", "--", "sleep", "1000"]);
    assert_eq!(late.code, 124);
    let user = zygote(&[
        "exec",
        "-u",
        "nobody",
        "-w",
        "/tmp",
        "input",
        "--",
        "sh",
        "-c",
        "id -un; pwd",
    ]);
    assert_eq!(user.good().text(), "nobody\n/tmp\n");
    let memory = it.exec(&[
        "python3",
        "-c",
        "kept = []\nwhile True: kept.append(bytearray(b'x' * (1 << 20)))",
    ]);
    assert_eq!(memory.code, 137, "{memory:?}");
    assert!(memory.error().contains("memory"), "{memory:?}");
    it.sh("true").good();
    let object = zygote(&[
        "exec",
        "--json",
        "input",
        "--",
        "sh",
        "-c",
        "echo out; exit 3",
    ]);
    let value = object.json().remove(0);
    assert_eq!((object.code, value["stdout"].as_str()), (3, Some("out\n")));
}

#[test]
fn a_terminal_and_what_has_none() {
    let it = Live::new("terminal");
    let refused = zygote(&["exec", "-it", "terminal", "--", "sh"]);
    assert_eq!(refused.code, 125);
    assert!(refused.error().contains("-t"), "{refused:?}");
    // script(1) gives this program a terminal.
    let line = format!(
        "{} exec -it terminal -- sh -c 'test -t 0 && stty size && echo ok'",
        program().display()
    );
    let shown = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown: Ran = shown.into();
    assert!(shown.text().contains("ok\r\n"), "{shown:?}");
    drop(it);
    let gone = zygote(&["exec", "terminal", "--", "true"]);
    assert_eq!(gone.code, 125);
    assert!(gone.error().contains("removed"), "{gone:?}");
}

#[test]
fn what_lives_is_counted_measured_and_ended_in_time() {
    let it = Live::with("counted", &["--ttl", "1h", "--idle", "1h"]);
    it.sh("true").good();
    let info = zygote(&["inspect", "--json", "counted"]).json().remove(0);
    assert_eq!(
        (&info["state"], &info["name"]),
        (&"running".into(), &"counted".into())
    );
    let stats = zygote(&["stats", "--json", "counted"]).json().remove(0);
    assert!(
        stats["memory_private_kib"].as_u64().unwrap() > 100,
        "{stats}"
    );
    let short = Live::with("short", &["--ttl", "2s"]);
    assert_eq!(zygote(&["wait", &short.name]).good().text(), "ttl\n");
    let events = zygote(&["events", "--json", "short"]).json();
    assert_eq!(events.last().unwrap()["reason"], "ttl");
    let taken = zygote(&["create", "--name", "counted"]);
    assert_eq!(taken.code, 125);
    assert!(taken.error().contains("taken"), "{taken:?}");
}

#[test]
fn an_interpreter_keeps_its_state_and_shows_values() {
    let it = Live::new("cells");
    let python = |code: &str| zygote(&["python", &it.name, "-c", code]);
    assert_eq!(
        python("import numpy; x = numpy.arange(3); x").good().text(),
        "array([0, 1, 2])\n"
    );
    assert_eq!(python("print(x.sum())").good().text(), "3\n");
    let failed = python("1/0");
    assert_eq!(failed.code, 1);
    assert!(failed.error().contains("ZeroDivisionError"), "{failed:?}");
    // The warm interpreter itself: it has what the template has loaded, and randomness of its own.
    let other = Live::new("cells-2");
    let draw = "import random, os; (random.random(), os.getpid())";
    let second = zygote(&["python", &other.name, "-c", draw]).good().text();
    assert_ne!(python(draw).good().text(), second);
    let figure = "class F:\n    def _repr_png_(self): return b'\\x89PNG'\ndisplay(F())";
    let folder = tempfile::tempdir().unwrap();
    let save = folder.path().to_str().unwrap();
    zygote(&["python", &it.name, "--save", save, "-c", figure]).good();
    assert_eq!(
        std::fs::read(folder.path().join("1.png")).unwrap(),
        b"\x89PNG"
    );
    let object = zygote(&["python", &it.name, "--json", "-c", "2 ** 10"])
        .json()
        .remove(0);
    assert_eq!(object["result"]["text/plain"], "1024");
    let late = zygote(&[
        "python",
        &it.name,
        "--timeout",
        "500ms",
        "-c",
        "while True: pass",
    ]);
    assert!(late.error().contains("KeyboardInterrupt"), "{late:?}");
    assert_eq!(python("x.size").good().text(), "3\n");
    let memory = python("kept = []\nwhile True: kept.append(bytearray(b'x' * (1 << 20)))");
    assert!(
        memory.error().contains("MemoryError") || memory.error().contains("memory"),
        "{memory:?}"
    );
    zygote(&["python", &it.name, "--restart"]).good();
    assert_eq!(python("'x' in globals()").good().text(), "False\n");
}

#[test]
fn sandboxes_outlive_an_engine_that_is_killed() {
    let it = Live::with("outlives", &["--ttl", "1h"]);
    zygote(&["python", "outlives", "-c", "x = 41"]).good();
    let count = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i; sleep 0.05; done; exit 3";
    let counts = zygote(&["exec", "-d", "outlives", "--", "sh", "-c", count]).good();
    let counts = counts.text().trim().to_owned();
    for round in 0..4 {
        // In the middle of one verb or the other.
        let words = match round {
            0 => ["exec", "outlives", "sleep", "1000"],
            1 => ["python", "outlives", "-c", "y = 1\nwhile True: y += 1"],
            2 => ["cp", "--json", "outlives:/usr/lib", "-"],
            _ => ["logs", "-f", "outlives", &counts],
        };
        let child = Command::new(program())
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.unwrap();
        it.sh("true").good();
        kill_engine();
        assert!(!child.wait().unwrap().success());
        assert_eq!(it.sh("echo on; exit 5").code, 5);
        if round == 1 {
            let list = zygote(&["inspect", "--json", "outlives"]).json().remove(0);
            assert_eq!(list["name"], "outlives");
            // The cell goes on; its interpreter is interrupted as always.
            zygote(&["kill", "--signal", "INT", "outlives", "1"]).good();
        }
    }
    let next = zygote(&[
        "python",
        "outlives",
        "-c",
        "x + globals().get('y', 0) * 0 + 1",
    ])
    .good();
    assert_eq!(next.text(), "42\n");
    assert_eq!(zygote(&["wait", "outlives", &counts]).code, 3);
    let expected: String = (1..=300).map(|n| format!("{n}\n")).collect();
    assert_eq!(
        zygote(&["logs", "outlives", &counts]).good().text(),
        expected
    );
    let memory = it.exec(&["python3", "-c", "print(sum(range(10)))"]).good();
    assert_eq!(memory.text(), "45\n");
}
