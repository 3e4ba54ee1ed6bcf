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

mod description;
mod error;
mod publish;
mod removal;
#[cfg(test)]
mod tests;

pub use description::{Derived, Template};
pub use error::StoreError;
pub use publish::Fresh;
pub use removal::Removal;

use crate::Progress;
use crate::lock;
use crate::recipe::{Recipe, RecipeError, RecipeOrigin, is_name};
use error::at;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
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

    /// That there is no such template for somebody of a tenant, who is told of those that are for him.
    #[must_use]
    pub fn none_for(&self, name: &str, tenant: &str) -> StoreError {
        let is_for = |template: &Template| template.is_for(Some(tenant));
        let all = self.list().into_iter();
        let known =
            all.filter_map(|(name, template)| template.is_ok_and(|t| is_for(&t)).then_some(name));
        StoreError::NotFound {
            name: name.to_owned(),
            known: known.collect(),
        }
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
            return Err(no_build(name, build));
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

    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        let path = self.state.join("lock");
        Ok(lock::hold(&path, lock::NAME_MAX, &mut |_| {})?)
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

/// Why a template has no such build: there is none, or none could be called so.
fn no_build(name: &str, build: &str) -> StoreError {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let is_word = !build.is_empty() && build.bytes().all(is_letter);
    let named = |name: &str| StoreError::Name {
        name: name.to_owned(),
    };
    match (is_name(name), is_word) {
        (false, _) => named(name),
        (true, false) => named(build),
        (true, true) => StoreError::NoBuild {
            name: name.to_owned(),
            build: build.to_owned(),
        },
    }
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
