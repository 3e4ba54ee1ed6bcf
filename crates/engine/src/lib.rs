//! Zygote: engine.
