//! The lab as its callers see it. Each check boots one, so there are few. No harness: the program
//! that starts a lab is also the one that runs inside of it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use zygote_lab::{INIT_VERB, LabCommand, LabConfig, LabError, Streams};

/// Makes and drops VMs with a vCPU, as many as its argument says.
const MANY_VMS: &str = "\
import fcntl, os
kvm = os.open('/dev/kvm', os.O_RDWR)
for _ in range(300):
    vm = fcntl.ioctl(kvm, 0xae01, 0)
    vcpu = fcntl.ioctl(vm, 0xae41, 0)
    os.close(vcpu); os.close(vm)
print('made')";

fn main() {
    if std::env::args()
        .nth(1)
        .is_some_and(|verb| verb == INIT_VERB)
    {
        zygote_lab::init_main();
    }
    if std::env::args().any(|word| word == "--list") {
        return;
    }
    let cache = cache();
    let shared = tempfile::tempdir_in(&cache).unwrap();
    streams_and_status_come_back_unmixed(&cache, shared.path());
    println!("test streams_and_status_come_back_unmixed ... ok");
    three_hundred_vms_in_a_row_survive(&cache);
    println!("test three_hundred_vms_in_a_row_survive ... ok");
    a_program_that_is_not_there_is_told(&cache);
    println!("test a_program_that_is_not_there_is_told ... ok");
}

/// Beside the build: the kernel is fetched once.
fn cache() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let target = exe.ancestors().find(|path| path.ends_with("target"));
    let cache = target.unwrap_or(Path::new("/var/tmp")).join("lab-cache");
    std::fs::create_dir_all(&cache).unwrap();
    cache
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

fn run(cache: &Path, writable: &[&Path], arguments: &[&str], input: Vec<u8>) -> Ran {
    let files = zygote_lab::prepare(cache, &mut |line| println!("{line}")).unwrap();
    let config = LabConfig {
        files,
        writable: writable.iter().map(|path| path.to_path_buf()).collect(),
        memory_mib: 2048,
        cpus: 1,
        icount: false,
    };
    let command = LabCommand {
        arguments: arguments.iter().map(Into::into).collect(),
        environment: std::env::vars_os().collect(),
        directory: "/tmp".into(),
        stdin: true,
    };
    let (output, error) = (Sink::default(), Sink::default());
    let streams = Streams {
        input: Box::new(Cursor::new(input)),
        output: Box::new(output.clone()),
        error: Box::new(error.clone()),
    };
    let result = zygote_lab::run(&config, &command, streams);
    let taken = |sink: Sink| sink.0.lock().unwrap().clone();
    Ran {
        result,
        output: taken(output),
        error: taken(error),
    }
}

fn streams_and_status_come_back_unmixed(cache: &Path, shared: &Path) {
    let script = "cat; head -c 2000000 /dev/zero | tr '\\0' e >&2; pwd > \"$0/kept\"; \
        test -c /dev/kvm && touch /etc/thrown-away && kill -9 $$";
    let input: Vec<u8> = (0..1_000_000_u32).map(|n| (n >> 5) as u8).collect();
    let path = shared.to_str().unwrap();
    let ran = run(cache, &[shared], &["sh", "-c", script, path], input.clone());
    assert_eq!(ran.result.unwrap(), 137);
    assert!(ran.output == input);
    assert!(ran.error.len() == 2_000_000 && ran.error.iter().all(|byte| *byte == b'e'));
    assert_eq!(std::fs::read(shared.join("kept")).unwrap(), b"/tmp\n");
    assert!(!Path::new("/etc/thrown-away").exists());
}

fn three_hundred_vms_in_a_row_survive(cache: &Path) {
    let ran = run(cache, &[], &["python3", "-c", MANY_VMS], Vec::new());
    assert_eq!((ran.result.unwrap(), &ran.output[..]), (0, &b"made\n"[..]));
}

fn a_program_that_is_not_there_is_told(cache: &Path) {
    let ran = run(cache, &[], &["no-such-program"], Vec::new());
    let Err(LabError::Program { status, message }) = ran.result else {
        panic!("it ran");
    };
    assert!(status == 127 && message.contains("no-such-program"));
}
