//! Why there is no root image.

use super::tools::TOOL_MAX_S;
use crate::lock::LockError;
use crate::recipe::RecipeError;
use std::io;
use std::path::{Path, PathBuf};

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
    /// There is no such package.
    #[error("{what}; all that was said is in {}", log.display())]
    NoPackage {
        /// Which, and where it was looked for.
        what: String,
        /// The tool's log.
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

pub(super) fn at<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> RootfsError + 'a {
    move |source| RootfsError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}
