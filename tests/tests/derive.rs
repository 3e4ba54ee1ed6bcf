//! Templates derived from others, and made of sandboxes: in a store of their own, over a base in another.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::process::Command;
use zygote_tests::*;

/// Makes a wheel (binary distribution format, version 1.0).
const MAKE_WHEEL: &str = r#"
import sys, zipfile
info = "zygote_test-1.0.dist-info/"
with zipfile.ZipFile(sys.argv[1] + "/zygote_test-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("zygote_test.py", "import numpy\nLOADED = numpy.arange(5).sum()\ndef main(): print('here')")
    wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: zygote-test\nVersion: 1.0\n")
    wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(info + "entry_points.txt", "[console_scripts]\nzt = zygote_test:main\n")
    wheel.writestr(info + "RECORD", "")
"#;

fn derive(words: &[&str]) -> Ran {
    zygote(&[&["template", "derive"], words].concat())
}

fn run(template: &str, words: &[&str]) -> String {
    let ran = zygote(&[&["run", "-t", template], words].concat());
    ran.good().text()
}

/// What lies in the store.
fn generations() -> usize {
    fs::read_dir(state().join("generations")).map_or(0, Iterator::count)
}

/// Removed with its test.
struct Template(&'static str);

impl Drop for Template {
    fn drop(&mut self) {
        zygote(&["template", "rm", self.0]);
    }
}

#[test]
fn a_derived_template_has_what_was_put_installed_run_and_imported() {
    let folder = tempfile::tempdir().unwrap();
    let _templates = [Template("mine"), Template("more")];
    fs::create_dir(folder.path().join("app")).unwrap();
    fs::write(folder.path().join("app/data"), "from the host\n").unwrap();
    let wheel = Command::new("python3")
        .args(["-c", MAKE_WHEEL])
        .arg(folder.path())
        .status();
    assert!(wheel.unwrap().success());
    let requirements = folder.path().join("requirements.txt");
    let requirements = requirements.to_str().unwrap();
    let links = folder.path().display();
    fs::write(
        requirements,
        format!("--no-index\n--find-links {links}\nzygote-test\n"),
    )
    .unwrap();
    let copy = format!("{links}/app:/opt/app");
    let words = [
        "python",
        "mine",
        "--copy",
        &copy,
        "--requirements",
        requirements,
        "--run",
        "cp /opt/app/data /etc/mine; (setsid sleep 1000 >/dev/null 2>&1 </dev/null &)",
        "--run",
        "zt >> /etc/mine; echo 10.0.0.1 mine >> /etc/hosts",
        "--warm",
        "import zygote_test",
        "--json",
    ];
    let built = derive(&words).good().json().remove(0);
    assert_eq!(
        (&built["is_new"], &built["from"]),
        (&true.into(), &"python".into())
    );
    let code = "import sys; m = sys.modules['zygote_test']; print(m.LOADED, m.__cached__[-4:]); \
        print(open('/etc/mine').read(), end='')";
    let expected = "10 .pyc\nfrom the host\nhere\n";
    assert_eq!(run("mine", &["-c", code]), expected);
    // What was left running runs in each, as do commands; nothing is known under a number.
    let looks = "grep -q sleep /proc/[0-9]*/comm && grep -q mine /etc/hosts && \
        getent hosts $(hostname) >/dev/null && cat /proc/sys/kernel/hostname /etc/hostname";
    let names = run("mine", &["--", "sh", "-c", looks]);
    let names: Vec<&str> = names.lines().collect();
    assert!(
        names[0].starts_with("zygote-") && names[0] == names[1],
        "{names:?}"
    );
    assert_ne!(run("mine", &["--", "hostname"]).trim(), names[0]);
    let draws = "import os, random, zygote_test; print(os.urandom(8), random.random())";
    assert_ne!(run("mine", &["-c", draws]), run("mine", &["-c", draws]));
    // It takes what differs, and nothing of what it is derived from.
    let base = zygote(&["template", "inspect", "python", "--json"]).good();
    let base = base.json().remove(0)["disk_bytes"].as_u64().unwrap();
    let bytes = built["disk_bytes"].as_u64().unwrap();
    assert!(bytes * 5 < base, "{bytes} of {base}");
    // The same again is there already; one whose command fails leaves nothing.
    let again = derive(&words).good().json().remove(0);
    assert_eq!(again["is_new"], false);
    let before = generations();
    let failed = derive(&["mine", "worse", "--run", "echo oh no; exit 7"]);
    assert_eq!(failed.code, 125, "{failed:?}");
    assert!(failed.error().contains("exit code 7") && failed.error().contains("oh no"));
    assert_eq!(generations(), before);
    // One of a derived one does not need that one's files.
    derive(&["mine", "more", "--run", "echo more >> /etc/mine"]).good();
    zygote(&["template", "rm", "mine"]).good();
    assert_eq!(run("more", &["-c", code]), format!("{expected}more\n"));
    let other = derive(&["nothing", "x", "--run", "true"]);
    assert!(other.error().contains("no template nothing"), "{other:?}");
}

#[test]
fn a_template_is_made_of_a_sandbox_that_goes_on() {
    let _template = Template("warm");
    zygote(&["create", "--name", "box"]).good();
    zygote(&[
        "python",
        "box",
        "-c",
        "import random; x = 41; random.seed(1)",
    ])
    .good();
    let count = "i=0; while true; do i=$((i+1)); echo $i; echo $i >> /root/lines; sleep 0.02; done";
    zygote(&["exec", "-d", "box", "--", "sh", "-c", count]).good();
    zygote(&["snapshot", "box", "early"]).good();
    let before = generations();
    // One that was built does not give way, one that was made so does.
    let taken = zygote(&["snapshot", "box", "python", "--template"]);
    assert!(taken.error().contains("was built"), "{taken:?}");
    zygote(&["snapshot", "box", "warm", "--template", "--at", "early"]).good();
    zygote(&["snapshot", "box", "warm", "--template"]).good();
    assert_eq!(generations(), before + 1);
    zygote(&["python", "box", "-c", "x += 1"]).good();
    zygote(&["rm", "box"]).good();
    let again = zygote(&["template", "build", "warm"]);
    assert!(again.error().contains("was made of a sandbox"), "{again:?}");
    let held = derive(&["warm", "x", "--run", "true"]);
    assert!(held.error().contains("snapshot of a sandbox"), "{held:?}");
    let mut drawn = Vec::new();
    for name in ["a", "b"] {
        zygote(&["create", "-t", "warm", "--name", name]).good();
        let state = zygote(&["python", name, "-c", "print(x + 1, random.random())"]);
        drawn.push(state.good().text());
        let listed = zygote(&["ps", name, "--json"]).good().json().remove(0);
        let listed = listed["processes"].as_array().unwrap().clone();
        let running = |process: &&serde_json::Value| process["state"] == "running";
        assert_eq!(listed.iter().filter(running).count(), 2, "{listed:?}");
        let lines = "n=$(wc -l < /root/lines); while [ $(wc -l < /root/lines) -le $n ]; do :; done; \
            awk '$1 != NR { exit 1 }' /root/lines";
        zygote(&["exec", name, "--", "sh", "-c", lines]).good();
        zygote(&["rm", name]).good();
    }
    assert!(drawn.iter().all(|one| one.starts_with("42 ")) && drawn[0] != drawn[1]);
    // Runs have it, too.
    assert!(
        run("warm", &["--", "tail", "-1", "/root/lines"])
            .trim()
            .parse::<u32>()
            .is_ok()
    );
    assert_eq!(run("warm", &["-c", "print(1)"]), "1\n");
}
