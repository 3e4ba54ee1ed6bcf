//! Deriving a template: a fork of another one's, what is put into it, what is run in it, and its snapshot as it
//! differs from the one that all began with.

use crate::Progress;
use crate::build::{BuildError, unix_seconds};
use crate::guest::Guest;
use crate::ingredients::GatherError;
use crate::recipe::Recipe;
use crate::rehearsal::activate;
use crate::rootfs::{Contents, Layer, layer};
use crate::steps::Steps;
use crate::store::{Derived, Fresh, Store, StoreError, Template, disk_bytes};
use crate::working_set;
use rustix::fs::{MemfdFlags, memfd_create, sendfile};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use zygote_protocol::PROTOCOL_VERSION;
use zygote_snapshot::state::MachineState;
use zygote_snapshot::{
    Ahead, CHUNK_BYTES, FORMAT_VERSION, Manifest, Origin, PAGE_BYTES, Snapshot, VerifyError, Writer,
};
use zygote_vmm::{Disk, GuestMemory, MachineError};

/// Why nothing can be derived from a template.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// It is not there, or damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An older or newer one.
    #[error(
        "the template {0} is of another version of Zygote; build it again: zygote template build {0}"
    )]
    Version(String),
    /// Its processes run on.
    #[error("the template {0} is a snapshot of a sandbox; templates are derived from built ones")]
    Held(String),
    /// From before recipes were kept.
    #[error("nobody knows what the template {0} was built from; build it again from its recipe")]
    Unknown(String),
}

/// What a template is derived from.
#[derive(Debug)]
pub struct Derivation {
    base: Template,
    /// Which build of it.
    build: String,
    /// Its first replica.
    snapshot: PathBuf,
    layer: Layer,
    /// All that its interpreter is warmed up with.
    warm: String,
    /// Whether it has one of its own; the base's stays otherwise.
    is_warmed: bool,
    /// A digest of all of it.
    pub digest: String,
}

/// Finds the base, and makes what is put into it.
pub fn prepare(
    store: &Store,
    recipe: &Recipe,
    from: &str,
    check: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Derivation, GatherError> {
    store
        .may_derive(&recipe.name, check, None)
        .map_err(BaseError::from)?;
    let base = store.inspect(from).map_err(BaseError::from)?;
    if base.protocol_version != PROTOCOL_VERSION {
        return Err(BaseError::Version(from.to_owned()).into());
    }
    let replicas = store.replicas(from).map_err(BaseError::from)?;
    let snapshot = replicas.into_iter().next().unwrap_or_default();
    if store
        .open_snapshot(from, &snapshot)
        .map_err(BaseError::from)?
        .manifest()
        .is_held()
    {
        return Err(BaseError::Held(from.to_owned()).into());
    }
    let layer = layer(recipe, &store.cache().join("layers"), check, progress)?;
    let before = base
        .warm_code()
        .ok_or_else(|| BaseError::Unknown(from.to_owned()))?;
    // One that was there before does not know packages that have come since.
    let is_warmed = !recipe.warm.is_empty() || !layer.contents.pip.is_empty();
    Ok(Derivation {
        build: store.current(from).map_err(BaseError::from)?,
        digest: digest(&base, &layer, recipe),
        warm: format!("{before}\n{}", recipe.warm),
        is_warmed,
        base,
        snapshot,
        layer,
    })
}

fn digest(base: &Template, layer: &Layer, recipe: &Recipe) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |word: &str| {
        hasher.update(&(word.len() as u64).to_le_bytes());
        hasher.update(word.as_bytes());
    };
    for word in [
        "derived",
        &base.digest,
        &layer.digest,
        &recipe.warm,
        &FORMAT_VERSION.to_string(),
        &PROTOCOL_VERSION.to_string(),
        env!("CARGO_PKG_VERSION"),
    ] {
        add(word);
    }
    recipe.run.iter().for_each(|line| add(line));
    hasher.finalize().to_hex().to_string()
}

/// Derives a template.
pub fn derive(
    store: &Store,
    recipe: &Recipe,
    from: &Derivation,
    progress: &mut dyn FnMut(Progress),
) -> Result<Template, BuildError> {
    let fresh = store.begin_new(&recipe.name)?;
    make(store, &fresh, recipe, from, progress)?;
    let Derivation { base, layer, .. } = from;
    let template = Template {
        name: recipe.name.clone(),
        created_unix_s: unix_seconds(),
        replicas: 1,
        digest: from.digest.clone(),
        disk_bytes: disk_bytes(fresh.folder()),
        recipe: Some(recipe.origin.clone()),
        contents: with(&base.contents, &layer.contents),
        tenant: None,
        derived: Some(Derived {
            from: base.name.clone(),
            build: from.build.clone(),
            run: recipe.run.clone(),
            warm: from.warm.clone(),
            sandbox: None,
        }),
        ..base.clone()
    };
    progress(Progress::new("publishing the template"));
    store.publish(fresh, &template)?;
    Ok(template)
}

/// A newer version of a package comes before an older one's.
fn with(before: &Contents, more: &Contents) -> Contents {
    let is_replaced = |name: &str| more.pip.iter().any(|wheel| wheel.name == name);
    let kept = before.pip.iter().filter(|wheel| !is_replaced(&wheel.name));
    let mut all = Contents {
        debian: before.debian.clone(),
        pip: kept.chain(&more.pip).cloned().collect(),
        files: [&before.files[..], &more.files].concat(),
    };
    all.pip.sort();
    all.files.sort();
    all.files.dedup();
    all
}

fn make(
    store: &Store,
    fresh: &Fresh,
    recipe: &Recipe,
    from: &Derivation,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), BuildError> {
    progress(Progress::new(format!("forking {}", from.base.name)));
    let pieces = store.pieces_of(&from.snapshot);
    let base = Snapshot::open(&from.snapshot, &pieces).map_err(VerifyError::from)?;
    base.verify_once(&store.stamps(), &mut |_, _| true)?;
    let memory = memory_of(&base)?;
    let mut guest = Guest::restore(
        &base.machine().map_err(VerifyError::from)?,
        memory.clone(),
        disks_of(&base).map_err(BuildError::Open)?,
        &Ahead::default(),
    )?;
    activate(&mut guest)?;
    let mut steps = Steps::new(&mut guest, progress);
    steps.put(&from.layer)?;
    recipe.run.iter().try_for_each(|line| steps.run(line))?;
    if from.is_warmed {
        steps.warm(&from.warm)?;
    }
    steps.freeze()?;
    guest.machine.pause()?;
    progress(Progress::new("writing what differs"));
    let written = Written {
        base: base.manifest().clone(),
        directory: fresh.replica(0),
        state: guest.machine.save()?,
    };
    let own = relative(&from.snapshot, &pieces);
    let (whole, folder) = base.into_whole(own);
    let mut writer = Writer::create(&written.directory)?;
    let copy = copy_of(&whole).map_err(BuildError::Open)?;
    let mut delta = writer.delta(&whole, &folder, false)?;
    own_pages(&guest, &memory, &mut |offset, bytes| {
        delta.pages(offset, bytes)?;
        copy.write_all_at(bytes, offset).map_err(BuildError::Open)
    })?;
    delta.finish()?;
    drop((guest, memory));
    writer.machine(&written.state)?;
    progress(Progress::new("recording what every run touches"));
    let disks = disks_of(&whole).map_err(BuildError::Open)?;
    if let Some(root) = disks.into_iter().next() {
        let fresh = working_set::Fresh {
            memory: copy,
            state: &written.state,
            memory_bytes: from.base.memory_bytes,
            root,
        };
        writer.working_sets(fresh.working_sets()?);
    }
    written.finish(store, &pieces, writer, recipe, from)
}

/// A snapshot that is all but there.
struct Written {
    base: Manifest,
    directory: PathBuf,
    state: MachineState,
}

impl Written {
    fn finish(
        self,
        store: &Store,
        pieces: &Path,
        writer: Writer,
        recipe: &Recipe,
        from: &Derivation,
    ) -> Result<(), BuildError> {
        writer.finish(Origin {
            template: recipe.name.clone(),
            recipe_digest: from.digest.clone(),
            created_unix_s: unix_seconds(),
            zygote_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_version: PROTOCOL_VERSION,
            replica: 0,
            ..self.base.origin
        })?;
        let snapshot = Snapshot::open(&self.directory, pieces).map_err(VerifyError::from)?;
        snapshot.verify_once(&store.stamps(), &mut |_, _| true)?;
        Ok(())
    }
}

/// A snapshot's folder, from that in which the folder of its pieces lies.
fn relative(snapshot: &Path, pieces: &Path) -> String {
    let home = pieces.parent().unwrap_or(pieces);
    let path = snapshot.strip_prefix(home).unwrap_or(snapshot);
    path.to_string_lossy().into_owned()
}

fn memory_of(snapshot: &Snapshot) -> Result<GuestMemory, BuildError> {
    let bytes = snapshot.manifest().memory.bytes;
    let memory = GuestMemory::private(snapshot.memory_file(), bytes);
    let memory = memory.map_err(MachineError::from)?;
    let put = &mut |offset, bytes: &[u8]| memory.write(offset, bytes);
    snapshot.read_delta(put).map_err(VerifyError::from)?;
    Ok(memory)
}

fn disks_of(snapshot: &Snapshot) -> io::Result<Vec<Disk>> {
    let disks = snapshot.disks();
    disks
        .map(|(file, digest)| Disk::new(file.try_clone()?, digest.to_owned()))
        .collect()
}

/// Takes pages: their offset in the memory, and their bytes.
type Put<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), BuildError>;

/// Gives the pages that a guest has for itself, in ascending order.
fn own_pages(guest: &Guest, memory: &GuestMemory, put: Put<'_>) -> Result<(), BuildError> {
    let parts = guest.machine.paused_memory()?;
    for [first, count] in memory.copied().map_err(BuildError::Open)? {
        let start = u64::from(first) * PAGE_BYTES;
        let end = u64::from(first + count) * PAGE_BYTES;
        for (offset, bytes) in &parts {
            let (from, to) = (start.max(*offset), end.min(offset + bytes.len() as u64));
            if from < to {
                put(
                    from,
                    &bytes[(from - offset) as usize..(to - offset) as usize],
                )?;
            }
        }
    }
    Ok(())
}

/// A file of this process, with a whole snapshot's memory; what is zero is a hole.
///
/// # Errors
/// If the snapshot cannot be read, or memory is short.
pub fn copy_of(whole: &Snapshot) -> io::Result<File> {
    let copy = File::from(memfd_create("memory", MemfdFlags::CLOEXEC)?);
    let memory = &whole.manifest().memory;
    copy.set_len(memory.bytes)?;
    for (index, digest) in memory.chunks.iter().enumerate() {
        let mut from = index as u64 * CHUNK_BYTES;
        let end = memory.bytes.min(from + CHUNK_BYTES);
        (&copy).seek(SeekFrom::Start(from))?;
        while !digest.is_empty() && from < end {
            let left = (end - from) as usize;
            // Moves `from` on.
            if sendfile(&copy, whole.memory_file(), Some(&mut from), left)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
    Ok(copy)
}
