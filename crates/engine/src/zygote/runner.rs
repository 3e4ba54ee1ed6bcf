//! A forked runner process, as the engine has it.

use super::END_MAX;
use rustix::process::{Signal, pidfd_send_signal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::timeout;

/// A forked runner process. Dropping it kills the process, whatever that does.
pub struct Runner {
    /// Its process id among those of its zygote.
    pub pid: u32,
    pub(super) life: Life,
    /// Its pidfd.
    pub(crate) process: OwnedFd,
}

pub(super) enum Life {
    /// Resolves to its wait status when it has been reaped.
    Running(oneshot::Receiver<i32>),
    /// With its wait status, unless its zygote has ended first.
    Ended(Option<i32>),
}

impl Runner {
    /// Waits for its end; gives back its wait status, unless its zygote has ended first.
    pub async fn ended(&mut self) -> Option<i32> {
        if let Life::Running(ended) = &mut self.life {
            self.life = Life::Ended(ended.await.ok());
        }
        match self.life {
            Life::Ended(status) => status,
            Life::Running(_) => None,
        }
    }

    /// Whether it has not ended yet, as far as has been told.
    pub fn is_alive(&mut self) -> bool {
        if let Life::Running(ended) = &mut self.life {
            match ended.try_recv() {
                Err(TryRecvError::Empty) => return true,
                told => self.life = Life::Ended(told.ok()),
            }
        }
        false
    }

    /// Kills it, and waits until it has been reaped: not longer than [`END_MAX`].
    pub async fn end(mut self) {
        self.kill();
        // A killed process can only be late when the host is out of breath, or its zygote is; it ends
        // all the same.
        let _ = timeout(END_MAX, self.ended()).await;
    }

    /// Its pidfd.
    pub fn process(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// Has it stand still; there is no way on from there but its end.
    pub fn stop(&self) {
        let _ = pidfd_send_signal(&self.process, Signal::STOP);
    }

    fn kill(&self) {
        // Fails if it has ended.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.kill();
    }
}
