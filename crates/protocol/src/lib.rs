//! Messages between the host and the agent in the guest, and how they are framed.
//!
//! One byte stream (a vsock connection that the agent opened before the snapshot and that every
//! fork inherits) carries frames in both directions:
//!
//! ```text
//! u32 little-endian: payload length in bytes, at most FRAME_PAYLOAD_MAX_BYTES
//! payload: one HostMessage (host to guest) or AgentMessage (guest to host), as postcard
//! ```
//!
//! This crate does no I/O and knows no clock: it turns messages into bytes and bytes into
//! messages, and refuses what is too large or does not decode. Neither side trusts the other.

#![forbid(unsafe_code)]

mod frame;
mod message;

pub use frame::{FrameDecoder, FrameError, encode};
pub use message::*;

/// Version of the messages in this crate. A template records the version its agent speaks; a host
/// of another version refuses it and asks for a rebuild.
pub const PROTOCOL_VERSION: u32 = 1;

/// Largest payload of one frame.
pub const FRAME_PAYLOAD_MAX_BYTES: usize = 1024 * 1024;

/// Largest piece of a stream (stdin, stdout, stderr) in one message.
pub const STREAM_CHUNK_MAX_BYTES: usize = 64 * 1024;

/// vsock context id of the host (virtio 1.3 §5.10.4).
pub const HOST_CID: u32 = 2;

/// vsock context id of every guest. Forks share it: no guest can reach another.
pub const GUEST_CID: u32 = 3;

/// vsock port on the host to which the agent connects once, while its template is being built.
pub const AGENT_PORT: u32 = 1024;

/// First of the I/O ports of the host clock that the agent reads when it applies an identity.
/// A 4-byte read of this port latches the host's CLOCK_REALTIME (ns since 1970) and returns its
/// low half; a 4-byte read of this port plus 4 returns the high half of what was latched.
pub const HOST_CLOCK_PORT: u16 = 0x5a00;
