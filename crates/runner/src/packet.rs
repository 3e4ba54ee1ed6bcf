//! Packets with descriptors over a SOCK_SEQPACKET socket (unix(7), SCM_RIGHTS).

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most descriptors in a packet.
pub const DESCRIPTORS_MAX: usize = 4;

/// A connected pair, blocking, closed by exec.
///
/// # Errors
/// If no descriptor is left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one packet.
///
/// # Errors
/// As sendmsg(2); `WouldBlock` on a non-blocking socket whose buffer is full.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one packet"));
    }
    let vectors = [IoSlice::new(bytes)];
    sendmsg(socket, &vectors, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one packet into `bytes`, which must have room for it; gives back its length, which is
/// zero at the end of the connection.
///
/// # Errors
/// As recvmsg(2); `WouldBlock` on a non-blocking socket with nothing to read.
pub fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut vectors = [IoSliceMut::new(bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = match recvmsg(socket, &mut vectors, &mut control, flags) {
        Ok(received) => received,
        // The other end was closed with packets of ours unread.
        Err(rustix::io::Errno::CONNRESET) => return Ok((0, Vec::new())),
        Err(error) => return Err(error.into()),
    };
    let descriptors = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn descriptors_arrive_with_their_packet_and_end_is_seen() {
        let (a, b) = pair().unwrap();
        let (c, _d) = pair().unwrap();
        send(&a, b"one", &[c.as_fd(), c.as_fd()]).unwrap();
        send(&a, b"two", &[]).unwrap();
        drop(a);
        let mut bytes = [0; 8];
        let (length, descriptors) = receive(&b, &mut bytes).unwrap();
        assert_eq!((&bytes[..length], descriptors.len()), (&b"one"[..], 2));
        assert_ne!(descriptors[0].as_raw_fd(), c.as_raw_fd());
        let (length, _) = receive(&b, &mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"two");
        assert_eq!(receive(&b, &mut bytes).unwrap().0, 0);
    }
}
