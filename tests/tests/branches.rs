//! Branches of running sandboxes, by the verbs that a user types.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::{Duration, Instant};
use zygote_tests::*;

/// Prints numbered lines, and appends them to a file, without end.
const COUNTING: &str =
    "i=0; while true; do i=$((i+1)); echo $i; echo $i >> /root/lines; sleep 0.02; done";

/// Has a sandbox branched; gives back the children.
fn branch(source: &Live, name: &str, words: &[&str]) -> Vec<Live> {
    let branched = zygote(&[&["branch", &source.name, "--name", name, "--json"], words].concat());
    let value = branched.good().json().remove(0);
    assert!(value["pause_us"].as_u64().unwrap() > 0, "{value}");
    assert_eq!(value["all_frozen"], true, "{value}");
    let children = value["sandboxes"].as_array().unwrap();
    let of = |child: &serde_json::Value| Live::named(child["name"].as_str().unwrap());
    children.iter().map(of).collect()
}

fn shell(script: &str) {
    let ran = std::process::Command::new("sh")
        .args(["-c", script])
        .status();
    assert!(ran.unwrap().success(), "{script}");
}

/// Kills all processes of a name (SIGKILL).
fn kill_all(name: &str) {
    let killed = std::process::Command::new("pkill")
        .args(["-9", "-x", name])
        .status();
    assert!(killed.unwrap().success());
}

/// Numbers from one on, each on a line; how many.
fn unbroken(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(*line, (index + 1).to_string(), "line {}", index + 1);
    }
    lines.len()
}

fn lines(of: &Live) -> usize {
    unbroken(&of.sh("cat /root/lines").good().text())
}

fn await_lines(of: &Live, least: usize) {
    let begun = Instant::now();
    while lines(of) < least {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "it stands still"
        );
    }
}

#[test]
fn a_branch_goes_on_where_its_source_is_as_somebody_else() {
    let source = Live::with("source", &["--env", "A=1"]);
    source
        .python("import random, ssl; x = 41; random.seed(7)")
        .good();
    source
        .sh("mkdir /srv/own && echo content > /srv/own/file && echo 10.0.0.1 mine >> /etc/hosts")
        .good();
    let counts = zygote(&["exec", "-d", "source", "--", "sh", "-c", COUNTING]).good();
    let counts = counts.text().trim().to_owned();
    await_lines(&source, 3);
    let kids = branch(&source, "kid", &["--count", "2"]);
    let drawn = branch(&source, "drawn", &["--reseed"]).remove(0);
    let known: Vec<&Live> = [&source].into_iter().chain(&kids).chain([&drawn]).collect();
    let own = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; cat /etc/hostname; \
        head -c 16 /dev/urandom | base64";
    let mut seen = std::collections::HashSet::new();
    for one in &known {
        let own = one.sh(own).good().text();
        for line in own.lines().filter(|line| *line != one.name) {
            assert!(seen.insert(line.to_owned()), "{line} is not its own");
        }
        assert_eq!(
            own.lines().filter(|line| *line == one.name).count(),
            2,
            "{own}"
        );
        let kept = one
            .sh("cat /srv/own/file; echo $A; grep -c mine /etc/hosts; getent hosts $(hostname) | wc -l")
            .good();
        assert_eq!(kept.text(), "content\n1\n1\n1\n");
        let tls = one.python("print(ssl.RAND_bytes(8).hex())").good().text();
        assert!(seen.insert(tls), "keys are not its own");
        let clock = one.python("import time; time.time()").good().text();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let late = now.unwrap().as_secs_f64() - clock.trim().parse::<f64>().unwrap();
        assert!((-1.0..60.0).contains(&late), "{late} s");
    }
    // A computation goes on; unless its numbers are to be others.
    let random = |one: &Live| one.python("x + random.random()").good().text();
    let drawn_by_source = random(&source);
    assert!(kids.iter().all(|kid| random(kid) == drawn_by_source));
    assert_ne!(random(&drawn), drawn_by_source);
    // The process of the source's goes on in each, under its number, with its output.
    for one in &known {
        await_lines(one, 10);
        let logs = zygote(&["logs", &one.name, &counts]).good();
        assert!(
            logs.error().is_empty() || logs.error().contains("no longer"),
            "{logs:?}"
        );
        zygote(&["kill", &one.name, &counts]).good();
        assert_eq!(zygote(&["wait", &one.name, &counts]).code, 137);
    }
    // What one writes nobody else sees.
    kids[0].sh("echo other > /srv/own/file").good();
    assert_eq!(kids[1].sh("cat /srv/own/file").good().text(), "content\n");
    let tree = zygote(&["tree", "--json", "source"]).json().remove(0);
    assert_eq!(
        tree["sandboxes"][0]["branches"].as_array().unwrap().len(),
        3
    );
    let shown = zygote(&["tree"]).good().text();
    assert!(
        shown.contains("├── kid-1") && shown.contains("└── drawn"),
        "{shown}"
    );
    zygote(&["rm", "--tree", "source"]).good();
    let left = zygote(&["ps", "--json"]).json().remove(0);
    assert_eq!(
        left["sandboxes"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|one| one["name"] == "kid-1")
            .count(),
        0
    );
}

#[test]
fn a_line_of_branches_loses_nothing_and_survives_its_ancestors_and_its_engine() {
    let mut last = Live::new("line");
    zygote(&["exec", "-d", "line", "--", "sh", "-c", COUNTING]).good();
    let mut most = 1;
    for depth in 0..8 {
        await_lines(&last, most + 1);
        let next = branch(&last, &format!("line-{depth}"), &[]).remove(0);
        if depth == 5 {
            // Those from which branches have come, too: what they have left is the first one's.
            kill_all("zygote-branch");
            kill_engine();
        }
        // It has all up to its branch, and the source no more than that from it.
        let (own, of_source) = (lines(&next), lines(&last));
        assert!(own > most && of_source > most);
        most = own;
        if depth % 2 == 0 {
            // It lives on when its source has ended.
            drop(std::mem::replace(&mut last, next));
        } else {
            let source = std::mem::replace(&mut last, next);
            await_lines(&source, of_source + 1);
        }
    }
    await_lines(&last, most + 1);
}

#[test]
fn programs_in_the_middle_of_everything_are_branched() {
    let source = Live::new("busy");
    // A pipe half full, an open file that has been removed, threads, a child, a sleep, and SQLite under load.
    let code = "import os, sqlite3, subprocess, threading, time\n\
        r, w = os.pipe(); os.write(w, b'half')\n\
        gone = open('/tmp/gone', 'w+'); gone.write('kept'); gone.flush(); os.unlink('/tmp/gone')\n\
        counts = [0] * 4\n\
        def count(n):\n    \
            while True: counts[n] += 1; time.sleep(0.01)\n\
        for n in range(4): threading.Thread(target=count, args=[n], daemon=True).start()\n\
        child = subprocess.Popen(['sleep', '100000'])\n\
        def load():\n    \
            db = sqlite3.connect('/root/db', isolation_level=None)\n    \
            db.execute('create table if not exists t(n integer)')\n    \
            n = 0\n    \
            while True:\n        \
                db.execute('begin')\n        \
                for _ in range(20): n += 1; db.execute('insert into t values (?)', [n])\n        \
                db.execute('commit')\n\
        threading.Thread(target=load, daemon=True).start()";
    source.python(code).good();
    let check = "import sqlite3\n\
        db = sqlite3.connect('/root/db', timeout=60)\n\
        before = list(counts); time.sleep(0.3)\n\
        print(os.read(r, 10), gone.seek(0), gone.read(), child.poll(), all(b > a for a, b in zip(before, counts)))\n\
        print(db.execute('pragma integrity_check').fetchone()[0])\n\
        n, most = db.execute('select count(*), max(n) from t').fetchone()\n\
        print(n == most, n % 20)";
    for number in 0..3 {
        let kid = branch(&source, &format!("busy-{number}"), &[]).remove(0);
        let checked = kid.python(check).good().text();
        assert_eq!(checked, "b'half' 0 kept None True\nok\nTrue 0\n");
    }
    // In the middle of a cell, which goes on in both.
    let slow = std::thread::spawn(|| {
        zygote(&[
            "python",
            "busy",
            "-c",
            "for n in range(30): time.sleep(0.1)\nprint('done', n)",
        ])
    });
    std::thread::sleep(Duration::from_secs(1));
    let kid = branch(&source, "busy-cell", &[]).remove(0);
    assert_eq!(slow.join().unwrap().good().text(), "done 29\n");
    assert_eq!(kid.python("n").good().text(), "29\n");
}

#[test]
fn what_cannot_be_branched_is_told_and_goes_on() {
    let it = Live::new("stays");
    let refused = zygote(&["branch", "stays", "--name", "stays"]);
    assert!(
        refused.code == 125 && refused.error().contains("taken"),
        "{refused:?}"
    );
    it.sh("true").good();
    // A fork bomb stands still and goes on as other programs do.
    let bomb = "ulimit -u 200; b() { b | b & }; b; sleep 100000";
    zygote(&[
        "exec", "-d", "-u", "nobody", "stays", "--", "sh", "-c", bomb,
    ])
    .good();
    let kid = branch(&it, "stays-kid", &["--freeze-timeout", "60s"]).remove(0);
    for one in [&it, &kid] {
        one.sh("true").good();
        zygote(&["kill", &one.name]).good();
    }
    let name = it.name.clone();
    drop(it);
    let ended = zygote(&["branch", &name]);
    assert!(
        ended.code == 125 && ended.error().contains("removed"),
        "{ended:?}"
    );
}

/// What a command says that is told that its sandbox has gone back.
fn is_told(waits: std::thread::JoinHandle<Ran>) {
    let ran = waits.join().unwrap();
    assert_eq!(ran.code, 125, "{ran:?}");
    assert!(ran.error().contains("rolled back"), "{ran:?}");
}

/// Waits until so many processes run.
fn await_processes(of: &Live, count: u64) {
    let begun = Instant::now();
    let running =
        || zygote(&["inspect", "--json", &of.name]).json().remove(0)["processes"].as_u64();
    while running() != Some(count) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", running());
    }
}

#[test]
fn a_sandbox_goes_back_and_those_who_wait_are_told() {
    let it = Live::new("back");
    let id = || zygote(&["inspect", "--json", "back"]).json().remove(0)["id"].clone();
    let first = id();
    it.python("x = 1").good();
    it.sh("echo one > /root/file").good();
    assert_eq!(zygote(&["snapshot", "back", "one"]).good().text(), "one\n");
    it.python("x = 2; y = 3").good();
    it.sh("echo two > /root/file; touch /root/new").good();
    let waits = std::thread::spawn(|| zygote(&["exec", "back", "--", "sleep", "1000"]));
    let cell =
        std::thread::spawn(|| zygote(&["python", "back", "-c", "import time; time.sleep(1000)"]));
    await_processes(&it, 2);
    zygote(&["rollback", "back", "one"]).good();
    is_told(waits);
    is_told(cell);
    let state = |it: &Live| it.python("print(x, 'y' in globals())").good().text();
    assert_eq!((id(), state(&it)), (first.clone(), "1 False\n".to_owned()));
    assert_eq!(
        it.sh("cat /root/file; ls /root").good().text(),
        "one\nfile\n"
    );
    // The next engine has its moments, too.
    it.python("x = 4").good();
    zygote(&["snapshot", "back"]).good();
    it.python("x = 5").good();
    kill_engine();
    zygote(&["rollback", "back"]).good();
    assert_eq!(state(&it), "4 False\n");
    zygote(&["rollback", "back", "one"]).good();
    assert_eq!((id(), state(&it)), (first, "1 False\n".to_owned()));
    // That of which there was no name has gone with what it was of.
    let moments = zygote(&["moments", "back", "--json"]).json().remove(0);
    let names: Vec<_> = moments["moments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].clone())
        .collect();
    assert_eq!(names, ["one"]);
    let kid = Live::named("back-kid");
    zygote(&["branch", "back", "--at", "one", "--name", "back-kid"]).good();
    assert_eq!(state(&kid), "1 False\n");
    zygote(&["moments", "back", "--forget", "one"]).good();
    let gone = zygote(&["rollback", "back", "one"]);
    assert!(
        gone.code == 125 && gone.error().contains("no moment"),
        "{gone:?}"
    );
    assert_eq!(state(&it), "1 False\n");
}

#[test]
fn each_program_can_be_undone() {
    let it = Live::with("undo", &["--moment-on-exec", "--moments", "3"]);
    it.sh("mkdir /root/data && echo kept > /root/data/file")
        .good();
    for _ in 0..3 {
        it.sh("rm -r /root/data").good();
        zygote(&["rollback", "undo"]).good();
        assert_eq!(it.sh("cat /root/data/file").good().text(), "kept\n");
        zygote(&["rollback", "undo"]).good();
    }
    let moments = || {
        let list = zygote(&["moments", "undo", "--json"]).json().remove(0);
        list["moments"].as_array().unwrap().len()
    };
    assert!(moments() <= 3);
    let every = Live::with("every", &["--moment-every", "200ms", "--moments", "2"]);
    let begun = Instant::now();
    loop {
        let list = zygote(&["moments", &every.name, "--json"]).json().remove(0);
        let moments = list["moments"].as_array().unwrap();
        assert!(moments.len() <= 2, "{list}");
        if moments
            .last()
            .is_some_and(|last| last["number"].as_u64() > Some(3))
        {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{list}");
    }
}

#[test]
fn a_paused_sandbox_costs_nothing_and_outlives_its_engine() {
    let it = Live::with("sleeper", &["--ttl", "1h"]);
    let pause = || zygote(&["pause", "sleeper"]).good();
    let resume = || zygote(&["resume", "sleeper"]);
    it.python("x = 41").good();
    let counts = zygote(&["exec", "-d", "sleeper", "--", "sh", "-c", COUNTING]).good();
    let counts = counts.text().trim().to_owned();
    await_lines(&it, 3);
    let waits = std::thread::spawn(|| zygote(&["exec", "sleeper", "--", "sleep", "1000"]));
    await_processes(&it, 3);
    assert!(pause().text().contains("on disk"));
    let told = waits.join().unwrap();
    assert!(
        told.code == 125 && told.error().contains("paused"),
        "{told:?}"
    );
    for words in [
        &["exec", "sleeper", "--", "true"][..],
        &["python", "sleeper", "-c", "1"],
        &["branch", "sleeper"],
        &["pause", "sleeper"],
        &["rollback", "sleeper"],
        &["stats", "sleeper"],
    ] {
        let refused = zygote(words);
        assert!(
            refused.code == 125 && refused.error().contains("paused"),
            "{refused:?}"
        );
    }
    let info = zygote(&["inspect", "--json", "sleeper"]).json().remove(0);
    assert_eq!(info["state"], "paused", "{info}");
    assert!(info["disk_bytes"].as_u64().unwrap() > 4096, "{info}");
    // It keeps no engine from stopping, and the next one has it.
    zygote(&["stop"]).good();
    resume().good();
    assert_eq!(it.python("x + 1").good().text(), "42\n");
    let had = lines(&it);
    await_lines(&it, had + 3);
    assert!(resume().error().contains("not paused"));
    pause();
    kill_engine();
    resume().good();
    await_lines(&it, had + 6);
    // A single bit: refused by name, and it stays as it is.
    pause();
    let id = info["id"].as_str().unwrap();
    let folder = state().join("sandboxes").join(id);
    let delta = folder.join("snapshot/delta.bin");
    let good = std::fs::read(&delta).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    std::fs::remove_file(&delta).unwrap();
    std::fs::write(&delta, &bad).unwrap();
    let refused = resume();
    assert!(
        refused.code == 125 && refused.error().contains("delta.bin"),
        "{refused:?}"
    );
    std::fs::write(&delta, &good).unwrap();
    resume().good();
    assert!(!folder.exists());
    await_lines(&it, had + 9);
    // Where there is no room it goes on, and leaves nothing.
    let all = state().join("sandboxes");
    let all = all.to_str().unwrap();
    shell(&format!("mount -t tmpfs -o size=64k tmpfs {all}"));
    let refused = zygote(&["pause", "sleeper"]);
    assert!(
        refused.code == 125 && refused.error().contains("No space"),
        "{refused:?}"
    );
    assert_eq!(std::fs::read_dir(all).unwrap().count(), 0);
    shell(&format!("umount {all}"));
    await_lines(&it, had + 12);
    zygote(&["kill", "sleeper", &counts]).good();
    // A branch has its own place on disk.
    let kid = branch(&it, "sleeper-kid", &[]).remove(0);
    zygote(&["pause", "sleeper-kid"]).good();
    assert_eq!(it.python("x").good().text(), "41\n");
    zygote(&["resume", "sleeper-kid"]).good();
    assert_eq!(kid.python("x").good().text(), "41\n");
    zygote(&["pause", "sleeper-kid"]).good();
    drop(kid);
    let left = std::fs::read_dir(state().join("sandboxes"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
}

#[test]
fn an_engine_that_is_killed_in_the_middle_of_a_verb_leaves_its_sandbox_whole() {
    let it = Live::new("middle");
    zygote(&["exec", "-d", "middle", "--", "sh", "-c", COUNTING]).good();
    await_lines(&it, 2);
    zygote(&["snapshot", "middle", "first"]).good();
    for (verb, late_ms) in [
        (&["branch", "middle"][..], 30),
        (&["branch", "middle"], 150),
        (&["snapshot", "middle"], 60),
        (&["rollback", "middle", "first"], 100),
        (&["pause", "middle"], 60),
        (&["pause", "middle"], 200),
        (&["resume", "middle"], 150),
    ] {
        if verb[0] == "resume" {
            zygote(&["pause", "middle"]);
        }
        let words: Vec<String> = verb.iter().map(|word| (*word).to_owned()).collect();
        let asking = std::thread::spawn(move || {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            zygote(&words)
        });
        std::thread::sleep(Duration::from_millis(late_ms));
        kill_engine();
        // It has been done, or it has not.
        asking.join().unwrap();
        zygote(&["resume", "middle"]);
        let had = lines(&it);
        await_lines(&it, had + 1);
    }
    // What nobody has heard of is gone, or can be seen and removed.
    for one in zygote(&["tree", "--json", "middle"]).json().remove(0)["sandboxes"][0]["branches"]
        .as_array()
        .unwrap()
    {
        let id = one["id"].as_str().unwrap().to_owned();
        assert!(lines(&Live::named(&id)) > 0);
    }
}

#[test]
fn what_differs_between_moments_is_told_and_nothing_runs_in_what_is_looked_at() {
    let it = Live::new("compared");
    zygote(&["exec", "-d", "compared", "--", "sh", "-c", COUNTING]).good();
    await_lines(&it, 1);
    it.sh("mkdir /srv/a; echo 1 > /srv/a/gone; echo 1 > /srv/changed")
        .good();
    zygote(&["snapshot", "compared", "first"]).good();
    it.sh("rm -r /srv/a; echo two > /srv/changed; ln -s x /srv/added")
        .good();
    zygote(&["snapshot", "compared", "second"]).good();
    let diff = |words: &[&str]| {
        let found = zygote(&[&["diff", "--json"], words].concat()).good();
        found.json().remove(0)
    };
    // Two looks at the same moment see the same, although a process is in the middle of writing.
    let same = diff(&["compared@second", "compared@-1"]);
    assert_eq!(same["files"].as_array().unwrap().len(), 0, "{same}");
    assert_eq!(same["pages"], 0, "{same}");
    let found = diff(&["compared@first", "compared@second"]);
    let told = |one: &serde_json::Value| format!("{} {}", one["change"], one["path"]);
    let told: Vec<String> = found["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(told)
        .collect();
    let expected = [
        r#""changed" "/root/lines""#,
        r#""removed" "/srv/a""#,
        r#""removed" "/srv/a/gone""#,
        r#""added" "/srv/added""#,
        r#""changed" "/srv/changed""#,
    ];
    assert_eq!(told, expected);
    assert!(found["pages"].as_u64().unwrap() > 0, "{found}");
    let nobody = zygote(&["diff", "compared@never"]);
    assert!(nobody.error().contains("no moment never"), "{nobody:?}");
}
