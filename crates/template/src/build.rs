//! Building a template: boot, warm, freeze, snapshot, once a replica; then publish.

use crate::Progress;
use crate::derive::derive;
use crate::guest::{Boot, COMMAND_LINE, Guest, GuestError};
use crate::ingredients::{GatherError, Gathered, Ingredients, gather};
use crate::recipe::Recipe;
use crate::steps::Steps;
use crate::store::{Fresh, Store, StoreError, Template, disk_bytes};
use crate::working_set;
use std::fs::File;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zygote_protocol::{AgentMessage, PROTOCOL_VERSION};
use zygote_snapshot::{
    FORMAT_VERSION, MEMORY_FILE, Origin, Snapshot, VerifyError, WriteError, Writer,
};
use zygote_vmm::{Disk, MachineError};

/// Limits of the stages; emulated hosts are a hundred times slower than real ones.
const BOOT_MAX: Duration = Duration::from_secs(300);
/// Most replicas of a template.
pub const REPLICAS_MAX: u32 = 64;

/// How to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// How many times to boot it, 1 to [`REPLICAS_MAX`].
    pub replicas: u32,
    /// Build even if the template is there and made of the same.
    pub force: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Built {
    /// There was one already, made of the same.
    UpToDate(Template),
    /// It has been built.
    New(Template),
}

/// Why a template could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Its ingredients.
    #[error(transparent)]
    Gather(#[from] GatherError),
    /// Its guest.
    #[error("the template's guest did not get ready")]
    Guest(#[from] GuestError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Writing it.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Reading it back.
    #[error("the snapshot that was just written cannot be read back")]
    Verify(#[from] VerifyError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file.
    #[error("cannot open what the template is booted from")]
    Open(#[source] io::Error),
    /// Not a possible number.
    #[error("{0} replicas: a template has 1 to {REPLICAS_MAX}")]
    Replicas(u32),
}

/// Builds a template, or finds that it is there. Needs a working /dev/kvm; with its ingredients in
/// the cache, nothing else.
///
/// # Errors
/// See [`BuildError`]; the store is then as it was.
pub fn build(
    store: &Store,
    recipe: &Recipe,
    options: &BuildOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Built, BuildError> {
    if !(1..=REPLICAS_MAX).contains(&options.replicas) {
        return Err(BuildError::Replicas(options.replicas));
    }
    let gathered = gather(store, recipe, options.force, progress)?;
    if let Some(template) = up_to_date(store, recipe, options, &gathered) {
        return Ok(Built::UpToDate(template));
    }
    let template = match &gathered {
        Gathered::Whole(ingredients) => boot_all(store, recipe, options, ingredients, progress)?,
        Gathered::Derived(from) => derive(store, recipe, from, progress)?,
    };
    Ok(Built::New(template))
}

fn boot_all(
    store: &Store,
    recipe: &Recipe,
    options: &BuildOptions,
    ingredients: &Ingredients,
    progress: &mut dyn FnMut(Progress),
) -> Result<Template, BuildError> {
    let digest = digest(ingredients, recipe, options);
    let fresh = store.begin_new(&recipe.name)?;
    for replica in 0..options.replicas {
        let of = (replica, options.replicas);
        make_replica(
            store,
            &fresh,
            recipe,
            options,
            ingredients,
            &digest,
            of,
            progress,
        )?;
    }
    let template = Template {
        name: recipe.name.clone(),
        created_unix_s: unix_seconds(),
        memory_bytes: options.memory_bytes,
        vcpus: options.vcpus,
        replicas: options.replicas,
        kernel_release: ingredients.kernel.release.clone(),
        interpreter: recipe.interpreter.clone(),
        base: recipe.base.clone(),
        packages: recipe.packages.clone(),
        digest,
        protocol_version: PROTOCOL_VERSION,
        recipe: Some(recipe.origin.clone()),
        contents: ingredients.root.contents.clone(),
        disk_bytes: disk_bytes(fresh.folder()) + ingredients.root.piece.bytes,
        tenant: None,
        derived: None,
    };
    progress(Progress::new("publishing the template"));
    store.publish(fresh, &template)?;
    Ok(template)
}

/// The template, if the store has it as these ingredients and options would make it.
pub fn up_to_date(
    store: &Store,
    recipe: &Recipe,
    options: &BuildOptions,
    gathered: &Gathered,
) -> Option<Template> {
    let template = store.inspect(&recipe.name).ok()?;
    let same = match gathered {
        Gathered::Whole(ingredients) => template.digest == digest(ingredients, recipe, options),
        Gathered::Derived(from) => template.digest == from.digest,
    };
    (same && !options.force).then_some(template)
}

/// A digest of everything that decides what the template will be.
fn digest(ingredients: &Ingredients, recipe: &Recipe, options: &BuildOptions) -> String {
    let mut words = vec![
        ingredients.digest.clone(),
        recipe.interpreter.clone(),
        recipe.warm.clone(),
        options.memory_bytes.to_string(),
        options.vcpus.to_string(),
        options.replicas.to_string(),
        FORMAT_VERSION.to_string(),
        PROTOCOL_VERSION.to_string(),
        env!("CARGO_PKG_VERSION").to_owned(),
        COMMAND_LINE.to_owned(),
    ];
    words.extend(recipe.run.iter().cloned());
    let mut hasher = blake3::Hasher::new();
    for word in words {
        hasher.update(&(word.len() as u64).to_le_bytes());
        hasher.update(word.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[expect(
    clippy::too_many_arguments,
    reason = "one caller; they are the build's whole state"
)]
fn make_replica(
    store: &Store,
    fresh: &Fresh,
    recipe: &Recipe,
    options: &BuildOptions,
    ingredients: &Ingredients,
    digest: &str,
    (replica, replicas): (u32, u32),
    progress: &mut dyn FnMut(Progress),
) -> Result<(), BuildError> {
    let mut tell = |message: &str| {
        let prefix = if replicas > 1 {
            format!("replica {} of {replicas}: ", replica + 1)
        } else {
            String::new()
        };
        progress(Progress::new(format!("{prefix}{message}")));
    };
    tell("booting the guest");
    let mut guest = boot(store, options, ingredients)?;
    let AgentMessage::Hello { kernel_release, .. } = guest.next("start its agent", BOOT_MAX)?
    else {
        return Err(GuestError::Unexpected("something before its greeting".into()).into());
    };
    let mut told = |progress: Progress| tell(&progress.message);
    let mut steps = Steps::new(&mut guest, &mut told);
    recipe.run.iter().try_for_each(|line| steps.run(line))?;
    steps.warm(&recipe.warm)?;
    steps.freeze()?;
    guest.machine.pause()?;
    tell("writing the snapshot");
    let state = guest.machine.save()?;
    let directory = fresh.replica(replica);
    let mut writer = Writer::create(&directory)?;
    writer.memory(guest.machine.paused_memory()?)?;
    writer.machine(&state)?;
    writer.disk(ingredients.root.piece.clone());
    drop(guest);
    tell("recording what every run touches");
    let fresh = working_set::Fresh {
        memory: File::open(directory.join(MEMORY_FILE)).map_err(BuildError::Open)?,
        state: &state,
        memory_bytes: options.memory_bytes,
        root: open_root(store, ingredients)?,
    };
    writer.working_sets(fresh.working_sets()?);
    let cpuid = state.vcpus.first().map(|vcpu| &vcpu.cpuid[..]);
    writer.finish(Origin {
        template: recipe.name.clone(),
        recipe_digest: digest.to_owned(),
        replica,
        created_unix_s: unix_seconds(),
        zygote_version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol_version: PROTOCOL_VERSION,
        kernel_release,
        interpreter: recipe.interpreter.clone(),
        cpu_vendor: zygote_snapshot::cpu::vendor(cpuid.unwrap_or_default()),
    })?;
    tell("verifying the snapshot");
    let snapshot = Snapshot::open(&directory, &store.pieces()).map_err(VerifyError::from)?;
    snapshot.verify_once(&store.stamps(), &mut |_, _| true)?;
    Ok(())
}

fn boot(
    store: &Store,
    options: &BuildOptions,
    ingredients: &Ingredients,
) -> Result<Guest, BuildError> {
    Ok(Guest::boot(Boot {
        memory_bytes: options.memory_bytes,
        vcpus: options.vcpus,
        kernel: File::open(&ingredients.kernel.image).map_err(BuildError::Open)?,
        initramfs: ingredients.initramfs_file().map_err(BuildError::Open)?,
        root: open_root(store, ingredients)?,
    })?)
}

fn open_root(store: &Store, ingredients: &Ingredients) -> Result<Disk, BuildError> {
    let digest = &ingredients.root.piece.digest;
    File::open(store.pieces().join(digest))
        .and_then(|file| Disk::new(file, digest.clone()))
        .map_err(BuildError::Open)
}

/// Now, since 1970-01-01T00:00:00Z.
pub fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}
