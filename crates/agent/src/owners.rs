//! Whose each page of the guest's memory is, for measuring: `/proc/1/exe owners` in a guest. A line for
//! each run of pages: the first one's number, their count, the owner.
//!
//! From /proc/PID/maps and pagemap (Documentation/admin-guide/mm/pagemap.rst), /proc/kpageflags and
//! /proc/iomem.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

const PAGE_BYTES: u64 = 4096;
const ENTRY_BYTES: u64 = 8;
/// Bits of a page map's entry.
const PRESENT: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 61;
const FRAME: u64 = (1 << 55) - 1;
/// Entries read at once.
const PIECE: u64 = 4096;

/// A page flag: never given back to the allocator.
const RESERVED: u32 = 32;
/// Page flags, the first that fits decides.
const KINDS: [(u32, &str); 7] = [
    (7, "slab"),
    (26, "page tables"),
    (10, NEW),
    (20, "no memory"),
    (RESERVED, "memory map and early kernel"),
    (14, "files in memory"),
    (5, "page cache"),
];
/// Free in the snapshot.
const NEW: &str = "new pages";
const OTHER: &str = "other kernel";

/// Prints it.
pub fn print() -> io::Result<()> {
    let mut owners = kernel_pages()?;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process may end meanwhile.
        let _ = mark_process(pid, &mut owners);
    }
    let mut out = io::stdout().lock();
    let mut first = 0;
    for run in owners.chunk_by(|one, next| one == next) {
        writeln!(out, "{first} {} {}", run.len(), run[0])?;
        first += run.len();
    }
    out.flush()
}

/// Every frame by what the kernel does with it.
fn kernel_pages() -> io::Result<Vec<&'static str>> {
    let image = image_ranges()?;
    let mut flags = Vec::new();
    File::open("/proc/kpageflags")?.read_to_end(&mut flags)?;
    let owner = |(frame, entry): (usize, &[u8])| {
        let mut bits = [0; 8];
        bits.copy_from_slice(entry);
        let bits = u64::from_ne_bytes(bits);
        let at = frame as u64 * PAGE_BYTES;
        // Parts of the image that the kernel does not need are pages like others.
        let is_of_image = bits >> RESERVED & 1 == 1;
        let of_image = image
            .iter()
            .find(|(first, last, _)| is_of_image && (*first..=*last).contains(&at));
        let kind = KINDS.iter().find(|(bit, _)| bits >> bit & 1 == 1);
        match (of_image, kind) {
            (Some((_, _, owner)), _) => *owner,
            (None, Some((_, owner))) => *owner,
            (None, None) => OTHER,
        }
    };
    Ok(flags.chunks_exact(8).enumerate().map(owner).collect())
}

/// Where the kernel's image lies: first and last address, and which part.
fn image_ranges() -> io::Result<Vec<(u64, u64, &'static str)>> {
    let parts = [
        ("Kernel code", "kernel code"),
        ("Kernel rodata", "kernel code"),
        ("Kernel data", "kernel data"),
        ("Kernel bss", "kernel data"),
    ];
    let text = fs::read_to_string("/proc/iomem")?;
    let range = |line: &str| {
        let (range, name) = line.trim().split_once(" : ")?;
        let (_, owner) = parts.iter().find(|(part, _)| *part == name)?;
        let (first, last) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some((number(first)?, number(last)?, *owner))
    };
    Ok(text.lines().filter_map(range).collect())
}

/// Whose it is by what a process maps it as.
fn mark_process(pid: u32, owners: &mut [&'static str]) -> io::Result<()> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"))?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    for line in maps.lines() {
        let Some((first, last, path)) = mapping(line) else {
            continue;
        };
        let mut at = first / PAGE_BYTES;
        while at < last / PAGE_BYTES {
            let count = PIECE.min(last / PAGE_BYTES - at);
            let mut entries = vec![0; (count * ENTRY_BYTES) as usize];
            pagemap.read_exact_at(&mut entries, at * ENTRY_BYTES)?;
            for entry in entries.chunks_exact(8) {
                let mut bits = [0; 8];
                bits.copy_from_slice(entry);
                let bits = u64::from_ne_bytes(bits);
                if bits & PRESENT == 0 {
                    continue;
                }
                if let Some(slot) = owners.get_mut((bits & FRAME) as usize) {
                    *slot = owner(pid, name.trim(), path, bits & OF_A_FILE != 0);
                }
            }
            at += count;
        }
    }
    Ok(())
}

/// Start, end and path of a line of /proc/PID/maps; those of the kernel's half have no page map.
fn mapping(line: &str) -> Option<(u64, u64, &str)> {
    let mut words = line.split_ascii_whitespace();
    let (first, last) = words.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let path = words.nth(4).unwrap_or_default();
    let (first, last) = (number(first)?, number(last)?);
    (last < 1 << 63).then_some((first, last, path))
}

fn owner(pid: u32, process: &str, path: &str, is_of_a_file: bool) -> &'static str {
    if is_of_a_file {
        return "mapped files";
    }
    if pid == std::process::id() {
        return NEW;
    }
    match (pid, process.starts_with("python"), path) {
        (1, _, _) => "agent",
        (_, true, "[heap]") => "interpreter's heap",
        (_, true, "[stack]") => "interpreter's stack",
        (_, true, "") => "interpreter's anonymous memory",
        (_, true, _) => "interpreter's data",
        _ => "other processes",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_and_the_kernels_left_out() {
        let line = "7f00-7fff rw-p 00000000 fe:00 12  /usr/lib/a b.so";
        assert_eq!(mapping(line), Some((0x7f00, 0x7fff, "/usr/lib/a")));
        let bare = "7f00-7fff rw-p 00000000 00:00 0 ";
        assert_eq!(mapping(bare), Some((0x7f00, 0x7fff, "")));
        let kernel = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(mapping(kernel), None);
    }

    #[test]
    fn a_page_belongs_to_who_maps_it() {
        assert_eq!(owner(1, "init", "[heap]", false), "agent");
        assert_eq!(owner(9, "python3", "[heap]", false), "interpreter's heap");
        assert_eq!(
            owner(9, "python3", "/lib/x.so", false),
            "interpreter's data"
        );
        assert_eq!(owner(9, "python3", "/lib/x.so", true), "mapped files");
        assert_eq!(owner(9, "sh", "", false), "other processes");
    }
}
