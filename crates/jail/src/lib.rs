//! What a process may still do once it holds a machine: nothing but run it. Namespaces, an empty
//! root, a user of its own, no capabilities, resource limits, and a filter of system calls.
//!
//! Knows nothing of machines or sockets. Everything here is for processes with one thread.

pub mod cgroup;
mod filter;
mod limits;
mod namespaces;
mod privileges;
mod root;

pub use filter::{Filter, FilterError, Role};
pub use namespaces::see_children;

use rustix::io::Errno;

/// A wall that must stand, and does not.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}: {source}")]
pub struct JailError {
    operation: &'static str,
    #[source]
    source: Errno,
}

fn must<T>(operation: &'static str, result: Result<T, Errno>) -> Result<T, JailError> {
    result.map_err(|source| JailError { operation, source })
}

/// What this kernel or user did not allow. Empty: every wall stands.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// One for each wall.
    pub missing: Vec<MissingWall>,
    /// Whether there is a user for each child: see [`become_runner`].
    pub has_users: bool,
}

/// A wall that this kernel or user did not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingWall {
    /// Its name.
    pub wall: String,
    /// The kernel's word.
    pub why: String,
    /// Without it a process that a guest has taken over can reach the host; the others only make
    /// that harder.
    pub is_main: bool,
}

/// Walls without which nobody's untrusted code should run.
const MAIN: [&str; 6] = [
    namespaces::USER_NAMESPACE,
    namespaces::MOUNT_NAMESPACE,
    namespaces::NETWORK_NAMESPACE,
    namespaces::PID_NAMESPACE,
    root::EMPTY_ROOT,
    FILTER,
];
/// The name of the wall that [`Filter`] is.
pub const FILTER: &str = "filter of system calls";

impl MissingWall {
    /// A wall by its name.
    pub fn new(wall: &str, why: &dyn std::fmt::Display) -> Self {
        Self {
            wall: wall.to_owned(),
            why: why.to_string(),
            is_main: MAIN.contains(&wall),
        }
    }
}

impl std::fmt::Display for MissingWall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.wall, self.why)
    }
}

impl Report {
    fn note<T>(&mut self, wall: &str, result: Result<T, Errno>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.miss(wall, &error);
                None
            }
        }
    }

    fn miss(&mut self, wall: &str, why: &dyn std::fmt::Display) {
        self.missing.push(MissingWall::new(wall, why));
    }
}

/// Jails this process, which must have one thread, and its children. What is open stays open.
///
/// Where process id namespaces are possible it returns in a child process, the first of a
/// namespace of its own; the caller's process waits for that one and ends as it ends, and either
/// dies with the other. `address_space_max_bytes`: what each of them may map.
///
/// # Errors
/// If this process could keep privileges, or its child cannot be made. Walls that this kernel or
/// user does not allow are no error: they stand in the report.
pub fn enter(address_space_max_bytes: u64) -> Result<Report, JailError> {
    let mut report = Report::default();
    namespaces::see_children();
    let user = namespaces::user(&mut report);
    report.has_users = user == namespaces::User::Ranged;
    let shared = namespaces::mount_namespace();
    let own = namespaces::others(&mut report);
    root::empty(shared, own, &mut report);
    limits::set(address_space_max_bytes, &mut report);
    privileges::become_nobody(user, &mut report)?;
    if own.children {
        namespaces::first_of_its_own()?;
    }
    privileges::drop_the_rest(user)?;
    Ok(report)
}

/// In a child of a jailed process whose report says `has_users`: makes it another user than its
/// parent and its siblings, and takes the last capabilities from it.
///
/// # Errors
/// If it could keep them: the child must end.
pub fn become_runner(number: u32) -> Result<(), JailError> {
    privileges::become_runner(number)
}
