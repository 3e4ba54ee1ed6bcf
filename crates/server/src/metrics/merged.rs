//! Metrics of two engines as one text: of the one that is asked, and of the one that has the machines.

use std::collections::HashSet;

/// The first, and those metrics of the second that the first does not have.
#[must_use]
pub fn merged(own: &str, other: &str) -> String {
    let known: HashSet<&str> = own.lines().filter_map(family).collect();
    let mut text = own.to_owned();
    let mut is_known = false;
    for line in other.lines() {
        if let Some(family) = family(line) {
            is_known = known.contains(family);
        }
        if !is_known {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// Whose lines begin here: each has its help, if any, and its type before its samples.
fn family(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("# HELP ");
    let rest = rest.or_else(|| line.strip_prefix("# TYPE "))?;
    rest.split(' ').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_have_is_the_firsts() {
        let own = "# HELP a What a is.\n# TYPE a gauge\na 1\n\n# TYPE b counter\nb{x=\"y\"} 2\n";
        let other =
            "# TYPE b counter\nb 7\n# HELP c It.\n# TYPE c gauge\nc 3\n# TYPE a gauge\na 9\n";
        let text = merged(own, other);
        assert_eq!(text, format!("{own}# HELP c It.\n# TYPE c gauge\nc 3\n"));
        assert_eq!(merged("", other), other);
    }
}
