//! Files of this host as a tar archive for a sandbox, and a sandbox's archive as files of this host. What
//! comes out of a guest leads nowhere else: that is `get`'s to see to.

use crate::get::Received;
use anyhow::Context;
use bytes::Bytes;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tar::{Archive, Builder, EntryType, Header};
use tokio::sync::mpsc;
use zygote_api::{GetPiece, Octets};

/// Pieces on their way.
const PIECES_MAX: usize = 16;
const PIECE_BYTES: usize = 64 * 1024;

/// What is sent of an archive, or why it breaks off.
pub type Pieces = mpsc::Receiver<io::Result<Bytes>>;

/// An archive's bytes, passed on as they are written.
struct Pipe {
    sender: mpsc::Sender<io::Result<Bytes>>,
}

impl Write for Pipe {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let piece = Bytes::copy_from_slice(&data[..data.len().min(PIECE_BYTES)]);
        let count = piece.len();
        let sent = self.sender.blocking_send(Ok(piece));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Packs a file or folder under a name, from a thread of its own; links in it as they are. It all
/// belongs to root in the sandbox.
pub fn pack(source: PathBuf, name: PathBuf) -> Pieces {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    std::thread::spawn(move || {
        let pipe = Pipe {
            sender: sender.clone(),
        };
        let mut builder = Builder::new(io::BufWriter::with_capacity(PIECE_BYTES, pipe));
        let packed = add(&mut builder, &source, &name, true);
        let packed = packed.and_then(|()| builder.into_inner()?.flush());
        if let Err(error) = packed {
            // A whole archive ends well; this one does not.
            let _ = sender.blocking_send(Err(error));
        }
    });
    pieces
}

/// Standard input as it comes.
pub fn stdin() -> Pieces {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    std::thread::spawn(move || {
        let pipe = Pipe {
            sender: sender.clone(),
        };
        let copied = io::copy(&mut io::stdin().lock(), &mut io::BufWriter::new(pipe));
        if let Err(error) = copied {
            let _ = sender.blocking_send(Err(error));
        }
    });
    pieces
}

fn add<W: Write>(
    builder: &mut Builder<W>,
    source: &Path,
    name: &Path,
    is_named: bool,
) -> io::Result<()> {
    let named = |error: io::Error| {
        let words = format!("cannot read {}: {error}", source.display());
        io::Error::new(error.kind(), words)
    };
    let meta = if is_named {
        fs::metadata(source)
    } else {
        fs::symlink_metadata(source)
    };
    let meta = meta.map_err(named)?;
    let mut header = header(&meta);
    if meta.is_dir() {
        header.set_entry_type(EntryType::Directory);
        header.set_size(0);
        builder.append_data(&mut header, name, io::empty())?;
        let entries = fs::read_dir(source).map_err(named)?;
        let mut inside: Vec<_> = entries.collect::<io::Result<Vec<_>>>().map_err(named)?;
        inside.sort_by_key(fs::DirEntry::file_name);
        for entry in inside {
            add(builder, &entry.path(), &name.join(entry.file_name()), false)?;
        }
    } else if meta.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, name, fs::read_link(source).map_err(named)?)?;
    } else if meta.is_file() {
        let file = File::open(source).map_err(named)?;
        // One that grows meanwhile is cut off where it ended, one that shrinks is filled up.
        let exact = file.chain(io::repeat(0)).take(meta.len());
        builder.append_data(&mut header, name, exact)?;
    } else {
        let words = format!("{} is neither a file nor a folder", source.display());
        return Err(io::Error::other(words));
    }
    Ok(())
}

fn header(meta: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_metadata(meta);
    header.set_mode(meta.permissions().mode() & 0o7777);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// An archive's bytes, read as they come.
pub struct Incoming {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Incoming {
    /// And where they go in; dropping that ends it.
    pub fn new() -> (mpsc::Sender<Bytes>, Self) {
        let (sender, pieces) = mpsc::channel(PIECES_MAX);
        let current = Bytes::new();
        (sender, Self { pieces, current })
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

/// Writes an archive of one file or folder to where that was wanted. Blocks.
pub fn unpack(incoming: Incoming, mut received: Received) -> anyhow::Result<Received> {
    let mut archive = Archive::new(incoming);
    let mut buffer = vec![0; PIECE_BYTES];
    let mut root: Option<PathBuf> = None;
    let cannot = "the sandbox sent what is no archive";
    for entry in archive.entries().context(cannot)? {
        let mut entry = entry.context(cannot)?;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&entry.path_bytes()));
        // The first is what was asked for; its name is known.
        let root = root.get_or_insert_with(|| path.clone());
        let within = path.strip_prefix(&*root).unwrap_or(&path);
        let path = Octets(within.as_os_str().as_bytes().to_vec());
        let mode = entry.header().mode().unwrap_or(0o644) & 0o7777;
        match entry.header().entry_type() {
            EntryType::Directory => received.take(0, GetPiece::Folder { path, mode }),
            EntryType::Symlink => {
                let target = entry.link_name_bytes().map(|name| name.into_owned());
                let target = Octets(target.unwrap_or_default());
                received.take(0, GetPiece::Link { path, target });
            }
            kind if kind.is_file() => {
                let bytes = entry.size();
                received.take(0, GetPiece::File { path, mode, bytes });
                let mut left = bytes;
                while left > 0 {
                    let count = entry
                        .read(&mut buffer)
                        .context("the sandbox's archive broke off")?;
                    if count == 0 {
                        anyhow::bail!("the sandbox's archive broke off");
                    }
                    left -= count as u64;
                    let data = Octets(buffer[..count].to_vec());
                    received.take(0, GetPiece::Data { data });
                }
            }
            _ => crate::out::complain!(
                "zygote: left out, for it is neither a file nor a folder: {}",
                String::from_utf8_lossy(&path.0)
            ),
        }
    }
    received.take(0, GetPiece::End);
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::Pair;

    #[test]
    fn what_is_packed_is_unpacked_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        fs::create_dir_all(source.join("sub")).unwrap();
        let big: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
        fs::write(source.join("sub/big"), &big).unwrap();
        fs::set_permissions(source.join("sub/big"), fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("sub/big", source.join("link")).unwrap();
        let mut pieces = pack(source, PathBuf::from("name"));
        let (sender, incoming) = Incoming::new();
        let passing = std::thread::spawn(move || {
            while let Some(piece) = pieces.blocking_recv() {
                sender.blocking_send(piece.unwrap()).unwrap();
            }
        });
        let target = folder.path().join("target");
        let pair = Pair {
            source: "/any/name".into(),
            target: Some(target.clone()),
        };
        let received = unpack(incoming, Received::new(&[pair], None)).unwrap();
        passing.join().unwrap();
        let (files, failures) = received.finish();
        assert_eq!((files.len(), failures.len()), (1, 0));
        assert_eq!(fs::read(target.join("link")).unwrap(), big);
        let mode = fs::metadata(target.join("sub/big"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o640);
    }

    #[test]
    fn an_archive_that_cannot_be_whole_breaks_off() {
        let folder = tempfile::tempdir().unwrap();
        let mut pieces = pack(folder.path().join("nope"), PathBuf::from("a"));
        let mut last = None;
        while let Some(piece) = pieces.blocking_recv() {
            last = Some(piece);
        }
        assert!(last.unwrap().unwrap_err().to_string().contains("nope"));
    }
}
