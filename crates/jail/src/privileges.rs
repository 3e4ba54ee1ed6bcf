//! No user of the host's, no capabilities, no way to new ones (capabilities(7)).

use crate::namespaces::User;
use crate::{JailError, Report, must};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// User ids of jailed processes begin here, above those that hosts give to people (below 60,000),
/// to their containers (subuid(5): mostly below 0x1000_0000) and to systemd-nspawn (0x8_0000 to
/// 0x6fff_ffff), and below 2^31: the process id is added, so no two at once have the same.
const FIRST_ID: u32 = 0x7100_0000;
/// For hosts that have no such ids, as in a container: `nobody`.
const NOBODY: u32 = 65534;

/// Root becomes a user that owns nothing; others are nobody in their namespace already.
pub fn become_nobody(user: User, report: &mut Report) -> Result<(), JailError> {
    drop_bounding_set(report);
    if user != User::Root {
        return Ok(());
    }
    must("leave root's groups", set_thread_groups(&[]))?;
    let own = FIRST_ID + rustix::process::getpid().as_raw_nonzero().get() as u32;
    if become_id(own).is_err() {
        must("stop being root", become_id(NOBODY))?;
        report.miss("user of its own", &format!("shared uid {NOBODY}"));
    }
    Ok(())
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

/// Gives up all capabilities, for this process and every program that it might become.
pub fn drop_the_rest() -> Result<(), JailError> {
    must(
        "clear the ambient capabilities",
        clear_ambient_capability_set(),
    )?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    must("drop the capabilities", set_capabilities(None, none))?;
    must("set no_new_privs", set_no_new_privs(true))
}
