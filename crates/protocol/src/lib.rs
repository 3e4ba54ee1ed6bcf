//! Messages between the host and the agent in the guest, and how they are framed.
//!
//! One byte stream (a vsock connection that the agent opened before the snapshot and that every
//! fork inherits; a new one, should a fork's host be lost) carries frames in both directions:
//!
//! ```text
//! u32 little-endian: payload length in bytes, at most PAYLOAD_MAX_BYTES of the kind of message
//! payload: one HostMessage (host to guest) or AgentMessage (guest to host), as postcard
//! ```
//!
//! This crate does no I/O and knows no clock: it turns messages into bytes and bytes into
//! messages, and refuses what is too large or does not decode. Neither side trusts the other.

#![forbid(unsafe_code)]

mod files;
mod frame;
mod message;

pub use files::*;
pub use frame::{FrameDecoder, FrameError, Message, encode};
pub use message::*;

/// Version of the messages in this crate. A template records the version its agent speaks; a host
/// of another version refuses it and asks for a rebuild.
pub const PROTOCOL_VERSION: u32 = 7;

/// Largest piece of a stream (stdin, stdout, stderr, a file) in one message.
pub const STREAM_CHUNK_MAX_BYTES: usize = 64 * 1024;

/// vsock context id of the host (virtio 1.3 §5.10.4).
pub const HOST_CID: u32 = 2;

/// vsock context id of every guest. Forks share it: no guest can reach another.
pub const GUEST_CID: u32 = 3;

/// vsock port on the host to which the agent connects once, while its template is being built.
pub const AGENT_PORT: u32 = 1024;

/// vsock port in the guest at which the agent takes a new connection once it has lost the one it had:
/// the engine at its other end was killed, and another one goes on. No program that is not root can
/// listen there (Linux: LAST_RESERVED_PORT).
pub const AGENT_LISTEN_PORT: u32 = 1023;

/// Guest-physical address of the host clock, alone on its page: an aligned 8-byte read gives the
/// host's CLOCK_REALTIME in nanoseconds since 1970, as of that read. A register rather than a
/// message, since a message is as old as its way.
pub const HOST_CLOCK_ADDRESS: u64 = 0xd100_0000;
