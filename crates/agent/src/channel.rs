//! The connection to the host: frames out of a buffer, frames in.

#![expect(
    unsafe_code,
    reason = "AF_VSOCK addresses are not in the standard library"
)]

use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use zygote_protocol::{AGENT_PORT, AgentMessage, FrameDecoder, HOST_CID, HostMessage, encode};

/// Above this, programs' output is left in their pipes until the host has taken some.
const OUTGOING_HIGH_BYTES: usize = 256 * 1024;
const READ_BYTES: usize = 64 * 1024;

/// The agent's end of the connection.
pub struct Channel {
    socket: OwnedFd,
    decoder: FrameDecoder,
    outgoing: VecDeque<u8>,
    /// Whether what waits is to wait for more that goes with it.
    is_held: bool,
    scratch: Vec<u8>,
}

/// Connects to the host; the connection then lives as long as the machine and its forks.
pub fn connect() -> io::Result<Channel> {
    // SAFETY: plain system calls; the descriptor is owned by nobody else.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = HOST_CID;
        address.svm_port = AGENT_PORT;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        if libc::connect(fd, (&raw const address).cast(), length) < 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(
                error.kind(),
                format!("connect to the host: {error}"),
            ));
        }
        socket
    };
    Channel::over(socket)
}

impl Channel {
    /// A channel over a connected stream.
    pub fn over(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket,
            decoder: FrameDecoder::default(),
            outgoing: VecDeque::new(),
            is_held: false,
            scratch: vec![0; READ_BYTES],
        })
    }

    /// For polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
        self.is_held = is_alone;
        Ok(())
    }

    /// Whether the host is so far behind that programs should wait.
    pub fn is_full(&self) -> bool {
        self.outgoing.len() >= OUTGOING_HIGH_BYTES
    }

    /// Queues a message; [`Channel::flush`] writes it, with the others of its turn.
    pub fn send(&mut self, message: &AgentMessage) -> io::Result<()> {
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
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads what has come. An error if the host has closed the connection.
    pub fn receive(&mut self) -> io::Result<()> {
        match rustix::io::read(&self.socket, &mut self.scratch[..]) {
            Ok(0) => Err(io::Error::other("the host has closed the connection")),
            Ok(count) => {
                self.decoder.extend(&self.scratch[..count]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The next whole message of those received.
    pub fn next_message(&mut self) -> io::Result<Option<HostMessage>> {
        self.decoder.next_message().map_err(io::Error::other)
    }
}
