//! Why there is no answer, or not the one that was hoped for.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;
use zygote_api::{Failure, with_causes};

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens.
    Connect(io::Error),
    /// The connection broke off.
    Broken(String),
    /// Nothing came in time.
    Late(Duration),
    /// What came is no answer of an engine.
    Nonsense(String),
    /// The engine's word.
    Refused(Box<Failure>),
}

impl ClientError {
    pub(crate) fn broken(error: hyper::Error) -> Self {
        Self::Broken(with_causes(&error))
    }

    pub(crate) fn nonsense(error: serde_json::Error) -> Self {
        Self::Nonsense(error.to_string())
    }

    /// The engine's word, if it has answered.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Refused(failure) => Some(failure),
            _ => None,
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "no engine answers: {error}"),
            Self::Broken(what) => write!(
                f,
                "the connection to the engine broke off ({what}); it has died or was killed; run \
                 the command again, and a new one starts"
            ),
            Self::Late(limit) => write!(
                f,
                "the engine has not answered within {} s; see: zygote status, or: zygote stop --now",
                limit.as_secs()
            ),
            Self::Nonsense(what) => write!(
                f,
                "what listens there is no engine of this version ({what}); name another socket \
                 with --socket"
            ),
            Self::Refused(failure) => failure.fmt(f),
        }
    }
}

impl Error for ClientError {}
