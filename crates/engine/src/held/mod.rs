//! What a killed engine would lose: the sockets and processes of its live sandboxes, with a record of
//! each. A process of its own, the holder, has them open beside the engine; the next engine gets them
//! from it and goes on. It does nothing else: while there is no engine, each sandbox runs by itself, and
//! its guest's agent keeps what its processes say.
//!
//! ```text
//! engine ── SOCK_SEQPACKET ── holder          one connection at a time; the first is its stdin
//!    Put, Remove, List  ->                    descriptors come with Put: the record (a memfd), others
//!                       <- Entry..., ListEnd  and go back with Entry
//! ```

mod holder;
mod process;
mod wire;

pub use holder::{Entry, Holder, HolderConfig};
pub use process::holder_main;
