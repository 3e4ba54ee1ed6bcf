//! Templates: from a recipe to snapshots that can be forked, and the store that keeps them.
//!
//! `gather` makes the ingredients (kernel, initramfs, root image) and needs apt but no KVM; `build`
//! boots them, warms the interpreter, freezes and snapshots, and needs KVM but no network.

mod agent;
mod build;
mod derive;
mod disk;
mod guest;
mod ingredients;
mod lock;
mod near;
mod recipe;
pub mod rehearsal;
mod rootfs;
mod size;
mod steps;
mod store;
mod working_set;

pub use agent::{AgentError, agent_path};
pub use build::{BuildError, BuildOptions, Built, build, unix_seconds, up_to_date};
pub use derive::{BaseError, Derivation, copy_of};
pub use disk::{DiskPart, Prune, Pruned};
pub use guest::{Guest, GuestError};
pub use ingredients::{GatherError, Gathered, Ingredients, gather};
pub use near::nearest;
pub use recipe::{BUILT_IN, Recipe, RecipeError, RecipeOrigin, is_name, memory_problem, starter};
pub use rootfs::{Contents, RootfsError, Wheel, has_user_ids};
pub use size::{SizeError, format_size, parse_size};
pub use store::{
    Derived, Fresh, Removal, SYSTEM_STATE_DIR, Store, StoreError, Template, default_state_dir,
    disk_bytes, is_held,
};

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
