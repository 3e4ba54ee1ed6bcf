//! What `python3` in the same guest does, a fork does: files, names, signals, limits.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use wait_timeout::ChildExt;
use zygote_tests::*;

fn run_in(folder: &Path, arguments: &[&OsStr], input: &[u8]) -> Ran {
    let mut command = Command::new(program());
    command.current_dir(folder).arg("run").args(arguments);
    feed(command, input)
}

fn words<'a>(words: &[&'a str]) -> Vec<&'a OsStr> {
    words.iter().map(|word| OsStr::new(*word)).collect()
}

/// A program that tells how it was started.
const TELL: &str = "\
import sys, os
names = dict(globals())
names['__loader__'] = type(names['__loader__']).__name__ + getattr(names['__loader__'], '__name__', '')
print(list(names), {k: v for k, v in names.items() if k not in ('sys', 'os')})
print(sys.argv, sys.orig_argv[1:], sys.path[0], sys.flags, os.getcwd())
";

#[test]
fn a_program_is_started_as_python3_starts_it() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("tell.py");
    fs::write(&script, TELL).unwrap();
    let path = script.to_str().unwrap();
    let cases: [(&[&str], &str); 3] = [
        (&["-c", TELL, "a", "b"], ""),
        (&["-", "a", "b"], TELL),
        (&[path, "a"], ""),
    ];
    for (arguments, input) in cases {
        let fork = run_in(folder.path(), &words(arguments), input.as_bytes()).good();
        let mut real = vec!["--copy"];
        let copy = format!("{path}:{path}");
        real.extend([copy.as_str(), "--", "python3"]);
        real.extend(arguments);
        let real = run_in(folder.path(), &words(&real), input.as_bytes()).good();
        assert_eq!(fork.text(), real.text());
    }
}

#[test]
fn output_that_cannot_be_flushed_is_told_as_python3_tells_it() {
    let code = "import os; print('lost'); os.close(1)";
    let fork = zygote(&["run", "-c", code]);
    let real = zygote(&["run", "--", "python3", "-c", code]);
    assert_eq!((fork.code, real.code), (120, 120), "{fork:?}");
    assert_eq!(fork.error(), real.error());
}

#[test]
fn a_folder_and_a_zip_archive_are_programs() {
    let folder = tempfile::tempdir().unwrap();
    let app = folder.path().join("app");
    fs::create_dir(&app).unwrap();
    fs::write(
        app.join("__main__.py"),
        "import sys, part; print(part.X, sys.argv, __file__)",
    )
    .unwrap();
    fs::write(app.join("part.py"), "X = 5").unwrap();
    let ran = run_in(folder.path(), &words(&["app", "z"]), b"").good();
    assert_eq!(ran.text(), "5 ['app', 'z'] /root/app/__main__.py\n");
    let zipped = Command::new("python3")
        .args(["-m", "zipapp", "app", "-o", "app.pyz"])
        .current_dir(&folder)
        .status();
    assert!(zipped.unwrap().success());
    let ran = run_in(folder.path(), &words(&["app.pyz", "z"]), b"").good();
    assert_eq!(ran.text(), "5 ['app.pyz', 'z'] /root/app.pyz/__main__.py\n");
}

#[test]
fn files_go_in_when_asked_and_only_then() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("helper.py", "X = 1");
    write("data.csv", "1,2");
    write(
        "job.py",
        "import helper, os; print(helper.X, open('data.csv').read(), os.stat('/opt/d').st_mode & 0o777)",
    );
    let without = run_in(folder.path(), &words(&["job.py"]), b"");
    assert_eq!(without.code, 1, "{without:?}");
    assert!(without.error().contains("--copy"), "{without:?}");
    use std::os::unix::fs::PermissionsExt;
    let data = folder.path().join("data.csv");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o640)).unwrap();
    let arguments = [
        "--copy",
        "helper.py",
        "--copy",
        "data.csv",
        "--copy",
        "data.csv:/opt/d",
        "job.py",
    ];
    let with = run_in(folder.path(), &words(&arguments), b"").good();
    assert_eq!(with.text(), format!("1 1,2 {}\n", 0o640));
    let command = ["--copy", "data.csv:/srv/", "--", "cat", "/srv/data.csv"];
    assert_eq!(
        run_in(folder.path(), &words(&command), b"").good().text(),
        "1,2"
    );
    let missing = run_in(folder.path(), &words(&["--copy", "nope", "-c", "1"]), b"");
    assert_eq!(missing.code, 125);
    assert!(missing.error().contains("nope"), "{missing:?}");
    let full = ["--copy", "job.py:/proc/no/job.py", "-c", "print(1)"];
    let full = run_in(folder.path(), &words(&full), b"");
    assert_eq!((full.code, full.text()), (125, String::new()));
    assert!(full.error().contains("/proc/no/job.py"), "{full:?}");
}

#[test]
fn files_come_out_whether_the_program_ends_well_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let code = "import os, sys, time\n\
                os.makedirs('out/sub'); open('out/sub/a', 'w').write('x' * 3_000_000)\n\
                os.symlink('/etc/passwd', 'out/link'); open('/srv/b', 'wb').write(bytes(range(256)))\n\
                if len(sys.argv) > 1: print('late', end=''); time.sleep(1000)\n\
                sys.exit(3)";
    let arguments = [
        "--json", "--get", "out", "--get", "/srv/b:c", "--get", "nope", "-c", code,
    ];
    let ran = run_in(folder.path(), &words(&arguments), b"");
    let record = &ran.json()[0];
    assert_eq!((ran.code, &record["exit_code"]), (3, &3.into()), "{ran:?}");
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("out/sub/a"), vec![b'x'; 3_000_000]);
    assert_eq!(read("c"), (0..=255).collect::<Vec<u8>>());
    let link = fs::read_link(folder.path().join("out/link")).unwrap();
    assert_eq!(link, std::path::Path::new("/etc/passwd"));
    assert_eq!(record["files"][1]["bytes"], 256);
    assert_eq!(record["error"]["code"], "get_failed");
    assert!(
        record["error"]["message"]
            .as_str()
            .unwrap()
            .contains("nope")
    );
    let late = [
        "--timeout",
        "20s",
        "--json",
        "--get",
        "/srv/b:d",
        "-c",
        code,
        "wait",
    ];
    let late = run_in(folder.path(), &words(&late), b"");
    assert_eq!(late.code, 124, "{late:?}");
    assert_eq!(late.json()[0]["stdout"], "late", "{late:?}");
    assert_eq!(read("d").len(), 256);
}

#[test]
fn a_script_of_many_megabytes_runs() {
    let folder = tempfile::tempdir().unwrap();
    let mut script = "# padding padding padding padding padding padding\n".repeat(60_000);
    script += "print('end', len(open(__file__).read()))\n";
    fs::write(folder.path().join("big.py"), &script).unwrap();
    let ran = run_in(folder.path(), &words(&["big.py"]), b"").good();
    assert_eq!(ran.text(), format!("end {}\n", script.len()));
}

#[test]
fn names_and_arguments_need_not_be_utf8() {
    let folder = tempfile::tempdir().unwrap();
    let name = OsString::from_vec(b"n\xff.py".to_vec());
    let code =
        "import sys, os; print([os.fsencode(a) for a in sys.argv], os.fsencode(__file__)[-5:])";
    fs::write(folder.path().join(&name), code).unwrap();
    let argument = OsString::from_vec(b"\xfe".to_vec());
    let ran = run_in(folder.path(), &[&name, &argument], b"").good();
    assert_eq!(ran.text(), "[b'n\\xff.py', b'\\xfe'] b'n\\xff.py'\n");
    let command = [
        OsStr::new("--"),
        OsStr::new("printf"),
        OsStr::new("%s"),
        &argument,
    ];
    assert_eq!(run_in(folder.path(), &command, b"").good().stdout, b"\xfe");
}

#[test]
fn signals_limits_and_files_are_those_of_a_login() {
    let code = "\
import multiprocessing, os, resource, signal, socket
def f(): os._exit(0)
if __name__ == '__main__':
    print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    print([s for s in range(1, 32) if signal.getsignal(s) == signal.SIG_IGN])
    print(resource.getrlimit(resource.RLIMIT_NOFILE), socket.getservbyname('http'))
    os.rename('/usr/share/perl5', '/usr/share/perl6') if os.path.isdir('/usr/share/perl5') else os.rename('/usr/games', '/usr/games2')
    inodes = {e.name: e.inode() for e in os.scandir('/etc')}
    print(all(os.lstat('/etc/' + n).st_ino == i for n, i in inodes.items()), len(inodes) > 20)
    open('/etc/new', 'w'); os.chmod('/etc/passwd', 0o600)
    inodes = {e.name: e.inode() for e in os.scandir('/etc')}
    print(all(os.lstat('/etc/' + n).st_ino == i for n, i in inodes.items()))
    p = multiprocessing.get_context('forkserver').Process(target=f); p.start(); p.join(); print(p.exitcode)
";
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("login.py"), code).unwrap();
    let ran = run_in(
        folder.path(),
        &words(&["--timeout", "120s", "login.py"]),
        b"",
    )
    .good();
    let expected = "set()\n[13, 25]\n(1024, 1048576) 80\nTrue True\nTrue\n0\n";
    assert_eq!(ran.text(), expected, "{ran:?}");
}

struct Running {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

/// Starts Python code and waits for its first line.
fn start(arguments: &[&str]) -> Running {
    let mut command = Command::new(program());
    command.arg("run").args(arguments).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    Running { child, output }
}

impl Running {
    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// How it ended, and what it printed since.
    fn end(mut self) -> (Ran, String) {
        let mut text = String::new();
        self.output.read_to_string(&mut text).unwrap();
        (self.child.wait_with_output().unwrap().into(), text)
    }
}

#[test]
fn the_first_interrupt_is_the_programs() {
    use rustix::process::Signal;
    // Not one long sleep: a signal that comes just before it is heard after it, by any Python.
    let handled = "import time, sys\ntry:\n  print('up', flush=True)\n  while True: time.sleep(0.05)\n\
        except KeyboardInterrupt: print('KI'); sys.exit(7)";
    let running = start(&["-c", handled]);
    running.signal(Signal::INT);
    let (ran, text) = running.end();
    assert_eq!((ran.code, text.as_str()), (7, "KI\n"));
    let plain = "import time, atexit\natexit.register(print, 'bye')\nprint('up', flush=True)\n\
        while True: time.sleep(0.05)";
    let running = start(&["-c", plain]);
    running.signal(Signal::INT);
    let (ran, text) = running.end();
    assert_eq!(
        (ran.code, text.as_str()),
        (130, "bye\n"),
        "dies of the signal"
    );
    let running = start(&["-c", plain]);
    running.signal(Signal::TERM);
    assert_eq!(running.end().0.code, 143);
}

#[test]
fn the_second_interrupt_kills() {
    use rustix::process::Signal;
    let deaf = "import signal, time\n\
        signal.signal(signal.SIGINT, lambda *_: print('no', flush=True))\nprint('up', flush=True)\n\
        while True: time.sleep(1)";
    let mut running = start(&["-c", deaf]);
    running.signal(Signal::INT);
    let mut line = String::new();
    running.output.read_line(&mut line).unwrap();
    assert_eq!(line, "no\n");
    running.signal(Signal::INT);
    assert_eq!(running.end().0.code, 130);
}

#[test]
fn a_killed_run_has_its_record_all_the_same() {
    use rustix::process::Signal;
    let deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('up')\n\
        while True: time.sleep(1)";
    let child = Command::new(program())
        .args(["run", "--json", "-c", deaf])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap();
    let runs = || zygote(&["status", "--json"]).json()[0]["runs"]["running"].as_u64();
    while runs().unwrap_or_default() == 0 {
        std::thread::sleep(Duration::from_millis(50));
    }
    let pid = rustix::process::Pid::from_child(&child);
    // The first is the program's, who ignores it; whether it does already cannot be seen from here. Two
    // that come at once would be one.
    while child.try_wait().unwrap().is_none() {
        rustix::process::kill_process(pid, Signal::INT).unwrap();
        child.wait_timeout(Duration::from_secs(2)).unwrap();
    }
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert_eq!((ran.code, ran.json().len()), (130, 1), "{ran:?}");
    assert_eq!(ran.json()[0]["signal"], 2, "{ran:?}");
}

#[test]
fn records_come_as_runs_end() {
    let code = "import os, sys, time\nif os.path.exists('/x'): pass\nprint('up')\ntime.sleep(1000)";
    let mut command = Command::new(program());
    command
        .args([
            "run",
            "--count",
            "2",
            "--json",
            "--timeout",
            "3s",
            "-c",
            code,
        ])
        .stdin(Stdio::null());
    let ran = feed(command, b"");
    assert_eq!((ran.code, ran.json().len()), (124, 2));
    for record in ran.json() {
        assert_eq!(
            (&record["timed_out"], &record["stdout"]),
            // Not flushed, and not lost.
            (&true.into(), &"up\n".into())
        );
    }
}

#[test]
fn a_reader_that_has_gone_ends_it_quietly() {
    for arguments in [
        "run --count 3 --json -c 'print(\"x\" * 100000)'",
        "template ls",
        "completions bash",
    ] {
        let line = format!(
            "{} {arguments} | true; echo ${{PIPESTATUS[0]}}",
            program().display()
        );
        let ran = feed(
            {
                let mut command = Command::new("bash");
                command.args(["-c", &line]);
                command
            },
            b"",
        );
        assert!(
            ["141\n", "0\n"].contains(&ran.text().as_str()),
            "{arguments}: {ran:?}"
        );
        assert_eq!(ran.error(), "", "{arguments}");
    }
}
