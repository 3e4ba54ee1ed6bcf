//! The host's wall clock as a register: what the agent sets a fork's clock by.
//!
//! An aligned 8-byte read gives CLOCK_REALTIME (nanoseconds since 1970, little-endian) as of that
//! read, one exit old; reads of other widths give ones. There is no state, so nothing to save.
//! A register in memory and not an I/O port: QEMU's emulated AMD-V (7.2) refuses port input from
//! user mode in a guest whose task register was restored.

use std::time::{SystemTime, UNIX_EPOCH};

/// Size of the register's page.
pub const BYTES: u64 = 0x1000;

/// A guest read at an offset within the page.
pub fn read(offset: u64, data: &mut [u8]) {
    data.fill(0xff);
    if let (0, Ok(register)) = (offset, <&mut [u8; 8]>::try_from(data)) {
        let since_1970 = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now_ns = u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX);
        *register = now_ns.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now_ns() -> u128 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_nanos()
    }

    #[test]
    fn a_read_tells_the_hosts_time() {
        let mut register = [0; 8];
        let before = now_ns();
        read(0, &mut register);
        assert!((before..=now_ns()).contains(&u128::from(u64::from_le_bytes(register))));
    }

    #[test]
    fn short_and_odd_reads_give_ones() {
        let (mut short, mut odd) = ([0; 4], [0; 8]);
        read(0, &mut short);
        read(8, &mut odd);
        assert_eq!((short, odd), ([0xff; 4], [0xff; 8]));
    }
}
