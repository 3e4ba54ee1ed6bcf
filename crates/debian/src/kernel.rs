//! Debian's kernels, fetched by apt and unpacked, never installed.
//!
//! Below the cache folder: one folder a package with its unpacked content, and one link a flavour
//! that names the package in use. Each is published by a rename.

use crate::command::{CommandError, output};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which build of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Everything as modules: for the emulated host.
    Generic,
    /// Small, for virtual machines: for guests.
    Cloud,
}

impl Flavour {
    /// Metapackages, the preferred one first.
    fn packages(self) -> [&'static str; 2] {
        match self {
            Flavour::Generic => ["linux-image-6.12-amd64", "linux-image-amd64"],
            Flavour::Cloud => ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"],
        }
    }

    fn link(self) -> &'static str {
        match self {
            Flavour::Generic => "generic",
            Flavour::Cloud => "cloud",
        }
    }
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// Verb.
        operation: &'static str,
        /// Object.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// A tool.
    #[error(transparent)]
    Tool(#[from] CommandError),
    /// apt's lists are missing or older than the archive, and cannot be renewed here.
    #[error("apt's package lists must be renewed; run: sudo apt-get update")]
    Update(#[source] CommandError),
    /// apt does not know any of them.
    #[error("apt knows no package {names}; update its lists with: sudo apt-get update")]
    Unknown {
        /// What was looked for.
        names: String,
    },
    /// The package is not what it should be.
    #[error("the package {package} has no {what}")]
    Content {
        /// Which.
        package: String,
        /// What is missing.
        what: String,
    },
}

fn at<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> KernelError + 'a {
    move |source| KernelError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// Where the package is unpacked; modules lie in `lib/modules/RELEASE`.
    pub root: PathBuf,
}

/// The kernel of this flavour: from the cache, else fetched. Several at once wait for each other.
///
/// # Errors
/// See [`KernelError`].
pub fn fetch(
    cache: &Path,
    flavour: Flavour,
    progress: &mut dyn FnMut(&str),
) -> Result<Kernel, KernelError> {
    if let Some(kernel) = cached(cache, flavour) {
        return Ok(kernel);
    }
    fs::create_dir_all(cache).map_err(at("make the folder", cache))?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(at("create", &lock_path))?;
    lock.lock().map_err(at("lock", &lock_path))?;
    if let Some(kernel) = cached(cache, flavour) {
        return Ok(kernel);
    }
    sweep(cache);
    let package = resolve(flavour, progress)?;
    let target = cache.join(&package);
    if !target.exists() {
        progress(&format!("fetching {package}"));
        let fresh = cache.join(format!("new-{package}"));
        fs::create_dir(&fresh).map_err(at("make the folder", &fresh))?;
        unpack(&package, &fresh, progress)?;
        fs::rename(&fresh, &target).map_err(at("publish", &target))?;
    }
    let link = cache.join(format!("new-link-{}", flavour.link()));
    symlink(&package, &link).map_err(at("create", &link))?;
    fs::rename(&link, cache.join(flavour.link())).map_err(at("publish", &link))?;
    cached(cache, flavour).ok_or(KernelError::Content {
        package,
        what: "kernel image and modules".into(),
    })
}

fn cached(cache: &Path, flavour: Flavour) -> Option<Kernel> {
    let root = fs::canonicalize(cache.join(flavour.link())).ok()?;
    let release = fs::read_dir(root.join("lib/modules")).ok()?.next()?.ok()?;
    let release = release.file_name().to_string_lossy().into_owned();
    let image = root.join(format!("boot/vmlinuz-{release}"));
    image.exists().then_some(Kernel {
        release,
        image,
        root,
    })
}

/// Removes what a killed run has left. Called under the lock.
fn sweep(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("new-") {
            // What cannot be removed now is in the way later, and is told then.
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
}

/// The newest real package behind the flavour's metapackages.
fn resolve(flavour: Flavour, progress: &mut dyn FnMut(&str)) -> Result<String, KernelError> {
    let find = || {
        let mut found = flavour.packages().into_iter().map(dependency);
        found.find_map(Result::transpose).transpose()
    };
    if let Some(package) = find()? {
        return Ok(package);
    }
    update(progress)?;
    find()?.ok_or(KernelError::Unknown {
        names: flavour.packages().join(" or "),
    })
}

/// apt's lists are missing or old. Only root can renew them.
fn update(progress: &mut dyn FnMut(&str)) -> Result<(), KernelError> {
    progress("updating apt's lists");
    output(Command::new("apt-get").args(["update", "-q"]), "apt").map_err(KernelError::Update)?;
    Ok(())
}

fn dependency(metapackage: &str) -> Result<Option<String>, KernelError> {
    let mut command = Command::new("apt-cache");
    command.args(["depends", "--no-recommends", metapackage]);
    match output(&command, "apt") {
        Ok(text) => Ok(parse_dependency(&String::from_utf8_lossy(&text))),
        // It has never heard of the package.
        Err(CommandError::Failed { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn parse_dependency(text: &str) -> Option<String> {
    let names = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    let mut images = names.filter(|name| name.starts_with("linux-image-"));
    images.next().map(|name| name.trim().to_owned())
}

fn unpack(package: &str, into: &Path, progress: &mut dyn FnMut(&str)) -> Result<(), KernelError> {
    let download = || {
        let mut command = Command::new("apt-get");
        command
            .args(["download", "-q", "-o", "APT::Sandbox::User=root", package])
            .current_dir(into);
        output(&command, "apt")
    };
    if download().is_err() {
        // The lists may be older than the archive.
        update(progress)?;
        download()?;
    }
    let archive = fs::read_dir(into)
        .map_err(at("read", into))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| KernelError::Content {
            package: package.to_owned(),
            what: "archive".into(),
        })?;
    progress(&format!("unpacking {package}"));
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").arg(&archive).arg(into);
    output(&command, "dpkg")?;
    fs::remove_file(&archive).map_err(at("remove", &archive))?;
    let release = package.trim_start_matches("linux-image-");
    let mut command = Command::new("/sbin/depmod");
    command.arg("--basedir").arg(into).arg(release);
    output(&command, "kmod")?;
    Ok(())
}

impl Kernel {
    /// Files of these modules and of all that they need, each after what it needs. Names of
    /// modules that are built in give nothing.
    ///
    /// # Errors
    /// If a module is neither there nor built in.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>, KernelError> {
        let folder = self.root.join("lib/modules").join(&self.release);
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(at("read", &path))
        };
        let index = read("modules.dep")?;
        let built_in = read("modules.builtin")?;
        let paths = order(&index, &built_in, names).map_err(|name| KernelError::Content {
            package: self.release.clone(),
            what: format!("module {name}"),
        })?;
        Ok(paths.into_iter().map(|path| folder.join(path)).collect())
    }
}

/// `kernel/fs/erofs/erofs.ko.xz` is `erofs`; dashes and underscores are the same to modprobe.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// Paths in load order from the text of modules.dep (`path: what it needs, the last first`).
fn order(index: &str, built_in: &str, names: &[&str]) -> Result<Vec<String>, String> {
    let lines: Vec<(&str, &str)> = index.lines().filter_map(|l| l.split_once(':')).collect();
    let built_in: HashSet<String> = built_in.lines().map(name_of).collect();
    let mut paths: Vec<String> = Vec::new();
    for name in names {
        let name = name.replace('-', "_");
        let Some((path, needs)) = lines.iter().find(|(path, _)| name_of(path) == name) else {
            if built_in.contains(&name) {
                continue;
            }
            return Err(name);
        };
        let needs = needs.split_whitespace().rev();
        for path in needs.chain([*path]) {
            if !paths.iter().any(|known| known == path) {
                paths.push(path.to_owned());
            }
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "kernel/a/base.ko.xz:\nkernel/b/mid-dle.ko.xz: kernel/a/base.ko.xz\n\
        kernel/c/top.ko.xz: kernel/b/mid-dle.ko.xz kernel/a/base.ko.xz\n";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let paths = order(INDEX, "", &["top", "mid_dle"]).unwrap();
        let names: Vec<String> = paths.iter().map(|path| name_of(path)).collect();
        assert_eq!(names, ["base", "mid_dle", "top"]);
    }

    #[test]
    fn a_built_in_module_gives_nothing_and_an_unknown_one_is_named() {
        let built_in = "kernel/d/virtio_pci.ko\n";
        assert!(order(INDEX, built_in, &["virtio-pci"]).unwrap().is_empty());
        assert_eq!(order(INDEX, built_in, &["nope"]).unwrap_err(), "nope");
    }

    #[test]
    fn the_real_package_is_found_behind_the_metapackage() {
        let text = "linux-image-6.12-amd64\n  Depends: linux-image-6.12.1+deb12-amd64\n";
        assert_eq!(
            parse_dependency(text).unwrap(),
            "linux-image-6.12.1+deb12-amd64"
        );
        assert_eq!(parse_dependency("W: nothing\n"), None);
    }

    #[test]
    fn what_is_cached_needs_no_network_and_leftovers_are_swept() {
        let cache = tempfile::tempdir().unwrap();
        assert!(cached(cache.path(), Flavour::Cloud).is_none());
        let root = cache.path().join("linux-image-1-cloud");
        fs::create_dir_all(root.join("lib/modules/1-cloud")).unwrap();
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::write(root.join("boot/vmlinuz-1-cloud"), "").unwrap();
        symlink("linux-image-1-cloud", cache.path().join("cloud")).unwrap();
        fs::create_dir(cache.path().join("new-broken")).unwrap();
        let kernel = fetch(cache.path(), Flavour::Cloud, &mut |_| panic!("fetched")).unwrap();
        assert_eq!(kernel.release, "1-cloud");
        sweep(cache.path());
        assert!(!cache.path().join("new-broken").exists() && root.exists());
    }
}
