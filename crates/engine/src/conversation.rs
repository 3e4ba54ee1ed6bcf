//! The agent's stream, as messages.

use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use zygote_protocol::{
    AgentMessage, FrameDecoder, HostMessage, ProcessId, Put, STREAM_CHUNK_MAX_BYTES, encode,
};

/// Below what the C library takes from the kernel anew each time.
const READ_BYTES: usize = 64 * 1024;

/// What the agent says.
pub struct Listener {
    stream: OwnedReadHalf,
    decoder: FrameDecoder,
    scratch: Vec<u8>,
}

/// How a conversation breaks off.
#[derive(Debug, PartialEq, Eq)]
pub enum Broken {
    /// The stream has ended.
    Ended,
    /// The guest sent what is no message.
    Nonsense(String),
}

impl Listener {
    /// Listens on a stream.
    pub fn new(stream: OwnedReadHalf) -> Self {
        Self {
            stream,
            decoder: FrameDecoder::default(),
            scratch: Vec::with_capacity(READ_BYTES),
        }
    }

    /// The next message.
    pub async fn next(&mut self) -> Result<AgentMessage, Broken> {
        loop {
            match self.decoder.next_message() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => return Err(Broken::Nonsense(error.to_string())),
            }
            self.scratch.clear();
            match self.stream.read_buf(&mut self.scratch).await {
                Ok(0) | Err(_) => return Err(Broken::Ended),
                Ok(_) => self.decoder.extend(&self.scratch),
            }
        }
    }
}

/// What is said to the agent after the first messages.
pub struct Speech {
    /// Which process it is for.
    pub process: ProcessId,
    /// Put into the guest before the program starts, in this order.
    pub puts: Option<mpsc::Receiver<Put>>,
    /// Starts the program.
    pub start: Vec<u8>,
    /// The program's standard input, if it has one.
    pub input: Option<mpsc::Receiver<Vec<u8>>>,
    /// Signals for the program.
    pub signals: Option<mpsc::Receiver<u8>>,
    /// What else is to be said.
    pub more: Option<mpsc::Receiver<HostMessage>>,
}

/// Says the first messages, then passes files, a program's input and signals on, to their ends.
/// Returns early, without an error, when the sandbox is gone: whoever listens to it finds out why.
pub async fn speak(mut stream: OwnedWriteHalf, opening: Vec<u8>, speech: Speech) -> OwnedWriteHalf {
    // Dropping the write half would end the stream for the agent: it is handed back instead.
    let _ = say(&mut stream, opening, speech).await;
    stream
}

async fn say(stream: &mut OwnedWriteHalf, mut opening: Vec<u8>, speech: Speech) -> io::Result<()> {
    let Speech {
        process,
        puts,
        start,
        mut input,
        mut signals,
        mut more,
    } = speech;
    if let Some(mut puts) = puts {
        stream.write_all(&opening).await?;
        opening.clear();
        while let Some(put) = puts.recv().await {
            write(stream, &HostMessage::Put(put)).await?;
        }
    }
    opening.extend(start);
    stream.write_all(&opening).await?;
    loop {
        tokio::select! {
            signal = next(&mut signals), if signals.is_some() => match signal {
                Some(signal) => write(stream, &HostMessage::Signal { process, signal, group: true }).await?,
                None => signals = None,
            },
            message = next(&mut more), if more.is_some() => match message {
                Some(message) => write(stream, &message).await?,
                None => more = None,
            },
            chunk = next(&mut input), if input.is_some() => match chunk {
                Some(chunk) => for piece in chunk.chunks(STREAM_CHUNK_MAX_BYTES) {
                    let data = piece.to_vec();
                    write(stream, &HostMessage::Stdin { process, data }).await?;
                },
                None => {
                    input = None;
                    write(stream, &HostMessage::StdinClose { process }).await?;
                }
            },
            else => return Ok(()),
        }
    }
}

async fn next<T>(channel: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    channel.as_mut()?.recv().await
}

async fn write(stream: &mut OwnedWriteHalf, message: &HostMessage) -> io::Result<()> {
    let bytes = encode(message).map_err(io::Error::other)?;
    stream.write_all(&bytes).await
}
