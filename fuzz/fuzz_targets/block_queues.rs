//! A hostile driver of the device.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zygote_vmm::fuzzing::{Kind, queues};

fuzz_target!(|script: &[u8]| {
    let _ = queues(Kind::Block, script);
});
