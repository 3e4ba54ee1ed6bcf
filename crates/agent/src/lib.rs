//! The agent: PID 1 of the guest, and the host's hand in it.
//!
//! It brings the guest up, connects to the host once, keeps the user's processes frozen while a
//! snapshot is taken, gives each fork its identity before it thaws them, and runs programs. Should a
//! fork's host be lost, it goes on, and waits for another one to connect. One thread, one poll loop. It
//! sees nothing of ours but the protocol.

mod cgroup;
mod channel;
mod context;
mod files;
mod gets;
mod guest;
mod identity;
mod interpreter;
mod launcher;
mod owners;
mod pressure;
mod process;
mod processes;
mod ring;
mod serve;
mod signals;
mod task;
mod terminal;
mod users;

use std::process::ExitCode;

/// For measuring, in a guest: whose its pages are.
const OWNERS_VERB: &str = "owners";

/// Does something with files; started by the agent alone.
pub const FILES_VERB: &str = task::VERB;

fn verb(words: &str) -> Option<std::io::Result<()>> {
    match words {
        OWNERS_VERB => Some(owners::print()),
        FILES_VERB => Some(task::run(std::env::args().nth(2))),
        _ => None,
    }
}

/// The program.
pub fn main() -> ExitCode {
    if let Some(done) = std::env::args().nth(1).and_then(|words| verb(&words)) {
        return match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("zygote-agent: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let served = guest::bring_up()
        .and_then(|()| channel::connect())
        .and_then(serve::serve);
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The kernel log reaches the serial port; PID 1's end then panics the kernel, and the
            // host sees the machine stop.
            guest::log(&format!("zygote-agent: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// For tests of who talks to agents: serves as the agent of a fork does, but on the machine where it is.
/// Its streams come over a SOCK_SEQPACKET socket, each in a packet: the first, and another when that one
/// has ended.
///
/// # Errors
/// When the socket's other end is closed.
pub fn serve_here(streams: std::os::fd::OwnedFd) -> std::io::Result<()> {
    channel::Channel::through(streams).and_then(serve::serve_here)
}
