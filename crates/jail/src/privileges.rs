//! No user of the host's, no capabilities, no way to new ones (capabilities(7)).

use crate::namespaces::{self, User};
use crate::{JailError, Report, must};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// For hosts that have no such ids, as in a container: `nobody`.
const NOBODY: u32 = 65534;
/// The zygote's own among the users of its namespace; not 0, who is root there.
const ZYGOTE: u32 = 1;
/// The first runner's.
const FIRST_RUNNER: u32 = 2;

/// What a zygote keeps, in its own user namespace: it gives each runner another user, and ends it.
const KEPT: CapabilitySet = CapabilitySet::SETUID
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::KILL);

/// Root becomes a user that owns nothing; others are nobody in their namespace already.
pub fn become_nobody(user: User, report: &mut Report) -> Result<(), JailError> {
    drop_bounding_set(report);
    match user {
        User::Mapped | User::Plain => return Ok(()),
        User::Ranged => {
            must("leave root's groups", set_thread_groups(&[]))?;
            return must("stop being root", become_id(ZYGOTE));
        }
        User::Root => {}
    }
    must("leave root's groups", set_thread_groups(&[]))?;
    if become_id(namespaces::first_user()).is_err() {
        must("stop being root", become_id(NOBODY))?;
        report.miss("user of its own", &format!("shared uid {NOBODY}"));
    }
    Ok(())
}

/// A runner becomes a user that its siblings are not, as far as there are users: they take turns.
pub fn become_runner(number: u32) -> Result<(), JailError> {
    let users = namespaces::USERS - FIRST_RUNNER;
    must(
        "become a user of its own",
        become_id(FIRST_RUNNER + number % users),
    )?;
    must("drop the capabilities", keep(CapabilitySet::empty()))
}

fn become_id(id: u32) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// Without CAP_SETPCAP the set stays, and no_new_privs makes it void.
fn drop_bounding_set(report: &mut Report) {
    for capability in CapabilitySet::all().iter() {
        match remove_capability_from_bounding_set(capability) {
            // Newer than this kernel.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => {
                report.miss("bounding set", &error);
                return;
            }
        }
    }
}

/// Gives up all capabilities but those of a zygote in a user namespace, for this process and every
/// program that it might become.
pub fn drop_the_rest(user: User) -> Result<(), JailError> {
    must(
        "clear the ambient capabilities",
        clear_ambient_capability_set(),
    )?;
    let kept = match user {
        User::Ranged => KEPT,
        _ => CapabilitySet::empty(),
    };
    must("drop the capabilities", keep(kept))?;
    must("set no_new_privs", set_no_new_privs(true))
}

fn keep(kept: CapabilitySet) -> Result<(), Errno> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets)
}
