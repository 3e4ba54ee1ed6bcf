//! What can be done with files of a guest: tasks for a process of the agent's own, whose input and output
//! are the file's.
//!
//! What a task reads of a file, or packs, is its standard output; what it writes or unpacks is its standard
//! input. Every other answer is a sequence of [`FileAnswer`]s on its standard output. A failure is a
//! [`FileFailure`] on its standard error, with exit status 1. Each is framed by its length (u32
//! little-endian) and encoded as postcard.

use serde::{Deserialize, Serialize};

/// Largest frame of an answer: a path has 4096 bytes at most (`PATH_MAX`).
const FRAME_MAX_BYTES: usize = 64 * 1024;
const HEADER_BYTES: usize = 4;

/// Something to do with files. Paths are bytes; relative ones start at the process's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileTask {
    /// Read a file.
    Read {
        /// Which.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// From where, in bytes.
        offset: u64,
        /// How much at most; `None`: to its end.
        length: Option<u64>,
    },
    /// Write a file. Answered by its `Entry`.
    Write {
        /// Which.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Permissions; `None`: those it has, or 0644.
        mode: Option<u32>,
        /// What becomes of what is there.
        how: WriteHow,
        /// Whether folders that are missing on the way are made.
        parents: bool,
    },
    /// Tell what there is at a path. Answered by an `Entry`.
    Stat {
        /// Where.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Whether a symbolic link at the end is followed.
        follow: bool,
    },
    /// List a folder. Answered by an `Entry` for each that is in it, their paths relative to it.
    List {
        /// Which.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// 1: what is in it; 2: also what is in folders in it; and so on.
        depth: u32,
    },
    /// List all that is in a folder, folders in it before what is in them, without what is mounted there.
    /// Answered by an `Entry` for each, their paths relative to it.
    Walk {
        /// Which.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// Make a folder.
    MakeFolder {
        /// Where.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Permissions.
        mode: u32,
        /// Whether those missing on the way are made, and one that is there is no failure.
        parents: bool,
    },
    /// Move or rename.
    Move {
        /// From where.
        #[serde(with = "serde_bytes")]
        from: Vec<u8>,
        /// To where.
        #[serde(with = "serde_bytes")]
        to: Vec<u8>,
        /// Whether what is there is replaced.
        replace: bool,
    },
    /// Remove.
    Remove {
        /// What.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// A folder with all that is in it.
        recursive: bool,
    },
    /// Set permissions.
    Chmod {
        /// Of what.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Which.
        mode: u32,
    },
    /// Give to another user, not following a symbolic link.
    Chown {
        /// What.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// `USER` or `USER:GROUP`, by name or number.
        user: String,
    },
    /// Make a symbolic link.
    Link {
        /// Where.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Where it leads to.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// Tell of changes. Answered by `Watching`, then a `Change` each, without end.
    Watch {
        /// A file or folder.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Folders in it as well.
        recursive: bool,
    },
    /// Pack a file or folder as a tar archive, under its own name.
    Pack {
        /// Which.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// Unpack a tar archive into a folder, which is made if it is not there.
    Unpack {
        /// Which.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
}

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WriteHow {
    /// In place of what is there, once all has come: others see the old or the new.
    Replace,
    /// Into what is there, which is emptied first.
    Truncate,
    /// Behind what is there.
    Append,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, a pipe, a socket.
    Other,
}

/// Something in the file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its path.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// What it is.
    pub kind: FileKind,
    /// Its length.
    pub bytes: u64,
    /// Permissions.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// Where a symbolic link leads to.
    #[serde(with = "serde_bytes")]
    pub target: Option<Vec<u8>>,
}

/// How something has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileChange {
    /// It was made, or moved here from where nobody watches.
    Created,
    /// It was written to, and closed.
    Written,
    /// Its permissions, owner or times have changed.
    Attributes,
    /// It was removed, or moved to where nobody watches.
    Removed,
    /// It was renamed.
    Renamed {
        /// What it is called now.
        #[serde(with = "serde_bytes")]
        to: Vec<u8>,
    },
    /// More has changed than could be told: look for yourself.
    Overflow,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileAnswer {
    /// Something that is there.
    Entry(FileEntry),
    /// Changes are told from here on.
    Watching,
    /// Something has changed.
    Change {
        /// Where, relative to what is watched; empty: that itself.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Whether it is a folder.
        is_folder: bool,
        /// How.
        change: FileChange,
    },
}

/// Why a task has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFailure {
    /// The kernel's number for it (errno(3)); 0 if it is none of the kernel's.
    pub errno: i32,
    /// The sentence for the user.
    pub message: String,
}

impl FileTask {
    /// As a word of a command line.
    ///
    /// # Errors
    /// Never: these types can be encoded.
    pub fn to_word(&self) -> Result<String, postcard::Error> {
        let bytes = postcard::to_stdvec(self)?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// From such a word; `None` if it is none.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        let digits = word.as_bytes().chunks(2);
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = digits.map(byte).collect();
        postcard::from_bytes(&bytes?).ok()
    }
}

/// Encodes a part of an answer, or a failure, with its length.
///
/// # Errors
/// Never: these types can be encoded.
pub fn encode_answer<T: Serialize>(answer: &T) -> Result<Vec<u8>, postcard::Error> {
    let mut bytes = postcard::to_extend(answer, vec![0; HEADER_BYTES])?;
    let length = (bytes.len() - HEADER_BYTES) as u32;
    bytes[..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// Takes a whole part off the beginning of what has come; `Ok(None)` until more comes.
///
/// # Errors
/// If that is none.
pub fn take_answer<T: for<'a> Deserialize<'a>>(
    buffer: &mut Vec<u8>,
) -> Result<Option<T>, crate::FrameError> {
    let Some((header, rest)) = buffer.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*header) as usize;
    if length > FRAME_MAX_BYTES {
        let limit = FRAME_MAX_BYTES;
        return Err(crate::FrameError::TooLong { length, limit });
    }
    let Some(payload) = rest.get(..length) else {
        return Ok(None);
    };
    let answer = postcard::from_bytes(payload);
    let answer = answer.map_err(|_| crate::FrameError::Undecodable { length })?;
    buffer.drain(..HEADER_BYTES + length);
    Ok(Some(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_survive_a_command_line_and_answers_a_stream() {
        let task = FileTask::Move {
            from: vec![0xff, b'\n'],
            to: b"b".to_vec(),
            replace: true,
        };
        let word = task.to_word().unwrap();
        assert_eq!(FileTask::from_word(&word), Some(task));
        for bad in ["", "zz", "abc", "ff"] {
            assert_eq!(FileTask::from_word(bad), None, "{bad}");
        }
        let failure = FileFailure {
            errno: 2,
            message: "no".into(),
        };
        let bytes = encode_answer(&failure).unwrap();
        let mut buffer = bytes[..3].to_vec();
        assert_eq!(take_answer::<FileFailure>(&mut buffer), Ok(None));
        buffer.extend_from_slice(&bytes[3..]);
        buffer.push(7);
        assert_eq!(take_answer(&mut buffer), Ok(Some(failure)));
        assert_eq!(buffer, [7]);
        let mut long = vec![0xff; 8];
        assert!(take_answer::<FileFailure>(&mut long).is_err());
    }
}
