//! Frames on the port between the lab and its host: length (u32, little-endian), then postcard.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};

/// Largest piece of a stream in a frame.
pub const PIECE_MAX_BYTES: usize = 32 * 1024;
/// Largest frame: an environment can be long.
const FRAME_MAX_BYTES: usize = 8 << 20;
/// Input that may be on its way to a program that does not read it.
pub const INPUT_WINDOW_BYTES: usize = 256 * 1024;

/// To the lab.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLab {
    /// First: what to mount and run.
    Job(Job),
    /// Standard input.
    Input(#[serde(with = "serde_bytes")] Vec<u8>),
    /// End of standard input.
    InputEnd,
    /// A signal for the program.
    Signal(i32),
    /// Is it alive? Answered by `Alive`.
    Ping,
}

/// What to mount and run. Paths and words as bytes: they need not be UTF-8.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// `(tag, path)` of each folder shared for writing.
    pub mounts: Vec<(String, Vec<u8>)>,
    /// Program and arguments.
    pub arguments: Vec<Vec<u8>>,
    /// The whole environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Directory.
    pub directory: Vec<u8>,
    /// Whether input will come.
    pub stdin: bool,
}

/// From the lab.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromLab {
    /// The lab is up, and waits for its job.
    Up,
    /// The answer to `Ping`.
    Alive,
    /// Standard output.
    Output(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Standard error.
    Error(#[serde(with = "serde_bytes")] Vec<u8>),
    /// So many bytes of input have been taken by the program.
    Taken(u32),
    /// The program has ended: last frame.
    Exit {
        /// As a shell tells it: 128+n for signal n.
        status: u8,
    },
    /// The program could not be run: last frame.
    Failed {
        /// Why.
        message: String,
        /// As a shell tells it: 127 not found, 126 not executable, 125 otherwise.
        status: u8,
    },
}

/// Writes a frame.
pub fn send<T: Serialize>(port: &mut impl Write, message: &T) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    port.write_all(&frame)
}

/// Reads a frame.
pub fn receive<T: DeserializeOwned>(port: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    port.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_MAX_BYTES {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    let mut body = vec![0; length];
    port.read_exact(&mut body)?;
    postcard::from_bytes(&body).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_follow_each_other_and_a_huge_one_is_refused() {
        let mut bytes = Vec::new();
        send(&mut bytes, &ToLab::Signal(2)).unwrap();
        send(&mut bytes, &ToLab::Input(vec![1, 2])).unwrap();
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        let mut reader = &bytes[..];
        assert_eq!(receive::<ToLab>(&mut reader).unwrap(), ToLab::Signal(2));
        let input = ToLab::Input(vec![1, 2]);
        assert_eq!(receive::<ToLab>(&mut reader).unwrap(), input);
        assert!(receive::<ToLab>(&mut reader).is_err());
    }
}
