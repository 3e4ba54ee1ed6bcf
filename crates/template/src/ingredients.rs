//! What a template is booted from: kernel, initramfs, root image. Made on any machine; no KVM.

use crate::agent::{self, AgentError};
use crate::derive::{self, BaseError, Derivation};
use crate::recipe::Recipe;
use crate::rootfs::{self, Places, RootImage, RootfsError};
use crate::{Progress, Store};
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use zygote_debian::initramfs::Initramfs;
use zygote_debian::kernel::{self, Flavour, Kernel, KernelError};

/// Modules of the guest, in the order in which the agent loads them (what they need comes before).
const MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "virtio-rng",
    "crc32c-intel",
    "erofs",
    "overlay",
];

/// What a template is made from.
#[derive(Debug)]
pub enum Gathered {
    /// It is booted.
    Whole(Box<Ingredients>),
    /// It is derived from another one.
    Derived(Box<Derivation>),
}

/// Why the ingredients cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest's kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The root image.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// What it is derived from.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The initramfs.
    #[error("cannot make the guest's initramfs")]
    Initramfs(#[source] io::Error),
}

/// What a template is booted from.
#[derive(Debug)]
pub struct Ingredients {
    /// The guest's kernel.
    pub kernel: Kernel,
    /// Its initramfs, complete.
    pub initramfs: Vec<u8>,
    /// The root image.
    pub root: RootImage,
    /// A digest of all of them.
    pub digest: String,
}

/// Makes the ingredients, or finds them in the cache; then it needs neither network nor root. With
/// `check`, the root image's bytes are compared with its digest, and it is made anew if they differ.
///
/// # Errors
/// See [`GatherError`].
pub fn gather(
    store: &Store,
    recipe: &Recipe,
    check: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Gathered, GatherError> {
    match &recipe.from {
        None => {
            let ingredients = whole(store, recipe, check, progress)?;
            Ok(Gathered::Whole(Box::new(ingredients)))
        }
        Some(from) => {
            let derivation = derive::prepare(store, recipe, from, check, progress)?;
            Ok(Gathered::Derived(Box::new(derivation)))
        }
    }
}

fn whole(
    store: &Store,
    recipe: &Recipe,
    check: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Ingredients, GatherError> {
    let (_, agent) = agent::find()?;
    let cache = store.cache();
    let places = Places {
        state: store.state_dir(),
        cache: &cache.join("rootfs"),
        pieces: &store.pieces(),
    };
    let root = rootfs::image(recipe, &places, check, progress)?;
    let kernel = kernel::fetch(&cache.join("kernels"), Flavour::Cloud, &mut |message| {
        progress(Progress::new(message));
    })?;
    let modules = kernel.modules(&MODULES)?;
    let initramfs = initramfs(&agent, &modules).map_err(GatherError::Initramfs)?;
    let mut hasher = blake3::Hasher::new();
    for part in [
        &initramfs[..],
        kernel.release.as_bytes(),
        root.piece.digest.as_bytes(),
    ] {
        hasher.update(blake3::hash(part).as_bytes());
    }
    Ok(Ingredients {
        digest: hasher.finalize().to_hex().to_string(),
        kernel,
        initramfs,
        root,
    })
}

/// The agent as PID 1, and the modules with the order to load them in.
fn initramfs(agent: &[u8], modules: &[PathBuf]) -> io::Result<Vec<u8>> {
    let mut archive = Initramfs::new(Vec::new());
    for folder in ["dev", "proc", "sys", "modules"] {
        archive.folder(folder)?;
    }
    archive.device("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, agent)?;
    let mut order = String::new();
    for path in modules {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{name}"), 0o644, &std::fs::read(path)?)?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish()
}

impl Ingredients {
    /// The initramfs as a file, for the machine.
    ///
    /// # Errors
    /// If memory is short.
    pub fn initramfs_file(&self) -> io::Result<File> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::memfd_create("initramfs", flags)?);
        file.write_all(&self.initramfs)?;
        io::Seek::rewind(&mut file)?;
        Ok(file)
    }
}
