//! Files that go into a sandbox: the program itself, and what `--copy` names. They are read while
//! they are sent, so their size costs no memory.

use anyhow::{Context, bail};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_api::{CHUNK_MAX_BYTES, ExecInput, Octets};

/// Most that goes into one sandbox; what it takes there is memory of the guest.
const COPY_MAX_BYTES: u64 = 1 << 30;
/// Most files and folders.
const COPY_MAX_ENTRIES: usize = 100_000;

/// `SRC[:DST]`, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Where it lies.
    pub source: PathBuf,
    /// Where it goes to; `None`: by its own name into the program's directory, or this program's.
    pub target: Option<PathBuf>,
}

impl Pair {
    /// Reads `SRC[:DST]`. A name with a colon is written with `./` before it and a DST after it.
    pub fn parse(text: &std::ffi::OsStr) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let path = |bytes: &[u8]| PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()));
        let (source, target) = match bytes.iter().rposition(|byte| *byte == b':') {
            Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
            None => (bytes, None),
        };
        if source.is_empty() || target.is_some_and(<[u8]>::is_empty) {
            return Err("write it as SRC or SRC:DST".to_owned());
        }
        Ok(Self {
            source: path(source),
            target: target.map(path),
        })
    }
}

/// Something to put, found and measured.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Folder {
        target: PathBuf,
        mode: u32,
    },
    File {
        source: PathBuf,
        target: PathBuf,
        mode: u32,
    },
    Content {
        content: Arc<[u8]>,
        target: PathBuf,
    },
    Link {
        target: PathBuf,
        to: PathBuf,
    },
}

/// All that goes into a sandbox, in order.
#[derive(Clone, Debug, Default)]
pub struct Files {
    entries: Vec<Entry>,
    bytes: u64,
}

impl Files {
    /// Whether nothing goes in.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The program, a file or a folder. The error is the reason alone.
    pub fn add_program(&mut self, path: &Path, in_guest: &Path) -> anyhow::Result<()> {
        self.add(path, in_guest.to_owned())
    }

    /// What `--copy` names; `cwd`: the program's directory; `beside`: the program's own folder, from
    /// which it imports, where a link is left.
    pub fn add_copy(
        &mut self,
        copy: &Pair,
        cwd: &Path,
        beside: Option<&Path>,
    ) -> anyhow::Result<()> {
        let Pair { source, target } = copy;
        let absolute = std::path::absolute(source)?;
        let name = normal(&absolute).file_name().map(PathBuf::from);
        let within = |folder: &Path| match &name {
            Some(name) => folder.join(name),
            None => folder.to_owned(),
        };
        let place = match target {
            Some(target) if target.as_os_str().as_bytes().ends_with(b"/") => {
                within(&cwd.join(target))
            }
            Some(target) => cwd.join(target),
            None => within(cwd),
        };
        self.add(&absolute, place.clone())
            .with_context(|| format!("cannot copy {}", source.display()))?;
        if let (None, Some(folder)) = (target, beside) {
            let link = within(folder);
            if link != place {
                self.entries.push(Entry::Link {
                    target: link,
                    to: place,
                });
            }
        }
        Ok(())
    }

    fn add(&mut self, source: &Path, target: PathBuf) -> anyhow::Result<()> {
        // What is named may be a link; what lies in a folder is copied as it is.
        let meta = fs::metadata(source)?;
        self.add_entry(source, target, &meta)
    }

    fn add_entry(&mut self, source: &Path, target: PathBuf, meta: &Metadata) -> anyhow::Result<()> {
        if self.entries.len() >= COPY_MAX_ENTRIES {
            bail!("there are more than {COPY_MAX_ENTRIES} files and folders");
        }
        let mode = meta.permissions().mode() & 0o7777;
        let kind = meta.file_type();
        if kind.is_dir() {
            self.entries.push(Entry::Folder {
                target: target.clone(),
                mode,
            });
            let mut names: Vec<_> = fs::read_dir(source)?.collect::<Result<_, _>>()?;
            names.sort_by_key(fs::DirEntry::file_name);
            for entry in names {
                let (path, target) = (entry.path(), target.join(entry.file_name()));
                let meta = fs::symlink_metadata(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                self.add_entry(&path, target, &meta)?;
            }
        } else if kind.is_symlink() {
            let to = fs::read_link(source)?;
            self.entries.push(Entry::Link { target, to });
        } else if !kind.is_file() {
            // A pipe, as the shell makes for <(…), can be read only once.
            let mut content = Vec::new();
            let limit = COPY_MAX_BYTES.saturating_sub(self.bytes);
            File::open(source)?
                .take(limit + 1)
                .read_to_end(&mut content)?;
            self.count(content.len() as u64)?;
            let content = content.into();
            self.entries.push(Entry::Content { content, target });
        } else {
            self.count(meta.len())?;
            // What cannot be opened is told before a sandbox is made.
            File::open(source).with_context(|| format!("cannot read {}", source.display()))?;
            let source = source.to_owned();
            self.entries.push(Entry::File {
                source,
                target,
                mode,
            });
        }
        Ok(())
    }

    fn count(&mut self, bytes: u64) -> anyhow::Result<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > COPY_MAX_BYTES {
            bail!("there are more than {} MiB of files", COPY_MAX_BYTES >> 20);
        }
        Ok(())
    }

    /// Sends all of it, to one sandbox; `None` if that has gone. A file that changes meanwhile is sent
    /// as it is then.
    pub fn send(&self, sender: &mpsc::Sender<ExecInput>) -> Option<()> {
        let send = |input| sender.blocking_send(input).ok();
        let octets = |path: &Path| Octets(path.as_os_str().as_bytes().to_vec());
        for entry in &self.entries {
            match entry {
                Entry::Folder { target, mode } => send(ExecInput::Folder {
                    path: octets(target),
                    mode: *mode,
                })?,
                Entry::Link { target, to } => send(ExecInput::Link {
                    path: octets(target),
                    target: octets(to),
                })?,
                Entry::File {
                    source,
                    target,
                    mode,
                } => {
                    let (path, mode) = (octets(target), *mode);
                    send(ExecInput::File { path, mode })?;
                    if let Err(error) = send_file(source, sender) {
                        let message = format!("cannot read {}: {error}", source.display());
                        send(ExecInput::Failed { message })?;
                    }
                }
                Entry::Content { content, target } => {
                    let (path, mode) = (octets(target), 0o644);
                    send(ExecInput::File { path, mode })?;
                    for piece in content.chunks(CHUNK_MAX_BYTES) {
                        let data = piece.to_vec().into();
                        send(ExecInput::Data { data })?;
                    }
                }
            }
        }
        Some(())
    }
}

fn send_file(source: &Path, sender: &mpsc::Sender<ExecInput>) -> io::Result<()> {
    let mut file = File::open(source)?.take(COPY_MAX_BYTES);
    loop {
        let mut data = vec![0; CHUNK_MAX_BYTES];
        let count = file.read(&mut data)?;
        data.truncate(count);
        let data = data.into();
        if count == 0 || sender.blocking_send(ExecInput::Data { data }).is_err() {
            return Ok(());
        }
    }
}

/// Without `.` and `..`, by the words alone.
pub fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(normal.pop()),
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_read_as_people_write_it() {
        let parse = |text: &str| Pair::parse(text.as_ref());
        let copy = parse("a b.csv").unwrap();
        assert_eq!((copy.source, copy.target), ("a b.csv".into(), None));
        let copy = parse("./a:b:/tmp/").unwrap();
        assert_eq!(
            (copy.source, copy.target),
            ("./a:b".into(), Some("/tmp/".into()))
        );
        assert!(parse("a:").is_err() && parse(":b").is_err() && parse("").is_err());
    }

    #[test]
    fn folders_go_in_whole_and_lie_where_the_program_looks() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("pack")).unwrap();
        fs::write(folder.path().join("pack/b.py"), "1").unwrap();
        std::os::unix::fs::symlink("b.py", folder.path().join("pack/a.py")).unwrap();
        let mut files = Files::default();
        let copy = Pair {
            source: folder.path().join("pack/."),
            target: None,
        };
        files
            .add_copy(&copy, Path::new("/work"), Some(Path::new("/home/me")))
            .unwrap();
        let targets: Vec<&Path> = files
            .entries
            .iter()
            .map(|entry| match entry {
                Entry::Folder { target, .. }
                | Entry::File { target, .. }
                | Entry::Content { target, .. }
                | Entry::Link { target, .. } => target.as_path(),
            })
            .collect();
        let expected = [
            "/work/pack",
            "/work/pack/a.py",
            "/work/pack/b.py",
            "/home/me/pack",
        ];
        assert_eq!(targets, expected.map(Path::new));
    }

    #[test]
    fn what_is_not_there_or_no_file_is_refused_by_name() {
        let mut files = Files::default();
        let copy = |path: &str| Pair {
            source: path.into(),
            target: None,
        };
        let error = files
            .add_copy(&copy("/no/such"), Path::new("/"), None)
            .unwrap_err();
        assert!(format!("{error:#}").contains("/no/such"));
    }
}
