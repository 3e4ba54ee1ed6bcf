//! The root file system: Debian packages by mmdebstrap, packed as an EROFS image that every fork
//! shares. Cached under the digest of what it was asked to be; stored under its own.

use crate::Progress;
use crate::lock::{self, LockError};
use crate::recipe::{Recipe, RecipeError};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use zygote_snapshot::{DiskPiece, file_digest};

/// Changes when this file makes another image of the same recipe.
const VERSION: &str = "3";
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
/// Most of a tool's complaint that is repeated.
const COMPLAINT_LINES: usize = 15;

/// A tool that has not ended by then hangs; the longest, mmdebstrap, takes a minute, and over a slow
/// line many.
const TOOL_MAX_S: &str = "3600";
/// How timeout(1) exits when the time is over.
const TIMED_OUT: i32 = 124;
/// How unshare(1), setpriv(1) and timeout(1) exit if there is no such program.
const NOT_FOUND: i32 = 127;

/// Why there is no root image.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The recipe's files.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// Another build.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file of ours.
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
    /// Neither root nor a user namespace with a range of user ids.
    #[error(
        "making a root file system needs user ids besides your own; to get them: sudo apt-get \
         install -y uidmap && sudo usermod --add-subuids 100000-165535 --add-subgids \
         100000-165535 $USER. Or build once as root: sudo zygote --state-dir {} template build {name}",
        state.display()
    )]
    NoUserIds {
        /// The recipe.
        name: String,
        /// The state directory.
        state: PathBuf,
    },
    /// A tool is missing.
    #[error("{program} is not installed; install it with: sudo apt-get install {package}")]
    Missing {
        /// Which.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// A tool hangs.
    #[error("{program} did not end within {TOOL_MAX_S} s and was ended; all that it said is in {}", log.display())]
    Late {
        /// Which.
        program: &'static str,
        /// Its log.
        log: PathBuf,
    },
    /// A tool failed.
    #[error("{program} failed ({status}); all that it said is in {}; its last words:\n{complaint}", log.display())]
    Tool {
        /// Which.
        program: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The last lines.
        complaint: String,
    },
}

fn at<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> RootfsError + 'a {
    move |source| RootfsError::File {
        operation,
        path: path.to_owned(),
        source,
    }
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
) -> Result<DiskPiece, RootfsError> {
    let key = key(recipe)?;
    let index = places.cache.join(&key);
    let cached = || cached(&index, places.pieces).filter(|piece| !check || is_whole(piece, places));
    if let Some(piece) = cached() {
        return Ok(piece);
    }
    for folder in [places.cache, places.pieces] {
        fs::create_dir_all(folder).map_err(at("make the folder", folder))?;
    }
    let lock_path = places.cache.join("lock");
    let waiting = "waiting for another build of a root file system";
    let _lock = lock::hold(&lock_path, lock::BUILD_MAX, &mut |holder| {
        progress(Progress::new(format!("{waiting}{holder}")));
    })?;
    if let Some(piece) = cached() {
        return Ok(piece);
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
    let made = make(recipe, &work, places.pieces, progress)?;
    let fresh = work.join("index");
    let text = format!("{} {}\n", made.digest, made.bytes);
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

/// A program that may give files any owner: as root itself, else in a user namespace where the
/// user is root and has the ids of /etc/subuid (user_namespaces(7), subuid(5)).
fn rooted(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return dependent(program);
    }
    let mut command = dependent("unshare");
    command.args(["--map-root-user", "--map-auto", program]);
    command
}

/// A program that is told to end when this one is killed, so that it leaves nothing behind.
/// mmdebstrap then signals its process group, which is why that is its own.
fn dependent(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM"])
        .args(["timeout", "--kill-after=30", TOOL_MAX_S, program])
        .process_group(0);
    command
}

/// Whether this user can make a root file system, whose files have many owners.
pub fn has_user_ids() -> bool {
    let mut command = rooted("true");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
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
    for (path, (mode, content)) in recipe.added_files()? {
        add(path.as_os_str().as_encoded_bytes());
        add(&mode.to_le_bytes());
        add(&content);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn cached(index: &Path, pieces: &Path) -> Option<DiskPiece> {
    let text = fs::read_to_string(index).ok()?;
    let (digest, bytes) = text.trim().split_once(' ')?;
    let piece = DiskPiece {
        bytes: bytes.parse().ok()?,
        digest: digest.to_owned(),
    };
    let good = zygote_snapshot::manifest::is_digest(digest)
        && fs::metadata(pieces.join(digest)).is_ok_and(|meta| meta.len() == piece.bytes);
    good.then_some(piece)
}

fn is_whole(piece: &DiskPiece, places: &Places<'_>) -> bool {
    let digest = File::open(places.pieces.join(&piece.digest)).and_then(|file| file_digest(&file));
    digest.is_ok_and(|(_, digest)| digest == piece.digest)
}

fn make(
    recipe: &Recipe,
    work: &Path,
    pieces: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<DiskPiece, RootfsError> {
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
    for (path, (mode, content)) in recipe.added_files()? {
        add_file(&tree, &path, mode, &content)?;
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
    Ok(DiskPiece { bytes, digest })
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
    tool(command, "mmdebstrap", "mmdebstrap", log)
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

fn tool(
    mut command: Command,
    program: &'static str,
    package: &'static str,
    log: &Path,
) -> Result<(), RootfsError> {
    let output = File::create(log).map_err(at("create", log))?;
    let again = output.try_clone().map_err(at("create", log))?;
    command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(again);
    let status = command.status().map_err(at("start", Path::new(program)))?;
    match status.code() {
        Some(0) => return Ok(()),
        Some(NOT_FOUND) => return Err(RootfsError::Missing { program, package }),
        Some(TIMED_OUT) => {
            let log = log.to_owned();
            return Err(RootfsError::Late { program, log });
        }
        _ => {}
    }
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    Err(RootfsError::Tool {
        program,
        status,
        log: log.to_owned(),
        complaint: lines[lines.len().saturating_sub(COMPLAINT_LINES)..].join("\n"),
    })
}

/// Writes a file into a tree as a program that runs in it would: its symbolic links never lead out
/// of it (openat2(2), RESOLVE_IN_ROOT).
fn add_file(tree: &Path, path: &Path, mode: u32, content: &[u8]) -> Result<(), RootfsError> {
    let write = || -> io::Result<()> {
        let root = openat(CWD, tree, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        let inside = path.strip_prefix("/").unwrap_or(path);
        let folder = make_folders(&root, inside.parent().unwrap_or(Path::new("")))?;
        let name = inside.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let mode = Mode::from_raw_mode(mode);
        // What is there may be a link: it is replaced, not followed.
        let _ = rustix::fs::unlinkat(&folder, name, rustix::fs::AtFlags::empty());
        let file = openat(&folder, name, flags | OFlags::NOFOLLOW, mode)?;
        rustix::fs::fchmod(&file, mode)?;
        File::from(file).write_all(content)
    };
    write().map_err(at("write into the root file system", path))
}

fn make_folders(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let open = |path: &Path| {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    };
    let mut prefix = PathBuf::new();
    let mut folder = open(&prefix)?;
    for part in path {
        prefix.push(part);
        folder = match open(&prefix) {
            Err(Errno::NOENT) => {
                mkdirat(&folder, part, Mode::from_raw_mode(0o755))?;
                open(&prefix)?
            }
            other => other?,
        };
    }
    Ok(folder)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), RootfsError> {
    let mut file = File::create(path).map_err(at("create", path))?;
    file.write_all(bytes).map_err(at("write", path))?;
    file.sync_all().map_err(at("flush", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

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
        fs::write(&index, format!("{} {bytes}\n", piece.digest)).unwrap();
        assert!(cached(&index, folder.path()).is_some() && is_whole(&piece, &places));
        fs::write(folder.path().join(&piece.digest), [2; 5000]).unwrap();
        assert!(cached(&index, folder.path()).is_some() && !is_whole(&piece, &places));
    }

    #[test]
    fn a_link_in_the_tree_does_not_lead_out_of_it() {
        let outside = tempfile::tempdir().unwrap();
        let tree = tempfile::tempdir().unwrap();
        symlink(outside.path(), tree.path().join("abs")).unwrap();
        symlink("../../../..", tree.path().join("up")).unwrap();
        fs::create_dir_all(tree.path().join(outside.path().strip_prefix("/").unwrap())).unwrap();
        for path in ["/abs/x", "/up/y", "/new/folder/z"] {
            add_file(tree.path(), Path::new(path), 0o640, b"content").unwrap();
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(tree.path().join("y").exists());
        let file = tree.path().join("new/folder/z");
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o640
        );
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
    fn a_tool_that_is_missing_or_fails_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let missing = tool(dependent("no-such-program"), "no-such-program", "pkg", &log);
        let sentence = missing.unwrap_err().to_string();
        assert!(sentence.contains("apt-get install pkg"), "{sentence}");
        let mut failing = dependent("ls");
        failing.arg("/no/such/file");
        let sentence = tool(failing, "ls", "coreutils", &log)
            .unwrap_err()
            .to_string();
        assert!(sentence.contains("/no/such/file"), "{sentence}");
    }

    #[test]
    fn an_index_without_its_image_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let digest = "0a".repeat(32);
        let index = folder.path().join("index");
        fs::write(&index, format!("{digest} 3\n")).unwrap();
        assert_eq!(cached(&index, folder.path()), None);
        fs::write(folder.path().join(&digest), "abc").unwrap();
        assert_eq!(cached(&index, folder.path()).unwrap().bytes, 3);
        fs::write(folder.path().join(&digest), "ab").unwrap();
        assert_eq!(cached(&index, folder.path()), None);
        fs::write(&index, "../../etc/passwd 3\n").unwrap();
        assert_eq!(cached(&index, folder.path()), None);
    }
}
