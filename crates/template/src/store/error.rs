//! Why the store cannot do it, and what to do about that.

use crate::lock::LockError;
use crate::near::nearest;
use crate::recipe::BUILT_IN;
use std::io;
use std::path::{Path, PathBuf};
use zygote_snapshot::{OpenError, VerifyError};

/// Why the store cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// No such template.
    #[error("there is no template {name}; {}", there_are(known))]
    NotFound {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// No template can be called so.
    #[error("{name:?} is no name of a template: [a-z0-9][a-z0-9_.-]*")]
    Name {
        /// What was asked for.
        name: String,
    },
    /// It never had such a build.
    #[error("the template {name} has no build {build:?}")]
    NoBuild {
        /// Which template.
        name: String,
        /// What was asked for.
        build: String,
    },
    /// A file.
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
    /// Others differ from it.
    #[error("{} derived from {name}, and need{} its files", are(by), if by.len() == 1 { "s" } else { "" })]
    Needed {
        /// Which template.
        name: String,
        /// Those that do.
        by: Vec<String>,
    },
    /// The name is that of one that was built.
    #[error("{name} is a template that was built, and not derived")]
    Taken {
        /// Which template.
        name: String,
    },
    /// The name is that of one that belongs to somebody else.
    #[error("somebody else has a template that is called {name}")]
    Others {
        /// Which template.
        name: String,
    },
    /// It is in the other store.
    #[error("the template {name} is in {}, and not yours to remove", state.display())]
    Shared {
        /// Which template.
        name: String,
        /// Where it is.
        state: PathBuf,
    },
    /// Something is being built, so what is unused cannot be told.
    #[error("a template is being built, and nothing can be removed meanwhile")]
    Building,
    /// Its description is damaged.
    #[error("the template {name} is damaged: {} is not readable", path.display())]
    Description {
        /// Which template.
        name: String,
        /// Its file.
        path: PathBuf,
    },
    /// A snapshot of it.
    #[error("the template {name} is not usable")]
    Snapshot {
        /// Which template.
        name: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// A snapshot of it is damaged.
    #[error("the template {name} is damaged")]
    Damaged {
        /// Which template.
        name: String,
        /// Where.
        #[source]
        source: VerifyError,
    },
}

fn are(names: &[String]) -> String {
    let verb = if names.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", names.join(", "))
}

fn there_are(known: &[String]) -> String {
    if known.is_empty() {
        "there are none yet".to_owned()
    } else {
        format!("there are: {}", known.join(", "))
    }
}

impl StoreError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::NotFound { name, known } => {
                let built_in = BUILT_IN.iter().any(|(built_in, _)| built_in == name);
                Some(match nearest(name, known.iter().map(String::as_str)) {
                    _ if built_in => format!("build it: zygote template build {name}"),
                    Some(near) => format!("do you mean {near}? see: zygote template ls"),
                    None => format!("write its recipe: zygote template init {name}"),
                })
            }
            Self::Snapshot { name, .. } | Self::Damaged { name, .. } => Some(format!(
                "build it again: zygote template build {name} --force"
            )),
            Self::Description { name, .. } => Some(format!(
                "remove it: zygote template rm {name}; then build it again from its recipe"
            )),
            Self::File { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run as the user who owns it, or name another folder: --state-dir DIR".into())
            }
            Self::Shared { name, .. } => Some(format!(
                "have its owner remove it: sudo zygote template rm {name}"
            )),
            Self::Needed { name, .. } => Some(format!(
                "remove all of them: zygote template rm {name} --derived"
            )),
            Self::Taken { name } => Some(format!(
                "choose another name, or remove that one: zygote template rm {name}"
            )),
            Self::Others { .. } => Some("choose another name".into()),
            Self::Building => Some("wait for its end; see: zygote status".into()),
            Self::NoBuild { name, .. } => Some(format!(
                "see which there is: zygote template inspect {name}"
            )),
            Self::File { .. } | Self::Lock(_) | Self::Name { .. } => None,
        }
    }
}

pub(super) fn at<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}
