//! Giving a name: a generation is written into a folder that is nobody's, and then renamed.

use super::error::at;
use super::{
    DESCRIPTION_FILE, FRESH_PREFIX, REPLICA_PREFIX, Store, StoreError, Template, write_synced,
};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

impl Store {
    /// A folder for a new generation of a template: nobody's until it is published. The caller holds the lock of
    /// builds.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn begin_new(&self, name: &str) -> Result<Fresh, StoreError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanoseconds = now.unwrap_or_default().as_nanos();
        self.begin(name, &format!("{nanoseconds}-{}", std::process::id()))
    }

    /// Whether a template that is derived may be called so: another one that was derived gives way, if it is the
    /// same tenant's, one that was built only if it is to.
    ///
    /// # Errors
    /// `Taken`, `Others`, or `Name`.
    pub fn may_derive(
        &self,
        name: &str,
        force: bool,
        tenant: Option<&str>,
    ) -> Result<(), StoreError> {
        let known = match self.inspect(name) {
            Err(error @ StoreError::Name { .. }) => return Err(error),
            known => known.ok(),
        };
        match known {
            Some(known) if known.tenant.as_deref() != tenant => {
                Err(StoreError::Others { name: known.name })
            }
            Some(built) if built.derived.is_none() && !force => {
                Err(StoreError::Taken { name: built.name })
            }
            _ => Ok(()),
        }
    }

    /// A folder for a generation that is being built: nobody's until it is published. The caller
    /// holds the lock of builds.
    pub(super) fn begin(&self, name: &str, unique: &str) -> Result<Fresh, StoreError> {
        for folder in [self.names(), self.generations()] {
            fs::create_dir_all(&folder).map_err(at("make the folder", &folder))?;
        }
        let _lock = self.lock()?;
        self.sweep();
        let path = self
            .generations()
            .join(format!("{FRESH_PREFIX}{name}-{unique}"));
        fs::create_dir(&path).map_err(at("make the folder", &path))?;
        Ok(Fresh { path })
    }

    /// Makes a finished generation the template of its name, in one rename.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn publish(&self, fresh: Fresh, template: &Template) -> Result<(), StoreError> {
        let text = serde_json::to_vec_pretty(template).unwrap_or_default();
        let description = fresh.path.join(DESCRIPTION_FILE);
        write_synced(&description, &text)?;
        let unique = fresh.path.file_name().unwrap_or_default().to_string_lossy();
        let unique = unique
            .strip_prefix(FRESH_PREFIX)
            .unwrap_or(&unique)
            .to_owned();
        let flushed = File::open(&fresh.path).and_then(|folder| folder.sync_all());
        flushed.map_err(at("flush", &fresh.path))?;
        let _lock = self.lock()?;
        let target = self.generations().join(&unique);
        fs::rename(&fresh.path, &target).map_err(at("publish", &target))?;
        let link = self.names().join(format!("{FRESH_PREFIX}{unique}"));
        symlink(Path::new("../generations").join(&unique), &link).map_err(at("create", &link))?;
        let name = self.names().join(&template.name);
        fs::rename(&link, &name).map_err(at("publish", &name))?;
        for folder in [self.generations(), self.names()] {
            let opened = File::open(&folder).and_then(|folder| folder.sync_all());
            opened.map_err(at("flush", &folder))?;
        }
        self.sweep();
        Ok(())
    }
}

/// A generation that is being built. Dropped unpublished, its folder goes.
pub struct Fresh {
    pub(super) path: PathBuf,
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // After publishing there is nothing of this name any more.
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Fresh {
    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.path
    }

    /// What no other generation is called.
    pub fn unique(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        let digest = blake3::hash(name.as_encoded_bytes());
        digest.to_hex().to_string()
    }

    /// The folder of one replica.
    pub fn replica(&self, index: u32) -> PathBuf {
        self.path.join(format!("{REPLICA_PREFIX}{index}"))
    }
}
