//! Installing what is missing: Debian packages only, and only those that are not there.

use crate::command::run;
use anyhow::bail;
use std::path::Path;
use std::process::Command;

/// `(a file that the package brings, the package)`.
const NEEDED: [(&str, &str); 12] = [
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/bin/busybox", "busybox-static"),
    ("/sbin/depmod", "kmod"),
    ("/usr/bin/mmdebstrap", "mmdebstrap"),
    ("/usr/bin/newuidmap", "uidmap"),
    ("/usr/bin/mkfs.erofs", "erofs-utils"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/zstd", "zstd"),
    ("/usr/bin/pip3", "python3-pip"),
    ("/usr/bin/cc", "gcc"),
    ("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev"),
    ("/usr/share/seabios/bios-256k.bin", "seabios"),
];

/// Installs what is missing; quick when nothing is.
pub fn install() -> anyhow::Result<()> {
    let missing = missing(&NEEDED, |path| Path::new(path).exists());
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !is_root() {
        bail!(
            "these packages are missing; install them with:\n    sudo apt-get install -y {packages}"
        );
    }
    eprintln!("xtask: installing {packages}");
    apt(&["update", "-q"])?;
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(missing);
    apt(&arguments)
}

fn missing<'a>(needed: &[(&str, &'a str)], exists: impl Fn(&str) -> bool) -> Vec<&'a str> {
    let absent = needed.iter().filter(|(file, _)| !exists(file));
    absent.map(|(_, package)| *package).collect()
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output();
    output.is_ok_and(|output| output.stdout.starts_with(b"0\n"))
}

fn apt(arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("apt-get");
    command.args(arguments);
    run(command.env("DEBIAN_FRONTEND", "noninteractive"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_absent_is_installed() {
        let needed = [("/a", "one"), ("/b", "two")];
        assert_eq!(missing(&needed, |path| path == "/a"), ["two"]);
        assert!(missing(&needed, |_| true).is_empty());
    }
}
