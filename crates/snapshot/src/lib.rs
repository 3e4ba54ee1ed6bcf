//! Zygote: the snapshot format.

#![forbid(unsafe_code)]

pub mod state;
