//! Inside of the lab: PID 1, from the end of the boot script to the end of the lab.

#![expect(unsafe_code, reason = "an ioctl")]

use crate::qemu::PORT_NAME;
use crate::wire::{self, FromLab, INPUT_WINDOW_BYTES, Job, PIECE_MAX_BYTES, ToLab};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What a program's children may still write after its end is waited for until they are silent for
/// this long,
const LAST_SILENCE_MAX: Duration = Duration::from_secs(1);
/// or have written so much: more than a pipe holds, so what the program itself wrote is out.
const LAST_OUTPUT_MAX_BYTES: u64 = 1 << 20;
const JOB_PORT_NAME: &str = "zygote.lab";
/// KVM_CREATE_VM (Linux include/uapi/linux/kvm.h).
const KVM_CREATE_VM: libc::c_ulong = 0xae01;

type Port = Arc<Mutex<File>>;

/// Runs the lab to its end: never returns.
pub fn init_main() -> ! {
    if let Err(error) = live() {
        // To the console, which is quoted when the lab breaks down.
        eprintln!("lab: {error}");
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    std::process::exit(1)
}

fn live() -> io::Result<()> {
    let mut reader = open_port(JOB_PORT_NAME)?;
    let port: Port = Arc::new(Mutex::new(reader.try_clone()?));
    // One VM for the whole life of the lab: QEMU 7.2 with several threads can hang on a stale
    // instruction when the kernel patches the key that the first and last VM switch.
    let _idle_vm = idle_vm();
    say(&port, &FromLab::Up)?;
    let ToLab::Job(job) = wire::receive(&mut reader)? else {
        return Err(io::Error::other("the first message must be the job"));
    };
    let last = match run(&job, reader, &port) {
        Ok(status) => FromLab::Exit { status },
        Err(error) => {
            let name = job
                .arguments
                .first()
                .map(|word| String::from_utf8_lossy(word));
            FromLab::Failed {
                message: format!("cannot run {}: {error}", name.unwrap_or_default()),
                status: match error.kind() {
                    io::ErrorKind::NotFound => 127,
                    io::ErrorKind::PermissionDenied => 126,
                    _ => 125,
                },
            }
        }
    };
    rustix::fs::sync();
    say(&port, &last)?;
    // The host ends QEMU at this word.
    loop {
        std::thread::park();
    }
}

/// In a kept lab: the port by which its command is talked to ([`crate::hold`]).
///
/// # Errors
/// If this is no kept lab.
pub fn port() -> io::Result<File> {
    open_port(PORT_NAME)
}

fn open_port(wanted: &str) -> io::Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == wanted {
            let device = Path::new("/dev").join(entry.file_name());
            return fs::OpenOptions::new().read(true).write(true).open(device);
        }
    }
    Err(io::Error::other("no port to the host"))
}

fn idle_vm() -> Option<(File, OwnedFd)> {
    let kvm = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .ok()?;
    // SAFETY: takes a number, gives a new descriptor or an error.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    // SAFETY: not negative: a descriptor that nobody else has.
    (vm >= 0).then(|| (kvm, unsafe { OwnedFd::from_raw_fd(vm) }))
}

fn say(port: &Port, message: &FromLab) -> io::Result<()> {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    wire::send(&mut *port, message)
}

fn run(job: &Job, reader: File, port: &Port) -> io::Result<u8> {
    for (tag, path) in &job.mounts {
        mount_share(tag, Path::new(OsStr::from_bytes(path)))?;
    }
    let mut command = command(job)?;
    let mut child = command.spawn()?;
    let pid = Pid::from_child(&child);
    let (done, pumps) = channel();
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    let flow = Arc::new(Flow::default());
    start_pump(stdout, port, &flow, &done, FromLab::Output);
    start_pump(stderr, port, &flow, &done, FromLab::Error);
    let stdin = child.stdin.take();
    let answers = Arc::clone(port);
    std::thread::spawn(move || obey(reader, stdin, pid, &answers));
    let status = wait(pid)?;
    for _ in 0..2 {
        drain(&pumps, &flow);
    }
    Ok(status)
}

/// How the program's output flows to the host.
#[derive(Default)]
struct Flow {
    sent_bytes: AtomicU64,
    /// Pieces that wait for a slow host.
    waiting: AtomicU64,
}

/// Waits for the end of one stream, while there is something of it to come.
fn drain(pumps: &Receiver<()>, flow: &Flow) {
    let start = flow.sent_bytes.load(Ordering::Relaxed);
    let mut last = start;
    while pumps.recv_timeout(LAST_SILENCE_MAX).is_err() {
        let now = flow.sent_bytes.load(Ordering::Relaxed);
        let silent = now == last && flow.waiting.load(Ordering::Relaxed) == 0;
        if silent || now - start > LAST_OUTPUT_MAX_BYTES {
            return;
        }
        last = now;
    }
}

fn mount_share(tag: &str, path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    // Cached as if nobody else wrote to it while the lab lives: what is shared is published by
    // renames, and without the cache every page of a snapshot is read from the host at each fork.
    let options = c"trans=virtio,version=9p2000.L,cache=loose,msize=512000";
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount(tag, path, "9p", flags, options)?;
    Ok(())
}

fn command(job: &Job) -> io::Result<Command> {
    let words = || job.arguments.iter().map(|word| OsStr::from_bytes(word));
    let Some(program) = words().next() else {
        return Err(io::Error::other("no program named"));
    };
    let directory = Path::new(OsStr::from_bytes(&job.directory));
    let directory = if directory.is_dir() {
        directory
    } else {
        Path::new("/")
    };
    let environment = job
        .environment
        .iter()
        .map(|(key, value)| (OsStr::from_bytes(key), OsStr::from_bytes(value)));
    let mut command = Command::new(program);
    command
        .args(words().skip(1))
        .env_clear()
        .envs(environment)
        .env(crate::IN_LAB, "1")
        .current_dir(directory)
        .stdin(if job.stdin {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    Ok(command)
}

fn start_pump(
    stream: Option<impl Read + Send + 'static>,
    port: &Port,
    flow: &Arc<Flow>,
    done: &Sender<()>,
    wrap: fn(Vec<u8>) -> FromLab,
) {
    let (port, flow, done) = (Arc::clone(port), Arc::clone(flow), done.clone());
    std::thread::spawn(move || {
        if let Some(mut stream) = stream {
            pump(&mut stream, &port, &flow, wrap);
        }
        // Nobody waits any more if the program's end is long past.
        let _ = done.send(());
    });
}

fn pump(stream: &mut dyn Read, port: &Port, flow: &Flow, wrap: fn(Vec<u8>) -> FromLab) {
    let mut piece = vec![0; PIECE_MAX_BYTES];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return,
            Ok(count) => {
                flow.waiting.fetch_add(1, Ordering::Relaxed);
                let said = say(port, &wrap(piece[..count].to_vec()));
                flow.waiting.fetch_sub(1, Ordering::Relaxed);
                flow.sent_bytes.fetch_add(count as u64, Ordering::Relaxed);
                if said.is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Follows the host's messages. The host gone: nobody needs the lab any more.
fn obey(mut reader: File, stdin: Option<std::process::ChildStdin>, pid: Pid, port: &Port) {
    let (input, chunks) = channel();
    let mut input = Some(input);
    let answers = Arc::clone(port);
    std::thread::spawn(move || feed(stdin, &chunks, &answers));
    loop {
        match wire::receive(&mut reader) {
            Ok(ToLab::Input(bytes)) => {
                if let Some(input) = &input {
                    // The feeder lives as long as this end does.
                    let _ = input.send(bytes);
                }
            }
            Ok(ToLab::InputEnd) => input = None,
            Ok(ToLab::Ping) => {
                // Blocks only while the host reads nothing, and then it asks nothing either.
                let _ = say(port, &FromLab::Alive);
            }
            Ok(ToLab::Signal(number)) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    // It may have ended already.
                    let _ = rustix::process::kill_process_group(pid, signal);
                }
            }
            Ok(ToLab::Job(_)) | Err(_) => {
                rustix::fs::sync();
                let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
            }
        }
    }
}

/// Gives the program its input. At most [`INPUT_WINDOW_BYTES`] wait here: the host sees to that.
fn feed(mut stdin: Option<std::process::ChildStdin>, chunks: &Receiver<Vec<u8>>, port: &Port) {
    const _: () = assert!(PIECE_MAX_BYTES <= INPUT_WINDOW_BYTES);
    for chunk in chunks {
        if let Some(open) = &mut stdin
            && open.write_all(&chunk).is_err()
        {
            stdin = None;
        }
        if say(port, &FromLab::Taken(chunk.len() as u32)).is_err() {
            return;
        }
    }
}

/// Waits for the program, for as long as the host lets it run; reaps every orphan on the way, as PID 1 must.
fn wait(program: Pid) -> io::Result<u8> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == program => return Ok(shell_status(status)),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn shell_status(status: WaitStatus) -> u8 {
    let signal = status.terminating_signal().map(|signal| 128 + signal);
    signal.or(status.exit_status()).unwrap_or(125) as u8
}
