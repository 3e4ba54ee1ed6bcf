//! The processes of a virtual machine: the zygote process that holds a snapshot, and the runner
//! processes that it forks, one a sandbox.
//!
//! Single-threaded until a machine runs, synchronous, no policy: who may fork what, and for how
//! long, is the engine's business. A process of either kind ends when the engine's end of its
//! control socket closes, so that nothing outlives a killed engine.

pub mod control;
pub mod packet;
pub mod pages;

mod branch;
mod children;
mod loaded;
mod process;
mod serial;
mod zygote;

pub use process::chain;
pub use serial::Console;
pub use zygote::zygote_main;
