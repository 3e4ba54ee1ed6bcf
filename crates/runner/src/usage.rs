//! What this process costs the host, from /proc/self (proc_pid_smaps(5), proc_pid_status(5)).

use crate::control::Usage;
use rustix::fs::{Mode, OFlags, openat};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

/// Both files have less than half of that.
const FILE_MAX_BYTES: usize = 8192;

/// Files of /proc/self, opened while there still was a way to them.
pub struct Meter {
    rollup: File,
    status: File,
}

impl Meter {
    /// For the calling process. `processes`: the folder /proc.
    pub fn open(processes: BorrowedFd<'_>) -> io::Result<Self> {
        let open = |name| -> io::Result<File> {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            Ok(openat(processes, name, flags, Mode::empty())?.into())
        };
        Ok(Self {
            rollup: open("self/smaps_rollup")?,
            status: open("self/status")?,
        })
    }

    /// Measures; what the kernel does not tell counts as zero.
    pub fn measure(&self) -> Usage {
        let rollup = text(&self.rollup);
        Usage {
            private_kib: kib(&rollup, "Private_Dirty:") + kib(&rollup, "Private_Hugetlb:"),
            page_tables_kib: kib(&text(&self.status), "VmPTE:"),
        }
    }
}

/// By pread(2) alone: a jailed process may not ask for more.
fn text(file: &File) -> String {
    let mut bytes = vec![0; FILE_MAX_BYTES];
    let length = rustix::io::pread(file, &mut bytes[..], 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

fn kib(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_field_is_read_by_its_whole_name() {
        let text = "Private_Clean:   4 kB\nPrivate_Dirty:     12 kB\n";
        assert_eq!(kib(text, "Private_Dirty:"), 12);
        assert_eq!(kib(text, "VmPTE:"), 0);
    }

    #[test]
    fn pages_that_are_written_count() {
        let meter = Meter::open(File::open("/proc").unwrap().as_fd()).unwrap();
        let before = meter.measure().private_kib;
        let pages = vec![1_u8; 8 << 20];
        let after = meter.measure().private_kib;
        assert!(after >= before + 8000, "{before} {after} {}", pages[5]);
    }
}
