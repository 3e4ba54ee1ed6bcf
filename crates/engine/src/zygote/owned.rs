//! The owner task of a zygote process: the only one who talks to it.

use super::process::Process;
use super::runner::{Life, Runner};
use super::{END_MAX, ForkRequest, Record, Request, UNANSWERED_MAX, ZygoteError};
use crate::admission::{Admission, Place};
use crate::held::Holder;
use crate::pressure;
use crate::socket::ControlSocket;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use zygote_jail::cgroup::Group;
use zygote_runner::control::{FromZygote, ToZygote, decode, encode};

/// A zygote process, and all that belongs to it.
pub(super) struct Owned {
    pub socket: ControlSocket,
    pub process: Process,
    pub group: Option<Group>,
    pub runners: HashMap<u32, (oneshot::Sender<i32>, Option<Place>)>,
    /// Where it is added up what runners have taken.
    pub admission: Arc<Admission>,
    pub held: Option<Held>,
    /// The key of the first of its family, if it is another.
    pub first: Option<String>,
}

/// Who holds a zygote, under which key, and how many holders had been lost by then.
pub(super) struct Held {
    pub holder: Arc<Holder>,
    pub key: String,
    pub losses: u64,
}

impl Owned {
    /// Until nobody wants forks any more, or it ends.
    pub async fn live(mut self, mut inbox: mpsc::Receiver<Request>) {
        let relief = self
            .group
            .as_ref()
            .map(|group| pressure::relieve(group.path().to_owned()));
        let relief = relief.map(tokio::spawn);
        self.serve(&mut inbox).await;
        drop(inbox);
        if let Some(relief) = relief {
            relief.abort();
        }
        let Self {
            socket,
            mut process,
            group,
            held,
            ..
        } = self;
        if let Some(held) = held {
            held.holder.remove(&held.key).await;
        }
        drop(socket);
        // It ends its runners at the end of its socket, and then itself.
        if timeout(END_MAX, process.ended()).await.is_err() {
            process.kill();
            let _ = timeout(END_MAX, process.ended()).await;
        }
        if let Some(group) = group {
            // Waits, though not for long: what was in it has ended.
            let _ = tokio::task::spawn_blocking(move || drop(group)).await;
        }
    }

    async fn serve(&mut self, inbox: &mut mpsc::Receiver<Request>) {
        let mut waiting: VecDeque<(Reply, Place)> = VecDeque::new();
        loop {
            tokio::select! {
                // What it says is taken before more is asked of it.
                biased;
                message = receive(&self.socket) => match message {
                    Ok((FromZygote::Forked { pid }, Some(process))) => {
                        let (sender, ended) = oneshot::channel();
                        let life = Life::Running(ended);
                        let runner = Runner { pid, life, process };
                        // Whoever asked may have been cancelled, or have been of another engine; the
                        // runner is dropped then, and ends.
                        if let Some((reply, place)) = waiting.pop_front() {
                            self.runners.insert(pid, (sender, Some(place)));
                            let _ = reply.send(Ok(runner));
                        }
                    }
                    Ok((FromZygote::ForkFailed { message }, _)) => {
                        if let Some((reply, _)) = waiting.pop_front() {
                            let _ = reply.send(Err(ZygoteError::Fork(message)));
                        }
                    }
                    Ok((FromZygote::Ended { pid, status, spent }, _)) => {
                        self.admission.has_spent(spent);
                        if let Some((sender, _)) = self.runners.remove(&pid) {
                            // The sandbox may have stopped caring.
                            let _ = sender.send(status);
                        }
                    }
                    Ok(_) | Err(_) => return,
                },
                request = inbox.recv(), if waiting.len() < UNANSWERED_MAX => match request {
                    None => return,
                    Some(Request::Hold(holder, key, snapshot, reply)) => {
                        let _ = reply.send(self.hold(holder, key, snapshot).await);
                    }
                    Some(Request::Send(stream, pagemap)) => {
                        let descriptors = [stream.as_fd(), pagemap.as_fd()];
                        if send(&self.socket, &ToZygote::Send, &descriptors).await.is_err() {
                            return;
                        }
                    }
                    Some(Request::Fork(ForkRequest { kind, place, agent, control, reply })) => {
                        let descriptors = [agent.as_fd(), control.as_fd()];
                        let sent = send(&self.socket, &ToZygote::Fork(kind), &descriptors).await;
                        if sent.is_err() {
                            return;
                        }
                        waiting.push_back((reply, place));
                    }
                },
            }
        }
    }

    /// Once for each of its sandboxes; does nothing if it is held already.
    async fn hold(
        &mut self,
        holder: Arc<Holder>,
        key: String,
        snapshot: Option<(PathBuf, PathBuf)>,
    ) -> io::Result<()> {
        let losses = *holder.losses().borrow();
        if self.held.as_ref().is_some_and(|held| held.losses == losses) {
            return Ok(());
        }
        let process = self.process.pidfd()?;
        let mut descriptors = vec![self.socket.as_fd(), process.as_fd()];
        descriptors.extend(self.group.as_ref().map(|group| group.lock().as_fd()));
        let group = self.group.as_ref().map(|group| group.path().to_owned());
        let first = self.first.clone();
        let record = serde_json::to_vec(&Record {
            group,
            first,
            snapshot,
        })?;
        holder.put(&key, &record, None, &descriptors).await?;
        self.held = Some(Held {
            holder,
            key,
            losses,
        });
        Ok(())
    }
}

type Reply = oneshot::Sender<Result<Runner, ZygoteError>>;

pub(super) async fn send(
    socket: &ControlSocket,
    message: &ToZygote,
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> Result<(), ZygoteError> {
    let bytes = encode(message).map_err(|_| ZygoteError::Gone)?;
    let sent = socket.send(&bytes, descriptors).await;
    sent.map_err(|_| ZygoteError::Gone)
}

pub(super) async fn receive(
    socket: &ControlSocket,
) -> Result<(FromZygote, Option<OwnedFd>), ZygoteError> {
    match socket.receive_with_descriptors().await {
        Ok(Some((bytes, descriptors))) => {
            let message = decode(&bytes).map_err(|_| ZygoteError::Gone)?;
            Ok((message, descriptors.into_iter().next()))
        }
        Ok(None) | Err(_) => Err(ZygoteError::Gone),
    }
}
