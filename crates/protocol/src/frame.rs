//! Frames: a length, then a payload. The decoder takes bytes as they come, in any pieces.

use serde::{Serialize, de::DeserializeOwned};

/// What goes into frames of one direction.
pub trait Message: Serialize + DeserializeOwned {
    /// Largest payload of a frame.
    const PAYLOAD_MAX_BYTES: usize;
}

const HEADER_BYTES: usize = 4;

/// Why a byte stream is not a stream of frames, or a message does not fit into one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The length in a header, or the encoded size of a message, is above the limit.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The length in question.
        length: usize,
        /// The largest that is allowed.
        limit: usize,
    },
    /// The payload is not a message of the expected kind.
    #[error("a frame of {length} bytes does not decode as a message")]
    Undecodable {
        /// The payload's length.
        length: usize,
    },
}

/// Encodes one message with its header.
///
/// # Errors
/// [`FrameError::TooLong`] if the message does not fit into a frame.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0; HEADER_BYTES])
        .map_err(|_| FrameError::Undecodable { length: 0 })?;
    let length = bytes.len() - HEADER_BYTES;
    let limit = M::PAYLOAD_MAX_BYTES;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    let header = u32::try_from(length).map_err(|_| FrameError::TooLong { length, limit })?;
    bytes[..HEADER_BYTES].copy_from_slice(&header.to_le_bytes());
    Ok(bytes)
}

/// Collects bytes and gives back whole messages.
///
/// After an error the stream cannot be trusted any more: drop the decoder and the connection.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    /// How much of `buffer` has been given out already.
    consumed: usize,
}

impl FrameDecoder {
    /// Appends bytes as they were received.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes come.
    ///
    /// # Errors
    /// If the stream is not one of frames of `M`.
    pub fn next_message<M: Message>(&mut self) -> Result<Option<M>, FrameError> {
        let pending = &self.buffer[self.consumed..];
        let Some((header, rest)) = pending.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        let limit = M::PAYLOAD_MAX_BYTES;
        if length > limit {
            return Err(FrameError::TooLong { length, limit });
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let (message, unused) =
            postcard::take_from_bytes(payload).map_err(|_| FrameError::Undecodable { length })?;
        if !unused.is_empty() {
            return Err(FrameError::Undecodable { length });
        }
        self.consumed += HEADER_BYTES + length;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AgentMessage, ExitStatus, HostMessage};
    use proptest::prelude::*;

    #[test]
    fn a_frame_one_byte_over_the_limit_is_refused_before_its_payload_comes() {
        let mut decoder = FrameDecoder::default();
        let limit = AgentMessage::PAYLOAD_MAX_BYTES;
        let length = limit + 1;
        decoder.extend(&(length as u32).to_le_bytes());
        assert_eq!(
            decoder.next_message::<AgentMessage>(),
            Err(FrameError::TooLong { length, limit })
        );
    }

    #[test]
    fn a_frame_of_the_largest_size_is_still_waited_for() {
        let mut decoder = FrameDecoder::default();
        let limit = AgentMessage::PAYLOAD_MAX_BYTES;
        decoder.extend(&(limit as u32).to_le_bytes());
        assert_eq!(decoder.next_message::<AgentMessage>(), Ok(None));
    }

    #[test]
    fn bytes_after_a_message_within_its_frame_are_refused() {
        let mut bytes = encode(&HostMessage::Freeze).unwrap();
        bytes.push(0);
        bytes[0] += 1;
        let mut decoder = FrameDecoder::default();
        decoder.extend(&bytes);
        assert!(decoder.next_message::<HostMessage>().is_err());
    }

    proptest! {
        #[test]
        fn messages_survive_any_cutting_of_the_stream(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..20),
            cut in 1usize..50,
        ) {
            let messages: Vec<_> = chunks.into_iter()
                .map(|data| AgentMessage::Stdout { process: 7, data })
                .chain([AgentMessage::Exited { process: 7, status: ExitStatus::Code(3) }])
                .collect();
            let bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).unwrap()).collect();
            let mut decoder = FrameDecoder::default();
            let mut received = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.extend(piece);
                while let Some(message) = decoder.next_message::<AgentMessage>().unwrap() {
                    received.push(message);
                }
            }
            prop_assert_eq!(received, messages);
        }

        #[test]
        fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = FrameDecoder::default();
            decoder.extend(&bytes);
            while let Ok(Some(_)) = decoder.next_message::<HostMessage>() {}
        }
    }
}
