//! Resource limits (getrlimit(2)) for a process and its children.

use crate::Report;
use rustix::process::{Resource, Rlimit, setrlimit};

/// Descriptors of a zygote or a runner; a machine of 32 vCPUs and all devices holds about 60.
const DESCRIPTORS_MAX: u64 = 256;
/// Processes and threads of one zygote's user: about 1,000 machines.
const PROCESSES_MAX: u64 = 8192;

/// Sets them for good: soft and hard alike.
pub fn set(address_space_max_bytes: u64, report: &mut Report) {
    let limits: [(&str, Resource, u64); 7] = [
        ("limit of descriptors", Resource::Nofile, DESCRIPTORS_MAX),
        ("limit of processes", Resource::Nproc, PROCESSES_MAX),
        (
            "limit of mapped memory",
            Resource::As,
            address_space_max_bytes,
        ),
        // A crash must not write a guest's memory to the host's disk.
        ("limit of core files", Resource::Core, 0),
        ("limit of written files", Resource::Fsize, 0),
        ("limit of locked memory", Resource::Memlock, 0),
        ("limit of message queues", Resource::Msgqueue, 0),
    ];
    for (name, resource, value) in limits {
        let limit = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        report.note(name, setrlimit(resource, limit));
    }
}
