//! The lab as its callers see it. Each check boots one, so there are few. The program that starts a
//! lab is also the one that runs inside of it.

#![allow(clippy::unwrap_used, reason = "a test")]

use libtest_mimic::{Arguments, Trial};
use std::io::{Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zygote_lab::{INIT_VERB, LabCommand, LabConfig, LabError, Streams};

/// First argument by which this program runs a lab that a test then disturbs.
const VICTIM_VERB: &str = "--victim";
/// Makes and drops VMs with a vCPU, as many as its argument says.
const MANY_VMS: &str = "\
import fcntl, os
kvm = os.open('/dev/kvm', os.O_RDWR)
for _ in range(300):
    vm = fcntl.ioctl(kvm, 0xae01, 0)
    vcpu = fcntl.ioctl(vm, 0xae41, 0)
    os.close(vcpu); os.close(vm)
print('made')";

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some(INIT_VERB) => zygote_lab::init_main(),
        Some(VICTIM_VERB) => return victim(),
        _ => {}
    }
    let tests = [
        trial(
            "streams_and_status_come_back_unmixed",
            streams_and_status_come_back_unmixed,
        ),
        trial(
            "three_hundred_vms_in_a_row_survive",
            three_hundred_vms_in_a_row_survive,
        ),
        trial(
            "a_program_that_is_not_there_is_told",
            a_program_that_is_not_there_is_told,
        ),
        trial(
            "a_command_without_end_is_ended_at_its_limit",
            a_command_without_end_is_ended_at_its_limit,
        ),
        trial(
            "a_lab_that_hangs_is_noticed_within_a_minute",
            a_lab_that_hangs_is_noticed_within_a_minute,
        ),
        trial(
            "a_signal_before_the_lab_is_up_ends_it_at_once",
            a_signal_before_the_lab_is_up_ends_it_at_once,
        ),
        trial(
            "the_first_signal_is_the_programs_and_the_second_ends_the_lab",
            the_first_signal_is_the_programs_and_the_second_ends_the_lab,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests.into()).exit_code()
}

fn trial(name: &str, check: fn()) -> Trial {
    Trial::test(name, move || {
        check();
        Ok(())
    })
}

/// Beside the build: the kernel is fetched once.
fn cache() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let target = exe.ancestors().find(|path| path.ends_with("target"));
    let cache = target.unwrap_or(Path::new("/var/tmp")).join("lab-cache");
    std::fs::create_dir_all(&cache).unwrap();
    cache
}

fn config(writable: &[&Path]) -> LabConfig {
    LabConfig {
        files: zygote_lab::prepare(&cache(), &mut |line| println!("{line}")).unwrap(),
        writable: writable.iter().map(|path| path.to_path_buf()).collect(),
        memory_mib: 2048,
        cpus: 1,
        icount: false,
    }
}

fn command(arguments: &[&str]) -> LabCommand {
    LabCommand {
        arguments: arguments.iter().map(Into::into).collect(),
        environment: std::env::vars_os().collect(),
        directory: "/tmp".into(),
        stdin: true,
        timeout: Some(Duration::from_secs(300)),
    }
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Ran {
    result: Result<u8, LabError>,
    output: Vec<u8>,
    error: Vec<u8>,
}

fn run(writable: &[&Path], command: &LabCommand, input: Vec<u8>) -> Ran {
    let (output, error) = (Sink::default(), Sink::default());
    let streams = Streams {
        input: Box::new(Cursor::new(input)),
        output: Box::new(output.clone()),
        error: Box::new(error.clone()),
    };
    let result = zygote_lab::run(&config(writable), command, streams);
    let taken = |sink: Sink| sink.0.lock().unwrap().clone();
    Ran {
        result,
        output: taken(output),
        error: taken(error),
    }
}

fn streams_and_status_come_back_unmixed() {
    let shared = tempfile::tempdir_in(cache()).unwrap();
    let script = "cat; head -c 2000000 /dev/zero | tr '\\0' e >&2; pwd > \"$0/kept\"; \
        test -c /dev/kvm && touch /etc/thrown-away && kill -9 $$";
    let input: Vec<u8> = (0..1_000_000_u32).map(|n| (n >> 5) as u8).collect();
    let path = shared.path().to_str().unwrap();
    let command = command(&["sh", "-c", script, path]);
    let ran = run(&[shared.path()], &command, input.clone());
    assert_eq!(ran.result.unwrap(), 137);
    assert!(ran.output == input);
    assert!(ran.error.len() == 2_000_000 && ran.error.iter().all(|byte| *byte == b'e'));
    let kept = std::fs::read(shared.path().join("kept")).unwrap();
    assert_eq!(kept, b"/tmp\n");
    assert!(!Path::new("/etc/thrown-away").exists());
}

fn three_hundred_vms_in_a_row_survive() {
    let ran = run(&[], &command(&["python3", "-c", MANY_VMS]), Vec::new());
    assert_eq!((ran.result.unwrap(), &ran.output[..]), (0, &b"made\n"[..]));
}

fn a_program_that_is_not_there_is_told() {
    let ran = run(&[], &command(&["no-such-program"]), Vec::new());
    let Err(LabError::Program { status, message }) = ran.result else {
        panic!("it ran");
    };
    assert!(status == 127 && message.contains("no-such-program"));
}

fn a_command_without_end_is_ended_at_its_limit() {
    let limit = Duration::from_secs(2);
    let mut command = command(&["sleep", "1000"]);
    command.timeout = Some(limit);
    // Its output is never read either.
    let (_reader, writer) = UnixStream::pair().unwrap();
    let streams = Streams {
        input: Box::new(std::io::empty()),
        output: Box::new(writer),
        error: Box::new(std::io::sink()),
    };
    let result = zygote_lab::run(&config(&[]), &command, streams);
    assert!(
        matches!(result, Err(LabError::TimedOut { limit: told, .. }) if told == limit),
        "{result:?}"
    );
}

/// This program, running a lab in which `word` is printed and nothing happens after.
fn victim() -> ExitCode {
    let command = command(&[
        "sh",
        "-c",
        "trap 'echo trapped' TERM; echo up; while :; do sleep 1; done",
    ]);
    let streams = Streams::inherited();
    match zygote_lab::run(&config(&[]), &command, streams) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            println!("\nvictim: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Victim {
    process: std::process::Child,
    output: std::process::ChildStdout,
}

impl Victim {
    fn start() -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .arg(VICTIM_VERB)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = process.stdout.take().unwrap();
        Self { process, output }
    }

    /// Reads its output up to this word.
    fn await_word(&mut self, word: &str) {
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(word) {
            let mut byte = [0];
            self.output.read_exact(&mut byte).unwrap();
            said.push(byte[0]);
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Its QEMU, once there is one.
    fn qemu(&self) -> rustix::process::Pid {
        let end = Instant::now() + Duration::from_secs(30);
        while Instant::now() < end {
            let children = format!("/proc/{0}/task/{0}/children", self.process.id());
            let children = std::fs::read_to_string(children).unwrap_or_default();
            if let Some(pid) = children.split_whitespace().next() {
                return rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
            }
            std::thread::yield_now();
        }
        panic!("there is no QEMU");
    }

    /// What it says at its end, and how long that took.
    fn end(mut self) -> (String, Duration) {
        let start = Instant::now();
        let mut said = String::new();
        self.output.read_to_string(&mut said).unwrap();
        self.process.wait().unwrap();
        (said, start.elapsed())
    }
}

fn a_lab_that_hangs_is_noticed_within_a_minute() {
    let mut victim = Victim::start();
    victim.await_word("up");
    let qemu = victim.qemu();
    rustix::process::kill_process(qemu, rustix::process::Signal::STOP).unwrap();
    let (said, took) = victim.end();
    assert!(said.contains("the lab has hung"), "{said}");
    assert!(took < Duration::from_secs(75), "{took:?}");
    assert!(rustix::process::test_kill_process(qemu).is_err());
}

fn a_signal_before_the_lab_is_up_ends_it_at_once() {
    let victim = Victim::start();
    let qemu = victim.qemu();
    victim.signal(rustix::process::Signal::HUP);
    let (said, took) = victim.end();
    assert!(said.contains("ended by signal 1"), "{said}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(rustix::process::test_kill_process(qemu).is_err());
}

fn the_first_signal_is_the_programs_and_the_second_ends_the_lab() {
    let mut victim = Victim::start();
    victim.await_word("up");
    victim.signal(rustix::process::Signal::TERM);
    victim.await_word("trapped");
    victim.signal(rustix::process::Signal::TERM);
    let (said, took) = victim.end();
    assert!(said.contains("ended by signal 15"), "{said}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}
