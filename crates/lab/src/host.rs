//! Outside of the lab: starting it, passing streams and signals, ending it.

#![expect(unsafe_code, reason = "signal mask, signalfd, a death signal for QEMU")]

use crate::wire::{self, FromLab, INPUT_WINDOW_BYTES, Job, PIECE_MAX_BYTES, ToLab};
use crate::{LabCommand, LabConfig, qemu};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A lab that is not up by then will never be; it takes 5 to 10 s, more on a busy machine.
const UP_MAX: Duration = Duration::from_secs(180);
/// Lines of the lab's console that go into an error.
const CONSOLE_LINES_MAX: usize = 60;

/// Why nothing could be run in the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// QEMU cannot be started.
    #[error("cannot start qemu-system-x86_64; install it with: apt-get install qemu-system-x86")]
    Qemu(#[source] io::Error),
    /// A file or socket of ours.
    #[error("cannot {operation}")]
    Own {
        /// Verb and object.
        operation: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// It did not come up, or broke down.
    #[error("the lab {what}; its console said last:\n{console}")]
    Broken {
        /// What happened.
        what: &'static str,
        /// The last lines of its console.
        console: String,
    },
    /// Our own output cannot be written (a closed pipe).
    #[error("cannot write the program's output")]
    Output(#[source] io::Error),
    /// The program could not be started; the status is a shell's.
    #[error("{message}")]
    Program {
        /// Why.
        message: String,
        /// 127 not found, 126 not executable, 125 otherwise.
        status: u8,
    },
}

fn own(operation: &'static str) -> impl FnOnce(io::Error) -> LabError {
    move |source| LabError::Own { operation, source }
}

/// Where the program's streams come from and go to.
pub struct Streams {
    /// Standard input, if the command has one.
    pub input: Box<dyn Read + Send>,
    /// Standard output.
    pub output: Box<dyn Write + Send>,
    /// Standard error.
    pub error: Box<dyn Write + Send>,
}

impl Streams {
    /// Those of this process.
    pub fn inherited() -> Self {
        Self {
            input: Box::new(io::stdin()),
            output: Box::new(io::stdout()),
            error: Box::new(io::stderr()),
        }
    }
}

struct Lab {
    qemu: Child,
    console: PathBuf,
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Everything that matters was flushed before its last word.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let _ = fs::remove_file(&self.console);
    }
}

/// Runs a command in a fresh lab; gives back its exit status as a shell tells it. SIGINT, SIGTERM
/// and SIGHUP of this process go to the command. Call it from a thread that lives as long as the
/// process: QEMU dies with it.
///
/// # Errors
/// See [`LabError`].
pub fn run(config: &LabConfig, command: &LabCommand, streams: Streams) -> Result<u8, LabError> {
    let signals = block_signals().map_err(own("block signals"))?;
    let (mut ours, theirs) = UnixStream::pair().map_err(own("make a socket"))?;
    let console = console_path(config);
    let lab = start(config, theirs.into(), console)?;
    ours.set_read_timeout(Some(UP_MAX))
        .map_err(own("set up a socket"))?;
    match wire::receive(&mut ours) {
        Ok(FromLab::Up) => {}
        _ => return Err(lab.broken("did not come up")),
    }
    ours.set_read_timeout(None)
        .map_err(own("set up a socket"))?;
    let sender = Arc::new(Sender::new(ours.try_clone().map_err(own("copy a socket"))?));
    let job = ToLab::Job(job(config, command));
    if sender.send(&job).is_err() {
        return Err(lab.broken("broke down"));
    }
    let Streams {
        input,
        output,
        error,
    } = streams;
    forward_signals(signals, Arc::clone(&sender));
    if command.stdin {
        let sender = Arc::clone(&sender);
        std::thread::spawn(move || forward_input(input, &sender));
    }
    listen(&lab, &mut ours, &sender, output, error)
}

fn listen(
    lab: &Lab,
    port: &mut UnixStream,
    sender: &Sender,
    mut output: Box<dyn Write + Send>,
    mut error: Box<dyn Write + Send>,
) -> Result<u8, LabError> {
    let mut put = |to_error: bool, bytes: &[u8]| {
        let stream = if to_error { &mut error } else { &mut output };
        let written = stream.write_all(bytes).and_then(|()| stream.flush());
        written.map_err(LabError::Output)
    };
    loop {
        match wire::receive(port) {
            Ok(FromLab::Output(bytes)) => put(false, &bytes)?,
            Ok(FromLab::Error(bytes)) => put(true, &bytes)?,
            Ok(FromLab::Taken(count)) => sender.taken(count as usize),
            Ok(FromLab::Exit { status }) => return Ok(status),
            Ok(FromLab::Failed { message, status }) => {
                return Err(LabError::Program { message, status });
            }
            Ok(FromLab::Up) | Err(_) => return Err(lab.broken("broke down")),
        }
    }
}

impl Lab {
    fn broken(&self, what: &'static str) -> LabError {
        let text = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let last = &lines[lines.len().saturating_sub(CONSOLE_LINES_MAX)..];
        LabError::Broken {
            what,
            console: last.join("\n"),
        }
    }
}

fn console_path(config: &LabConfig) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let folder = config.files.initramfs.parent().unwrap_or(Path::new("/"));
    sweep_consoles(folder);
    folder.join(format!("console-{}-{number}.log", std::process::id()))
}

/// Removes the logs of labs whose process was killed.
fn sweep_consoles(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix("console-")
            .and_then(|rest| rest.split(['-', '.']).next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn start(config: &LabConfig, job: OwnedFd, console: PathBuf) -> Result<Lab, LabError> {
    let program = std::env::current_exe().map_err(own("find this program"))?;
    let mut command = qemu::command(config, &program, &console);
    let log = File::create(&console).map_err(own("create the lab's console log"))?;
    let log_again = log.try_clone().map_err(own("copy a descriptor"))?;
    command
        .stdin(Stdio::from(job))
        .stdout(log)
        .stderr(log_again)
        // Not in our group: Ctrl-C is for the program, by way of us.
        .process_group(0);
    // SAFETY: one system call, safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let signal = Some(rustix::process::Signal::KILL);
            Ok(rustix::process::set_parent_process_death_signal(signal)?)
        });
    }
    let qemu = command.spawn().map_err(LabError::Qemu)?;
    Ok(Lab { qemu, console })
}

fn job(config: &LabConfig, command: &LabCommand) -> Job {
    let bytes = |text: &OsStr| text.as_bytes().to_vec();
    let folders = config.writable.iter().enumerate();
    Job {
        mounts: folders
            .map(|(index, path)| (qemu::tag(index), bytes(path.as_os_str())))
            .collect(),
        arguments: command.arguments.iter().map(|word| bytes(word)).collect(),
        environment: command
            .environment
            .iter()
            .map(|(key, value)| (bytes(key), bytes(value)))
            .collect(),
        directory: bytes(command.directory.as_os_str()),
        stdin: command.stdin,
    }
}

/// The writing half of the port, and how much input the program has not taken yet.
struct Sender {
    port: Mutex<UnixStream>,
    outstanding: Mutex<usize>,
    taken: Condvar,
}

impl Sender {
    fn new(port: UnixStream) -> Self {
        Self {
            port: Mutex::new(port),
            outstanding: Mutex::new(0),
            taken: Condvar::new(),
        }
    }

    fn send(&self, message: &ToLab) -> io::Result<()> {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        wire::send(&mut *port, message)
    }

    fn taken(&self, count: usize) {
        let mut outstanding = self.lock();
        *outstanding = outstanding.saturating_sub(count);
        self.taken.notify_all();
    }

    /// Waits until so many bytes more may be on their way.
    fn reserve(&self, count: usize) {
        let mut outstanding = self.lock();
        while *outstanding + count > INPUT_WINDOW_BYTES {
            let waited = self.taken.wait(outstanding);
            outstanding = waited.unwrap_or_else(PoisonError::into_inner);
        }
        *outstanding += count;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, usize> {
        let locked = self.outstanding.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends with the input, or with the lab.
fn forward_input(mut input: Box<dyn Read + Send>, sender: &Sender) {
    let mut piece = vec![0; PIECE_MAX_BYTES];
    loop {
        let message = match input.read(&mut piece) {
            Ok(0) => ToLab::InputEnd,
            Ok(count) => {
                sender.reserve(count);
                ToLab::Input(piece[..count].to_vec())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => ToLab::InputEnd,
        };
        let last = message == ToLab::InputEnd;
        if sender.send(&message).is_err() || last {
            return;
        }
    }
}

/// Blocks the signals that are the program's, for this thread and those that it will start, and
/// gives a descriptor to read them from.
fn block_signals() -> io::Result<File> {
    // SAFETY: plain system calls on a local set; the descriptor is nobody else's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(File::from_raw_fd(fd))
        }
    }
}

/// Passes signals on for as long as the process lives.
fn forward_signals(mut signals: File, sender: Arc<Sender>) {
    std::thread::spawn(move || {
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        while signals.read_exact(&mut record).is_ok() {
            let number = u32::from_ne_bytes([record[0], record[1], record[2], record[3]]);
            if sender.send(&ToLab::Signal(number as i32)).is_err() {
                return;
            }
        }
    });
}
