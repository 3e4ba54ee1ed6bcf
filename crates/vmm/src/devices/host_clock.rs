//! The host's wall clock on two I/O ports: what the agent sets a fork's clock by.
//!
//! A message would be as old as its way to the agent; a port read is as old as one exit. Reading 4
//! bytes at offset 0 latches CLOCK_REALTIME (nanoseconds since 1970) and returns its low half;
//! 4 bytes at offset 4 return the high half of what was latched. Anything else reads as ones.

use std::time::{SystemTime, UNIX_EPOCH};

/// The device. Its latch is not part of a snapshot: a reader is never stopped half-way, since
/// the agent reads the clock only while it applies an identity.
#[derive(Debug, Default)]
pub struct HostClock {
    latched_ns: u64,
}

impl HostClock {
    /// Number of I/O ports.
    pub const PORTS: u16 = 8;

    /// A guest read.
    pub fn read(&mut self, offset: u8, data: &mut [u8]) {
        data.fill(0xff);
        let Some(word) = data.first_chunk_mut::<4>() else {
            return;
        };
        match offset {
            0 => {
                let since_1970 = SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default();
                self.latched_ns = u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX);
                *word = (self.latched_ns as u32).to_le_bytes();
            }
            4 => *word = ((self.latched_ns >> 32) as u32).to_le_bytes(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_are_of_one_moment() {
        let mut clock = HostClock::default();
        let (mut low, mut high, mut again) = ([0; 4], [0; 4], [0; 4]);
        let before = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_nanos();
        clock.read(0, &mut low);
        let after = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_nanos();
        clock.read(4, &mut high);
        clock.read(4, &mut again);
        let value =
            u64::from(u32::from_le_bytes(low)) | (u64::from(u32::from_le_bytes(high)) << 32);
        assert!((before..=after).contains(&u128::from(value)));
        assert_eq!(high, again);
    }

    #[test]
    fn short_and_odd_reads_give_ones() {
        let mut clock = HostClock::default();
        let (mut short, mut odd) = ([0; 2], [0; 4]);
        clock.read(0, &mut short);
        clock.read(2, &mut odd);
        assert_eq!((short, odd), ([0xff; 2], [0xff; 4]));
    }
}
