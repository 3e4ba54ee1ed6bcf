//! A run's end, for shells and for machines.

use serde::Serialize;
use zygote_api::{Collected, ExecResult};

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

/// One run as JSON: the API's result, and what only we know.
#[derive(Debug, Serialize)]
pub struct RunRecord {
    /// Which of those that were asked for: 0 to count − 1.
    index: usize,
    #[serde(flatten)]
    result: ExecResult,
    /// What to do about a failure of the program's own, if we know.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl RunRecord {
    /// Puts a run's parts together.
    pub fn new(
        index: usize,
        mut result: ExecResult,
        output: &mut Collected,
        hint: Option<String>,
    ) -> Self {
        let (stdout, stderr) = output.take();
        result.set_output(stdout, stderr);
        result.truncated |= output.truncated;
        Self {
            index,
            result,
            hint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zygote_api::OutputBudget;

    #[test]
    fn a_record_has_every_field_that_was_promised() {
        let mut output = Collected::new(100, &OutputBudget::new(100));
        output.push_stdout(b"text");
        output.push_stderr(&[0xff]);
        let result = ExecResult {
            exit_code: 124,
            fork_time_ms: Some(1.5),
            ..ExecResult::default()
        };
        let record = RunRecord::new(3, result, &mut output, None);
        let value = serde_json::to_value(record).unwrap();
        let fields = [
            "index",
            "id",
            "template",
            "stdout",
            "stderr",
            "exit_code",
            "signal",
            "timed_out",
            "truncated",
            "out_of_memory",
            "fork_time_ms",
            "first_output_time_ms",
            "exec_time_ms",
            "total_time_ms",
            "memory_private_kib",
            "host",
            "error",
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
