//! A process on a WebSocket (RFC 6455): for browsers, and for terminals in them.
//!
//! To the client, binary messages are output (that of a terminal; of a process without one, standard output
//! and error as they come), text messages are `ProcessEvent`s but for output: the last is `result` or
//! `error`. From the client, binary messages are standard input, text messages are `ProcessInput`s.

use crate::backend::Backend;
use axum::extract::ws::{CloseFrame, Message, WebSocket};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zygote_access::Caller;
use zygote_api::{AttachRequest, ErrorCode, Failure, ProcessEvent, ProcessInput};

/// Messages on their way.
const WAITING_MAX: usize = 16;
/// How long a client may take for one message.
const SEND_MAX: Duration = Duration::from_secs(60);
/// Of RFC 6455 §7.4.1: all is told, or what came makes no sense.
const NORMAL: u16 = 1000;
const INVALID: u16 = 1007;

/// Serves one to its end. A client that goes away leaves the process.
pub async fn serve<B: Backend>(
    backend: Arc<B>,
    caller: Caller,
    id: String,
    process: u32,
    asked: AttachRequest,
    mut socket: WebSocket,
) {
    let (input, taken) = mpsc::channel(WAITING_MAX);
    let (events, mut happening) = mpsc::channel(WAITING_MAX);
    // By itself: it takes input while output waits for the client, and the other way round.
    let mut attached = Attached(tokio::spawn(async move {
        backend
            .attach(&caller, &id, process, asked, taken, events)
            .await
    }));
    loop {
        tokio::select! {
            event = happening.recv() => match event {
                Some(event) => if send(&mut socket, message(event)).await.is_none() {
                    return;
                },
                // All has been told.
                None => break,
            },
            came = socket.recv() => match came {
                Some(Ok(came)) => match line(came) {
                    Ok(Some(line)) => if !pass(&input, line, &mut happening, &mut socket).await {
                        return;
                    },
                    Ok(None) => {}
                    Err(failure) => {
                        tell(&mut socket, failure, INVALID).await;
                        return;
                    }
                },
                // It has gone.
                Some(Err(_)) | None => return,
            },
        }
    }
    match (&mut attached.0).await {
        Ok(Err(failure)) => tell(&mut socket, failure, NORMAL).await,
        Ok(Ok(())) | Err(_) => close(&mut socket, NORMAL).await,
    }
}

/// Ended with its client.
struct Attached(JoinHandle<Result<(), Failure>>);

impl Drop for Attached {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Passes a line on, and output meanwhile. False once the client has gone.
async fn pass(
    input: &mpsc::Sender<ProcessInput>,
    line: ProcessInput,
    happening: &mut mpsc::Receiver<ProcessEvent>,
    socket: &mut WebSocket,
) -> bool {
    let passing = input.send(line);
    tokio::pin!(passing);
    loop {
        tokio::select! {
            // One that takes none any more has ended.
            _ = &mut passing => return true,
            Some(event) = happening.recv() => {
                if send(socket, message(event)).await.is_none() {
                    return false;
                }
            }
        }
    }
}

async fn tell(socket: &mut WebSocket, error: Failure, code: u16) {
    let told = send(socket, message(ProcessEvent::Error { error })).await;
    if told.is_some() {
        close(socket, code).await;
    }
}

async fn close(socket: &mut WebSocket, code: u16) {
    let reason = "".into();
    send(socket, Message::Close(Some(CloseFrame { code, reason }))).await;
}

async fn send(socket: &mut WebSocket, message: Message) -> Option<()> {
    timeout(SEND_MAX, socket.send(message)).await.ok()?.ok()
}

fn message(event: ProcessEvent) -> Message {
    match event {
        ProcessEvent::Stdout { data, .. } | ProcessEvent::Stderr { data, .. } => {
            Message::Binary(data.0.into())
        }
        // None of our types fails.
        event => Message::Text(serde_json::to_string(&event).unwrap_or_default().into()),
    }
}

fn line(message: Message) -> Result<Option<ProcessInput>, Failure> {
    match message {
        Message::Binary(data) => {
            let data = data.to_vec().into();
            Ok(Some(ProcessInput::Stdin { data }))
        }
        Message::Text(text) => serde_json::from_str(&text).map(Some).map_err(|error| {
            let message = "a message is not what it should be";
            Failure::new(ErrorCode::BadRequest, message).cause(error.to_string())
        }),
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => Ok(None),
    }
}
