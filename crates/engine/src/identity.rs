//! Who a sandbox is: drawn anew for each fork, never baked into a snapshot.

use std::io;
use uuid::Uuid;
use zygote_protocol::Identity;

/// Entropy for each of the guest's generators.
const SEED_BYTES: usize = 64;

/// A new sandbox's id and identity.
pub fn draw() -> io::Result<(Uuid, Identity)> {
    let id = Uuid::now_v7();
    let mut machine_id: [u8; 16] = random()?;
    // A version 4 UUID without dashes, as machine-id(5) asks.
    machine_id[6] = (machine_id[6] & 0x0f) | 0x40;
    machine_id[8] = (machine_id[8] & 0x3f) | 0x80;
    let mut boot_id: [u8; 16] = random()?;
    boot_id[6] = (boot_id[6] & 0x0f) | 0x40;
    boot_id[8] = (boot_id[8] & 0x3f) | 0x80;
    let tail = id.simple().to_string();
    let identity = Identity {
        hostname: format!("zygote-{}", &tail[tail.len() - 12..]),
        machine_id,
        boot_id,
        kernel_seed: random::<SEED_BYTES>()?.to_vec(),
        interpreter_seed: Some(random::<SEED_BYTES>()?.to_vec()),
        reseed: false,
        stays: false,
    };
    Ok((id, identity))
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_an_identity_repeats() {
        let (one, a) = draw().unwrap();
        let (two, b) = draw().unwrap();
        assert_ne!(one, two);
        assert_ne!(a.hostname, b.hostname);
        assert_ne!(a.machine_id, b.machine_id);
        assert_ne!(a.boot_id, b.boot_id);
        assert_ne!(a.kernel_seed, b.kernel_seed);
        assert_ne!(a.interpreter_seed, b.interpreter_seed);
        assert_ne!(Some(a.kernel_seed), a.interpreter_seed);
        assert!(a.hostname.len() <= 63);
    }
}
