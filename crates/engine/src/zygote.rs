//! The engine's side of a zygote process: starting it, asking it for forks, seeing it end.

use crate::socket::ControlSocket;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use zygote_runner::control::{FromZygote, Load, ToZygote, decode, encode};
use zygote_runner::packet;

/// Fork requests that wait for the zygote's owner task.
const REQUESTS_MAX: usize = 64;
/// Samples of forks' generators that are remembered, so that a repetition is noticed: 32 MiB.
const SAMPLES_MAX: usize = 1 << 20;
/// Bytes in a sample.
const SAMPLE_BYTES: usize = 32;

/// How zygote processes are started.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Program and arguments that end in [`zygote_runner::zygote_main`].
    pub command: Vec<OsString>,
    /// The snapshot, and where its pieces lie.
    pub load: Load,
}

/// Why there is no zygote, or no fork of it.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// The process could not be started or talked to.
    #[error("cannot start the zygote process")]
    Start(#[source] io::Error),
    /// The snapshot is not usable; the sentence names cause and remedy.
    #[error("{0}")]
    Refused(String),
    /// It ended, or was killed.
    #[error("the zygote process has ended")]
    Gone,
    /// It cannot fork now.
    #[error("{0}")]
    Fork(String),
}

/// A loaded snapshot, ready to be forked. Dropping it lets the process end by itself;
/// [`Zygote::shut_down`] waits for that.
pub struct Zygote {
    requests: mpsc::Sender<ForkRequest>,
    missing_walls: Vec<String>,
    samples: Mutex<HashSet<[u8; SAMPLE_BYTES]>>,
    owner: JoinHandle<()>,
}

struct ForkRequest {
    agent: OwnedFd,
    control: OwnedFd,
    reply: oneshot::Sender<Result<Runner, ZygoteError>>,
}

/// A forked runner process.
pub struct Runner {
    /// Its process id among those of its zygote.
    pub pid: u32,
    /// Resolves to its wait status when it has been reaped.
    pub ended: oneshot::Receiver<i32>,
}

impl Zygote {
    /// Starts a zygote process and waits until its snapshot is checked and mapped.
    ///
    /// # Errors
    /// If it cannot be started, or refuses the snapshot.
    pub async fn load(config: &EngineConfig) -> Result<Self, ZygoteError> {
        let (ours, theirs) = packet::pair().map_err(ZygoteError::Start)?;
        let child = spawn(config, theirs).map_err(ZygoteError::Start)?;
        let socket = ControlSocket::new(ours).map_err(ZygoteError::Start)?;
        send(&socket, &ToZygote::Load(config.load.clone()), &[]).await?;
        let missing_walls = match receive(&socket).await? {
            FromZygote::Loaded { missing_walls, .. } => missing_walls,
            FromZygote::Refused { message } => return Err(ZygoteError::Refused(message)),
            _ => return Err(ZygoteError::Gone),
        };
        let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
        Ok(Self {
            requests,
            missing_walls,
            samples: Mutex::default(),
            owner: tokio::spawn(own(socket, child, inbox)),
        })
    }

    /// Forks a runner that talks over these two sockets.
    ///
    /// # Errors
    /// If the process is gone or cannot fork.
    pub async fn fork(&self, agent: OwnedFd, control: OwnedFd) -> Result<Runner, ZygoteError> {
        let (reply, answer) = oneshot::channel();
        let request = ForkRequest {
            agent,
            control,
            reply,
        };
        let sent = self.requests.send(request).await;
        sent.map_err(|_| ZygoteError::Gone)?;
        answer.await.map_err(|_| ZygoteError::Gone)?
    }

    /// Walls of its jail that this host did not allow, a sentence each.
    pub fn missing_walls(&self) -> &[String] {
        &self.missing_walls
    }

    /// Whether no fork of this zygote has shown this sample of its generator before.
    pub fn is_new_sample(&self, sample: &[u8]) -> bool {
        let Ok(sample) = <[u8; SAMPLE_BYTES]>::try_from(sample) else {
            return false;
        };
        let mut seen = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= SAMPLES_MAX {
            seen.clear();
        }
        seen.insert(sample)
    }

    /// Ends the process, and waits until it is gone.
    pub async fn shut_down(self) {
        drop(self.requests);
        // Fails only if the owner task panicked; the process ends with its socket all the same.
        let _ = self.owner.await;
    }
}

fn spawn(config: &EngineConfig, control: OwnedFd) -> io::Result<Child> {
    let [program, arguments @ ..] = &config.command[..] else {
        return Err(io::Error::other("no program to start it with"));
    };
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::from(control))
        .stdout(Stdio::null())
        .spawn()
}

/// Owns the process until nobody wants forks any more, or it ends.
async fn own(socket: ControlSocket, mut child: Child, mut inbox: mpsc::Receiver<ForkRequest>) {
    let mut waiting = VecDeque::new();
    let mut runners: HashMap<u32, oneshot::Sender<i32>> = HashMap::new();
    loop {
        tokio::select! {
            request = inbox.recv() => {
                let Some(ForkRequest { agent, control, reply }) = request else { break };
                let descriptors = [agent.as_fd(), control.as_fd()];
                if send(&socket, &ToZygote::Fork, &descriptors).await.is_err() {
                    break;
                }
                waiting.push_back(reply);
            }
            message = receive(&socket) => match message {
                Ok(FromZygote::Forked { pid }) => {
                    let (sender, ended) = oneshot::channel();
                    runners.insert(pid, sender);
                    answer(&mut waiting, Ok(Runner { pid, ended }));
                }
                Ok(FromZygote::ForkFailed { message }) => {
                    answer(&mut waiting, Err(ZygoteError::Fork(message)));
                }
                Ok(FromZygote::Ended { pid, status }) => {
                    if let Some(sender) = runners.remove(&pid) {
                        // The sandbox may have stopped caring.
                        let _ = sender.send(status);
                    }
                }
                Ok(_) | Err(_) => break,
            },
        }
    }
    drop((socket, waiting));
    // It ends at the end of its socket; an error means that it has been reaped already.
    let _ = child.wait().await;
}

type Waiting = VecDeque<oneshot::Sender<Result<Runner, ZygoteError>>>;

fn answer(waiting: &mut Waiting, result: Result<Runner, ZygoteError>) {
    if let Some(reply) = waiting.pop_front() {
        // Whoever asked may have been cancelled; the runner then finds its sockets closed.
        let _ = reply.send(result);
    }
}

async fn send(
    socket: &ControlSocket,
    message: &ToZygote,
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> Result<(), ZygoteError> {
    let bytes = encode(message).map_err(|_| ZygoteError::Gone)?;
    let sent = socket.send(&bytes, descriptors).await;
    sent.map_err(|_| ZygoteError::Gone)
}

async fn receive(socket: &ControlSocket) -> Result<FromZygote, ZygoteError> {
    match socket.receive().await {
        Ok(Some(bytes)) => decode(&bytes).map_err(|_| ZygoteError::Gone),
        Ok(None) | Err(_) => Err(ZygoteError::Gone),
    }
}
