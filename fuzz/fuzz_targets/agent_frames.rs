//! What a guest sends to the host, cut anywhere.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zygote_protocol::{AgentMessage, FrameDecoder};

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let mut decoder = FrameDecoder::default();
    for piece in pieces {
        decoder.extend(&piece);
        while let Ok(Some(_)) = decoder.next_message::<AgentMessage>() {}
    }
});
