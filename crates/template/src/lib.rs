//! Templates: from a recipe to snapshots that can be forked, and the store that keeps them.
//!
//! `gather` makes the ingredients (kernel, initramfs, root image) and needs apt but no KVM; `build`
//! boots them, warms the interpreter, freezes and snapshots, and needs KVM but no network.

mod agent;
mod build;
mod guest;
mod ingredients;
mod lock;
mod recipe;
pub mod rehearsal;
mod rootfs;
mod size;
mod store;
mod working_set;

pub use build::{BuildError, BuildOptions, Built, build, up_to_date};
pub use guest::{Guest, GuestError};
pub use ingredients::{GatherError, Ingredients, gather};
pub use recipe::{BUILT_IN, Recipe, RecipeError, memory_problem};
pub use rootfs::has_user_ids;
pub use size::{SizeError, format_size, parse_size};
pub use store::{Store, StoreError, Template, default_state_dir};

/// How far a long piece of work has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, for people.
    pub message: String,
    /// Done and total, in whatever unit, if that is known.
    pub part: Option<(u64, u64)>,
}

impl Progress {
    fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            part: None,
        }
    }
}
