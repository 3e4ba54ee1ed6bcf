//! Namespaces (namespaces(7)): nothing of the host in sight.

#![expect(unsafe_code, reason = "unshare, fork, waitpid, prctl")]

use crate::{JailError, Report, must};
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::fs;

/// Who this process is, and what it may make.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Root of this host, where user namespaces are not allowed: can make the others and become
    /// anybody.
    Root,
    /// Was root, and is in a user namespace whose [`USERS`] are nobody's on the host.
    Ranged,
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

/// Users of a [`User::Ranged`] namespace: its zygote, and one for each of its runners, in turn.
pub const USERS: u32 = 256;
/// On the host those users begin here, above those that hosts give to people (below 60,000), to
/// their containers (subuid(5): mostly below 0x1000_0000) and to systemd-nspawn (0x8_0000 to
/// 0x6fff_ffff): for each process that there can be (`PID_MAX_LIMIT`, 2^22) a range of its own.
const FIRST_USER: u32 = 0x7000_0000;

/// The first of this process's users on the host.
pub fn first_user() -> u32 {
    FIRST_USER + rustix::process::getpid().as_raw_nonzero().get() as u32 * USERS
}

/// Enters a user namespace.
pub fn user(report: &mut Report) -> User {
    if rustix::process::geteuid().is_root() {
        return match new_range() {
            Ok(()) => User::Ranged,
            Err(error) => {
                report.miss("user of each sandbox's own", &error);
                User::Root
            }
        };
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

/// Has the ends of children told. Inherited as ignored, SIGCHLD would make them vanish unseen
/// (sigaction(2)).
pub fn see_children() {
    // SAFETY: sets how one signal is met.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
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

/// Only a process outside may give a namespace a range of users, so that one is made for it.
fn new_range() -> Result<(), Errno> {
    let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let (entered, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (first, pid) = (first_user(), std::process::id());
    // Once inside there is no way back. A container may not have such users.
    for map in ["uid_map", "gid_map"] {
        let map = fs::read_to_string(format!("/proc/self/{map}")).map_err(io)?;
        if !is_mapped(&map, first, USERS) {
            return Err(Errno::INVAL);
        }
    }
    // SAFETY: this process has one thread, so the child finds every lock free.
    match unsafe { libc::fork() } {
        0 => {
            drop(told);
            let mut byte = [0; 1];
            // Nothing comes if there is no namespace.
            let mapped = matches!(rustix::io::read(&entered, &mut byte), Ok(1))
                && ["uid_map", "gid_map"].iter().all(|file| {
                    let map = format!("0 {first} {USERS}");
                    fs::write(format!("/proc/{pid}/{file}"), map).is_ok()
                });
            // SAFETY: ends the child without running what the parent has registered for its end.
            unsafe { libc::_exit(i32::from(!mapped)) }
        }
        child if child > 0 => {
            let result = unshare(UnshareFlags::NEWUSER);
            if result.is_ok() {
                rustix::io::write(&told, b"!")?;
            }
            drop(told);
            let status = wait_for(child);
            result?;
            match status {
                Some(status) if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 => Ok(()),
                _ => Err(Errno::PERM),
            }
        }
        _ => Err(io(std::io::Error::last_os_error())),
    }
}

/// Whether a user namespace has all of these ids (user_namespaces(7): lines of the first id inside,
/// the first outside, and how many).
fn is_mapped(map: &str, first: u32, count: u32) -> bool {
    let (first, end) = (u64::from(first), u64::from(first) + u64::from(count));
    map.lines().any(|line| {
        let mut words = line.split_whitespace().map(str::parse::<u64>);
        match (words.next(), words.next(), words.next()) {
            (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) => {
                inside <= first && end <= inside + count
            }
            _ => false,
        }
    })
}

/// The wait status of a child, once it has ended; `None` if there is no such child.
fn wait_for(child: libc::pid_t) -> Option<libc::c_int> {
    let mut status = 0;
    // SAFETY: writes one integer. A child that works waits for nobody but us.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return None;
        }
    }
    Some(status)
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
        libc::_exit(match wait_for(child) {
            Some(status) if libc::WIFEXITED(status) => libc::WEXITSTATUS(status),
            Some(status) => 128 + libc::WTERMSIG(status),
            None => LOST,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_that_a_container_lacks_are_not_used() {
        assert!(is_mapped(
            "         0          0 4294967295\n",
            0x7000_0000,
            USERS
        ));
        let rootless = "0 1000 1\n1 100000 65536\n";
        assert!(!is_mapped(rootless, 0x7000_0000, USERS));
        assert!(is_mapped(rootless, 65_000, 537) && !is_mapped(rootless, 65_000, 538));
        assert!(!is_mapped("", 0, 1) && !is_mapped("0 0\n", 0, 1));
    }
}
