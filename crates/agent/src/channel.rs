//! The connection to the host: frames out of a buffer, frames in.

#![expect(
    unsafe_code,
    reason = "AF_VSOCK addresses are not in the standard library"
)]

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, recvmsg};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use zygote_protocol::{
    AGENT_LISTEN_PORT, AGENT_PORT, AgentMessage, FrameDecoder, HOST_CID, HostMessage, encode,
};

/// Above this, programs' output is left in their pipes until the host has taken some.
const OUTGOING_HIGH_BYTES: usize = 256 * 1024;
const READ_BYTES: usize = 64 * 1024;

/// The agent's end of the connection.
pub struct Channel {
    socket: OwnedFd,
    door: Door,
    /// Whether the host has hung up, and the next one is waited for.
    is_lost: bool,
    /// Whether nothing is to be said: the host that has come does not know yet of whom.
    is_mute: bool,
    decoder: FrameDecoder,
    outgoing: VecDeque<u8>,
    /// Whether what waits is to wait for more that goes with it.
    is_held: bool,
    scratch: Vec<u8>,
}

/// Where another host comes in.
pub enum Door {
    /// It connects to this socket.
    Listener(OwnedFd),
    /// It sends its stream over this one, each in a packet.
    Packets(OwnedFd),
}

impl Door {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listener(socket) | Self::Packets(socket) => socket.as_fd(),
        }
    }

    /// A stream that has come, if one has.
    fn take(&self) -> io::Result<Option<OwnedFd>> {
        let taken = match self {
            Self::Listener(socket) => rustix::net::accept_with(socket, SocketFlags::CLOEXEC),
            Self::Packets(socket) => receive_descriptor(socket),
        };
        match taken {
            Ok(stream) => Ok(Some(stream)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Connects to the host; the connection then lives as long as the machine and its forks, unless their
/// host is lost.
pub fn connect() -> io::Result<Channel> {
    let socket = vsock(HOST_CID, AGENT_PORT, libc::connect, "connect to the host")?;
    let listener = vsock(
        libc::VMADDR_CID_ANY,
        AGENT_LISTEN_PORT,
        libc::bind,
        "listen for another host",
    )?;
    rustix::net::listen(&listener, 1)?;
    rustix::io::ioctl_fionbio(&listener, true)?;
    Channel::over(socket, Door::Listener(listener))
}

type Operation =
    unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn vsock(cid: u32, port: u32, operation: Operation, what: &str) -> io::Result<OwnedFd> {
    // SAFETY: plain system calls; the descriptor is owned by nobody else.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = cid;
        address.svm_port = port;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        if operation(fd, (&raw const address).cast(), length) < 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(error.kind(), format!("{what}: {error}")));
        }
        Ok(socket)
    }
}

/// One descriptor that has been sent (unix(7), SCM_RIGHTS).
fn receive_descriptor(socket: &OwnedFd) -> Result<OwnedFd, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut vectors = [io::IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(socket, &mut vectors, &mut control, flags)?;
    let sent = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sent) => sent.next(),
        _ => None,
    });
    // Who sends them has gone.
    sent.ok_or(Errno::PIPE)
}

impl Channel {
    /// A channel over a connected stream.
    pub fn over(socket: OwnedFd, door: Door) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket,
            door,
            is_lost: false,
            is_mute: false,
            decoder: FrameDecoder::default(),
            outgoing: VecDeque::new(),
            is_held: false,
            scratch: vec![0; READ_BYTES],
        })
    }

    /// A channel over the first stream that comes through a door.
    pub fn through(socket: OwnedFd) -> io::Result<Self> {
        let door = Door::Packets(socket);
        let mut fds = [PollFd::from_borrowed_fd(door.fd(), PollFlags::IN)];
        // Until there is one, or who sends them ends.
        poll(&mut fds, None)?;
        let first = door.take()?.ok_or(io::ErrorKind::WouldBlock)?;
        Self::over(first, door)
    }

    /// For polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        if self.is_lost {
            self.door.fd()
        } else {
            self.socket.as_fd()
        }
    }

    /// Whether the host has hung up, and no other has come yet.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Whether there is no host that knows what there is.
    pub fn is_mute(&self) -> bool {
        self.is_mute
    }

    /// The host is about to hear what there is.
    pub fn unmute(&mut self) {
        self.is_mute = false;
    }

    /// The host has hung up: what was on its way is lost.
    fn lose(&mut self) {
        (self.is_lost, self.is_mute, self.is_held) = (true, true, false);
        self.outgoing = VecDeque::new();
        self.decoder = FrameDecoder::default();
    }

    /// Another host, if one has come.
    pub fn find(&mut self) -> io::Result<()> {
        if let Some(socket) = self.door.take()? {
            rustix::io::ioctl_fionbio(&socket, true)?;
            (self.socket, self.is_lost) = (socket, false);
        }
        Ok(())
    }

    /// Whether bytes wait to be written.
    pub fn is_behind(&self) -> bool {
        !self.outgoing.is_empty() && !self.is_held
    }

    /// Whether a message waits for others.
    pub fn is_held(&self) -> bool {
        self.is_held
    }

    /// It waits no longer.
    pub fn release(&mut self) {
        self.is_held = false;
    }

    /// Queues a message that is in no hurry: it goes with the next one, or when it is released. Each
    /// writing has the host's kernel and the guest's stop for each other.
    pub fn send_with_next(&mut self, message: &AgentMessage) -> io::Result<()> {
        let is_alone = self.outgoing.is_empty();
        self.send(message)?;
        self.is_held = is_alone && !self.is_mute;
        Ok(())
    }

    /// Whether the host is so far behind that programs should wait.
    pub fn is_full(&self) -> bool {
        self.outgoing.len() >= OUTGOING_HIGH_BYTES
    }

    /// Queues a message; [`Channel::flush`] writes it, with the others of its turn.
    pub fn send(&mut self, message: &AgentMessage) -> io::Result<()> {
        if self.is_mute {
            return Ok(());
        }
        self.is_held = false;
        self.outgoing
            .extend(encode(message).map_err(io::Error::other)?);
        Ok(())
    }

    /// Writes what can be written.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.is_behind() {
            let (front, _) = self.outgoing.as_slices();
            match rustix::io::write(&self.socket, front) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // Reading tells.
                Err(_) => self.outgoing.clear(),
            }
        }
        Ok(())
    }

    /// Reads what has come. The host may turn out to have hung up.
    pub fn receive(&mut self) {
        match rustix::io::read(&self.socket, &mut self.scratch[..]) {
            Ok(0) => self.lose(),
            Ok(count) => self.decoder.extend(&self.scratch[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.lose(),
        }
    }

    /// The next whole message of those received.
    pub fn next_message(&mut self) -> io::Result<Option<HostMessage>> {
        self.decoder.next_message().map_err(io::Error::other)
    }
}
