//! The root file system: Debian packages by mmdebstrap, those of the Python Package Index by pip, packed
//! as an EROFS image that every fork shares. Cached under the digest of what it was asked to be; stored
//! under its own.

mod contents;
mod error;
mod layer;
mod pip;
mod tools;
mod tree;

pub use contents::{Contents, Wheel};
pub use error::RootfsError;
pub use layer::{Layer, layer};
pub use pip::compiler;
pub use tools::has_user_ids;

use crate::Progress;
use crate::lock;
use crate::recipe::{Recipe, RecipeError};
use error::at;
use pip::Wanted;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use tools::{dependent, rooted, tool};
use tree::add_file;
use zygote_snapshot::{DiskPiece, file_digest};

/// Changes when this file makes another image of the same recipe.
const VERSION: &str = "4";
/// How the names of folders begin where images are made.
const WORK: &str = "work-";
/// What the tools of the last build said.
const LOG: &str = "log";
/// What programs expect of any system: /etc/services and /etc/protocols.
const ALWAYS: &str = "netbase";
/// What no program in a sandbox needs.
const EXCLUDED: [&str; 6] = [
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/var/cache/debconf/*-old",
];
/// Files that mmdebstrap copies from this machine, or that every fork gets anew.
const NEUTRAL: [(&str, &str); 4] = [
    ("/etc/hostname", "zygote\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("/etc/resolv.conf", ""),
    ("/etc/machine-id", ""),
];
/// A root image, and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootImage {
    /// The image, in the store's folder of pieces.
    pub piece: DiskPiece,
    /// What has been installed into it.
    pub contents: Contents,
}

/// Where things lie.
pub struct Places<'a> {
    /// The state directory, for messages.
    pub state: &'a Path,
    /// Work and the cache's index.
    pub cache: &'a Path,
    /// Images by digest.
    pub pieces: &'a Path,
}

/// The recipe's root image, from the cache or made now. Several at once wait for each other. With
/// `check`, one of the cache is used only if its bytes are what they were.
pub fn image(
    recipe: &Recipe,
    places: &Places<'_>,
    check: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<RootImage, RootfsError> {
    let key = key(recipe)?;
    let index = places.cache.join(&key);
    let cached = || cached(&index, places.pieces).filter(|image| !check || is_whole(image, places));
    if let Some(image) = cached() {
        return Ok(image);
    }
    for folder in [places.cache, places.pieces] {
        fs::create_dir_all(folder).map_err(at("make the folder", folder))?;
    }
    let lock_path = places.cache.join("lock");
    let waiting = "waiting for another build of a root file system";
    let _lock = lock::hold(&lock_path, lock::BUILD_MAX, &mut |holder| {
        progress(Progress::new(format!("{waiting}{holder}")));
    })?;
    if let Some(image) = cached() {
        return Ok(image);
    }
    if !has_user_ids() {
        return Err(RootfsError::NoUserIds {
            name: recipe.name.clone(),
            state: places.state.to_owned(),
        });
    }
    remove_old_work(places.cache)?;
    let work = places.cache.join(format!("{WORK}{}", std::process::id()));
    // Nobody else gets at set-uid files in it.
    let private = fs::DirBuilder::new().mode(0o700).create(&work);
    private.map_err(at("make the folder", &work))?;
    let made = make(recipe, &work, places.pieces, progress);
    if made.is_err() {
        // What the tools have said is beside it.
        let _ = remove(&work);
    }
    let made = made?;
    let fresh = work.join("index");
    let contents = serde_json::to_string(&made.contents).unwrap_or_default();
    let text = format!("{} {}\n{contents}\n", made.piece.digest, made.piece.bytes);
    write_synced(&fresh, text.as_bytes())?;
    fs::rename(&fresh, &index).map_err(at("publish", &index))?;
    remove(&work)?;
    Ok(made)
}

/// Work of builds that were killed. Their tools may still be ending, so no build takes the name of
/// another's work.
fn remove_old_work(cache: &Path) -> Result<(), RootfsError> {
    let entries = fs::read_dir(cache).map_err(at("read", cache))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(WORK) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Work of an earlier build may have folders that only a [`rooted`] program can remove.
fn remove(work: &Path) -> Result<(), RootfsError> {
    match fs::remove_dir_all(work) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let mut command = rooted("rm");
            command.arg("-rf").arg(work);
            tool(command, "rm", "coreutils", &work.with_file_name(LOG))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", work)(error)),
        _ => Ok(()),
    }
}

/// A digest of everything that decides what the image will be.
fn key(recipe: &Recipe) -> Result<String, RecipeError> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(VERSION.as_bytes());
    add(recipe.base.as_bytes());
    let mut packages = recipe.packages.clone();
    packages.sort();
    packages.dedup();
    for package in &packages {
        add(package.as_bytes());
    }
    let (requirements, file) = recipe.requirements()?;
    if !requirements.is_empty() || file.is_some() {
        add(b"pip");
        requirements
            .iter()
            .for_each(|wanted| add(wanted.as_bytes()));
        add(file.unwrap_or_default().as_bytes());
    }
    for (path, (mode, content)) in recipe.added_files()? {
        add(path.as_os_str().as_encoded_bytes());
        add(&mode.to_le_bytes());
        add(&content);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// An index has the image's digest and length in its first line, and in the second what is in it.
fn cached(index: &Path, pieces: &Path) -> Option<RootImage> {
    let text = fs::read_to_string(index).ok()?;
    let (first, contents) = text.split_once('\n')?;
    let (digest, bytes) = first.split_once(' ')?;
    let piece = DiskPiece {
        bytes: bytes.parse().ok()?,
        digest: digest.to_owned(),
    };
    let good = zygote_snapshot::manifest::is_digest(digest)
        && fs::metadata(pieces.join(digest)).is_ok_and(|meta| meta.len() == piece.bytes);
    let contents = serde_json::from_str(contents).ok()?;
    good.then_some(RootImage { piece, contents })
}

fn is_whole(image: &RootImage, places: &Places<'_>) -> bool {
    let piece = &image.piece;
    let digest = File::open(places.pieces.join(&piece.digest)).and_then(|file| file_digest(&file));
    digest.is_ok_and(|(_, digest)| digest == piece.digest)
}

fn make(
    recipe: &Recipe,
    work: &Path,
    pieces: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<RootImage, RootfsError> {
    let tree = work.join("tree");
    progress(Progress::new(format!(
        "installing Debian {} with {} into a root file system (about a minute)",
        recipe.base,
        recipe.packages.join(", ")
    )));
    let log = work.with_file_name(LOG);
    let archive = work.join("tree.tar");
    install(recipe, &archive, &log)?;
    unpack(&archive, &tree, &log)?;
    for (path, text) in NEUTRAL {
        add_file(&tree, Path::new(path), 0o644, text.as_bytes())?;
    }
    let mut contents = Contents {
        debian: contents::debian_packages(&tree).map_err(at("read", &tree))?,
        ..Contents::default()
    };
    let (requirements, file) = recipe.requirements()?;
    let wanted = Wanted {
        requirements: &requirements,
        file: file.as_deref(),
    };
    if !wanted.is_empty() {
        progress(Progress::new("installing Python packages"));
        contents.pip = pip::install(&wanted, &tree, work, &log)?;
    }
    for (path, (mode, content)) in recipe.added_files()? {
        add_file(&tree, &path, mode, &content)?;
        contents.files.push(path);
    }
    progress(Progress::new("packing the root file system"));
    let image = work.join("image");
    let mut pack = rooted("mkfs.erofs");
    // Nothing of time or chance in the image: the same tree gives the same digest.
    pack.args(["-T0", "-U", "00000000-0000-0000-0000-000000000000"])
        .arg(&image)
        .arg(&tree);
    tool(pack, "mkfs.erofs", "erofs-utils", &log)?;
    let file = File::open(&image).map_err(at("open", &image))?;
    let (bytes, digest) = file_digest(&file).map_err(at("read", &image))?;
    file.sync_all().map_err(at("flush", &image))?;
    let mut permissions = file.metadata().map_err(at("read", &image))?.permissions();
    permissions.set_readonly(true);
    file.set_permissions(permissions)
        .map_err(at("protect", &image))?;
    fs::rename(&image, pieces.join(&digest)).map_err(at("publish", &image))?;
    let flushed = File::open(pieces).and_then(|folder| folder.sync_all());
    flushed.map_err(at("flush", pieces))?;
    let piece = DiskPiece { bytes, digest };
    Ok(RootImage { piece, contents })
}

fn install(recipe: &Recipe, archive: &Path, log: &Path) -> Result<(), RootfsError> {
    let mut command = dependent("mmdebstrap");
    command
        .args(["--variant=minbase", "--format=tar"])
        .args(EXCLUDED.map(|path| format!("--dpkgopt=path-exclude={path}")))
        .arg("--dpkgopt=path-include=/usr/share/doc/*/copyright")
        .arg(format!("--include={ALWAYS},{}", recipe.packages.join(",")))
        .arg(&recipe.base)
        .arg(archive);
    // This machine's own archive mirrors, when it runs Debian.
    let sources = [
        "/etc/apt/sources.list.d/debian.sources",
        "/etc/apt/sources.list",
    ];
    let own = sources
        .iter()
        .find(|path| fs::metadata(path).is_ok_and(|meta| meta.len() > 0));
    command.args(own);
    tool(command, "mmdebstrap", "mmdebstrap", log).map_err(|error| not_found(error, recipe, log))
}

/// apt's complaint about packages that do not exist, in one line.
fn not_found(error: RootfsError, recipe: &Recipe, log: &Path) -> RootfsError {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let unknown = |line: &str| {
        let name = line.strip_prefix("E: Unable to locate package ")?;
        Some(name.trim().to_owned())
    };
    let names: Vec<String> = text.lines().filter_map(unknown).collect();
    if names.is_empty() {
        return error;
    }
    RootfsError::NoPackage {
        what: format!("Debian {} has no package {}", recipe.base, names.join(", ")),
        log: log.to_owned(),
    }
}

/// Unpacks all but device nodes, which only root can make; a guest has a devtmpfs.
fn unpack(archive: &Path, tree: &Path, log: &Path) -> Result<(), RootfsError> {
    fs::create_dir(tree).map_err(at("make the folder", tree))?;
    let mut command = rooted("tar");
    command
        .args([
            "--extract",
            "--numeric-owner",
            "--exclude=./dev/*",
            "--file",
        ])
        .arg(archive)
        .arg("--directory")
        .arg(tree);
    tool(command, "tar", "tar", log)?;
    fs::remove_file(archive).map_err(at("remove", archive))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), RootfsError> {
    let mut file = File::create(path).map_err(at("create", path))?;
    file.write_all(bytes).map_err(at("write", path))?;
    file.sync_all().map_err(at("flush", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_of_the_right_length_and_other_bytes_is_not_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, [1; 5000]).unwrap();
        let (bytes, digest) = file_digest(&File::open(&path).unwrap()).unwrap();
        fs::rename(&path, folder.path().join(&digest)).unwrap();
        let piece = DiskPiece { bytes, digest };
        let places = Places {
            state: folder.path(),
            cache: folder.path(),
            pieces: folder.path(),
        };
        let index = folder.path().join("index");
        let contents = serde_json::to_string(&Contents::default()).unwrap();
        fs::write(&index, format!("{} {bytes}\n{contents}\n", piece.digest)).unwrap();
        assert!(is_whole(&cached(&index, folder.path()).unwrap(), &places));
        fs::write(folder.path().join(&piece.digest), [2; 5000]).unwrap();
        assert!(!is_whole(&cached(&index, folder.path()).unwrap(), &places));
    }

    #[test]
    fn work_of_a_killed_build_is_removed_and_nothing_else() {
        let cache = tempfile::tempdir().unwrap();
        for path in ["work-1/tree/sub", "work-22"] {
            fs::create_dir_all(cache.path().join(path)).unwrap();
        }
        fs::write(cache.path().join("log"), "").unwrap();
        remove_old_work(cache.path()).unwrap();
        let left: Vec<_> = fs::read_dir(cache.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].file_name(), "log");
    }

    #[test]
    fn an_index_without_its_image_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let digest = "0a".repeat(32);
        let index = folder.path().join("index");
        let contents = serde_json::to_string(&Contents::default()).unwrap();
        fs::write(&index, format!("{digest} 3\n{contents}\n")).unwrap();
        assert_eq!(cached(&index, folder.path()), None);
        fs::write(folder.path().join(&digest), "abc").unwrap();
        let found = cached(&index, folder.path()).unwrap();
        assert_eq!(
            (found.piece.bytes, found.contents),
            (3, Contents::default())
        );
        fs::write(folder.path().join(&digest), "ab").unwrap();
        assert_eq!(cached(&index, folder.path()), None);
        fs::write(&index, format!("../../etc/passwd 3\n{contents}\n")).unwrap();
        assert_eq!(cached(&index, folder.path()), None);
    }
}
