//! Namespaces (namespaces(7)): nothing of the host in sight.

#![expect(unsafe_code, reason = "unshare, fork, waitpid, prctl")]

use crate::{JailError, Report, must};
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::fs;

/// Who this process is, and what it may make.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Root of this host: can make namespaces and become anybody.
    Root,
    /// Somebody, in a user namespace.
    Mapped,
    /// Somebody, and user namespaces are not allowed.
    Plain,
}

/// The id of a [`User::Mapped`] process in its namespace: not root's, so that nothing is kept for
/// who gets hold of a file of that namespace.
const INSIDE: u32 = 65534;

/// Names of walls.
pub const USER_NAMESPACE: &str = "user namespace";
/// See above.
pub const MOUNT_NAMESPACE: &str = "mount namespace";
/// See above.
pub const NETWORK_NAMESPACE: &str = "network namespace";
/// See above.
pub const PID_NAMESPACE: &str = "pid namespace";

/// Enters a user namespace if this is not root.
pub fn user(report: &mut Report) -> User {
    if rustix::process::geteuid().is_root() {
        return User::Root;
    }
    match new_user_namespace() {
        Ok(()) => User::Mapped,
        Err(error) => {
            report.miss(USER_NAMESPACE, &error);
            User::Plain
        }
    }
}

fn new_user_namespace() -> Result<(), Errno> {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    unshare(UnshareFlags::NEWUSER)?;
    let write = |file: &str, text: String| {
        fs::write(format!("/proc/self/{file}"), text)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("{INSIDE} {uid} 1"))?;
    write("gid_map", format!("{INSIDE} {gid} 1"))
}

/// What this process is alone in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// Its mounts are nobody else's.
    pub mounts: bool,
    /// Its children will be in a process id namespace of their own.
    pub children: bool,
}

/// Enters the others.
pub fn others(report: &mut Report) -> Own {
    let mut enter = |name, flag| report.note(name, unshare(flag)).is_some();
    let mounts = enter(MOUNT_NAMESPACE, UnshareFlags::NEWNS);
    enter(NETWORK_NAMESPACE, UnshareFlags::NEWNET);
    enter("ipc namespace", UnshareFlags::NEWIPC);
    enter("uts namespace", UnshareFlags::NEWUTS);
    enter("cgroup namespace", UnshareFlags::NEWCGROUP);
    let children = enter(PID_NAMESPACE, UnshareFlags::NEWPID);
    Own { mounts, children }
}

/// Which mount namespace this process is in (namespaces(7): the same device and inode mean the
/// same namespace).
pub fn mount_namespace() -> Result<(u64, u64), Errno> {
    let stat = rustix::fs::stat("/proc/self/ns/mnt")?;
    Ok((stat.st_dev, stat.st_ino))
}

fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: the flags are namespaces only: no descriptor table is taken from a thread.
    unsafe { unshare_unsafe(flags) }
}

/// How a keeper ends that cannot tell how the kept one has ended.
const LOST: i32 = 125;

/// Returns in a child, the first process of its namespace: when that ends, the kernel ends the
/// rest. The caller's process becomes its keeper.
pub fn first_of_its_own() -> Result<(), JailError> {
    // SAFETY: sets how one signal is met. Inherited as ignored, it would hide the child's end.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    // SAFETY: this process has one thread, so the child finds every lock free.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: sets one attribute of this process.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            Ok(())
        }
        child if child > 0 => keep(child),
        _ => must(
            "fork into the process id namespace",
            Err(Errno::from_raw_os_error(
                std::io::Error::last_os_error()
                    .raw_os_error()
                    .unwrap_or(libc::EIO),
            )),
        ),
    }
}

/// Holds nothing, waits, and ends as the child has ended.
fn keep(child: libc::pid_t) -> ! {
    // SAFETY: this process uses none of its objects again, and ends without dropping them.
    unsafe {
        libc::close_range(0, u32::MAX, 0);
        let mut status = 0;
        while libc::waitpid(child, &raw mut status, 0) < 0 {
            if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                libc::_exit(LOST);
            }
        }
        let code = if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            128 + libc::WTERMSIG(status)
        };
        libc::_exit(code)
    }
}
