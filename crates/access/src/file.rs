//! The file that keys are kept in. It is read by engines, written by the command line, and replaced whole: a
//! reader sees all of a change or nothing of it.

use crate::key::{Key, NewKey};
use crate::secret::Secret;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Of the format.
const VERSION: u32 = 1;
/// Most keys.
const KEYS_MAX: usize = 10_000;
/// Bits of a mode by which others may write.
const OTHERS_WRITE: u32 = 0o022;

/// Why keys cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
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
    /// Its content.
    #[error("{} is no file of keys: {why}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Others could put keys into it.
    #[error("{} can be written by others, so its keys count for nothing", .0.display())]
    Writable(PathBuf),
    /// There is no such key.
    #[error("there is no key {0}")]
    NotFound(String),
    /// There are too many.
    #[error("there are {KEYS_MAX} keys, as many as may be")]
    TooMany,
    /// What is asked for cannot be.
    #[error("{0}")]
    Bad(String),
}

/// The file.
#[derive(Clone, Debug)]
pub struct KeyFile(PathBuf);

/// What it says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    keys: Vec<Key>,
}

/// Which state of the file something was read from.
pub(crate) type Stamp = Option<(u64, u64, i64, i64, u64)>;

impl KeyFile {
    /// At a path, whether it is there or not.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Its state now: another one after each change.
    pub(crate) fn stamp(&self) -> Stamp {
        let meta = fs::symlink_metadata(&self.0).ok()?;
        Some((
            meta.dev(),
            meta.ino(),
            meta.ctime(),
            meta.ctime_nsec(),
            meta.size(),
        ))
    }

    /// All keys; none if there is no file.
    ///
    /// # Errors
    /// If there is one, and it cannot be read or trusted.
    pub fn read(&self) -> Result<Vec<Key>, KeyFileError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&self.0);
        let file = match file {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.failed("open")(error)),
        };
        let mode = file.metadata().map_err(self.failed("look at"))?.mode();
        if mode & OTHERS_WRITE != 0 {
            return Err(KeyFileError::Writable(self.0.clone()));
        }
        let text = io::read_to_string(&file).map_err(self.failed("read"))?;
        let damaged = |why: String| KeyFileError::Damaged {
            path: self.0.clone(),
            why,
        };
        let content: Content =
            serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if content.version != VERSION {
            return Err(damaged(format!("its version is {}", content.version)));
        }
        if let Some(bad) = content.keys.iter().find(|key| key.check().is_err()) {
            return Err(damaged(format!("the key {} makes no sense", bad.id)));
        }
        Ok(content.keys)
    }

    /// Makes a key. Its words are given back this once.
    ///
    /// # Errors
    /// If it cannot be, or the file not be written.
    pub fn create(&self, new: NewKey) -> Result<(Secret, Key), KeyFileError> {
        new.check().map_err(KeyFileError::Bad)?;
        let _lock = self.lock()?;
        let mut keys = self.read()?;
        if keys.len() >= KEYS_MAX {
            return Err(KeyFileError::TooMany);
        }
        let secret = loop {
            let secret = Secret::draw().map_err(self.failed("draw a secret for"))?;
            if !keys.iter().any(|key| key.id == secret.id()) {
                break secret;
            }
        };
        let NewKey {
            name,
            role,
            tenant,
            expires_unix_s,
            limits,
        } = new;
        let key = Key {
            id: secret.id().to_owned(),
            hash: secret.hash().to_hex().to_string(),
            name,
            role,
            tenant,
            created_unix_s: now_unix_s(),
            expires_unix_s,
            limits,
        };
        keys.push(key.clone());
        self.write(keys)?;
        Ok((secret, key))
    }

    /// Takes a key away, by its id, the beginning of its id if no other begins so, or its words.
    ///
    /// # Errors
    /// If there is none, or the file cannot be written.
    pub fn revoke(&self, words: &str) -> Result<Key, KeyFileError> {
        let _lock = self.lock()?;
        let mut keys = self.read()?;
        let none = || KeyFileError::NotFound(shown(words).to_owned());
        let id = shown(words);
        let found = keys.iter().position(|key| key.id == id).or_else(|| {
            let mut begins = (0..keys.len()).filter(|index| keys[*index].id.starts_with(id));
            let first = begins.next().filter(|_| !id.is_empty());
            first.filter(|_| begins.next().is_none())
        });
        let revoked = keys.remove(found.ok_or_else(none)?);
        self.write(keys)?;
        Ok(revoked)
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> KeyFileError {
        let path = self.0.clone();
        move |source| KeyFileError::File {
            operation,
            path,
            source,
        }
    }

    /// One writer at a time.
    fn lock(&self) -> Result<OwnedFd, KeyFileError> {
        if let Some(folder) = self.0.parent() {
            fs::create_dir_all(folder).map_err(self.failed("make the folder of"))?;
        }
        let path = self.0.with_extension("lock");
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let locked = open(&path, flags, Mode::from_raw_mode(0o600)).and_then(|file| {
            // Held for as long as it takes to write a small file.
            flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        });
        locked.map_err(|error| self.failed("lock")(error.into()))
    }

    fn write(&self, keys: Vec<Key>) -> Result<(), KeyFileError> {
        let content = Content {
            version: VERSION,
            keys,
        };
        let mut text = serde_json::to_vec_pretty(&content)
            .map_err(|error| self.failed("write")(error.into()))?;
        text.push(b'\n');
        let fresh = self.0.with_extension("new");
        let written = write_whole(&fresh, &text).and_then(|()| fs::rename(&fresh, &self.0));
        let written = written.and_then(|()| match self.0.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        });
        written.map_err(|error| {
            let _ = fs::remove_file(&fresh);
            self.failed("write")(error)
        })
    }
}

impl Key {
    /// As when it was made: somebody may have written it by hand.
    fn check(&self) -> Result<(), String> {
        if self.id.is_empty() || blake3::Hash::from_hex(&self.hash).is_err() {
            return Err("its hash".to_owned());
        }
        NewKey {
            name: self.name.clone(),
            role: self.role,
            tenant: self.tenant.clone(),
            expires_unix_s: self.expires_unix_s,
            limits: self.limits.clone(),
        }
        .check()
    }
}

/// The id of a key whose words somebody gives.
fn shown(words: &str) -> &str {
    let rest = words.strip_prefix("zyg_").unwrap_or(words);
    rest.split('_').next().unwrap_or_default()
}

fn write_whole(path: &Path, text: &[u8]) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

/// Now, in seconds since 1970-01-01T00:00:00Z.
pub(crate) fn now_unix_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caller::Role;
    use crate::key::Limits;
    use std::os::unix::fs::PermissionsExt;

    fn new(tenant: &str) -> NewKey {
        NewKey {
            name: None,
            role: Role::Run,
            tenant: Some(tenant.to_owned()),
            expires_unix_s: None,
            limits: Limits::default(),
        }
    }

    #[test]
    fn keys_are_made_listed_and_revoked_and_the_file_is_nobody_elses() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeyFile::at(folder.path().join("deeper/keys.json"));
        assert!(file.read().unwrap().is_empty() && file.stamp().is_none());
        let (secret, key) = file.create(new("acme")).unwrap();
        let before = file.stamp();
        let (_, other) = file.create(new("other")).unwrap();
        assert_ne!(file.stamp(), before);
        assert_eq!(file.read().unwrap(), [key.clone(), other.clone()]);
        let text = fs::read_to_string(file.path()).unwrap();
        let words = secret.reveal();
        assert!(!text.contains(words.rsplit('_').next().unwrap()));
        assert_eq!(fs::metadata(file.path()).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(
            file.revoke("nope"),
            Err(KeyFileError::NotFound(_))
        ));
        assert!(matches!(file.revoke(""), Err(KeyFileError::NotFound(_))));
        assert_eq!(file.revoke(&words).unwrap().id, key.id);
        assert_eq!(file.revoke(&other.id[..8]).unwrap().id, other.id);
        assert!(file.read().unwrap().is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_trusted_gives_no_keys() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeyFile::at(folder.path().join("keys.json"));
        file.create(new("acme")).unwrap();
        let good = fs::read_to_string(file.path()).unwrap();
        let set = |mode| {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        };
        set(0o620);
        assert!(matches!(file.read(), Err(KeyFileError::Writable(_))));
        set(0o600);
        for bad in [
            "",
            "{",
            &good[..good.len() / 2],
            &good.replace("\"version\": 1", "\"version\": 2"),
            &good.replace("\"run\"", "\"root\""),
            &good.replace("\"acme\"", "\"../x\""),
            &good.replace("\"hash\": \"", "\"hash\": \"zz"),
        ] {
            fs::write(file.path(), bad).unwrap();
            let error = file.read().unwrap_err();
            assert!(
                matches!(error, KeyFileError::Damaged { .. }),
                "{bad}: {error}"
            );
            assert!(matches!(
                file.create(new("a")),
                Err(KeyFileError::Damaged { .. })
            ));
        }
        fs::write(file.path(), good).unwrap();
        assert_eq!(file.read().unwrap().len(), 1);
    }

    #[test]
    fn many_at_once_lose_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeyFile::at(folder.path().join("keys.json"));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        file.create(new("acme")).unwrap();
                    }
                });
            }
        });
        assert_eq!(file.read().unwrap().len(), 40);
    }
}
