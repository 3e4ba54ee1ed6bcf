//! What a derived template has besides its base's root: packages of the Python Package Index and files, as
//! an archive that is put into a guest. Cached under the digest of what it was asked to be.

use super::contents::Contents;
use super::error::{RootfsError, at};
use super::pip::{self, Wanted};
use super::tree::add_file;
use super::{LOG, WORK, write_synced};
use crate::Progress;
use crate::lock;
use crate::recipe::{Recipe, RecipeError};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use zygote_snapshot::file_digest;

/// Changes when this file makes another archive of the same recipe.
const VERSION: &str = "1";
const ARCHIVE: &str = "layer.tar";
const INDEX: &str = "index.json";

/// An archive of files and links, none of folders, in ascending order of their paths.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The archive; `None`: there is nothing to be put.
    pub archive: Option<PathBuf>,
    /// Its BLAKE3, in hex.
    pub digest: String,
    /// Length of the archive.
    pub bytes: u64,
    /// What is in it.
    pub contents: Contents,
}

#[derive(Serialize, Deserialize)]
struct Index {
    digest: String,
    bytes: u64,
    contents: Contents,
}

/// The recipe's layer, from the cache or made now. With `check`, one of the cache is used only if its bytes are
/// what they were. The caller holds the lock of builds, so that nobody else makes one.
pub fn layer(
    recipe: &Recipe,
    cache: &Path,
    check: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Layer, RootfsError> {
    let (requirements, file) = recipe.requirements()?;
    let wanted = Wanted {
        requirements: &requirements,
        file: file.as_deref(),
    };
    let files = recipe.added_files()?;
    if wanted.is_empty() && files.is_empty() {
        return Ok(Layer {
            archive: None,
            digest: String::new(),
            bytes: 0,
            contents: Contents::default(),
        });
    }
    let folder = cache.join(key(&wanted, &files)?);
    if let Some(found) = cached(&folder).filter(|layer| !check || is_whole(layer)) {
        return Ok(found);
    }
    fs::create_dir_all(cache).map_err(at("make the folder", cache))?;
    let lock_path = cache.join("lock");
    let waiting = "waiting for another build to end";
    let _lock = lock::hold(&lock_path, lock::BUILD_MAX, &mut |holder| {
        progress(Progress::new(format!("{waiting}{holder}")));
    })?;
    super::remove_old_work(cache)?;
    let work = cache.join(format!("{WORK}{}", std::process::id()));
    fs::create_dir(&work).map_err(at("make the folder", &work))?;
    let made = make(&wanted, &files, &work, &cache.join(LOG), progress);
    let published = made.and_then(|()| {
        let fresh = work.join("layer");
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&fresh, &folder).map_err(at("publish", &folder))
    });
    let _ = fs::remove_dir_all(&work);
    published?;
    cached(&folder).ok_or_else(|| {
        let gone = std::io::ErrorKind::NotFound.into();
        at("read", &folder)(gone)
    })
}

type Files = std::collections::BTreeMap<PathBuf, (u32, Vec<u8>)>;

fn key(wanted: &Wanted<'_>, files: &Files) -> Result<String, RecipeError> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(VERSION.as_bytes());
    add(&(wanted.requirements.len() as u64).to_le_bytes());
    for requirement in wanted.requirements {
        add(requirement.as_bytes());
    }
    add(wanted.file.unwrap_or_default().as_bytes());
    for (path, (mode, content)) in files {
        add(path.as_os_str().as_encoded_bytes());
        add(&mode.to_le_bytes());
        add(content);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn cached(folder: &Path) -> Option<Layer> {
    let index: Index = serde_json::from_slice(&fs::read(folder.join(INDEX)).ok()?).ok()?;
    let archive = folder.join(ARCHIVE);
    let is_there = fs::metadata(&archive).is_ok_and(|meta| meta.len() == index.bytes);
    is_there.then_some(Layer {
        archive: Some(archive),
        digest: index.digest,
        bytes: index.bytes,
        contents: index.contents,
    })
}

fn is_whole(layer: &Layer) -> bool {
    let Some(archive) = &layer.archive else {
        return true;
    };
    let digest = File::open(archive).and_then(|file| file_digest(&file));
    digest.is_ok_and(|(_, digest)| digest == layer.digest)
}

/// Makes `layer/` in the folder of work.
fn make(
    wanted: &Wanted<'_>,
    files: &Files,
    work: &Path,
    log: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), RootfsError> {
    let (tree, fresh) = (work.join("tree"), work.join("layer"));
    for folder in [&tree, &fresh] {
        fs::create_dir(folder).map_err(at("make the folder", folder))?;
    }
    let mut contents = Contents::default();
    if !wanted.is_empty() {
        progress(Progress::new("fetching Python packages"));
        contents.pip = pip::unpack_into(wanted, &tree, work, log)?;
    }
    for (path, (mode, content)) in files {
        add_file(&tree, path, *mode, content)?;
        contents.files.push(path.clone());
    }
    let archive = fresh.join(ARCHIVE);
    pack(&tree, &archive).map_err(at("write", &archive))?;
    let digested = File::open(&archive).and_then(|file| file_digest(&file));
    let (bytes, digest) = digested.map_err(at("read", &archive))?;
    let index = Index {
        digest,
        bytes,
        contents,
    };
    let text = serde_json::to_vec(&index).unwrap_or_default();
    write_synced(&fresh.join(INDEX), &text)
}

fn pack(tree: &Path, archive: &Path) -> std::io::Result<()> {
    let mut builder = tar::Builder::new(BufWriter::new(File::create(archive)?));
    let mut paths = Vec::new();
    collect(tree, &mut paths)?;
    paths.sort();
    for path in paths {
        let name = path.strip_prefix(tree).unwrap_or(&path);
        let meta = fs::symlink_metadata(&path)?;
        let mut header = tar::Header::new_gnu();
        // Nothing of time or chance in it.
        header.set_metadata_in_mode(&meta, tar::HeaderMode::Deterministic);
        header.set_mode(meta.permissions().mode() & 0o7777);
        if meta.is_symlink() {
            header.set_size(0);
            builder.append_link(&mut header, name, fs::read_link(&path)?)?;
        } else {
            builder.append_data(&mut header, name, File::open(&path)?)?;
        }
    }
    let file = builder.into_inner()?.into_inner()?;
    file.sync_all()
}

/// All that is no folder.
fn collect(folder: &Path, paths: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), paths)?;
        } else {
            paths.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(folder: &Path, text: &str) -> Recipe {
        let text = format!("name = \"x\"\nfrom = \"python\"\n{text}\n");
        Recipe::parse("x.toml", &text, Some(&folder.join("x.toml"))).unwrap()
    }

    fn made(folder: &Path, recipe: &Recipe) -> (Layer, usize) {
        let mut told = 0;
        let cache = folder.join("cache/layers");
        let layer = layer(recipe, &cache, true, &mut |_| told += 1).unwrap();
        (layer, told)
    }

    #[test]
    fn files_and_links_are_packed_once_and_the_same_each_time() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("data/sub")).unwrap();
        fs::write(folder.path().join("data/sub/a"), "1").unwrap();
        let recipe = recipe(folder.path(), "files = [\"data:/opt/data\"]");
        let (first, _) = made(folder.path(), &recipe);
        let archive = first.archive.clone().unwrap();
        let mut archive = tar::Archive::new(File::open(archive).unwrap());
        let paths: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().into_owned())
            .collect();
        assert_eq!(paths, [Path::new("opt/data/sub/a")]);
        let mode = |layer: &Layer| {
            let file = File::open(layer.archive.as_ref().unwrap()).unwrap();
            let mut archive = tar::Archive::new(file);
            let entry = archive.entries().unwrap().next().unwrap().unwrap();
            entry.header().mode().unwrap()
        };
        let path = folder.path().join("data/sub/a");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let (first, _) = made(folder.path(), &recipe);
        assert_eq!(mode(&first), 0o640);
        fs::remove_dir_all(folder.path().join("cache")).unwrap();
        let (second, _) = made(folder.path(), &recipe);
        assert_eq!(first.digest, second.digest);
        // One that is not what it was is made again.
        fs::write(second.archive.unwrap(), vec![0; second.bytes as usize]).unwrap();
        let (third, _) = made(folder.path(), &recipe);
        assert_eq!(third.digest, first.digest);
        assert!(is_whole(&third));
        fs::write(folder.path().join("data/sub/a"), "2").unwrap();
        assert_ne!(made(folder.path(), &recipe).0.digest, first.digest);
    }

    #[test]
    fn nothing_wanted_is_no_layer() {
        let folder = tempfile::tempdir().unwrap();
        let (layer, told) = made(folder.path(), &recipe(folder.path(), "run = [\"true\"]"));
        assert!(layer.archive.is_none() && told == 0);
        assert!(!folder.path().join("cache").exists());
    }

    #[test]
    fn what_was_half_made_is_removed_and_made_again() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "1").unwrap();
        let recipe = recipe(folder.path(), "files = [\"a\"]");
        let cache = folder.path().join("cache/layers");
        fs::create_dir_all(cache.join("work-1/tree")).unwrap();
        made(folder.path(), &recipe);
        let left: Vec<_> = fs::read_dir(&cache).unwrap().flatten().collect();
        assert_eq!(left.len(), 2, "{left:?}: the layer, and the lock");
    }
}
