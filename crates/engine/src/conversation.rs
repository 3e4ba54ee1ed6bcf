//! The agent's stream, as messages.

use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use zygote_protocol::{
    AgentMessage, FrameDecoder, HostMessage, ProcessId, STREAM_CHUNK_MAX_BYTES, encode,
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

/// Says the first messages, then passes a program's input on, chunk by chunk, to its end. Returns
/// early, without an error, when the sandbox is gone: whoever listens to it finds out why.
pub async fn speak(
    mut stream: OwnedWriteHalf,
    opening: Vec<u8>,
    input: Option<(ProcessId, mpsc::Receiver<Vec<u8>>)>,
) -> OwnedWriteHalf {
    // Dropping the write half would end the stream for the agent: it is handed back instead.
    if stream.write_all(&opening).await.is_ok()
        && let Some((process, chunks)) = input
    {
        let _ = pass_on(&mut stream, process, chunks).await;
    }
    stream
}

async fn pass_on(
    stream: &mut OwnedWriteHalf,
    process: ProcessId,
    mut chunks: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    while let Some(chunk) = chunks.recv().await {
        for piece in chunk.chunks(STREAM_CHUNK_MAX_BYTES) {
            let data = piece.to_vec();
            let bytes = encode(&HostMessage::Stdin { process, data }).map_err(io::Error::other)?;
            stream.write_all(&bytes).await?;
        }
    }
    let bytes = encode(&HostMessage::StdinClose { process }).map_err(io::Error::other)?;
    stream.write_all(&bytes).await
}
