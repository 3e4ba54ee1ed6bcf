//! Messages between the engine, its zygote processes and their runners: one packet each on a
//! SOCK_SEQPACKET socket, postcard-encoded.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::path::PathBuf;
use zygote_snapshot::RunKind;

/// Largest packet: three paths, or the end of a console.
pub const PACKET_MAX_BYTES: usize = 16 * 1024;
/// Largest packet to a zygote process that has been loaded: what it receives into is memory that
/// its forks copy.
pub const REQUEST_MAX_BYTES: usize = 64;
/// Most of the guest's console that goes into a report of its end.
pub const CONSOLE_MAX_BYTES: usize = 4096;

/// From the engine to a zygote process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToZygote {
    /// First message: which snapshot to hold. Answered by `Loaded` or `Refused`.
    Load(Load),
    /// Fork a runner, with what such runs touch. Carries two descriptors: the agent's stream and the
    /// runner's control socket.
    Fork(RunKind),
    /// Of a branch: send the pages of the guest's memory that are not those of its snapshot's file, and the
    /// machine's state. Carries a stream for them ([`crate::pages`]), and the process's page map
    /// (proc_pid_pagemap(5)). Answered on the stream alone.
    Send,
}

/// What a zygote process holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// The snapshot's directory.
    pub snapshot: PathBuf,
    /// Where disk images lie, by digest.
    pub pieces: PathBuf,
    /// Where verifications are remembered.
    pub stamps: PathBuf,
    /// The cgroup to be in, with the runners, if there is one.
    pub group: Option<PathBuf>,
}

/// A wall of the jail that this host did not allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingWall {
    /// Its name.
    pub wall: String,
    /// The kernel's word.
    pub why: String,
    /// Whether nobody's untrusted code should run without it.
    pub is_main: bool,
}

/// From a zygote process to the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromZygote {
    /// The snapshot is mapped; forks can begin.
    Loaded {
        /// Size of the guest's memory.
        memory_bytes: u64,
        /// Number of vCPUs.
        vcpus: u32,
        /// Walls of the jail that this host did not allow.
        missing_walls: Vec<MissingWall>,
    },
    /// The snapshot is not usable; the process ends.
    Refused {
        /// Why, and what to do about it.
        message: String,
    },
    /// A runner has been forked. Answers come in the order of the requests. Carries the runner's
    /// pidfd.
    Forked {
        /// Its process id.
        pid: u32,
    },
    /// No runner could be forked.
    ForkFailed {
        /// Why.
        message: String,
    },
    /// A runner has ended and been reaped.
    Ended {
        /// Its process id.
        pid: u32,
        /// How it ended, as wait(2) tells.
        status: i32,
        /// What it has taken.
        spent: Spent,
    },
}

/// What a process has taken from its host, as wait4(2) tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// Page faults, those of its guest among them.
    pub faults: u64,
    /// Processor time, in microseconds.
    pub cpu_us: u64,
}

/// From the engine to a runner of a live sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToRunner {
    /// From an engine that goes on where another was. Carries the agent's new stream, in place of the one
    /// whose other end that other engine took with it.
    NewStream,
    /// Fork: the child is a zygote process, which holds the machine as it is now. Carries the child's
    /// control socket, on which it says `Loaded` first. Answered by `Branched` or `BranchFailed`, with the
    /// same number: an engine may find answers to the one before it.
    Branch {
        /// The engine's own.
        number: u64,
    },
}

/// How long a machine stood still for a branch, in microseconds, and what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Until its vCPUs had left the guest.
    pub stop_us: u32,
    /// Reading the state of vCPUs and devices.
    pub save_us: u32,
    /// fork(2): its page tables are copied.
    pub fork_us: u32,
    /// Until its vCPUs could go on.
    pub resume_us: u32,
}

impl Pause {
    /// All of it.
    #[must_use]
    pub fn total_us(&self) -> u32 {
        [self.stop_us, self.save_us, self.fork_us, self.resume_us]
            .into_iter()
            .fold(0, u32::saturating_add)
    }
}

/// From a runner to the engine. Closing the control socket ends the runner; for as long as somebody holds
/// its other end, it lives, whatever becomes of the agent's stream. The machine starts with the first
/// byte on that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromRunner {
    /// The machine is made, and waits before its guest's next instruction.
    Parked,
    /// It has forked, and its guest goes on. Carries the child's pidfd.
    Branched {
        /// The request's.
        number: u64,
        /// How long its guest stood still.
        pause: Pause,
    },
    /// It has not, and its guest goes on.
    BranchFailed {
        /// The request's.
        number: u64,
        /// Why.
        message: String,
    },
    /// The machine could not be made, or has stopped by itself; the process ends.
    Stopped {
        /// Why.
        reason: String,
        /// The last that the guest's kernel wrote to its console.
        console: String,
    },
}

/// Why a packet makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("a control packet that makes no sense")]
pub struct PacketError(#[source] postcard::Error);

/// Encodes a message.
///
/// # Errors
/// If it cannot be encoded; these types always can.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, PacketError> {
    postcard::to_stdvec(message).map_err(PacketError)
}

/// Decodes a message.
///
/// # Errors
/// If the bytes are not one.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, PacketError> {
    postcard::from_bytes(bytes).map_err(PacketError)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_socket_format() {
        let message = FromRunner::Stopped {
            reason: "r".into(),
            console: "c".into(),
        };
        let bytes = encode(&message).unwrap();
        assert_eq!(decode::<FromRunner>(&bytes).unwrap(), message);
        assert!(decode::<FromRunner>(&bytes[..2]).is_err());
    }
}
