//! The agent: PID 1 of the guest, and the host's hand in it.
//!
//! It brings the guest up, connects to the host once, keeps the user's processes frozen while a
//! snapshot is taken, gives each fork its identity before it thaws them, and runs programs. One
//! thread, one poll loop. It sees nothing of ours but the protocol.

mod cgroup;
mod channel;
mod files;
mod gets;
mod guest;
mod identity;
mod interpreter;
mod launcher;
mod owners;
mod process;
mod serve;
mod signals;

use std::process::ExitCode;

/// For measuring, in a guest: whose its pages are.
const OWNERS_VERB: &str = "owners";

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(OWNERS_VERB) {
        return match owners::print() {
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
