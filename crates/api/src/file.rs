//! Files of a sandbox.

use crate::octets::Octets;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a path leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    /// A regular file.
    #[default]
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, a pipe, a socket.
    Other,
}

/// Something in a sandbox's file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileInfo {
    /// Its path, as it was asked for; in a list relative to the folder.
    pub path: Octets,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: FileType,
    /// Its length.
    pub bytes: u64,
    /// Permissions.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed, RFC 3339.
    pub modified: String,
    /// The same, in seconds since 1970.
    pub modified_unix_s: u64,
    /// Where a symbolic link leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Octets>,
}

/// What is in a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileList {
    /// In the order of their names, a folder before what is in it.
    pub files: Vec<FileInfo>,
}

/// What was asked for has been done, and there is no more to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// It has.
    pub done: bool,
}

/// `POST …/files`: what there is, or that it has been done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum FileResult {
    /// Of `list`.
    List(FileList),
    /// Of `stat`.
    Info(FileInfo),
    /// Of the others.
    Done(Done),
}

/// `POST …/files`: something to do with files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum FileAction {
    /// Tell what there is at a path: a `FileInfo`.
    Stat {
        /// Where; relative to the user's home.
        path: Octets,
        /// Look at a symbolic link itself.
        #[serde(default)]
        no_follow: bool,
    },
    /// List a folder: a `FileList`.
    List {
        /// Which.
        path: Octets,
        /// 1: what is in it; 2: also what is in folders in it; and so on.
        #[serde(default = "one")]
        #[schema(default = 1)]
        depth: u32,
    },
    /// Make a folder.
    Mkdir {
        /// Where.
        path: Octets,
        /// Permissions.
        #[serde(default = "folder_mode")]
        #[schema(default = 0o755)]
        mode: u32,
        /// Make those missing on the way; one that is there is no failure.
        #[serde(default)]
        parents: bool,
    },
    /// Move or rename.
    Move {
        /// What.
        path: Octets,
        /// To where.
        to: Octets,
        /// Replace what is there.
        #[serde(default)]
        replace: bool,
    },
    /// Remove.
    Remove {
        /// What.
        path: Octets,
        /// A folder with all that is in it.
        #[serde(default)]
        recursive: bool,
    },
    /// Set permissions.
    Chmod {
        /// Of what.
        path: Octets,
        /// Which.
        mode: u32,
    },
    /// Give to another user.
    Chown {
        /// What.
        path: Octets,
        /// `USER` or `USER:GROUP`, by name or number.
        owner: String,
    },
    /// Make a symbolic link.
    Symlink {
        /// Where.
        path: Octets,
        /// Where it leads to.
        target: Octets,
    },
}

fn one() -> u32 {
    1
}

fn folder_mode() -> u32 {
    0o755
}

/// `GET …/files/watch`: something has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FileEvent {
    /// Changes are told from here on.
    Watching,
    /// It was made, or moved here from where nobody watches.
    Created {
        /// Relative to what is watched; empty: that itself.
        path: Octets,
        /// Whether it is a folder.
        folder: bool,
    },
    /// It was written to, and closed.
    Written {
        /// Likewise.
        path: Octets,
    },
    /// Its permissions, owner or times have changed.
    Attributes {
        /// Likewise.
        path: Octets,
        /// Whether it is a folder.
        folder: bool,
    },
    /// It was removed, or moved to where nobody watches.
    Removed {
        /// Likewise.
        path: Octets,
        /// Whether it is a folder.
        folder: bool,
    },
    /// It was renamed.
    Renamed {
        /// What it was called.
        path: Octets,
        /// What it is called now.
        to: Octets,
        /// Whether it is a folder.
        folder: bool,
    },
    /// More has changed than could be told: look for yourself.
    Overflow,
    /// It is watched no longer.
    Error {
        /// Why.
        error: crate::Failure,
    },
}
