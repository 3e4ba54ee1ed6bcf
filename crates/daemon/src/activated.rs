//! Sockets at which a service manager listens for this process, and which it is given (sd_listen_fds(3)): it is
//! started when the first client comes.

#![expect(
    unsafe_code,
    reason = "descriptors that come with a process have no owner"
)]

use anyhow::{Context, bail};
use rustix::net::{AddressFamily, SocketType, getsockname, sockopt};
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

/// One of each kind at most.
#[derive(Debug, Default)]
pub struct Given {
    /// For its owner.
    pub unix: Option<UnixListener>,
    /// For others.
    pub tcp: Option<TcpListener>,
}

/// Takes them; those of a process that was started by hand are none, and so are they a second time.
///
/// # Errors
/// If there are others than an engine can use.
pub fn given() -> anyhow::Result<Given> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let mut given = Given::default();
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(given);
    }
    let numbers =
        sd_notify::listen_fds().context("cannot take the sockets of a service manager")?;
    for number in numbers {
        // SAFETY: the service manager has opened it for this process alone, and nobody takes it a second time.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        given.add(socket)?;
    }
    Ok(given)
}

impl Given {
    fn add(&mut self, socket: OwnedFd) -> anyhow::Result<()> {
        let is_stream = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
        let family = getsockname(&socket).map(|address| address.address_family());
        let is_one_more = match family {
            Ok(AddressFamily::UNIX) if is_stream => {
                let listener = UnixListener::from(socket);
                listener.set_nonblocking(true)?;
                self.unix.replace(listener).is_some()
            }
            Ok(AddressFamily::INET | AddressFamily::INET6) if is_stream => {
                let listener = TcpListener::from(socket);
                listener.set_nonblocking(true)?;
                self.tcp.replace(listener).is_some()
            }
            _ => true,
        };
        if is_one_more {
            bail!(
                "the service manager gives a socket that is of no use here; in the unit write one \
                 ListenStream= with a path, and one with an address if there are keys"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn one_of_each_kind_is_of_use() {
        let folder = tempfile::tempdir().unwrap();
        let unix = |name| OwnedFd::from(UnixListener::bind(folder.path().join(name)).unwrap());
        let tcp = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let mut given = Given::default();
        given.add(tcp()).unwrap();
        given.add(unix("a")).unwrap();
        assert!(given.unix.is_some() && given.tcp.is_some());
        assert!(given.add(unix("b")).is_err());
        assert!(
            Given::default()
                .add(UdpSocket::bind("127.0.0.1:0").unwrap().into())
                .is_err()
        );
        assert!(super::given().unwrap().unix.is_none());
    }
}
