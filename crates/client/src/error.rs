//! Why there is no answer, or not the one that was hoped for.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;
use zygote_api::{ErrorCode, Failure, with_causes};

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

    /// In the API's words.
    pub fn to_failure(&self) -> Failure {
        let unreachable = |message: &str| Failure::new(ErrorCode::EngineUnreachable, message);
        match self {
            Self::Connect(error) => unreachable("no engine answers").cause(error.to_string()),
            Self::Broken(what) => {
                unreachable("the connection to the engine broke off; it has died or was killed")
                    .cause(what.clone())
                    .remedy("run the command again, and a new one starts")
            }
            Self::Late(limit) => {
                let words = format!("the engine has not answered within {} s", limit.as_secs());
                unreachable(&words).remedy("see: zygote status, or: zygote stop --now")
            }
            Self::Nonsense(what) => unreachable("what listens there is no engine of this version")
                .cause(what.clone())
                .remedy("name another socket with --socket"),
            Self::Refused(failure) => (**failure).clone(),
        }
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
        self.to_failure().fmt(f)
    }
}

impl Error for ClientError {}
