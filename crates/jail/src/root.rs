//! An empty, read-only root: no path leads anywhere.

use crate::Report;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};

/// Any folder that there is on every host; it is covered in this mount namespace alone.
const COVERED: &str = "/proc";

/// Needs a mount namespace of its own.
pub fn empty(report: &mut Report) {
    report.note("empty root", replace());
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
