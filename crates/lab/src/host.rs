//! Outside of the lab: starting it, deciding when it ends, ending it.
//!
//! The calling thread owns the lab and decides; threads that may block (`link`) tell it what has
//! happened. So every way to the end is open at any time, also when nobody reads our output.

#![expect(unsafe_code, reason = "a death signal for QEMU")]

use crate::console::Console;
use crate::link::{Event, Link, Streams};
use crate::signals::Signals;
use crate::wire::{Job, ToLab};
use crate::{LabCommand, LabConfig, LabError, own, qemu};
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// A lab that is not up by then will never be; it takes 5 to 10 s, more on a busy machine.
const UP_MAX: Duration = Duration::from_secs(180);

struct Lab {
    qemu: Child,
    console: Console,
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Everything that matters was flushed before its last word. SIGKILL is not refused, so the
        // wait ends.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Runs a command in a fresh lab; gives back its exit status as a shell tells it. One that dies of the
/// signal that this process was sent is `Interrupted`, as this process then is.
///
/// The first SIGINT, SIGTERM or SIGHUP of this process goes to the command; one that comes before
/// the lab is up, and any second one, ends the lab at once. Call it from a thread that lives as
/// long as the process: QEMU dies with it.
///
/// # Errors
/// See [`LabError`].
pub fn run(config: &LabConfig, command: &LabCommand, streams: Streams) -> Result<u8, LabError> {
    let (events, inbox) = channel();
    let _signals = Signals::send_to(events.clone()).map_err(own("catch signals"))?;
    let (ours, theirs) = UnixStream::pair().map_err(own("make a socket"))?;
    let lab = start(config, theirs.into(), None)?;
    let link = Link::open(ours, streams, events).map_err(own("talk to the lab"))?;
    conduct(&lab, config, command, link, &inbox)
}

/// A kept lab, for whoever may end it.
#[derive(Clone, Debug)]
pub struct Handle {
    events: Sender<Event>,
    /// The emulator's process.
    pub pid: u32,
}

impl Handle {
    /// Ends the lab at once.
    pub fn end(&self) {
        // Fails if it has ended.
        let _ = self.events.send(Event::Ended);
    }
}

/// Runs a command in a fresh lab until it ends or the lab's handle, which `started` gets, ends it.
/// `port` is the host's end of a stream whose other end the command finds with [`crate::port`].
/// Signals of this process are nothing to it. Call it from a thread of its own: QEMU dies with it.
///
/// # Errors
/// See [`LabError`].
pub fn hold(
    config: &LabConfig,
    command: &LabCommand,
    streams: Streams,
    port: OwnedFd,
    started: impl FnOnce(Handle),
) -> Result<u8, LabError> {
    let (events, inbox) = channel();
    let (ours, theirs) = UnixStream::pair().map_err(own("make a socket"))?;
    let lab = start(config, theirs.into(), Some(port))?;
    let pid = lab.qemu.id();
    let handle = Handle {
        events: events.clone(),
        pid,
    };
    started(handle);
    let link = Link::open(ours, streams, events).map_err(own("talk to the lab"))?;
    conduct(&lab, config, command, link, &inbox)
}

fn conduct(
    lab: &Lab,
    config: &LabConfig,
    command: &LabCommand,
    mut link: Link,
    inbox: &Receiver<Event>,
) -> Result<u8, LabError> {
    let mut deadline = Some((Instant::now(), UP_MAX));
    let (mut is_up, mut forwarded) = (false, None);
    loop {
        let event = match deadline {
            Some((since, limit)) => inbox.recv_timeout(limit.saturating_sub(since.elapsed())),
            // What the user starts without a limit may take as long as it likes; that the lab
            // itself is alive is the link's to see.
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match event {
            Ok(Event::Up) => {
                is_up = true;
                link.send(ToLab::Job(job(config, command)));
                link.forward_input(command.stdin);
                deadline = command.timeout.map(|limit| (Instant::now(), limit));
            }
            Ok(Event::Signal(signal)) if is_up && forwarded.is_none() => {
                forwarded = Some(signal);
                link.send(ToLab::Signal(signal));
            }
            Ok(Event::Signal(signal)) => return Err(LabError::Interrupted { signal }),
            Ok(Event::Ended) => return Err(LabError::Ended),
            Ok(Event::Exited(status)) => {
                return match forwarded {
                    Some(signal) if i32::from(status) == 128 + signal => {
                        Err(LabError::Interrupted { signal })
                    }
                    _ => Ok(status),
                };
            }
            Ok(Event::Failed { message, status }) => {
                return Err(LabError::Program { message, status });
            }
            Ok(Event::OutputGone(error)) => return Err(LabError::Output(error)),
            Ok(Event::Broken(what)) => return Err(lab.broken(what)),
            Err(RecvTimeoutError::Timeout) if is_up => {
                let limit = command.timeout.unwrap_or_default();
                let console = lab.console.tail();
                return Err(LabError::TimedOut { limit, console });
            }
            Err(RecvTimeoutError::Timeout) => {
                let limit_s = UP_MAX.as_secs();
                return Err(lab.broken(format!("did not come up within {limit_s} s")));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(lab.broken("lost its connection".to_owned()));
            }
        }
    }
}

impl Lab {
    fn broken(&self, what: String) -> LabError {
        LabError::Broken {
            what,
            console: self.console.tail(),
        }
    }
}

fn start(config: &LabConfig, job: OwnedFd, port: Option<OwnedFd>) -> Result<Lab, LabError> {
    let program = std::env::current_exe().map_err(own("find this program"))?;
    let (console, log) = Console::create(config)?;
    let number = port.as_ref().map(AsRawFd::as_raw_fd);
    let mut command = qemu::command(config, &program, console.path(), number);
    let log_again = log.try_clone().map_err(own("copy a descriptor"))?;
    command
        .stdin(Stdio::from(job))
        .stdout(log)
        .stderr(log_again)
        // Not in our group: Ctrl-C is for the program, by way of us.
        .process_group(0);
    // SAFETY: two system calls, safe between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if let Some(port) = &port {
                rustix::io::fcntl_setfd(port, rustix::io::FdFlags::empty())?;
            }
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
