//! Zygote: the command line.
fn main() {}
