//! The catalogue of errors.

use serde::{Deserialize, Serialize};
use std::fmt;
use utoipa::ToSchema;

/// The body of every answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: Failure,
    /// The request's, as in the header `x-request-id`.
    #[serde(default)]
    pub request_id: String,
}

/// What went wrong, for programs and for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// For programs: stable.
    pub code: ErrorCode,
    /// One sentence.
    pub message: String,
    /// What it came from, if that says more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// After how many seconds to try again, where that can help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

/// Codes of errors, each with one HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the request is not what it should be; the message names the field.
    BadRequest,
    /// 401: a key is needed here, or the one that was shown is none.
    Unauthorized,
    /// 403: not for this caller.
    Forbidden,
    /// 404: there is nothing at this path.
    NotFound,
    /// 405: not with this method.
    MethodNotAllowed,
    /// 404: there is no sandbox of this id, or it has ended.
    SandboxNotFound,
    /// 404: the sandbox has no such process, or has forgotten it.
    ProcessNotFound,
    /// 404: there is no such template.
    TemplateNotFound,
    /// 409: the beginning of an id fits several sandboxes.
    Ambiguous,
    /// 409: another sandbox has this name.
    NameTaken,
    /// 409: the sandbox was there, and has ended; the message says why.
    SandboxEnded,
    /// 409: the process has ended, or takes no input.
    ProcessEnded,
    /// 409: the process has no terminal.
    NoTerminal,
    /// 404: there is no such file in the sandbox.
    FileNotFound,
    /// 409: a file of the sandbox cannot be had or changed; `cause` is the kernel's name for why.
    FileFailed,
    /// 404: the sandbox has no such context.
    ContextNotFound,
    /// 409: the context's interpreter has ended; the message says how.
    ContextDead,
    /// 409: the sandbox could not be branched; it goes on.
    NotBranched,
    /// 409: the sandbox is paused, or is not.
    SandboxPaused,
    /// 409: the sandbox could not be paused, or not be resumed; it is as it was.
    PauseFailed,
    /// 404: the sandbox keeps no such moment.
    MomentNotFound,
    /// 409: the sandbox was rolled back to an earlier moment, and what was asked for is gone.
    RolledBack,
    /// 429: a limit of the engine, of a sandbox, or of the key is reached.
    LimitReached,
    /// 500: the template is there, but not usable.
    TemplateUnusable,
    /// 409: a template could not be built.
    BuildFailed,
    /// 409: this host does not allow what must stand between it and untrusted code.
    MissingWalls,
    /// 413: too long.
    TooLarge,
    /// 503: too many runs wait already, or this one waited too long; try again later.
    Busy,
    /// 503: the engine ends, and begins nothing more.
    Stopping,
    /// 503: there is no memory for one more sandbox.
    NoRoom,
    /// 503: the emulated host that held the machines has died, or does not come up.
    LabDied,
    /// 409: machines cannot run on this host.
    NoMachines,
    /// 409: something is in the way, such as work that goes on.
    Conflict,
    /// 500: a failure of the engine's own.
    Internal,
    /// In a result: the program was killed at its time limit.
    TimedOut,
    /// In a result: the guest's kernel killed the program because its memory was used up.
    OutOfMemory,
    /// In a result: there is no such program in the guest.
    ProgramNotFound,
    /// In a result: the program is there, but cannot be run.
    ProgramNotExecutable,
    /// In a result: the program could not be started.
    ProgramNotStarted,
    /// In a result: the sandbox could not be made, or died under the program.
    SandboxDied,
    /// In a result: a file that was asked for cannot be had.
    GetFailed,
    /// Of the command line: a signal to it ended the run.
    Interrupted,
    /// Of the command line: its words are not what they should be.
    Usage,
    /// Of the command line: a file of this machine cannot be read or written.
    File,
    /// Of a client: no engine answers.
    EngineUnreachable,
}

impl ErrorCode {
    /// The HTTP status; 200 for what comes within a result.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest | Self::Usage | Self::File => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound
            | Self::SandboxNotFound
            | Self::ProcessNotFound
            | Self::ContextNotFound
            | Self::MomentNotFound
            | Self::FileNotFound
            | Self::TemplateNotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::BuildFailed
            | Self::MissingWalls
            | Self::NoMachines
            | Self::Conflict
            | Self::Ambiguous
            | Self::NameTaken
            | Self::SandboxEnded
            | Self::ProcessEnded
            | Self::NoTerminal
            | Self::ContextDead
            | Self::NotBranched
            | Self::RolledBack
            | Self::SandboxPaused
            | Self::PauseFailed
            | Self::FileFailed => 409,
            Self::LimitReached => 429,
            Self::TooLarge => 413,
            Self::TemplateUnusable | Self::Internal => 500,
            Self::Busy
            | Self::Stopping
            | Self::NoRoom
            | Self::LabDied
            | Self::EngineUnreachable => 503,
            // Of a process that was to be detached; else they come within results.
            Self::ProgramNotFound | Self::ProgramNotExecutable | Self::ProgramNotStarted => 409,
            Self::SandboxDied => 500,
            // They come within results.
            Self::TimedOut | Self::OutOfMemory | Self::GetFailed | Self::Interrupted => 200,
        }
    }
}

impl Failure {
    /// With a sentence alone.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: plain(message.into()),
            cause: None,
            remedy: None,
            retry_after_seconds: None,
        }
    }

    /// An error's sentence, and its causes.
    #[must_use]
    pub fn of(code: ErrorCode, error: &dyn std::error::Error) -> Self {
        Self {
            cause: causes(error),
            ..Self::new(code, error.to_string())
        }
    }

    /// With what to do about it.
    #[must_use]
    pub fn remedy(self, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Self { remedy, ..self }
    }

    /// With what it came from.
    #[must_use]
    pub fn cause(self, cause: impl Into<String>) -> Self {
        let cause = Some(plain(cause.into()));
        Self { cause, ..self }
    }

    /// Worth another try after so many seconds.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        let retry_after_seconds = Some(seconds);
        Self {
            retry_after_seconds,
            ..self
        }
    }

    /// Code and remedy are the request's own fault.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }

    /// A failure of the engine's own.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }
}

/// What an error came from, each cause once.
fn causes(error: &dyn std::error::Error) -> Option<String> {
    let mut words = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        words.push(cause.to_string());
        next = cause.source();
    }
    words.dedup();
    (!words.is_empty()).then(|| plain(words.join(": ")))
}

/// Without the numbers that the standard library puts behind the kernel's words: ` (os error 2)`.
fn plain(text: String) -> String {
    const NUMBER: &str = " (os error ";
    let mut plain = text;
    while let Some(at) = plain.find(NUMBER)
        && let Some(end) = plain[at..].find(')')
    {
        plain.replace_range(at..=at + end, "");
    }
    plain
}

/// An error with what it came from, in one line.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    match causes(error) {
        Some(causes) => format!("{error}: {causes}"),
        None => error.to_string(),
    }
}

/// For people: sentence, cause, remedy.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(cause) = &self.cause {
            write!(f, ": {cause}")?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_in_order_and_once() {
        #[derive(Debug)]
        struct Error(&'static str, Option<Box<Error>>);
        impl fmt::Display for Error {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.0)
            }
        }
        impl std::error::Error for Error {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                self.1.as_deref().map(|cause| cause as _)
            }
        }
        let inner = Error(
            "b",
            Some(Box::new(Error("b", Some(Box::new(Error("c", None)))))),
        );
        let error = Error("a", Some(Box::new(inner)));
        assert_eq!(with_causes(&error), "a: b: c");
        let failure = Failure::of(ErrorCode::Internal, &error);
        assert_eq!(
            (&*failure.message, failure.cause.as_deref()),
            ("a", Some("b: c"))
        );
        assert_eq!(
            Failure::of(ErrorCode::Internal, &Error("a", None)).cause,
            None
        );
    }

    #[test]
    fn the_numbers_of_errors_are_for_nobody() {
        let error = std::io::Error::from_raw_os_error(2);
        let failure = Failure::internal(format!("a: {error}")).cause(format!("{error}; {error}"));
        assert_eq!(failure.message, "a: No such file or directory");
        assert_eq!(
            failure.cause.as_deref(),
            Some("No such file or directory; No such file or directory")
        );
        assert_eq!(plain("x (os error ".into()), "x (os error ");
    }

    #[test]
    fn a_failure_tells_people_cause_and_remedy() {
        let failure = Failure::new(ErrorCode::Busy, "too much work")
            .cause("9 runs wait")
            .remedy("try again later");
        assert_eq!(
            failure.to_string(),
            "too much work: 9 runs wait; try again later"
        );
        let body = ErrorBody {
            error: failure,
            request_id: "1".into(),
        };
        let json = serde_json::to_value(&body).unwrap();
        assert_eq!(json["error"]["code"], "busy");
        assert_eq!(serde_json::from_value::<ErrorBody>(json).unwrap(), body);
    }
}
