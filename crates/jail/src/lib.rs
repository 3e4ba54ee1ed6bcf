//! What a process may still do once it holds a machine: nothing but run it. Namespaces, an empty
//! root, a user of its own, no capabilities, resource limits, and a filter of system calls.
//!
//! Knows nothing of machines or sockets. Everything here is for processes with one thread.

mod filter;
mod limits;
mod namespaces;
mod privileges;
mod root;

pub use filter::{Filter, FilterError};

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
#[derive(Debug, Default)]
pub struct Report {
    /// A sentence each.
    pub missing: Vec<String>,
}

impl Report {
    fn note<T>(&mut self, wall: &str, result: Result<T, Errno>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.missing.push(format!("{wall}: {error}"));
                None
            }
        }
    }
}

/// Jails this process, which must have one thread, and its children. What is open stays open.
///
/// Where process id namespaces are possible it returns in a child process, the first of a
/// namespace of its own; the caller's process waits for that one and ends as it ends, and either
/// dies with the other.
///
/// # Errors
/// If this process could keep privileges, or its child cannot be made. Walls that this kernel or
/// user does not allow are no error: they stand in the report.
pub fn enter() -> Result<Report, JailError> {
    let mut report = Report::default();
    let user = namespaces::user(&mut report);
    let pid_namespace = namespaces::others(&mut report);
    root::empty(&mut report);
    limits::set(&mut report);
    privileges::become_nobody(user, &mut report)?;
    if pid_namespace {
        namespaces::first_of_its_own()?;
    }
    privileges::drop_the_rest()?;
    Ok(report)
}
