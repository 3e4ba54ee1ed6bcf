//! Zygote: runner.
