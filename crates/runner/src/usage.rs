//! What this process costs the host, from /proc/self (proc_pid_smaps(5), proc_pid_status(5)).

use crate::control::Usage;
use std::fs;

/// Measures; what the kernel does not tell counts as zero.
pub fn measure() -> Usage {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    Usage {
        private_kib: kib(&rollup, "Private_Dirty:") + kib(&rollup, "Private_Hugetlb:"),
        page_tables_kib: kib(&status, "VmPTE:"),
    }
}

fn kib(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_read_by_its_whole_name() {
        let text = "Private_Clean:   4 kB\nPrivate_Dirty:     12 kB\n";
        assert_eq!(kib(text, "Private_Dirty:"), 12);
        assert_eq!(kib(text, "VmPTE:"), 0);
    }

    #[test]
    fn pages_that_are_written_count() {
        let before = measure().private_kib;
        let pages = vec![1_u8; 8 << 20];
        let after = measure().private_kib;
        assert!(after >= before + 8000, "{before} {after} {}", pages[5]);
    }
}
