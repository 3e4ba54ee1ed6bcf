//! Zygote: lab.
