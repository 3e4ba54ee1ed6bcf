//! The holder: one thread, one loop, no state but a table of descriptors.

use super::wire::{FromHolder, ToHolder};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    sockopt::socket_peercred,
};
use rustix::process::{Resource, geteuid, getrlimit, setrlimit};
use rustix::time::Timespec;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use zygote_runner::control::{PACKET_MAX_BYTES, decode, encode};
use zygote_runner::packet;

struct Held {
    /// The record first.
    descriptors: Vec<OwnedFd>,
    expires_unix_ms: Option<u64>,
}

impl Held {
    fn is_alive(&self) -> bool {
        self.descriptors.len() > 1
    }

    /// Nothing but the record stays.
    fn let_go(&mut self) {
        self.descriptors.truncate(1);
        self.expires_unix_ms = None;
    }
}

struct Holder {
    engine: Option<OwnedFd>,
    listener: OwnedFd,
    held: BTreeMap<String, Held>,
    /// How long it waits for an engine.
    away_max: Duration,
    /// Since when there has been none.
    away_since: Instant,
}

/// Holds what the engine at standard input gives it, and what the next one does, which connects at
/// `socket`. Ends when there is nothing left to hold, or when no engine has come for `away_max`; what it
/// has held ends then. Gives back the process's exit status.
pub fn holder_main(socket: &Path, away_max: Duration) -> u8 {
    match hold(socket, away_max) {
        Ok(()) => 0,
        // Its engine sees that it has gone.
        Err(_) => 1,
    }
}

fn hold(socket: &Path, away_max: Duration) -> io::Result<()> {
    // Nothing that ends the engine's group or terminal is for this process.
    let _ = rustix::process::setsid();
    raise_limit();
    let engine = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    let place = Place::of(socket)?;
    let listener = place.listen()?;
    let ready = encode(&FromHolder::Ready).map_err(io::Error::other)?;
    packet::send(&engine, &ready, &[])?;
    let mut holder = Holder {
        engine: Some(engine),
        listener,
        held: BTreeMap::new(),
        away_max,
        away_since: Instant::now(),
    };
    while !holder.is_over() {
        holder.turn()?;
    }
    place.leave();
    Ok(())
}

/// Descriptors for as many sandboxes as an engine may have.
fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // As many as there may be, then.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Where the next engine connects. Paths of sockets are short; this one goes by its folder's descriptor.
pub struct Place {
    folder: OwnedFd,
    name: PathBuf,
}

impl Place {
    pub fn of(socket: &Path) -> io::Result<Self> {
        let missing = || io::Error::other("a socket's path that names no file");
        let (folder, name) = socket
            .parent()
            .zip(socket.file_name())
            .ok_or_else(missing)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(folder, flags, Mode::empty())?;
        Ok(Self {
            folder,
            name: name.into(),
        })
    }

    pub fn address(&self) -> io::Result<SocketAddrUnix> {
        let folder = PathBuf::from("/proc/self/fd").join(self.folder.as_raw_fd().to_string());
        Ok(SocketAddrUnix::new(folder.join(&self.name))?)
    }

    fn listen(&self) -> io::Result<OwnedFd> {
        // One that a killed holder has left: its engine would be connected to it otherwise.
        let _ = rustix::fs::unlinkat(&self.folder, &self.name, rustix::fs::AtFlags::empty());
        let socket = endpoint()?;
        rustix::process::umask(Mode::from_raw_mode(0o177));
        bind(&socket, &self.address()?)?;
        listen(&socket, 4)?;
        Ok(socket)
    }

    /// Nobody listens there any more.
    pub fn leave(&self) {
        let _ = rustix::fs::unlinkat(&self.folder, &self.name, rustix::fs::AtFlags::empty());
    }
}

/// A socket for packets, not connected.
pub fn endpoint() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
}

fn now_unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

impl Holder {
    fn is_over(&self) -> bool {
        self.engine.is_none()
            && (!self.held.values().any(Held::is_alive)
                || self.away_since.elapsed() >= self.away_max)
    }

    /// How long to wait for something to happen; for ever while there is an engine.
    fn patience(&self) -> Option<Duration> {
        if self.engine.is_some() {
            return None;
        }
        let now = now_unix_ms();
        let expires = self.held.values().filter_map(|held| held.expires_unix_ms);
        let expires = expires.map(|at| Duration::from_millis(at.saturating_sub(now)));
        let away = self.away_max.saturating_sub(self.away_since.elapsed());
        expires.chain([away]).min()
    }

    fn turn(&mut self) -> io::Result<()> {
        let limit = self.patience().map(|patience| Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        });
        // The next engine waits until all has been heard that the one before it had to say.
        let expected = self.engine.as_ref().unwrap_or(&self.listener);
        let mut fds = [PollFd::new(expected, PollFlags::IN)];
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = !fds[0].revents().is_empty();
        match (is_ready, self.engine.is_some()) {
            (true, true) => {
                if self.hear().is_err() {
                    (self.engine, self.away_since) = (None, Instant::now());
                }
            }
            (true, false) => self.meet(),
            (false, _) => {}
        }
        if self.engine.is_none() {
            let now = now_unix_ms();
            let is_due = |held: &&mut Held| held.expires_unix_ms.is_some_and(|at| at <= now);
            self.held.values_mut().filter(is_due).for_each(Held::let_go);
        }
        Ok(())
    }

    /// Somebody has connected: the next engine, if it is this user's.
    fn meet(&mut self) {
        let Ok(guest) = accept_with(&self.listener, SocketFlags::CLOEXEC) else {
            return;
        };
        let is_ours = socket_peercred(&guest).is_ok_and(|who| who.uid == geteuid());
        if is_ours {
            self.engine = Some(guest);
        }
    }

    /// Does what the engine asks for; an error once that has gone.
    fn hear(&mut self) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let engine = self.engine.as_ref().ok_or_else(gone)?;
        let mut bytes = [0; PACKET_MAX_BYTES];
        let (length, descriptors) = packet::receive(engine, &mut bytes)?;
        if length == 0 {
            return Err(gone());
        }
        match decode(&bytes[..length]).map_err(io::Error::other)? {
            ToHolder::Put {
                key,
                expires_unix_ms,
            } => {
                let held = Held {
                    descriptors,
                    expires_unix_ms,
                };
                self.held.insert(key, held);
            }
            ToHolder::Remove { key } => drop(self.held.remove(&key)),
            ToHolder::List => {
                for (key, held) in &self.held {
                    let key = key.clone();
                    let descriptors: Vec<_> = held.descriptors.iter().map(AsFd::as_fd).collect();
                    let entry = encode(&FromHolder::Entry { key }).map_err(io::Error::other)?;
                    packet::send(engine, &entry, &descriptors)?;
                }
                let end = encode(&FromHolder::ListEnd).map_err(io::Error::other)?;
                packet::send(engine, &end, &[])?;
            }
        }
        Ok(())
    }
}
