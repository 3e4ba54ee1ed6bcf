//! A fork before it is somebody: its process, and the engine's ends of its sockets.

use crate::identity;
use crate::pool::Busy;
use crate::socket::ControlSocket;
use crate::zygote::{Runner, Zygote, ZygoteError};
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use tokio::net::UnixStream;
use uuid::Uuid;
use zygote_protocol::Identity;
use zygote_runner::control::{FromRunner, decode};
use zygote_runner::packet;
use zygote_snapshot::RunKind;

/// Why there is no fork.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// Our side of its sockets.
    #[error("cannot make the sandbox's sockets: {0}")]
    Sockets(#[from] io::Error),
    /// The kernel's generator.
    #[error("cannot draw an identity: {0}")]
    Identity(#[source] io::Error),
    /// The zygote's word.
    #[error("{0}")]
    Zygote(#[from] ZygoteError),
}

/// A forked runner, and who it will be. The first byte on `stream` starts its machine; dropping it ends the process.
pub struct Fork {
    /// The sandbox's id.
    pub id: Uuid,
    /// What makes it somebody: drawn for it alone.
    pub identity: Identity,
    /// To the guest's agent.
    pub stream: UnixStream,
    /// To the runner.
    pub control: ControlSocket,
    /// The process.
    pub runner: Runner,
    /// What it has ahead is for these.
    pub kind: RunKind,
    /// Tells its pool when it is over.
    pub busy: Option<Busy>,
}

impl Fork {
    /// Has a zygote fork. It may be making its machine still when this returns.
    pub async fn of(zygote: &Zygote, kind: RunKind) -> Result<Self, ForkError> {
        let (ours, agent) = StdStream::pair()?;
        let (control, runner_control) = packet::pair()?;
        ours.set_nonblocking(true)?;
        agent.set_nonblocking(true)?;
        let (id, identity) = identity::draw().map_err(ForkError::Identity)?;
        let runner = zygote.fork(kind, agent.into(), runner_control).await?;
        Ok(Self {
            id,
            identity,
            stream: UnixStream::from_std(ours)?,
            control: ControlSocket::new(control)?,
            runner,
            kind,
            busy: None,
        })
    }

    /// Waits until its machine is made. False if that will not be: the process ends.
    pub async fn parked(&self) -> bool {
        match self.control.receive().await {
            Ok(Some(bytes)) => matches!(decode(&bytes), Ok(FromRunner::Parked)),
            Ok(None) | Err(_) => false,
        }
    }

    /// Whether its process has not ended yet.
    pub fn is_alive(&mut self) -> bool {
        self.runner.is_alive()
    }
}
