//! A run's end, for shells and for machines.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use std::time::Duration;
use zygote_engine::{Captured, ExitStatus, Outcome, RunResult, StartFailure};

/// timeout(1)'s code.
pub const TIMED_OUT: u8 = 124;
/// Zygote itself failed.
pub const FAILED: u8 = 125;

/// Ends this process by a signal that it was sent, so that a shell sees what happened (and stops its
/// loop at Ctrl-C). Gives back a shell's code for it, should the process survive that.
pub fn die_of(signal: i32) -> u8 {
    // Fails for numbers that are no signals.
    let _ = signal_hook::low_level::emulate_default_handler(signal);
    128_u8.saturating_add(u8::try_from(signal).unwrap_or(0))
}

/// The exit code that tells a shell how a run ended.
pub fn exit_code(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Exited(ExitStatus::Code(code)) => *code,
        Outcome::Exited(ExitStatus::Signal { signal, .. }) => 128_u8.saturating_add(*signal),
        Outcome::TimedOut => TIMED_OUT,
        Outcome::StartFailed { reason, .. } => match reason {
            StartFailure::NotFound => 127,
            StartFailure::NotExecutable => 126,
            StartFailure::Other => FAILED,
        },
        Outcome::Failed(_) => FAILED,
    }
}

/// A sentence in which a guest may have had its word, for a terminal: no control characters but the
/// ends of lines.
fn printable(text: &str) -> String {
    let shown = |letter: char| match letter {
        '\n' => letter,
        '\t' => ' ',
        letter if letter.is_control() => '\u{fffd}',
        letter => letter,
    };
    text.chars().map(shown).collect()
}

/// What people are told on stderr beside the program's own words; usually nothing.
pub fn sentence(outcome: &Outcome, limit: Option<Duration>) -> Option<String> {
    match outcome {
        Outcome::Exited(ExitStatus::Code(_)) => None,
        Outcome::Exited(ExitStatus::Signal { out_of_memory, .. }) => out_of_memory.then(|| {
            "the program was killed because the guest ran out of memory; build the template with \
             more: zygote template build NAME --memory SIZE"
                .to_owned()
        }),
        Outcome::TimedOut => Some(format!(
            "the program was killed at its time limit of {:?} (see --timeout)",
            limit.unwrap_or_default()
        )),
        Outcome::StartFailed { message, .. } | Outcome::Failed(message) => Some(printable(message)),
    }
}

/// One run as JSON.
#[derive(Debug, Serialize)]
pub struct RunRecord<'a> {
    /// Which of those that were asked for: 0 to count − 1.
    pub index: usize,
    id: String,
    template: &'a str,
    /// Absent when the bytes are not UTF-8; then they are in `stdout_base64`.
    stdout: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout_base64: Option<String>,
    stderr: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr_base64: Option<String>,
    exit_code: u8,
    /// The signal that ended the program, if one did.
    signal: Option<u8>,
    timed_out: bool,
    truncated: bool,
    fork_time_ms: Option<f64>,
    exec_time_ms: Option<f64>,
    total_time_ms: f64,
    memory_private_kib: Option<u64>,
    host: &'static str,
    /// The sentence that people are told, if there is one.
    error: Option<String>,
    /// What to do about a failure of the program's own, if we know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl<'a> RunRecord<'a> {
    /// Puts a run's parts together.
    pub fn new(
        template: &'a str,
        host: &'static str,
        limit: Option<Duration>,
        result: &RunResult,
        output: &'a Captured,
    ) -> Self {
        let (stdout, stdout_base64) = text_or_base64(&output.stdout);
        let (stderr, stderr_base64) = text_or_base64(&output.stderr);
        Self {
            index: 0,
            id: result.id.to_string(),
            template,
            stdout,
            stdout_base64,
            stderr,
            stderr_base64,
            exit_code: exit_code(&result.outcome),
            signal: match result.outcome {
                Outcome::Exited(ExitStatus::Signal { signal, .. }) => Some(signal),
                _ => None,
            },
            timed_out: result.outcome == Outcome::TimedOut,
            truncated: output.truncated,
            fork_time_ms: result.fork_time.map(milliseconds),
            exec_time_ms: result.exec_time.map(milliseconds),
            total_time_ms: milliseconds(result.total_time),
            memory_private_kib: result.usage.map(|usage| usage.private_kib),
            host,
            error: sentence(&result.outcome, limit),
            hint: None,
        }
    }
}

/// Milliseconds to the microsecond.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

fn text_or_base64(bytes: &[u8]) -> (Option<&str>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text), None),
        Err(_) => (None, Some(STANDARD.encode(bytes))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(outcome: Outcome) -> RunResult {
        RunResult {
            id: uuid::Uuid::nil(),
            outcome,
            fork_time: Some(Duration::from_micros(1500)),
            first_output_time: None,
            exec_time: None,
            total_time: Duration::from_millis(2),
            usage: None,
        }
    }

    #[test]
    fn every_end_has_the_code_that_shells_know() {
        let signal = |signal| {
            Outcome::Exited(ExitStatus::Signal {
                signal,
                out_of_memory: false,
            })
        };
        let start = |reason| Outcome::StartFailed {
            reason,
            message: String::new(),
        };
        let cases = [
            (Outcome::Exited(ExitStatus::Code(7)), 7),
            (signal(9), 137),
            (signal(64), 192),
            (Outcome::TimedOut, 124),
            (start(StartFailure::NotFound), 127),
            (start(StartFailure::NotExecutable), 126),
            (start(StartFailure::Other), 125),
            (Outcome::Failed(String::new()), 125),
        ];
        for (outcome, code) in cases {
            assert_eq!(exit_code(&outcome), code, "{outcome:?}");
        }
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal_by_way_of_our_sentences() {
        let message = "died\u{1b}]0;owned\u{7}\r\nlast words\u{9b}2J".to_owned();
        let told = sentence(&Outcome::Failed(message), None).unwrap();
        assert!(told.contains("died") && told.contains("\nlast words"));
        assert!(
            !told
                .chars()
                .any(|letter| letter.is_control() && letter != '\n')
        );
    }

    #[test]
    fn a_record_has_every_field_that_was_promised() {
        let output = Captured {
            stdout: b"text".to_vec(),
            stderr: vec![0xff],
            truncated: false,
        };
        let result = result(Outcome::TimedOut);
        let limit = Some(Duration::from_secs(2));
        let record = RunRecord::new("python", "lab", limit, &result, &output);
        let value = serde_json::to_value(record).unwrap();
        let fields = [
            "id",
            "template",
            "stdout",
            "stderr",
            "exit_code",
            "signal",
            "timed_out",
            "truncated",
            "fork_time_ms",
            "exec_time_ms",
            "total_time_ms",
            "memory_private_kib",
            "host",
        ];
        for field in fields {
            assert!(value.get(field).is_some(), "{field}");
        }
        assert_eq!(value["stdout"], "text");
        assert_eq!(value["stderr_base64"], "/w==");
        assert!(value["stderr"].is_null() && value.get("stdout_base64").is_none());
        assert_eq!(
            (&value["exit_code"], &value["fork_time_ms"]),
            (&124.into(), &1.5.into())
        );
    }
}
