//! A process's streams, which are this program's.

use crate::interrupt::Interrupts;
use crate::out;
use anyhow::Context;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Notify, mpsc};
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

/// Follows a process to its end.
pub async fn follow(
    mut events: Events<ProcessEvent>,
    mut sink: Sink<'_>,
    left: &Notify,
    mut on_started: impl FnMut(u32),
) -> anyhow::Result<End> {
    let (printer, lines) = mpsc::channel(OUTPUT_MAX);
    let mut printing = tokio::task::spawn_blocking(move || print(lines));
    let following = async {
        loop {
            let broken = || ClientError::Broken("it ended without a result".to_owned());
            match events.next().await?.ok_or_else(broken)? {
                ProcessEvent::Started { process, .. } => on_started(process),
                ProcessEvent::Stdout { data, .. } => match &mut sink {
                    Sink::Ours => drop(printer.send((true, data.0)).await),
                    Sink::Kept(kept) => kept.push_stdout(&data.0),
                },
                ProcessEvent::Stderr { data, .. } => match &mut sink {
                    Sink::Ours => drop(printer.send((false, data.0)).await),
                    Sink::Kept(kept) => kept.push_stderr(&data.0),
                },
                ProcessEvent::Skipped { from, to } => skipped(to - from),
                ProcessEvent::Result(result) => return Ok(result),
                ProcessEvent::Error { error } => {
                    return Err(ClientError::Refused(Box::new(error)));
                }
            }
        }
    };
    let result = tokio::select! {
        result = following => result,
        () = left.notified() => return Ok(End::Left),
        // Only an error ends it first.
        printed = &mut printing => return gone(printed.context("printing panicked")?),
    };
    drop(printer);
    let printed = printing.await.context("printing panicked")?;
    if printed.is_err() {
        return gone(printed);
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

fn gone(printed: io::Result<()>) -> anyhow::Result<End> {
    let code = printed.map_or_else(|error| out::code(&error), |()| out::READER_GONE);
    Ok(End::ReaderGone(code))
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
