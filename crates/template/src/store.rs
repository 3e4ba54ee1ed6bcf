//! The store: templates by name, on disk.
//!
//! ```text
//!     STATE/templates/NAME             link to the generation in use; renaming it publishes
//!     STATE/generations/NAME-UNIQUE/   template.json, replica-0/ … (a snapshot each)
//!     STATE/pieces/DIGEST              disk images, shared
//!     STATE/sandboxes/ID/              a sandbox that is paused: its record, and a snapshot
//!     STATE/cache/                     kernels, index of root images, stamps of verifications
//!     STATE/lock                       held while a name changes
//!     STATE/builds.lock                held by the one build at a time, and to remove what is unused
//! ```

mod error;

pub use error::StoreError;

use crate::Progress;
use crate::lock;
use crate::recipe::{Recipe, RecipeError, RecipeOrigin, is_name};
use crate::rootfs::Contents;
use error::at;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use zygote_snapshot::Snapshot;

const PIECES: &str = "pieces";
const NAMES: &str = "templates";
const GENERATIONS: &str = "generations";
const SANDBOXES: &str = "sandboxes";
const DESCRIPTION_FILE: &str = "template.json";
const REPLICA_PREFIX: &str = "replica-";
const BUILDS_LOCK: &str = "builds.lock";
/// Being written; nobody's yet. No template can be called so.
const FRESH_PREFIX: &str = ".new-";

/// What a template is, for people and for the next build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// When it was built, in seconds since 1970-01-01T00:00:00Z.
    pub created_unix_s: u64,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// How many times it was booted, so that forks do not all share one address-space layout.
    pub replicas: u32,
    /// Guest's `uname -r`.
    pub kernel_release: String,
    /// Its warm interpreter.
    pub interpreter: String,
    /// Debian release and packages.
    pub base: String,
    /// Debian packages beside the base system.
    pub packages: Vec<String>,
    /// A digest of everything that it was built from.
    pub digest: String,
    /// What it takes on disk, holes not counted, in bytes.
    pub disk_bytes: u64,
    /// Version of the messages that its agent speaks; 0 in those of earlier versions.
    #[serde(default)]
    pub protocol_version: u32,
    /// The recipe that it was built from; none in those of earlier versions.
    #[serde(default)]
    pub recipe: Option<RecipeOrigin>,
    /// What has been installed into it.
    #[serde(default)]
    pub contents: Contents,
    /// What it is derived from, if it was not booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub derived: Option<Derived>,
}

/// How a template has come from another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Derived {
    /// The other one.
    pub from: String,
    /// Which build of it.
    pub build: String,
    /// Commands that were run.
    pub run: Vec<String>,
    /// All that its interpreter was warmed up with.
    pub warm: String,
    /// The sandbox that it is a moment of, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

impl Template {
    /// What its interpreter was warmed up with, if that is known.
    #[must_use]
    pub fn warm_code(&self) -> Option<String> {
        if let Some(derived) = &self.derived {
            return Some(derived.warm.clone());
        }
        let origin = self.recipe.as_ref()?;
        let recipe = Recipe::parse(&self.name, &origin.text, origin.path.as_deref());
        Some(recipe.ok()?.warm)
    }
}

/// What removing a template has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// What its own files took.
    pub freed_bytes: u64,
    /// What its image takes, if it stays because others use it, or the next build of its recipe.
    pub kept_bytes: u64,
}

/// Where templates are kept.
#[derive(Clone, Debug)]
pub struct Store {
    state: PathBuf,
    /// Somebody else's, whose templates can be run too.
    shared: Option<PathBuf>,
}

/// Where root's templates are, which others may run.
pub const SYSTEM_STATE_DIR: &str = "/var/lib/zygote";

/// Where everything is kept unless the user says otherwise: root's is the system's.
pub fn default_state_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from(SYSTEM_STATE_DIR);
    }
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/".into()));
    let data = data.filter(|path| path.is_absolute());
    data.unwrap_or_else(|| home().join(".local/share"))
        .join("zygote")
}

impl Store {
    /// The store in a state directory; nothing is created until something is built.
    pub fn open(state: PathBuf) -> Self {
        Self {
            state,
            shared: None,
        }
    }

    /// With another store, whose templates can be run as well; one's own come first.
    #[must_use]
    pub fn with_shared(self, shared: Option<PathBuf>) -> Self {
        let shared = shared.filter(|shared| *shared != self.state);
        Self { shared, ..self }
    }

    /// The other store.
    pub fn shared_dir(&self) -> Option<&Path> {
        self.shared.as_deref()
    }

    /// One's own state directory, then the other's.
    fn homes(&self) -> impl Iterator<Item = &Path> {
        [Some(&self.state), self.shared.as_ref()]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
    }

    /// The state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// Kernels, root images' index, stamps.
    pub fn cache(&self) -> PathBuf {
        self.state.join("cache")
    }

    /// Disk images by digest.
    pub fn pieces(&self) -> PathBuf {
        self.state.join(PIECES)
    }

    /// Disk images of a template's snapshot: they lie in its own store, or, if it differs from another one, in
    /// that one's.
    pub fn pieces_of(&self, snapshot: &Path) -> PathBuf {
        if base_folder(snapshot).is_some() {
            return self.pieces_under(snapshot);
        }
        let home = self.homes().find(|home| snapshot.starts_with(home));
        home.unwrap_or(&self.state).join(PIECES)
    }

    /// Disk images of a snapshot that differs from another one: they lie where that does.
    pub fn pieces_under(&self, snapshot: &Path) -> PathBuf {
        let base = base_folder(snapshot);
        let holds = |home: &&Path| base.as_ref().is_some_and(|base| home.join(base).is_dir());
        let home = self.homes().find(holds);
        home.unwrap_or(&self.state).join(PIECES)
    }

    /// Whether a sandbox is paused.
    pub fn has_sandboxes(&self) -> bool {
        entries(&self.sandboxes()).next().is_some()
    }

    /// Sandboxes that are on disk, each in a folder of its id.
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join(SANDBOXES)
    }

    /// Where verifications are remembered.
    pub fn stamps(&self) -> PathBuf {
        self.cache().join("verified")
    }

    fn names(&self) -> PathBuf {
        self.state.join(NAMES)
    }

    fn generations(&self) -> PathBuf {
        self.state.join(GENERATIONS)
    }

    /// All templates, by name. Those that are damaged come as errors.
    pub fn list(&self) -> Vec<(String, Result<Template, StoreError>)> {
        let describe = |name: String| (name.clone(), self.inspect(&name));
        self.known().into_iter().map(describe).collect()
    }

    /// The names of all templates, sorted.
    pub fn known(&self) -> Vec<String> {
        let mut names: Vec<String> = self.homes().flat_map(names_in).collect();
        names.sort();
        names.dedup();
        names
    }

    /// When a name was last given or taken away, in each store.
    pub fn named_at(&self) -> Vec<Option<SystemTime>> {
        let changed = |home: &Path| fs::metadata(home.join(NAMES)).ok()?.modified().ok();
        self.homes().map(changed).collect()
    }

    /// The names of those that are not somebody else's.
    pub(crate) fn own_names(&self) -> Vec<String> {
        let mut names = names_in(&self.state);
        names.sort();
        names
    }

    fn not_found(&self, name: String) -> StoreError {
        let known = self.known();
        StoreError::NotFound { name, known }
    }

    /// What a template is.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn inspect(&self, name: &str) -> Result<Template, StoreError> {
        let generation = self.generation(name)?;
        let path = generation.join(DESCRIPTION_FILE);
        let damaged = || StoreError::Description {
            name: name.to_owned(),
            path: path.clone(),
        };
        let text = fs::read(&path).map_err(|_| damaged())?;
        let template: Template = serde_json::from_slice(&text).map_err(|_| damaged())?;
        if template.name == name {
            Ok(template)
        } else {
            Err(damaged())
        }
    }

    /// The recipe that a user names: see [`Recipe::find`]; or that which a template of this name was
    /// built from: the file if it is still there, else the text as it was.
    ///
    /// # Errors
    /// See [`RecipeError`].
    pub fn recipe(&self, name: &str) -> Result<Recipe, RecipeError> {
        let found = Recipe::find(name);
        let Err(RecipeError::Unknown { .. }) = found else {
            return found;
        };
        let known = self.inspect(name).ok();
        let derived = known.as_ref().and_then(|known| known.derived.as_ref());
        if derived.is_some_and(|derived| derived.sandbox.is_some()) {
            let name = name.to_owned();
            return Err(RecipeError::OfASandbox { name });
        }
        match known.and_then(|known| known.recipe) {
            Some(RecipeOrigin {
                path: Some(path), ..
            }) if path.is_file() => Recipe::find(&path.to_string_lossy()),
            Some(RecipeOrigin { path, text }) => Recipe::parse(name, &text, path.as_deref()),
            None => found,
        }
    }

    /// The snapshot folders of a template, one a replica.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn replicas(&self, name: &str) -> Result<Vec<PathBuf>, StoreError> {
        let generation = self.generation(name)?;
        let count = self.inspect(name)?.replicas;
        let replica = |index| generation.join(format!("{REPLICA_PREFIX}{index}"));
        Ok((0..count).map(replica).collect())
    }

    /// Compares every byte of a template with its digests; gives back the bytes read. `progress`
    /// gets bytes done and in all, replica by replica.
    ///
    /// # Errors
    /// The first damage, by name.
    pub fn verify(
        &self,
        name: &str,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, StoreError> {
        let mut read = 0;
        for directory in self.replicas(name)? {
            let snapshot = self.open_snapshot(name, &directory)?;
            let report = snapshot
                .verify(&mut |done, total| {
                    progress(done, total);
                    true
                })
                .map_err(|source| {
                    // Whoever runs it next compares again, and refuses it.
                    snapshot.forget(&self.stamps());
                    StoreError::Damaged {
                        name: name.to_owned(),
                        source,
                    }
                })?;
            read += report.read_bytes;
        }
        Ok(read)
    }

    pub(crate) fn open_snapshot(
        &self,
        name: &str,
        directory: &Path,
    ) -> Result<Snapshot, StoreError> {
        Snapshot::open(directory, &self.pieces_of(directory)).map_err(|source| {
            StoreError::Snapshot {
                name: name.to_owned(),
                source,
            }
        })
    }

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

    /// What a template's own files take on disk, its shared image not counted.
    pub(crate) fn generation_bytes(&self, name: &str) -> u64 {
        self.generation(name)
            .map_or(0, |generation| disk_bytes(&generation))
    }

    /// What generations take that no name stands for any more.
    pub(crate) fn unnamed_bytes(&self) -> u64 {
        let names = self.own_names().into_iter();
        let named: HashSet<_> = names
            .filter_map(|name| self.generation(&name).ok())
            .collect();
        let all = entries(&self.generations()).map(|entry| entry.path());
        let unnamed = all.filter(|path| !named.contains(path));
        unnamed.map(|path| disk_bytes(&path)).sum()
    }

    /// The images that templates use, by digest.
    pub(crate) fn used_pieces(&self) -> HashSet<String> {
        let mut digests = HashSet::new();
        for generation in entries(&self.generations()) {
            collect_pieces(&generation.path(), &mut digests);
        }
        digests
    }

    /// The build that a name stands for now: the name of its generation's folder.
    ///
    /// # Errors
    /// If there is no such template.
    pub fn current(&self, name: &str) -> Result<String, StoreError> {
        let generation = self.generation(name)?;
        let build = generation.file_name().unwrap_or_default();
        Ok(build.to_string_lossy().into_owned())
    }

    /// The snapshot folders of one build of a template, one a replica.
    ///
    /// # Errors
    /// See [`StoreError`]; `NotFound` for a build that is not there any more.
    pub fn replicas_of(&self, name: &str, build: &str) -> Result<Vec<PathBuf>, StoreError> {
        let own = build.strip_prefix(name).is_some_and(|rest| {
            rest.starts_with('-')
                && rest
                    .bytes()
                    .all(|byte| byte == b'-' || byte.is_ascii_digit())
        });
        if !is_name(name) || !own {
            let name = build.to_owned();
            return Err(StoreError::Name { name });
        }
        let mut places = self.homes().map(|home| home.join(GENERATIONS).join(build));
        let generation = places
            .find(|place| place.is_dir())
            .ok_or_else(|| self.not_found(name.to_owned()))?;
        let is_replica = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            name.to_string_lossy().starts_with(REPLICA_PREFIX)
        };
        let entries = fs::read_dir(&generation).map_err(|_| self.not_found(name.to_owned()))?;
        let count = entries.flatten().filter(is_replica).count();
        if count == 0 {
            let path = generation.join(format!("{REPLICA_PREFIX}0"));
            let name = name.to_owned();
            return Err(StoreError::Description { name, path });
        }
        let replica = |index| generation.join(format!("{REPLICA_PREFIX}{index}"));
        Ok((0..count).map(replica).collect())
    }

    /// The folder of the generation that a name stands for.
    fn generation(&self, name: &str) -> Result<PathBuf, StoreError> {
        let name = name.to_owned();
        if !is_name(&name) {
            return Err(StoreError::Name { name });
        }
        let mut found = self.homes().filter_map(|home| {
            let names = home.join(NAMES);
            let target = fs::read_link(names.join(&name)).ok()?;
            // The link leads from there to the folder beside.
            Some(home.join(GENERATIONS).join(target.file_name()?))
        });
        found.next().ok_or_else(|| self.not_found(name.clone()))
    }

    /// Waits until no other build is under way, and keeps others waiting until the result is
    /// dropped. Whoever builds holds it, from before the ingredients to after the publishing; on
    /// the host, when the building itself goes on in a lab, whose locks stay inside.
    ///
    /// # Errors
    /// If the lock's file cannot be made.
    pub fn lock_builds(&self, progress: &mut dyn FnMut(Progress)) -> Result<File, StoreError> {
        fs::create_dir_all(&self.state).map_err(at("make the folder", &self.state))?;
        Ok(lock::hold(
            &self.state.join(BUILDS_LOCK),
            lock::BUILD_MAX,
            &mut |holder| {
                progress(Progress::new(format!(
                    "waiting for another build to end{holder}"
                )));
            },
        )?)
    }

    pub(crate) fn try_lock_builds(&self) -> Option<File> {
        lock::try_hold(&self.state.join(BUILDS_LOCK))
    }

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

    /// Whether a template that is derived may be called so: another one that was derived gives way, one that was
    /// built only if it is to.
    ///
    /// # Errors
    /// `Taken`, or `Name`.
    pub fn may_derive(&self, name: &str, force: bool) -> Result<(), StoreError> {
        let known = match self.inspect(name) {
            Err(error @ StoreError::Name { .. }) => return Err(error),
            known => known.ok(),
        };
        match known.filter(|known| known.derived.is_none() && !force) {
            Some(built) => Err(StoreError::Taken { name: built.name }),
            None => Ok(()),
        }
    }

    /// What one build of a template is.
    ///
    /// # Errors
    /// See [`StoreError`]; `NotFound` for a build that is not there any more.
    pub fn inspect_build(&self, name: &str, build: &str) -> Result<Template, StoreError> {
        let replicas = self.replicas_of(name, build)?;
        let generation = replicas.first().and_then(|replica| replica.parent());
        let path = generation.unwrap_or(Path::new("")).join(DESCRIPTION_FILE);
        let read = fs::read(&path).ok();
        let template = read.and_then(|text| serde_json::from_slice(&text).ok());
        let name = name.to_owned();
        template.ok_or(StoreError::Description { name, path })
    }

    /// A folder for a generation that is being built: nobody's until it is published. The caller
    /// holds the lock of builds.
    fn begin(&self, name: &str, unique: &str) -> Result<Fresh, StoreError> {
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

    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        let path = self.state.join("lock");
        Ok(lock::hold(&path, lock::NAME_MAX, &mut |_| {})?)
    }

    /// Removes what nothing refers to: replaced generations, what killed builds have left, images
    /// that neither a template nor the cache's index names. Called under the lock. What cannot be
    /// removed now is removed another time.
    fn sweep(&self) {
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

/// Whether a snapshot is of a machine that was running.
pub fn is_held(snapshot: &Path) -> bool {
    let path = snapshot.join(zygote_snapshot::MANIFEST_FILE);
    let manifest = fs::read(path).ok();
    let manifest = manifest.and_then(|bytes| zygote_snapshot::Manifest::decode(&bytes).ok());
    manifest.is_some_and(|manifest| manifest.is_held())
}

/// The folder of the snapshot that one differs from, in its store.
fn base_folder(snapshot: &Path) -> Option<PathBuf> {
    let path = snapshot.join(zygote_snapshot::MANIFEST_FILE);
    let manifest = zygote_snapshot::Manifest::decode(&fs::read(path).ok()?).ok()?;
    Some(PathBuf::from(manifest.base?.folder))
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

/// A generation that is being built. Dropped unpublished, its folder goes.
pub struct Fresh {
    path: PathBuf,
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

/// The images that the snapshots of a generation have.
fn collect_pieces(generation: &Path, digests: &mut HashSet<String>) {
    for replica in entries(generation) {
        let path = replica.path().join(zygote_snapshot::MANIFEST_FILE);
        collect_digests(&path, digests);
    }
}

/// The names of the templates in a state directory.
fn names_in(home: &Path) -> Vec<String> {
    entries(&home.join(NAMES))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| is_name(name))
        .collect()
}

/// What lies in a folder; nothing if it is not there.
pub(crate) fn entries(folder: &Path) -> impl Iterator<Item = fs::DirEntry> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten()
}

/// Every word in a file that is a digest: keeps more than needed, never less.
fn collect_digests(path: &Path, digests: &mut HashSet<String>) {
    let text = fs::read(path).unwrap_or_default();
    let words = text.split(|byte| !byte.is_ascii_alphanumeric());
    let words = words.filter_map(|word| std::str::from_utf8(word).ok());
    let found = words.filter(|word| zygote_snapshot::manifest::is_digest(word));
    digests.extend(found.map(str::to_owned));
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = File::create(path).map_err(at("create", path))?;
    io::Write::write_all(&mut file, bytes).map_err(at("write", path))?;
    file.sync_all().map_err(at("flush", path))
}

/// What a folder takes on disk, holes not counted.
pub fn disk_bytes(folder: &Path) -> u64 {
    entries(folder)
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => disk_bytes(&entry.path()),
            Ok(meta) => meta.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(name: &str, digest: &str) -> Template {
        Template {
            name: name.into(),
            created_unix_s: 1,
            memory_bytes: 512 << 20,
            vcpus: 1,
            replicas: 0,
            kernel_release: "6".into(),
            interpreter: "python".into(),
            base: "bookworm".into(),
            packages: vec![],
            digest: digest.into(),
            disk_bytes: 0,
            protocol_version: 0,
            recipe: None,
            contents: Contents::default(),
            derived: None,
        }
    }

    fn publish(store: &Store, name: &str, unique: &str) {
        let fresh = store.begin(name, unique).unwrap();
        store.publish(fresh, &template(name, unique)).unwrap();
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_owned());
        (folder, store)
    }

    #[test]
    fn publishing_replaces_and_the_old_generation_goes() {
        let (_folder, store) = store();
        assert!(matches!(
            store.inspect("a"),
            Err(StoreError::NotFound { .. })
        ));
        publish(&store, "a", "1");
        publish(&store, "b", "2");
        publish(&store, "a", "3");
        assert_eq!(store.inspect("a").unwrap().digest, "3");
        assert_eq!(fs::read_dir(store.generations()).unwrap().count(), 2);
        store.remove("a", false).unwrap();
        assert!(matches!(
            store.remove("a", false),
            Err(StoreError::NotFound { .. })
        ));
        let names: Vec<String> = store.list().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["b"]);
        assert_eq!(fs::read_dir(store.generations()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_build_has_left_is_swept_and_a_live_one_is_not() {
        let (_folder, store) = store();
        publish(&store, "a", "1");
        let dead = store.generations().join(".new-a-dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("half"), "x").unwrap();
        symlink("nowhere", store.names().join(".new-a-dead")).unwrap();
        let live = store.begin("b", "live").unwrap();
        assert!(!dead.exists());
        assert!(fs::symlink_metadata(store.names().join(".new-a-dead")).is_err());
        let builds = store.lock_builds(&mut |_| {}).unwrap();
        store.remove("a", false).unwrap();
        assert!(live.path.exists());
        drop((live, builds));
        publish(&store, "a", "2");
        assert_eq!(fs::read_dir(store.generations()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_paused_sandbox_differs_from_stays() {
        let (_folder, store) = store();
        publish(&store, "a", "1");
        let snapshot = store.sandboxes().join("id/snapshot");
        fs::create_dir_all(&snapshot).unwrap();
        let whole = store.generations().join("a-1/replica-0");
        fs::create_dir_all(store.pieces()).unwrap();
        write_snapshot(&whole, |writer| {
            writer.memory([(0, &[1; 4096][..])]).unwrap()
        });
        let base = Snapshot::open(&whole, &store.pieces()).unwrap();
        fs::remove_dir(&snapshot).unwrap();
        write_snapshot(&snapshot, |writer| {
            let folder = "generations/a-1/replica-0";
            writer.delta(&base, folder, true).unwrap().finish().unwrap();
        });
        assert_eq!(store.pieces_under(&snapshot), store.pieces());
        publish(&store, "a", "2");
        publish(&store, "a", "3");
        let left = |store: &Store| fs::read_dir(store.generations()).unwrap().count();
        assert_eq!(left(&store), 2);
        // One that cannot be read may need any of them.
        let manifest = snapshot.join(zygote_snapshot::MANIFEST_FILE);
        fs::remove_file(&manifest).unwrap();
        publish(&store, "a", "4");
        assert_eq!(left(&store), 3);
        fs::remove_dir_all(store.sandboxes()).unwrap();
        publish(&store, "a", "5");
        assert_eq!(left(&store), 1);
    }

    /// A template that differs from another one's snapshot.
    fn derive(store: &Store, name: &str, unique: &str, from: &Path) {
        let fresh = store.begin(name, unique).unwrap();
        let base = Snapshot::open(from, &store.pieces()).unwrap();
        let folder = from.strip_prefix(store.state_dir()).unwrap();
        write_snapshot(&fresh.replica(0), |writer| {
            let folder = folder.to_str().unwrap();
            writer
                .delta(&base, folder, false)
                .unwrap()
                .finish()
                .unwrap();
        });
        let template = Template {
            replicas: 1,
            ..template(name, unique)
        };
        store.publish(fresh, &template).unwrap();
    }

    #[test]
    fn what_a_derived_template_differs_from_stays_and_is_not_removed_without_it() {
        let (_folder, store) = store();
        publish(&store, "a", "1");
        fs::create_dir_all(store.pieces()).unwrap();
        let whole = store.generations().join("a-1/replica-0");
        write_snapshot(&whole, |writer| {
            writer.memory([(0, &[1; 4096][..])]).unwrap()
        });
        derive(&store, "b", "2", &whole);
        let refused = store.remove("a", false).unwrap_err();
        assert!(
            refused
                .to_string()
                .starts_with("b is derived from a, and needs")
        );
        let left = |store: &Store| fs::read_dir(store.generations()).unwrap().count();
        // A new build of the base leaves the old one's files where they are.
        publish(&store, "a", "3");
        assert_eq!(left(&store), 3);
        assert!(store.verify("b", &mut |_, _| {}).is_ok());
        store.remove("a", false).unwrap();
        assert_eq!(left(&store), 2);
        store.remove("b", false).unwrap();
        assert_eq!(left(&store), 0);
        // With it, all go.
        publish(&store, "a", "4");
        let whole = store.generations().join("a-4/replica-0");
        write_snapshot(&whole, |writer| {
            writer.memory([(0, &[1; 4096][..])]).unwrap()
        });
        derive(&store, "b", "5", &whole);
        derive(&store, "c", "6", &whole);
        let refused = store.remove("a", false).unwrap_err().to_string();
        assert!(
            refused.starts_with("b, c are derived from a, and need its"),
            "{refused}"
        );
        store.remove("a", true).unwrap();
        assert_eq!((left(&store), store.known().len()), (0, 0));
    }

    fn write_snapshot(folder: &Path, memory: impl FnOnce(&mut zygote_snapshot::Writer)) {
        use zygote_snapshot::state::*;
        let mut writer = zygote_snapshot::Writer::create(folder).unwrap();
        memory(&mut writer);
        let state = MachineState {
            vcpus: vec![],
            clock: ClockState { clock_ns: 0 },
            ioapic: IoapicState {
                id: 0,
                select: 0,
                redirections: vec![],
                pending: 0,
            },
            serial: SerialState {
                baud_divisor_low: 0,
                baud_divisor_high: 0,
                interrupt_enable: 0,
                interrupt_identification: 0,
                line_control: 0,
                line_status: 0,
                modem_control: 0,
                modem_status: 0,
                scratch: 0,
                in_buffer: vec![],
            },
            devices: vec![],
            generation_id_address: 0,
        };
        writer.machine(&state).unwrap();
        writer
            .finish(zygote_snapshot::Origin {
                template: "a".into(),
                recipe_digest: String::new(),
                replica: 0,
                created_unix_s: 0,
                zygote_version: String::new(),
                protocol_version: 0,
                kernel_release: String::new(),
                interpreter: String::new(),
                cpu_vendor: String::new(),
            })
            .unwrap();
    }

    #[test]
    fn a_template_may_be_called_new() {
        let (_folder, store) = store();
        publish(&store, "new-new-model", "1");
        publish(&store, "a", "2");
        store.remove("a", false).unwrap();
        let names: Vec<String> = store.list().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["new-new-model"]);
        store.inspect("new-new-model").unwrap();
    }

    #[test]
    fn a_second_build_waits_and_says_so() {
        let (_folder, store) = store();
        let first = store.lock_builds(&mut |_| panic!("waited")).unwrap();
        let (told, heard) = std::sync::mpsc::channel();
        let other = store.clone();
        let second = std::thread::spawn(move || {
            let mut tell = |progress: Progress| told.send(progress.message).unwrap();
            other.lock_builds(&mut tell).unwrap()
        });
        assert!(heard.recv().unwrap().contains("waiting"));
        drop(first);
        second.join().unwrap();
    }

    #[test]
    fn images_in_use_stay_and_others_go() {
        let (_folder, store) = store();
        let (kept, indexed, gone) = ("0a".repeat(32), "0b".repeat(32), "0c".repeat(32));
        fs::create_dir_all(store.pieces()).unwrap();
        for digest in [&kept, &indexed, &gone] {
            fs::write(store.pieces().join(digest), "x").unwrap();
        }
        fs::create_dir_all(store.cache().join("rootfs")).unwrap();
        fs::write(store.cache().join("rootfs/key"), format!("{indexed} 1\n")).unwrap();
        let fresh = store.begin("a", "1").unwrap();
        assert!(!store.pieces().join(&gone).exists());
        fs::write(store.pieces().join(&kept), "x").unwrap();
        fs::create_dir(fresh.replica(0)).unwrap();
        fs::write(
            fresh.replica(0).join("manifest"),
            format!("{{\"digest\": \"{kept}\"}}"),
        )
        .unwrap();
        store.publish(fresh, &template("a", "1")).unwrap();
        assert!(store.pieces().join(&kept).exists() && store.pieces().join(&indexed).exists());
    }

    #[test]
    fn templates_of_another_store_can_be_run_and_not_removed_and_ones_own_come_first() {
        let (_ours, own) = store();
        let (_theirs, system) = store();
        publish(&system, "both", "1");
        publish(&system, "theirs", "2");
        let own = own.with_shared(Some(system.state_dir().to_owned()));
        publish(&own, "both", "3");
        assert_eq!(own.known(), ["both", "theirs"]);
        assert_eq!(own.inspect("both").unwrap().digest, "3");
        assert_eq!(own.inspect("theirs").unwrap().digest, "2");
        assert_eq!(own.current("theirs").unwrap(), "theirs-2");
        let snapshot = system.generations().join("theirs-2/replica-0");
        assert_eq!(own.pieces_of(&snapshot), system.pieces());
        let refused = own.remove("theirs", false);
        assert!(matches!(refused, Err(StoreError::Shared { .. })));
        own.remove("both", false).unwrap();
        assert_eq!(own.inspect("both").unwrap().digest, "1");
        assert!(own.replicas_of("theirs", "theirs-2").is_err());
    }

    #[test]
    fn a_name_cannot_lead_out_of_the_store() {
        let (_folder, store) = store();
        for name in ["../x", "", "A", "a/b", ".hidden"] {
            assert!(matches!(store.inspect(name), Err(StoreError::Name { .. })));
            assert!(matches!(
                store.remove(name, false),
                Err(StoreError::Name { .. })
            ));
        }
    }
}
