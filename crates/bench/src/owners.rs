//! Whose each page of a snapshot is, as the agent of a fork tells (`agent/src/owners.rs`).

/// Pages by owner.
pub struct Owners {
    /// First page of each run, and its owner; ascending.
    runs: Vec<(u32, String)>,
}

impl Owners {
    /// From the agent's lines: first page, count, owner. What is no line is nobody's.
    pub fn parse(text: &str) -> Self {
        let run = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let first = words.next()?.parse().ok()?;
            let owner = words.nth(1)?;
            Some((first, owner.to_owned()))
        };
        Self {
            runs: text.lines().filter_map(run).collect(),
        }
    }

    /// Whether nobody has told anything.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// A page's owner; `frame`: guest-physical.
    pub fn of(&self, frame: u32) -> &str {
        let after = self.runs.partition_point(|(first, _)| *first <= frame);
        match after.checked_sub(1) {
            Some(index) => &self.runs[index].1,
            None => "unknown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_in_its_run() {
        let owners = Owners::parse("0 3 slab\n3 1 kernel data\nnonsense\n4 100 new pages\n");
        let of = [0, 2, 3, 4, 103].map(|frame| owners.of(frame));
        let told = ["slab", "slab", "kernel data", "new pages", "new pages"];
        assert_eq!(of, told);
        assert_eq!(Owners::parse("").of(7), "unknown");
    }
}
