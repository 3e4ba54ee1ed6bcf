//! What engine and holder say to each other: one postcard-encoded message in a packet.

use serde::{Deserialize, Serialize};

/// From the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHolder {
    /// Hold this in place of what has that key. Carries the record, and what else is to stay open.
    Put {
        key: String,
        /// Nothing but the record is held from then on if no engine is there, in milliseconds since 1970.
        expires_unix_ms: Option<u64>,
    },
    /// Let go of it.
    Remove { key: String },
    /// Tell what is held.
    List,
}

/// From the holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHolder {
    /// To the engine that has started it: the next one can connect from now on.
    Ready,
    /// Carries what `Put` has brought, as far as it is held still.
    Entry { key: String },
    /// Those were all.
    ListEnd,
}
