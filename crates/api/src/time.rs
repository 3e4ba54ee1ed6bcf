//! Moments, as people and programs read them.

use std::time::{Duration, SystemTime};

/// Seconds since 1970-01-01T00:00:00Z in RFC 3339, UTC: `2026-11-25T13:40:07Z`.
#[must_use]
pub fn rfc3339(unix_s: u64) -> String {
    /// The last second of the year 9999, after which the format has no words.
    const LAST: u64 = 253_402_300_799;
    let since = Duration::from_secs(unix_s.min(LAST));
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + since).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_in_rfc_3339_and_none_is_too_late_for_it() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_795_613_887), "2026-11-25T13:38:07Z");
        assert_eq!(rfc3339(u64::MAX), "9999-12-31T23:59:59Z");
    }
}
