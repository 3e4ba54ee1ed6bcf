//! One request to run something, to its end.

use crate::out::complain;
use crate::progress::Reporter;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;
use zygote_api::{ExecEvent, ExecResult, GetPiece};
use zygote_daemon::{Client, ClientError, Events};

/// Output, as it comes.
pub enum Output {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// A piece of a file that was asked for.
    Got(usize, GetPiece),
}

/// Follows a run to its end, and passes signals on to it. Output that nobody takes any more is dropped.
pub async fn follow(
    client: &Client,
    mut events: Events<ExecEvent>,
    mut signals: mpsc::Receiver<u8>,
    output: mpsc::Sender<Output>,
) -> Result<ExecResult, ClientError> {
    let mut id = None;
    let mut waiting = Waiting::default();
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            // Once there is somebody to get it.
            Some(signal) = signals.recv(), if id.is_some() => {
                // The program may have ended just now.
                let _ = client.signal(id.as_deref().unwrap_or_default(), signal).await;
                continue;
            }
        };
        let broken = || ClientError::Broken("it ended without a result".to_owned());
        match event.ok_or_else(broken)? {
            ExecEvent::Progress { message } => waiting.say(&message),
            ExecEvent::Warning { message } => warn(&message),
            ExecEvent::Ready { id: own } => {
                waiting.over();
                id = Some(own);
            }
            ExecEvent::Stdout { data } => drop(output.send(Output::Stdout(data.0)).await),
            ExecEvent::Stderr { data } => drop(output.send(Output::Stderr(data.0)).await),
            ExecEvent::Get { index, piece } => {
                drop(output.send(Output::Got(index, piece)).await);
            }
            ExecEvent::Result(result) => return Ok(*result),
            ExecEvent::Error { error } => return Err(ClientError::Refused(Box::new(error))),
        }
    }
}

/// What is said to somebody at a terminal while there is no sandbox yet; elsewhere the program's words
/// are the only ones.
#[derive(Default)]
struct Waiting {
    reporter: Option<Reporter>,
}

impl Waiting {
    fn say(&mut self, message: &str) {
        if std::io::stderr().is_terminal() {
            self.reporter.get_or_insert_with(Reporter::new).say(message);
        }
    }

    fn over(&mut self) {
        self.reporter = None;
    }
}

/// Once, however many runs there are.
fn warn(message: &str) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        complain!("zygote: warning: {message}");
    }
}
