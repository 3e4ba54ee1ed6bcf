//! Zygote: template.
