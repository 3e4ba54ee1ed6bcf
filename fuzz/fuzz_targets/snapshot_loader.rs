//! The loader of snapshots, behind its digests: whatever bytes have the right digest, loading ends
//! in a value or an error.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zygote_snapshot::{Manifest, decode_machine};

fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::decode(bytes);
    let header = format!("zygote-snapshot 1 {}\n", blake3::hash(bytes).to_hex());
    let _ = Manifest::decode(&[header.as_bytes(), bytes].concat());
    for vcpus in [1, 2, 32] {
        let _ = decode_machine(bytes, vcpus);
    }
});
