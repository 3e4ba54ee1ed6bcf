//! Installing what has been built, taking it away again, and packing it as a Debian package.

use crate::command::{ask, run};
use anyhow::{Context, bail};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = "target/release/zygote";
const AGENT: &str = "target/release/zygote-agent";
/// What a Debian host needs to build templates and to run them where it has no KVM.
const DEPENDS: &str = "libc6, busybox-static, erofs-utils, kmod, mmdebstrap, qemu-system-x86, seabios, \
                       uidmap, xz-utils, zstd";
const RECOMMENDS: &str = "python3-pip";

/// A file to install.
struct Item {
    /// Below the prefix.
    path: PathBuf,
    content: Vec<u8>,
    mode: u32,
}

impl Item {
    fn new(path: impl Into<PathBuf>, content: Vec<u8>, mode: u32) -> Self {
        Self {
            path: path.into(),
            content,
            mode,
        }
    }
}

/// Installs below `prefix`; with `root`, into a folder that will be `/` elsewhere.
pub fn install(prefix: &Path, root: Option<&Path>) -> anyhow::Result<()> {
    for item in items(prefix)? {
        let path = within(root, &prefix.join(&item.path));
        let folder = path.parent().unwrap_or(Path::new("/"));
        let cannot = || {
            format!(
                "cannot install {}; as root: sudo make install",
                path.display()
            )
        };
        fs::create_dir_all(folder).with_context(cannot)?;
        // A program that runs is replaced, not written to.
        let fresh = path.with_extension("fresh");
        fs::write(&fresh, &item.content).with_context(cannot)?;
        fs::set_permissions(&fresh, Permissions::from_mode(item.mode)).with_context(cannot)?;
        fs::rename(&fresh, &path).with_context(cannot)?;
        // What is packed is no change of this machine.
        if root.is_none() {
            eprintln!("xtask: {}", path.display());
        }
    }
    Ok(())
}

/// Removes what [`install`] has put there, and nothing else.
pub fn uninstall(prefix: &Path, root: Option<&Path>) -> anyhow::Result<()> {
    for item in items(prefix)? {
        let path = within(root, &prefix.join(&item.path));
        match fs::remove_file(&path) {
            Ok(()) => eprintln!("xtask: removed {}", path.display()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => bail!("cannot remove {}: {error}", path.display()),
        }
    }
    // Ours alone: they stay if something else lies there.
    for folder in [
        "lib/zygote",
        "share/doc/zygote",
        "share/zygote/grafana",
        "share/zygote",
    ] {
        let _ = fs::remove_dir(within(root, &prefix.join(folder)));
    }
    eprintln!(
        "xtask: templates stay: zygote template rm, zygote prune --all, or remove the state directory"
    );
    Ok(())
}

fn within(root: Option<&Path>, path: &Path) -> PathBuf {
    match root {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    }
}

fn items(prefix: &Path) -> anyhow::Result<Vec<Item>> {
    let read =
        |path: &str| fs::read(path).with_context(|| format!("cannot read {path}; run: make build"));
    let mut items = vec![
        Item::new("bin/zygote", read(PROGRAM)?, 0o755),
        Item::new("lib/zygote/zygote-agent", read(AGENT)?, 0o755),
        Item::new("share/doc/zygote/README.md", read("README.md")?, 0o644),
        Item::new("share/doc/zygote/copyright", read("LICENSE")?, 0o644),
    ];
    let unit = fs::read_to_string("packaging/zygote.service").context("cannot read the unit")?;
    let unit = unit.replace("@PREFIX@", &prefix.display().to_string());
    items.push(Item::new(
        "lib/systemd/system/zygote.service",
        unit.into(),
        0o644,
    ));
    for (from, to) in [
        (
            "packaging/zygote.socket",
            "lib/systemd/system/zygote.socket",
        ),
        (
            "packaging/grafana/zygote.json",
            "share/zygote/grafana/zygote.json",
        ),
    ] {
        items.push(Item::new(to, read(from)?, 0o644));
    }
    let completions = [
        ("bash", "share/bash-completion/completions/zygote"),
        ("zsh", "share/zsh/site-functions/_zygote"),
        ("fish", "share/fish/vendor_completions.d/zygote.fish"),
    ];
    for (shell, path) in completions {
        let script = ask(Command::new(PROGRAM).args(["completions", shell]))?;
        items.push(Item::new(path, script.stdout, 0o644));
    }
    items.extend(manual()?);
    Ok(items)
}

/// The manual's pages, as the program writes them.
fn manual() -> anyhow::Result<Vec<Item>> {
    let folder = Path::new("target/man");
    let _ = fs::remove_dir_all(folder);
    run(Command::new(PROGRAM).arg("manual").arg(folder))?;
    let mut pages = Vec::new();
    for entry in fs::read_dir(folder).context("cannot read the manual")? {
        let path = entry.context("cannot read the manual")?.path();
        let name = path.file_name().unwrap_or_default();
        let content = fs::read(&path).context("cannot read the manual")?;
        pages.push(Item::new(
            Path::new("share/man/man1").join(name),
            content,
            0o644,
        ));
    }
    Ok(pages)
}

/// A Debian package of what has been built, in `target/dist`.
pub fn dist() -> anyhow::Result<()> {
    let tree = Path::new("target/dist/tree");
    let _ = fs::remove_dir_all(tree);
    install(Path::new("/usr"), Some(tree))?;
    let version = env!("CARGO_PKG_VERSION");
    let control = format!(
        "Package: zygote\nVersion: {version}\nArchitecture: amd64\nSection: admin\nPriority: optional\n\
         Maintainer: the authors of Zygote <zygote@localhost>\nDepends: {DEPENDS}\n\
         Recommends: {RECOMMENDS}\n\
         Description: forks of virtual machines, for untrusted code\n \
         A microVM is booted once, with Python and numpy loaded, and snapshotted whole. Every run\n \
         after that is a new KVM virtual machine over a copy-on-write mapping of that snapshot.\n"
    );
    fs::create_dir_all(tree.join("DEBIAN")).context("cannot make the package")?;
    fs::write(tree.join("DEBIAN/control"), control).context("cannot make the package")?;
    let package = format!("target/dist/zygote_{version}_amd64.deb");
    let mut pack = Command::new("dpkg-deb");
    pack.args(["--root-owner-group", "--build"])
        .arg(tree)
        .arg(&package);
    run(&mut pack)?;
    eprintln!("xtask: {package}; to install it: sudo apt-get install ./{package}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_lies_below_its_root() {
        let path = within(Some(Path::new("/tmp/tree")), Path::new("/usr/bin/zygote"));
        assert_eq!(path, Path::new("/tmp/tree/usr/bin/zygote"));
        assert_eq!(within(None, Path::new("/usr/x")), Path::new("/usr/x"));
    }
}
