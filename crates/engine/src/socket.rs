//! Control sockets for tokio: packets in, packets out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdSocket;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use zygote_runner::control::PACKET_MAX_BYTES;
use zygote_runner::packet;

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A SOCK_SEQPACKET socket that is waited for by tokio. The datagram type only lends its
/// readiness: every byte goes through sendmsg(2) and recvmsg(2), which know the difference.
pub struct ControlSocket(UnixDatagram);

impl ControlSocket {
    /// Takes over a connected socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(UnixDatagram::from_std(StdSocket::from(socket))?))
    }

    /// Sends one packet.
    pub async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = &self.0;
        socket
            .async_io(Interest::WRITABLE, || {
                packet::send(socket, bytes, descriptors)
            })
            .await
    }

    /// Receives one packet; `None` once the other end is closed.
    pub async fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let packet = self.receive_with_descriptors().await?;
        Ok(packet.map(|(bytes, _)| bytes))
    }

    /// As `receive`, with the descriptors that came along.
    pub async fn receive_with_descriptors(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let socket = &self.0;
        let receive = || {
            let mut bytes = [0; PACKET_MAX_BYTES];
            let (length, descriptors) = packet::receive(socket, &mut bytes)?;
            Ok((bytes[..length].to_vec(), descriptors))
        };
        let (bytes, descriptors) = socket.async_io(Interest::READABLE, receive).await?;
        Ok((!bytes.is_empty()).then_some((bytes, descriptors)))
    }
}
