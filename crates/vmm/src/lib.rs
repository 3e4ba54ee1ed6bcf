//! Zygote: vmm.
