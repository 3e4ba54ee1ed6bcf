//! An empty, read-only root: no path leads anywhere.

use crate::Report;
use crate::namespaces::{Own, mount_namespace};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};

/// Any folder that there is on every host; it is covered in this mount namespace alone.
const COVERED: &str = "/proc";

/// The wall's name.
pub const EMPTY_ROOT: &str = "empty root";

/// Changes nothing unless this process has left the mount namespace `before`: in a namespace that it
/// shares, every process would lose its root (pivot_root(2)).
pub fn empty(before: Result<(u64, u64), Errno>, own: Own, report: &mut Report) {
    let is_own = || Ok(own.mounts && mount_namespace()? != before?);
    let emptied = match is_own() {
        Ok(true) => replace(),
        Ok(false) => Err(Errno::PERM),
        Err(error) => Err(error),
    };
    report.note(EMPTY_ROOT, emptied);
}

fn replace() -> Result<(), Errno> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(
        "none",
        COVERED,
        "tmpfs",
        flags,
        c"size=4k,nr_inodes=2,mode=0555",
    )?;
    chdir(COVERED)?;
    // pivot_root(2): the old root goes under the new one, and is taken away from there.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    mount_remount("/", flags | MountFlags::RDONLY, "")
}
