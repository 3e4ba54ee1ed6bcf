//! What Debian gives us: kernels, fetched by apt without installing them, and the initramfs format
//! that they boot. Used by the lab and by templates; knows neither.

#![forbid(unsafe_code)]

pub mod initramfs;
pub mod kernel;

mod command;

pub use command::CommandError;
