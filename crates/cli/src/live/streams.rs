//! A process's streams, which are this program's.

use crate::interrupt::Interrupts;
use crate::out;
use anyhow::Context;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use zygote_api::{Collected, ProcessEvent, ProcessInput, ProcessResult};
use zygote_daemon::{ClientError, Events};

/// Pieces of input that wait to be taken.
const INPUT_MAX: usize = 16;
const INPUT_CHUNK_BYTES: usize = 32 * 1024;
/// Pieces of output that wait for a slow reader.
const OUTPUT_MAX: usize = 16;
/// What leaves a process on a terminal alone: Ctrl-P, Ctrl-Q.
const LEAVE: [u8; 2] = [0x10, 0x11];

/// How the following of a process ends.
pub enum End {
    /// It has ended.
    Result(Box<ProcessResult>),
    /// It goes on, and its user has left.
    Left,
    /// Nobody reads its output any more; with the exit code for that.
    ReaderGone(u8),
}

/// Input for a process.
pub struct Input {
    /// Where it goes in.
    pub sender: mpsc::Sender<ProcessInput>,
    /// Says that its user wants to leave.
    pub left: Arc<Notify>,
}

/// A way in, and what comes out of it.
pub fn input() -> (Input, mpsc::Receiver<ProcessInput>) {
    let (sender, receiver) = mpsc::channel(INPUT_MAX);
    let left = Arc::default();
    (Input { sender, left }, receiver)
}

impl Input {
    /// Passes standard input on, from a thread of its own, to its end.
    pub fn pass_stdin(&self, has_terminal: bool) {
        let (sender, left) = (self.sender.clone(), Arc::clone(&self.left));
        // It may wait for input until this process ends.
        std::thread::spawn(move || pass(&sender, &left, has_terminal));
    }
}

fn pass(sender: &mpsc::Sender<ProcessInput>, left: &Notify, has_terminal: bool) -> Option<()> {
    let mut keys = LeaveKeys::default();
    let mut chunk = vec![0; INPUT_CHUNK_BYTES];
    let mut input = io::stdin().lock();
    while let Ok(count) = input.read(&mut chunk)
        && count > 0
    {
        let data = if has_terminal {
            match keys.take(&chunk[..count]) {
                Some(data) => data,
                None => {
                    left.notify_one();
                    return None;
                }
            }
        } else {
            chunk[..count].to_vec()
        };
        let data = data.into();
        sender.blocking_send(ProcessInput::Stdin { data }).ok()?;
    }
    sender.blocking_send(ProcessInput::StdinEnd).ok()
}

/// Looks for the keys that leave; one that may begin them is held back.
#[derive(Default)]
struct LeaveKeys {
    has_begun: bool,
}

impl LeaveKeys {
    /// What goes on; `None` once both have been typed.
    fn take(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut rest = Vec::with_capacity(typed.len() + 1);
        for byte in typed {
            match (self.has_begun, *byte) {
                (true, key) if key == LEAVE[1] => return None,
                (begun, key) => {
                    if begun {
                        rest.push(LEAVE[0]);
                    }
                    self.has_begun = key == LEAVE[0];
                    if !self.has_begun {
                        rest.push(key);
                    }
                }
            }
        }
        Some(rest)
    }
}

/// Where output goes.
pub enum Sink<'a> {
    /// To this program's own streams.
    Ours,
    /// Into memory.
    Kept(&'a mut Collected),
}

/// This program's own output, from a thread of its own: who reads it may be slow.
pub struct Printer {
    sender: Option<mpsc::Sender<(bool, Vec<u8>)>>,
    thread: JoinHandle<io::Result<()>>,
}

impl Printer {
    /// Begins. Needs a runtime.
    pub fn new() -> Self {
        let (sender, pieces) = mpsc::channel(OUTPUT_MAX);
        Self {
            sender: Some(sender),
            thread: tokio::task::spawn_blocking(move || print(pieces)),
        }
    }

    /// Prints to standard output, or error.
    pub async fn print(&self, is_stdout: bool, data: Vec<u8>) {
        if let Some(sender) = &self.sender {
            // Gone with its reader, which is told elsewhere.
            let _ = sender.send((is_stdout, data)).await;
        }
    }

    /// Waits until nobody reads any more; gives back the exit code for that.
    pub async fn gone(&mut self) -> u8 {
        match (&mut self.thread).await {
            Ok(Err(error)) => out::code(&error),
            Ok(Ok(())) | Err(_) => out::READER_GONE,
        }
    }

    /// Waits until all is printed.
    pub async fn end(&mut self) -> anyhow::Result<()> {
        self.sender = None;
        (&mut self.thread)
            .await
            .context("printing panicked")?
            .context("cannot write the output")
    }
}

/// Follows a process to its end.
pub async fn follow(
    mut events: Events<ProcessEvent>,
    mut sink: Sink<'_>,
    left: &Notify,
    mut on_started: impl FnMut(u32),
) -> anyhow::Result<End> {
    let mut printer = Printer::new();
    let result = loop {
        let broken = || ClientError::Broken("it ended without a result".to_owned());
        let next = tokio::select! {
            next = events.next() => next?,
            () = left.notified() => return Ok(End::Left),
            code = printer.gone() => return Ok(End::ReaderGone(code)),
        };
        match next.ok_or_else(broken)? {
            ProcessEvent::Started { process, .. } => on_started(process),
            ProcessEvent::Stdout { data, .. } => match &mut sink {
                Sink::Ours => printer.print(true, data.0).await,
                Sink::Kept(kept) => kept.push_stdout(&data.0),
            },
            ProcessEvent::Stderr { data, .. } => match &mut sink {
                Sink::Ours => printer.print(false, data.0).await,
                Sink::Kept(kept) => kept.push_stderr(&data.0),
            },
            ProcessEvent::Skipped { from, to } => skipped(to - from),
            ProcessEvent::Result(result) => break Ok(result),
            ProcessEvent::Error { error } => break Err(error),
        }
    };
    printer.sender = None;
    if let Err(error) = (&mut printer.thread).await.context("printing panicked")? {
        return Ok(End::ReaderGone(out::code(&error)));
    }
    Ok(End::Result(result?))
}

/// Output that nobody has kept.
pub fn skipped(bytes: u64) {
    static SAID: AtomicBool = AtomicBool::new(false);
    // The first gap: what comes is told from where it was left.
    let often = if SAID.swap(true, Ordering::Relaxed) {
        "more"
    } else {
        "of its output"
    };
    out::complain!("zygote: {bytes} bytes {often} were not kept");
}

fn print(mut pieces: mpsc::Receiver<(bool, Vec<u8>)>) -> io::Result<()> {
    while let Some((is_stdout, data)) = pieces.blocking_recv() {
        if is_stdout {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&data)?;
            stdout.flush()?;
        } else {
            io::stderr().lock().write_all(&data)?;
        }
    }
    Ok(())
}

/// Passes the first signal to this program on to the process.
pub fn pass_signals(interrupts: &Interrupts, sender: mpsc::Sender<ProcessInput>) {
    let mut signals = interrupts.for_program();
    tokio::spawn(async move {
        if let Some(signal) = signals.recv().await {
            // It may have ended.
            let _ = sender.send(ProcessInput::Signal { signal }).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_keys_leave_and_one_alone_is_typed() {
        let mut keys = LeaveKeys::default();
        assert_eq!(keys.take(b"ab"), Some(b"ab".to_vec()));
        assert_eq!(keys.take(b"a\x10"), Some(b"a".to_vec()));
        assert_eq!(keys.take(b"b"), Some(b"\x10b".to_vec()));
        assert_eq!(keys.take(b"\x10\x10"), Some(b"\x10".to_vec()));
        assert_eq!(keys.take(b"\x11"), None);
    }
}
