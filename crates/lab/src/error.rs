//! Why nothing could be run in a lab.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why nothing could be run in the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// QEMU cannot be started.
    #[error("cannot start qemu-system-x86_64; install it with: apt-get install qemu-system-x86")]
    Qemu(#[source] io::Error),
    /// A socket or thread of ours.
    #[error("cannot {operation}")]
    Own {
        /// Verb and object.
        operation: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// The console's file.
    #[error("cannot create the log of the lab's console, {}", path.display())]
    Console {
        /// Where.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// It did not come up, hung, or broke down.
    #[error("the lab {what}; its console said last:\n{console}")]
    Broken {
        /// What happened.
        what: String,
        /// The last lines of its console.
        console: String,
    },
    /// A signal of this process has ended it.
    #[error("ended by signal {signal}")]
    Interrupted {
        /// Which.
        signal: i32,
    },
    /// Ended by its [`crate::Handle`].
    #[error("the lab was ended")]
    Ended,
    /// The command has not ended in time.
    #[error(
        "the command did not end within {limit:?}, and its lab was ended{}",
        told(console)
    )]
    TimedOut {
        /// How long it was allowed to run.
        limit: Duration,
        /// The last lines of the lab's console; mostly there are none.
        console: String,
    },
    /// Our own output cannot be written (a closed pipe).
    #[error("cannot write the program's output")]
    Output(#[source] io::Error),
    /// The program could not be started; the status is a shell's.
    #[error("{message}")]
    Program {
        /// Why.
        message: String,
        /// 127 not found, 126 not executable, 125 otherwise.
        status: u8,
    },
}

fn told(console: &str) -> String {
    if console.is_empty() {
        String::new()
    } else {
        format!("; its console said last:\n{console}")
    }
}

/// Names what we could not do ourselves.
pub fn own(operation: &'static str) -> impl FnOnce(io::Error) -> LabError {
    move |source| LabError::Own { operation, source }
}
