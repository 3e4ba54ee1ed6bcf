//! Walls between sandboxes and this host that the host does not allow, in words.

use zygote_runner::control::MissingWall;

/// The main ones, each with the kernel's word.
pub fn list(walls: &[MissingWall]) -> String {
    let main = walls.iter().filter(|wall| wall.is_main);
    let named: Vec<String> = main
        .map(|MissingWall { wall, why, .. }| format!("{wall} ({why})"))
        .collect();
    named.join(", ")
}

/// What to do about them.
pub fn remedy(walls: &[MissingWall]) -> &'static str {
    let is_missing = |name| walls.iter().any(|wall| wall.is_main && wall.wall == name);
    if is_missing("filter of system calls") && !is_missing("mount namespace") {
        "Use a kernel with CONFIG_SECCOMP_FILTER, or run all the same with --allow-missing-walls"
    } else if rustix::process::geteuid().is_root() {
        "Run outside of a container, or give the container CAP_SYS_ADMIN and allow it unshare(2) \
         and mount(2) (docker run --cap-add SYS_ADMIN --security-opt seccomp=unconfined \
         --security-opt apparmor=unconfined; systemd: RestrictNamespaces=no), or run all the same \
         with --allow-missing-walls"
    } else {
        "Run as root, or allow user namespaces (sudo sysctl kernel.unprivileged_userns_clone=1 \
         user.max_user_namespaces=65536; on Ubuntu also \
         kernel.apparmor_restrict_unprivileged_userns=0), or run all the same with \
         --allow-missing-walls"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_main_walls_are_listed_and_there_is_a_way_on() {
        let wall = |wall: &str, is_main| MissingWall {
            wall: wall.into(),
            why: "no".into(),
            is_main,
        };
        let walls = [
            wall("pid namespace", true),
            wall("limit of descriptors", false),
        ];
        assert_eq!(list(&walls), "pid namespace (no)");
        assert!(remedy(&walls).contains("--allow-missing-walls"));
        let filter = [wall("filter of system calls", true)];
        assert!(remedy(&filter).contains("CONFIG_SECCOMP_FILTER"));
    }
}
