//! What the store takes on disk, and getting back what nothing needs.

use crate::store::{Store, StoreError, disk_bytes, entries};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A part of what the store takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPart {
    /// What it is, for people.
    pub what: String,
    /// Bytes on disk, holes not counted.
    pub bytes: u64,
    /// Of those, what `prune` gets back; with `all`, all that is no template's.
    pub reclaimable_bytes: u64,
}

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// What they took.
    pub bytes: u64,
}

/// What to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prune {
    /// Also what the next build, run or lab makes again by itself: all but templates.
    pub all: bool,
    /// Only tell.
    pub dry_run: bool,
}

impl Store {
    /// What it takes, part by part.
    pub fn usage(&self) -> Vec<DiskPart> {
        let cache = self.cache();
        let templates = self.own_names().into_iter();
        let mut parts: Vec<DiskPart> = templates
            .map(|name| DiskPart {
                bytes: self.generation_bytes(&name),
                reclaimable_bytes: 0,
                what: format!("template {name}"),
            })
            .collect();
        parts.push(DiskPart {
            what: "earlier builds, which others differ from".to_owned(),
            bytes: self.unnamed_bytes(),
            reclaimable_bytes: 0,
        });
        let unneeded = self.unneeded(false);
        let folders = [
            ("root images", self.pieces()),
            ("paused sandboxes", self.sandboxes()),
            ("kernels", cache.join("kernels")),
            ("lab", cache.join("lab")),
            ("logs", self.logs()),
            ("builds", cache.join("rootfs")),
            ("layers", cache.join("layers")),
            ("verifications", self.stamps()),
        ];
        parts.extend(folders.map(|(what, folder)| {
            let within = unneeded.iter().filter(|path| path.starts_with(&folder));
            DiskPart {
                what: what.to_owned(),
                bytes: disk_bytes(&folder),
                reclaimable_bytes: within.map(|path| taken(path)).sum(),
            }
        }));
        parts
    }

    /// Removes what nothing needs. The engine's own log is left to the engine.
    ///
    /// # Errors
    /// If something is being built.
    pub fn prune(&self, how: Prune) -> Result<Pruned, StoreError> {
        if !self.state_dir().is_dir() {
            return Ok(Pruned::default());
        }
        let Some(_alone) = self.try_lock_builds() else {
            return Err(StoreError::Building);
        };
        let _lock = self.lock()?;
        let paths = self.unneeded(how.all);
        let bytes = paths.iter().map(|path| taken(path)).sum();
        if !how.dry_run {
            for path in &paths {
                remove(path)?;
            }
        }
        Ok(Pruned { paths, bytes })
    }

    /// What nothing needs; with `all`, also what is made again by itself.
    fn unneeded(&self, all: bool) -> Vec<PathBuf> {
        let (cache, used) = (self.cache(), self.used_pieces());
        let mut found = paths(&self.pieces());
        found.retain(|piece| !used.contains(&name_of(piece)));
        let indexes = paths(&cache.join("rootfs")).into_iter();
        found
            .extend(indexes.filter(|index| !is_lock(index) && (all || !is_index_of(index, &used))));
        // The next build of a derived template makes them again.
        let layers = paths(&cache.join("layers")).into_iter();
        found.extend(layers.filter(|path| !is_lock(path)));
        let (kernels, lab) = (cache.join("kernels"), cache.join("lab"));
        if all {
            found.extend([kernels, lab, self.stamps(), cache.join("kvm.json")]);
        } else {
            found.extend(old_kernels(&kernels));
            found.extend(old_lab_files(&lab));
        }
        found.extend(old_logs(&self.logs()));
        found.retain(|path| path.symlink_metadata().is_ok());
        found
    }

    fn logs(&self) -> PathBuf {
        self.state_dir().join("log")
    }
}

fn remove(path: &Path) -> Result<(), StoreError> {
    let removed = match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return Ok(()),
    };
    removed.map_err(|source| StoreError::File {
        operation: "remove",
        path: path.to_owned(),
        source,
    })
}

fn taken(path: &Path) -> u64 {
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => disk_bytes(path),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    }
}

fn paths(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = entries(folder).map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn is_lock(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "lock")
}

/// Whether a file of the cache names an image that is used.
fn is_index_of(index: &Path, used: &HashSet<String>) -> bool {
    let text = fs::read_to_string(index).unwrap_or_default();
    let digest = text.split_whitespace().next();
    digest.is_some_and(|digest| used.contains(digest))
}

/// Kernels that no link leads to any more.
fn old_kernels(folder: &Path) -> Vec<PathBuf> {
    let all = paths(folder);
    let linked: HashSet<String> = all
        .iter()
        .filter_map(|path| fs::read_link(path).ok())
        .map(|target| name_of(&target))
        .collect();
    let is_old =
        |path: &PathBuf| path.is_dir() && !path.is_symlink() && !linked.contains(&name_of(path));
    all.into_iter().filter(is_old).collect()
}

/// Of each kind all but the newest: the others are those of earlier versions.
fn old_lab_files(folder: &Path) -> Vec<PathBuf> {
    let mut old = Vec::new();
    for kind in ["initramfs-", "vmlinux-"] {
        let mut own: Vec<PathBuf> = paths(folder);
        own.retain(|path| name_of(path).starts_with(kind));
        own.sort_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok());
        own.pop();
        old.extend(own);
    }
    old
}

/// Logs that have been set aside.
fn old_logs(folder: &Path) -> Vec<PathBuf> {
    let mut old = paths(folder);
    old.retain(|path| path.extension().is_none_or(|end| end != "log"));
    old
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_owned());
        for path in [
            "pieces",
            "cache/rootfs",
            "cache/kernels/old",
            "cache/kernels/new",
            "cache/lab",
            "log",
        ] {
            fs::create_dir_all(folder.path().join(path)).unwrap();
        }
        std::os::unix::fs::symlink("new", folder.path().join("cache/kernels/cloud")).unwrap();
        let digest = "0a".repeat(32);
        fs::write(store.pieces().join(&digest), [1; 8192]).unwrap();
        fs::write(
            store.cache().join("rootfs/key"),
            format!("{digest} 8192\n{{}}\n"),
        )
        .unwrap();
        fs::write(folder.path().join("log/engine.log"), "x").unwrap();
        fs::write(folder.path().join("log/engine.log.1"), "x").unwrap();
        (folder, store)
    }

    #[test]
    fn what_nothing_needs_is_told_first_and_then_removed() {
        let (folder, store) = store();
        let how = |all, dry_run| Prune { all, dry_run };
        let told = store.prune(how(false, true)).unwrap();
        assert!(told.bytes >= 8192, "{told:?}");
        assert_eq!(store.pieces().read_dir().unwrap().count(), 1);
        assert_eq!(store.prune(how(false, false)).unwrap(), told);
        assert_eq!(store.pieces().read_dir().unwrap().count(), 0);
        assert!(!folder.path().join("cache/kernels/old").exists());
        assert!(folder.path().join("cache/kernels/new").exists());
        assert!(folder.path().join("log/engine.log").exists());
        assert!(!folder.path().join("log/engine.log.1").exists());
        let nothing = store.prune(how(false, false)).unwrap();
        assert_eq!(nothing, Pruned::default());
        store.prune(how(true, false)).unwrap();
        let left: Vec<_> = paths(&store.cache());
        assert!(left.iter().all(|path| path.ends_with("rootfs")), "{left:?}");
        let usage = store.usage();
        assert!(
            usage.iter().all(|part| part.reclaimable_bytes == 0),
            "{usage:?}"
        );
    }

    #[test]
    fn while_something_is_built_nothing_is_removed() {
        let (_folder, store) = store();
        let _building = store.lock_builds(&mut |_| {}).unwrap();
        let how = Prune {
            all: false,
            dry_run: false,
        };
        assert!(matches!(store.prune(how), Err(StoreError::Building)));
    }

    #[test]
    fn what_it_takes_is_told_part_by_part() {
        let (_folder, store) = store();
        let usage = store.usage();
        let images = usage
            .iter()
            .find(|part| part.what == "root images")
            .unwrap();
        assert_eq!(images.bytes, images.reclaimable_bytes);
        assert!(images.bytes >= 8192);
    }
}
