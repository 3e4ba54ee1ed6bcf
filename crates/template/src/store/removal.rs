//! Taking a name away, and with it what nothing refers to any more.

use super::error::at;
use super::{
    FRESH_PREFIX, GENERATIONS, Store, StoreError, base_folder, collect_digests, collect_pieces,
    disk_bytes, entries,
};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What removing a template has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// What its own files took.
    pub freed_bytes: u64,
    /// What its image takes, if it stays because others use it, or the next build of its recipe.
    pub kept_bytes: u64,
}

impl Store {
    /// Removes a template, and with `derived` all that differ from its files. Sandboxes that run from it go on.
    ///
    /// # Errors
    /// See [`StoreError`]; `Needed` if there are such and they are to stay.
    pub fn remove(&self, name: &str, derived: bool) -> Result<Removal, StoreError> {
        let by = self.derived_from(name)?;
        if !derived && !by.is_empty() {
            let name = name.to_owned();
            return Err(StoreError::Needed { name, by });
        }
        let mut all = Removal {
            freed_bytes: 0,
            kept_bytes: 0,
        };
        for name in by.iter().map(String::as_str).chain([name]) {
            let one = self.remove_one(name)?;
            all.freed_bytes += one.freed_bytes;
            all.kept_bytes = all.kept_bytes.max(one.kept_bytes);
        }
        Ok(all)
    }

    /// Those of one's own that differ from the files of a template.
    fn derived_from(&self, name: &str) -> Result<Vec<String>, StoreError> {
        let generation = self.generation(name)?;
        let base = generation.file_name();
        let differs = |other: &String| {
            let found = self.generation(other);
            found.is_ok_and(|found| bases_of(&found).iter().any(|own| Some(&**own) == base))
        };
        Ok(self.own_names().into_iter().filter(differs).collect())
    }

    fn remove_one(&self, name: &str) -> Result<Removal, StoreError> {
        let generation = self.generation(name)?;
        let link = self.names().join(name);
        if link.symlink_metadata().is_err() {
            let state = self.shared.clone().unwrap_or_default();
            let name = name.to_owned();
            return Err(StoreError::Shared { name, state });
        }
        let _lock = self.lock()?;
        let own = disk_bytes(&generation);
        let mut images = HashSet::new();
        collect_pieces(&generation, &mut images);
        fs::remove_file(&link).map_err(at("remove", &link))?;
        // While something is built, what is unused cannot be told: the build will sweep.
        if let Some(_alone) = self.try_lock_builds() {
            self.sweep();
        }
        let stay = images.iter().map(|digest| self.pieces().join(digest));
        let kept_bytes = stay
            .filter_map(|path| path.metadata().ok())
            .map(|meta| meta.blocks() * 512);
        Ok(Removal {
            freed_bytes: if generation.exists() { 0 } else { own },
            kept_bytes: kept_bytes.sum(),
        })
    }

    /// Removes what nothing refers to: replaced generations, what killed builds have left, images
    /// that neither a template nor the cache's index names. Called under the lock. What cannot be
    /// removed now is removed another time.
    pub(super) fn sweep(&self) {
        let mut used = HashSet::new();
        for entry in entries(&self.names()) {
            let fresh = entry
                .file_name()
                .to_string_lossy()
                .starts_with(FRESH_PREFIX);
            match fs::read_link(entry.path()) {
                Ok(target) if !fresh => {
                    used.insert(target.file_name().map(ToOwned::to_owned));
                }
                _ => drop(fs::remove_file(entry.path())),
            }
        }
        // Those that paused sandboxes differ from; of one that cannot be read nobody knows which.
        let bases: Option<HashSet<_>> = entries(&self.sandboxes())
            .map(|entry| base_of(&entry.path()))
            .collect();
        let Some(bases) = bases else { return };
        used.extend(bases.into_iter().map(Some));
        let derived: Vec<_> = used
            .iter()
            .flatten()
            .flat_map(|name| bases_of(&self.generations().join(name)))
            .collect();
        used.extend(derived.into_iter().map(Some));
        for entry in entries(&self.generations()) {
            if !used.contains(&Some(entry.file_name())) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let mut digests = self.used_pieces();
        for index in entries(&self.cache().join("rootfs")) {
            collect_digests(&index.path(), &mut digests);
        }
        for piece in entries(&self.pieces()) {
            if !digests.contains(&piece.file_name().to_string_lossy().into_owned()) {
                let _ = fs::remove_file(piece.path());
            }
        }
    }
}

/// The generation that a paused sandbox differs from.
fn base_of(sandbox: &Path) -> Option<OsString> {
    base_generation(&sandbox.join("snapshot"))
}

/// The generations that the snapshots of one differ from.
fn bases_of(generation: &Path) -> Vec<OsString> {
    entries(generation)
        .filter_map(|replica| base_generation(&replica.path()))
        .collect()
}

fn base_generation(snapshot: &Path) -> Option<OsString> {
    let folder = base_folder(snapshot)?;
    let generation = folder.strip_prefix(GENERATIONS).ok()?.components().next()?;
    Some(generation.as_os_str().to_owned())
}
