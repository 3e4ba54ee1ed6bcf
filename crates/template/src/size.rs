//! Sizes as people write them: `512M`, `4G`, in powers of 1024.

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no size; write a whole number with K, M or G, such as 512M")]
pub struct SizeError {
    /// What was written.
    text: String,
}

/// Parses a size into bytes.
///
/// # Errors
/// If it is no whole number, or does not fit.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let refuse = || SizeError {
        text: text.to_owned(),
    };
    let trimmed = text.trim().trim_end_matches("iB").trim_end_matches('B');
    let digits = trimmed.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match trimmed[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(refuse()),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(refuse());
    }
    let number: u64 = digits.parse().map_err(|_| refuse())?;
    number.checked_mul(1 << shift).ok_or_else(refuse)
}

/// A size for people: the largest unit that gives a whole number, else one decimal.
pub fn format_size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let size = 1_u64 << shift;
        if bytes >= size {
            let tenths = (u128::from(bytes) * 10 + u128::from(size) / 2) / u128::from(size);
            return if tenths % 10 == 0 {
                format!("{} {unit}", tenths / 10)
            } else {
                format!("{}.{} {unit}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let good = [
            ("0", 0),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("4g", 4 << 30),
            ("1KB", 1024),
            ("17179869183G", 17_179_869_183 << 30),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "-1M",
            "1.5G",
            "1T",
            "0x10",
            "17179869184G",
            "1 M",
            "é",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_whole_units_when_they_are_whole() {
        assert_eq!(format_size(512 << 20), "512 MiB");
        assert_eq!(format_size(1536 << 20), "1.5 GiB");
        assert_eq!(format_size(17), "17 B");
    }
}
