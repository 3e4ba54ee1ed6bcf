//! `zygote run` is `python3` run locally: streams, codes, arguments; and whatever a program does
//! stays its own.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::{Command, Stdio};
use zygote_tests::*;

#[test]
fn numpy_is_there_and_output_is_the_programs_alone() {
    let ran = python("import numpy; print(numpy.arange(3).sum())").good();
    assert_eq!((ran.text().as_str(), ran.error().as_str()), ("3\n", ""));
}

#[test]
fn the_exit_code_and_stderr_are_the_programs() {
    let ran = python("import sys; sys.stderr.write('e'); sys.exit(7)");
    assert_eq!(
        (ran.code, ran.text(), ran.error()),
        (7, String::new(), "e".into())
    );
}

#[test]
fn a_traceback_is_that_of_python3() {
    let ran = python("def f():\n    1/0\nf()");
    let expected = "Traceback (most recent call last):\n  File \"<string>\", line 3, in <module>\n  \
        File \"<string>\", line 2, in f\nZeroDivisionError: division by zero\n";
    assert_eq!((ran.code, ran.error()), (1, expected.to_owned()));
}

#[test]
fn the_time_limit_ends_an_endless_loop_with_124() {
    let ran = zygote(&["run", "--timeout", "2s", "-c", "while True: pass"]);
    assert_eq!(ran.code, 124, "{ran:?}");
    assert!(ran.error().contains("time limit"));
}

#[test]
fn a_signal_is_told_as_128_and_its_number() {
    assert_eq!(python("import os; os.kill(os.getpid(), 15)").code, 143);
    let ran = zygote(&["run", "--json", "-c", "import ctypes; ctypes.string_at(0)"]);
    let record = &ran.json()[0];
    assert_eq!(
        (&record["exit_code"], &record["signal"]),
        (&139.into(), &11.into())
    );
}

#[test]
fn input_output_and_errors_are_binary_and_whole() {
    let input: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n.wrapping_mul(7919) >> 3) as u8)
        .collect();
    let code = "import sys\nd = sys.stdin.buffer.read()\nsys.stdout.buffer.write(d)\n\
        sys.stderr.buffer.write(d[::-1])";
    let ran = zygote_with_input(&["run", "-c", code], &input).good();
    assert!(ran.stdout == input);
    assert!(ran.stderr.iter().rev().eq(&input));
}

#[test]
fn a_file_runs_with_its_name_arguments_and_lines() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prógram.py");
    std::fs::write(
        &path,
        "import sys\nprint(sys.argv, __file__)\nraise ValueError('é')\n",
    )
    .unwrap();
    let mut command = Command::new(program());
    command
        .current_dir(&folder)
        .args(["run", "prógram.py", "a", "--json", "-x"]);
    let ran = feed(command, b"");
    // Nothing of the host's folders.
    let line = "['prógram.py', 'a', '--json', '-x'] /root/prógram.py\n".to_owned();
    assert_eq!((ran.code, ran.text()), (1, line));
    assert!(ran.error().contains("raise ValueError('é')"), "{ran:?}");
    assert!(ran.error().ends_with("ValueError: é\n"));
}

#[test]
fn a_program_is_read_from_standard_input() {
    let ran = zygote_with_input(&["run", "-", "x"], b"import sys; print(sys.argv)").good();
    assert_eq!(ran.text(), "['-', 'x']\n");
}

#[test]
fn environment_and_directory_are_the_users() {
    let code = "import os; print(os.environ['A'], os.getcwd(), os.environ.get('ZYGOTE_STATE_DIR'))";
    let arguments = ["run", "--env", "A=b=c", "--cwd", "/usr/lib", "-c", code];
    assert_eq!(zygote(&arguments).good().text(), "b=c /usr/lib None\n");
}

#[test]
fn commands_run_and_those_that_are_not_there_are_told_as_a_shell_tells() {
    let ran = zygote(&["run", "--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(
        (ran.code, ran.text(), ran.error()),
        (3, "out\n".into(), "err\n".into())
    );
    assert_eq!(zygote(&["run", "--", "no-such-program"]).code, 127);
    assert_eq!(zygote(&["run", "--", "/etc/passwd"]).code, 126);
    assert_eq!(zygote(&["run", "--cwd", "/nowhere", "-c", "1"]).code, 125);
}

#[test]
fn subprocesses_threads_and_c_code_write_to_the_same_streams() {
    let code = "import subprocess, threading, ctypes, sys\n\
        sys.stdout.write('a'); sys.stdout.flush()\n\
        subprocess.run(['sh', '-c', 'printf b; printf c >&2'])\n\
        t = threading.Thread(target=lambda: print('d', end='', flush=True)); t.start(); t.join()\n\
        l = ctypes.CDLL(None); l.printf(b'e'); l.fflush(None)";
    let ran = python(code).good();
    assert_eq!((ran.text().as_str(), ran.error().as_str()), ("abde", "c"));
}

#[test]
fn what_the_template_never_touched_can_be_used() {
    let code = "import sqlite3, xml.dom.minidom, decimal, tarfile, ctypes.util, multiprocessing\n\
        c = sqlite3.connect(':memory:'); print(c.execute('select 6*7').fetchone()[0])\n\
        with multiprocessing.Pool(2) as p: print(p.map(abs, [-1, -2]))\n\
        print(len(open('/usr/lib/python3.11/turtle.py').read()) > 1000)";
    assert_eq!(python(code).good().text(), "42\n[1, 2]\nTrue\n");
}

#[test]
fn a_python_of_the_users_own_settings_is_a_new_one() {
    let arguments = [
        "run",
        "--env",
        "PYTHONHASHSEED=0",
        "-c",
        "import sys; print(sys.flags.hash_randomization)",
    ];
    assert_eq!(zygote(&arguments).good().text(), "0\n");
}

#[test]
fn a_hostile_program_harms_only_its_own_run() {
    let programs = [
        ("import os; os.closerange(0, 4096); os._exit(5)", 5),
        (
            "import os, signal; os.kill(os.getppid(), signal.SIGKILL); os._exit(6)",
            6,
        ),
        (
            "import os, signal; os.kill(-1, signal.SIGKILL); os._exit(8)",
            8,
        ),
        (
            "import os\nos.write(1, bytes([3, 0, 0, 0, 4, 5, 6]) * 50); os._exit(9)",
            9,
        ),
        (
            "import socket\ns = socket.socket(socket.AF_VSOCK); s.connect((2, 1024))",
            1,
        ),
        ("open('/root/big', 'wb').write(b'x' * (1 << 30))", 1),
    ];
    for (program, code) in programs {
        let ran = zygote(&["run", "--timeout", "60s", "-c", program]);
        assert_eq!(ran.code, code, "{program}: {ran:?}");
    }
    let mut protocol = python("import os\nos.write(1, bytes([3, 0, 0, 0, 4, 5, 6]))").good();
    assert_eq!(protocol.stdout.split_off(0), [3, 0, 0, 0, 4, 5, 6]);
}

#[test]
fn a_guest_that_resets_or_panics_is_told_by_a_sentence() {
    for key in ["b", "c"] {
        let code = format!("open('/proc/sysrq-trigger', 'w').write('{key}')");
        let ran = zygote(&["run", "--timeout", "60s", "-c", &code]);
        assert_eq!(ran.code, 125, "{ran:?}");
        assert!(ran.error().contains("the sandbox has died"), "{ran:?}");
    }
}

#[test]
fn a_fork_bomb_is_ended_at_its_limit() {
    let ran = zygote(&[
        "run",
        "--timeout",
        "10s",
        "-c",
        "import os\nwhile True: os.fork()",
    ]);
    assert!(ran.code == 124 || ran.code == 1, "{ran:?}");
}

#[test]
fn a_full_file_system_is_the_programs_own_error() {
    let code = "import os\nf = open('/var/tmp/full', 'wb')\n\
        try:\n    while True: f.write(b'x' * 65536)\n\
        except OSError as e: print(e.errno, flush=True); os._exit(0)";
    let ran = zygote(&["run", "--timeout", "120s", "-c", code]).good();
    assert_eq!(ran.text(), "28\n");
}

#[test]
fn output_without_end_is_ended_with_its_reader() {
    let mut command = Command::new(program());
    command.args(["run", "-c", "while True: print('y' * 1000)"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut some = [0; 10];
    std::io::Read::read_exact(&mut stdout, &mut some).unwrap();
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
fn json_tells_bytes_that_are_not_text_in_base64() {
    let code = "import sys; sys.stdout.buffer.write(b'\\xff\\x00')";
    let record = &zygote(&["run", "--json", "-c", code]).good().json()[0];
    assert_eq!(record["stdout_base64"], "/wA=");
    assert!(record["stdout"].is_null() && record["memory_private_kib"].as_u64() > Some(100));
    assert_eq!(record["exit_code"], 0);
}
