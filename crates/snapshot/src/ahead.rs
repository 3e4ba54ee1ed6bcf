//! What a fork has ahead of its guest.

use crate::manifest::{PAGE_BYTES, WorkingSet};

/// Offsets into guest memory and lengths, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Pages to copy.
    pub written: Vec<(u64, u64)>,
    /// Pages to map: those, and more that are only read.
    pub touched: Vec<(u64, u64)>,
}

impl WorkingSet {
    /// As ranges of bytes.
    #[must_use]
    pub fn ahead(&self) -> Ahead {
        Ahead {
            written: in_bytes(&self.written),
            touched: in_bytes(&union(&self.written, &self.read)),
        }
    }
}

fn in_bytes(pages: &[[u32; 2]]) -> Vec<(u64, u64)> {
    let bytes = |pages: u32| u64::from(pages) * PAGE_BYTES;
    let ranges = pages.iter();
    ranges
        .map(|&[first, count]| (bytes(first), bytes(count)))
        .collect()
}

/// Both, as few ranges.
fn union(one: &[[u32; 2]], other: &[[u32; 2]]) -> Vec<[u32; 2]> {
    let mut all: Vec<[u32; 2]> = one.iter().chain(other).copied().collect();
    all.sort_unstable();
    let mut few: Vec<[u32; 2]> = Vec::new();
    for [first, count] in all {
        match few.last_mut() {
            Some([begin, length]) if first <= *begin + *length => {
                *length = (*length).max(first + count - *begin);
            }
            _ => few.push([first, count]),
        }
    }
    few
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_and_what_is_read_become_few_ranges() {
        let written = [[1, 2], [10, 1], [20, 5]];
        let read = [[3, 1], [5, 1], [11, 2], [21, 1]];
        let union = union(&written, &read);
        assert_eq!(union, [[1, 3], [5, 1], [10, 3], [20, 5]]);
        assert_eq!(in_bytes(&[[2, 3]]), [(8192, 12288)]);
    }
}
