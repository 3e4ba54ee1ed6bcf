//! Files that come out of a sandbox once its program has ended: `--get`. The guest is not trusted:
//! nothing that it sends leads out of the folder that was named.

mod landing;

use crate::copy::Pair;
use crate::failure;
use anyhow::{Context, bail};
use landing::Landing;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use zygote_api::{ErrorCode, ExecResult, Failure, GetPiece, GotFile, Octets};

/// What was asked for and has come, of one run.
pub struct Received {
    wanted: Vec<Pair>,
    /// Which of several runs this is, each of which has a folder of its own.
    run: Option<usize>,
    place: Option<Place>,
    open: Option<Open>,
    files: Vec<GotFile>,
    failures: Vec<Failure>,
}

/// Where a file or folder goes.
struct Place {
    index: usize,
    path: PathBuf,
    /// If it is a folder: what comes lies below it.
    folder: Option<OwnedFd>,
    /// What follows is of no use.
    failed: bool,
}

struct Open {
    file: Landing,
    bytes: u64,
    hasher: Sha256,
}

impl Received {
    /// Nothing yet; `run`: its number, if there are several.
    pub fn new(wanted: &[Pair], run: Option<usize>) -> Self {
        Self {
            wanted: wanted.to_vec(),
            run,
            place: None,
            open: None,
            files: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// The next piece.
    pub fn take(&mut self, index: usize, piece: GetPiece) {
        if self.place.as_ref().is_none_or(|place| place.index != index) {
            self.place = self.place_for(index);
        }
        let failed = self.place.as_ref().is_none_or(|place| place.failed);
        if failed && !matches!(piece, GetPiece::Failed { .. }) {
            return;
        }
        if let Err(error) = self.write(piece) {
            self.fail(failure::of(&error));
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.open = None;
        if let Some(place) = &mut self.place {
            place.failed = true;
        }
        self.failures.push(failure);
    }

    /// As cp(1) chooses: into a folder that is there, else by that name.
    fn place_for(&self, index: usize) -> Option<Place> {
        let wanted = self.wanted.get(index)?;
        let name = wanted.source.file_name();
        let within = |folder: &Path| name.map_or(folder.to_owned(), |name| folder.join(name));
        let path = match &wanted.target {
            None => within(Path::new(".")),
            Some(target) if target.as_os_str().as_bytes().ends_with(b"/") => within(target),
            Some(target) if target.is_dir() => within(target),
            Some(target) => target.clone(),
        };
        let path = match (self.run, path.parent(), path.file_name()) {
            (Some(run), Some(parent), Some(name)) => parent.join(run.to_string()).join(name),
            _ => path,
        };
        Some(Place {
            index,
            path,
            folder: None,
            failed: false,
        })
    }

    fn write(&mut self, piece: GetPiece) -> anyhow::Result<()> {
        if let GetPiece::Data { data } = &piece {
            return self.data(&data.0);
        }
        if !matches!(piece, GetPiece::Failed { .. }) {
            self.close()?;
        }
        let Some(place) = &mut self.place else {
            bail!("a file came that was not asked for");
        };
        match piece {
            GetPiece::Data { .. } | GetPiece::End => {}
            GetPiece::Failed { error } => {
                let what = self.wanted[place.index].source.display();
                let message = format!("cannot get {what}");
                let failure = Failure::new(ErrorCode::GetFailed, message).cause(error.message);
                self.fail(failure);
            }
            GetPiece::Folder { path, mode } if path.0.is_empty() => {
                place.folder = Some(make_root(&place.path, mode)?);
            }
            GetPiece::Folder { path, mode } => place.make_folder(&path, mode)?,
            GetPiece::Link { path, target } => place.make_link(&path, &target)?,
            GetPiece::File { path, mode, .. } => {
                self.open = Some(Open {
                    file: place.create(&path, mode)?,
                    bytes: 0,
                    hasher: Sha256::new(),
                });
            }
        }
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> anyhow::Result<()> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        open.hasher.update(data);
        open.bytes += data.len() as u64;
        let written = open.file.write(data);
        written.with_context(|| format!("cannot write {}", open.file.path().display()))
    }

    fn close(&mut self) -> anyhow::Result<()> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        let landed = open.file.land();
        landed.with_context(|| format!("cannot write {}", open.file.path().display()))?;
        let digest = open.hasher.finalize();
        self.files.push(GotFile {
            path: Octets(open.file.path().as_os_str().as_bytes().to_vec()),
            bytes: open.bytes,
            sha256: Some(digest.iter().map(|byte| format!("{byte:02x}")).collect()),
            content: None,
            error: None,
        });
        Ok(())
    }

    /// What has come, and what has not.
    pub fn finish(mut self) -> (Vec<GotFile>, Vec<Failure>) {
        // What has come whole has been closed; the rest is dropped.
        self.open = None;
        (self.files, self.failures)
    }

    /// Puts what has come into a result, and what has not: that is an error if there is no other.
    pub fn into_result(self, result: &mut ExecResult) {
        let (files, failures) = self.finish();
        result.files = files;
        let mut failures = failures.into_iter();
        if let Some(first) = failures.next()
            && result.error.is_none()
        {
            let others = failures.map(|failure| failure.message).collect::<Vec<_>>();
            let cause = first.cause.clone().into_iter().chain(others);
            let cause = cause.collect::<Vec<_>>().join("; ");
            let cause = (!cause.is_empty()).then_some(cause);
            result.error = Some(Failure { cause, ..first });
            if result.exit_code == 0 {
                result.exit_code = crate::report::FAILED;
            }
        }
    }
}

fn make_root(path: &Path, mode: u32) -> anyhow::Result<OwnedFd> {
    let made = fs::create_dir_all(path);
    made.with_context(|| format!("cannot make the folder {}", path.display()))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty())
        .with_context(|| format!("cannot open the folder {}", path.display()))?;
    // One of somebody else's keeps its permissions.
    let _ = rustix::fs::fchmod(&folder, folder_mode(mode));
    Ok(folder)
}

fn folder_mode(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o777 | 0o700)
}

/// The guest's word for where something lies, if it leads nowhere else.
fn within(path: &Octets) -> anyhow::Result<&Path> {
    let path = Path::new(OsStr::from_bytes(&path.0));
    let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    if path.as_os_str().is_empty() || !path.components().all(is_plain) {
        bail!(
            "the guest sent a path that leads elsewhere: {}",
            path.display()
        );
    }
    Ok(path)
}

impl Place {
    fn folder(&self) -> anyhow::Result<&OwnedFd> {
        let folder = self.folder.as_ref();
        folder.context("the guest sent a part of a folder that it has not sent")
    }

    /// The folder in which a path lies: no link on the way is followed (openat2(2)).
    fn parent(&self, path: &Path) -> anyhow::Result<OwnedFd> {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let parent = parent.unwrap_or(Path::new("."));
        rustix::fs::openat2(self.folder()?, parent, flags, Mode::empty(), resolve)
            .with_context(|| format!("cannot open {}", self.path.join(parent).display()))
    }

    fn make_folder(&self, path: &Octets, mode: u32) -> anyhow::Result<()> {
        let path = within(path)?;
        let parent = self.parent(path)?;
        let name = path.file_name().unwrap_or_default();
        match rustix::fs::mkdirat(&parent, name, folder_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error).with_context(|| self.cannot("make the folder", path)),
        }
    }

    fn make_link(&self, path: &Octets, target: &Octets) -> anyhow::Result<()> {
        let path = within(path)?;
        let parent = self.parent(path)?;
        let name = path.file_name().unwrap_or_default();
        let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
        rustix::fs::symlinkat(OsStr::from_bytes(&target.0), &parent, name)
            .with_context(|| self.cannot("make the link", path))
    }

    /// Begins a file.
    fn create(&self, path: &Octets, mode: u32) -> anyhow::Result<Landing> {
        let is_named = path.0.is_empty();
        let (folder, full) = if is_named {
            let parent = self
                .path
                .parent()
                .filter(|path| !path.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            let made = fs::create_dir_all(parent);
            made.with_context(|| format!("cannot make the folder {}", parent.display()))?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(parent, flags, Mode::empty())
                .with_context(|| format!("cannot open the folder {}", parent.display()))?;
            (folder, self.path.clone())
        } else {
            let path = within(path)?;
            (self.parent(path)?, self.path.join(path))
        };
        let name = full.file_name().context("name a DST for it")?.to_owned();
        let cannot = format!("cannot write {}", full.display());
        Landing::begin(folder, &name, full, mode, is_named).context(cannot)
    }

    fn cannot(&self, what: &str, path: &Path) -> String {
        format!("cannot {what} {}", self.path.join(path).display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(text: &str) -> Pair {
        Pair::parse(text.as_ref()).unwrap()
    }

    fn file(path: &str, bytes: u64) -> GetPiece {
        let (path, mode) = (path.into(), 0o640);
        GetPiece::File { path, mode, bytes }
    }

    fn data(text: &str) -> GetPiece {
        GetPiece::Data { data: text.into() }
    }

    fn folder(path: &str) -> GetPiece {
        let (path, mode) = (path.into(), 0o755);
        GetPiece::Folder { path, mode }
    }

    #[test]
    fn a_file_and_a_folder_come_to_where_they_were_asked_for() {
        let home = tempfile::tempdir().unwrap();
        let at = home.path().display();
        let wanted = [
            pair(&format!("out/a.txt:{at}/")),
            pair(&format!("/srv/dir:{at}/new")),
        ];
        let mut received = Received::new(&wanted, None);
        for piece in [file("", 5), data("he"), data("llo"), GetPiece::End] {
            received.take(0, piece);
        }
        for piece in [
            folder(""),
            folder("sub"),
            file("sub/b", 1),
            data("b"),
            GetPiece::End,
        ] {
            received.take(1, piece);
        }
        let mut result = ExecResult::default();
        received.into_result(&mut result);
        assert_eq!(result.error, None);
        assert_eq!(fs::read(home.path().join("a.txt")).unwrap(), b"hello");
        assert_eq!(fs::read(home.path().join("new/sub/b")).unwrap(), b"b");
        assert_eq!(result.files.len(), 2);
        assert_eq!(result.files[0].bytes, 5);
        let digest = result.files[0].sha256.as_deref().unwrap();
        assert!(digest.starts_with("2cf24dba"), "{digest}");
    }

    #[test]
    fn several_runs_have_a_folder_each() {
        let home = tempfile::tempdir().unwrap();
        let wanted = [pair(&format!("a.txt:{}/", home.path().display()))];
        for run in 0..2 {
            let mut received = Received::new(&wanted, Some(run));
            received.take(0, file("", 1));
            received.take(0, data(&run.to_string()));
            received.take(0, GetPiece::End);
            received.into_result(&mut ExecResult::default());
        }
        assert_eq!(fs::read(home.path().join("0/a.txt")).unwrap(), b"0");
        assert_eq!(fs::read(home.path().join("1/a.txt")).unwrap(), b"1");
    }

    #[test]
    fn a_hostile_guest_writes_nowhere_else() {
        let home = tempfile::tempdir().unwrap();
        let outside = home.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let wanted = [pair(&format!("x:{}/in", home.path().display()))];
        let link = |path: &str, target: &Path| GetPiece::Link {
            path: path.into(),
            target: Octets(target.as_os_str().as_bytes().to_vec()),
        };
        let outside_file = format!("{}/f", outside.display());
        let attacks: [Vec<GetPiece>; 5] = [
            vec![file("../outside/f", 1), data("x")],
            vec![file(&outside_file, 1), data("x")],
            vec![link("l", &outside), file("l/f", 1), data("x")],
            vec![link("f", &outside.join("f")), file("f", 1), data("x")],
            vec![link("d", &outside), folder("d"), file("d/f", 1), data("x")],
        ];
        for attack in attacks {
            let mut received = Received::new(&wanted, None);
            received.take(0, folder(""));
            for piece in attack.into_iter().chain([GetPiece::End]) {
                received.take(0, piece);
            }
            received.into_result(&mut ExecResult::default());
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        }
        // Without a folder of its own there is nothing to write into.
        let mut received = Received::new(&wanted, None);
        received.take(0, file("a", 1));
        let mut result = ExecResult::default();
        received.into_result(&mut result);
        assert!(result.error.is_some());
    }

    #[test]
    fn what_has_failed_is_an_error_of_the_run_and_half_a_file_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let wanted = [pair(&format!("a:{}/", home.path().display())), pair("nope")];
        let mut received = Received::new(&wanted, None);
        received.take(0, file("", 9));
        received.take(0, data("half"));
        let failed = |words: &str| GetPiece::Failed {
            error: Failure::new(ErrorCode::GetFailed, words),
        };
        received.take(0, failed("the sandbox has died"));
        received.take(1, failed("No such file or directory"));
        let mut result = ExecResult::default();
        received.into_result(&mut result);
        assert_eq!((result.exit_code, result.files.len()), (125, 0));
        let error = result.error.unwrap();
        assert_eq!(error.code, ErrorCode::GetFailed);
        assert!(error.to_string().contains("cannot get nope"), "{error}");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_was_there_stays_until_all_of_the_new_one_has_come_and_devices_stay_devices() {
        let home = tempfile::tempdir().unwrap();
        let old = home.path().join("a");
        fs::write(&old, "old").unwrap();
        let get = |target: &Path, last: Option<GetPiece>| {
            let wanted = [pair(&format!("a:{}", target.display()))];
            let mut received = Received::new(&wanted, None);
            for piece in [file("", 3), data("new")].into_iter().chain(last) {
                received.take(0, piece);
            }
            let mut result = ExecResult::default();
            received.into_result(&mut result);
            result.error
        };
        let error = || {
            let error = Failure::new(ErrorCode::GetFailed, "it has died");
            Some(GetPiece::Failed { error })
        };
        for broken in [None, error()] {
            get(&old, broken);
            assert_eq!(fs::read(&old).unwrap(), b"old");
        }
        assert_eq!(get(&old, Some(GetPiece::End)), None);
        assert_eq!(fs::read(&old).unwrap(), b"new");
        // What an earlier guest may have left there.
        let planted = home.path().join("planted");
        std::os::unix::fs::symlink(&old, &planted).unwrap();
        let refused = get(&planted, Some(GetPiece::End)).unwrap().to_string();
        assert!(refused.contains("it is a link"), "{refused}");
        let null = Path::new("/dev/null");
        assert_eq!(get(null, Some(GetPiece::End)), None);
        get(null, error());
        assert!(!fs::metadata(null).unwrap().is_file());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2);
    }
}
