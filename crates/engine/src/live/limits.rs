//! What live sandboxes may take: of the engine together, and each.

use std::time::Duration;

/// Limits, each with its unit in its name or type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveLimits {
    /// Sandboxes at once.
    pub sandboxes_max: usize,
    /// Ended sandboxes that are remembered.
    pub ended_max: usize,
    /// Processes of one sandbox that run at once because somebody asked for them.
    pub processes_max: usize,
    /// Ended processes of one sandbox whose output and exit status are kept; the oldest give way.
    pub ended_processes_max: usize,
    /// Open streams of one process.
    pub readers_max: usize,
    /// Tasks with files of one sandbox that go on at once.
    pub files_max: usize,
    /// Interpreters that stay, of one sandbox.
    pub contexts_max: usize,
    /// Cells that wait for one interpreter.
    pub cells_max: usize,
    /// Moments of one sandbox that are kept: with a name, and without.
    pub moments_max: usize,
    /// Output that is kept of one process, in bytes.
    pub ring_bytes: u32,
    /// Longest time to live.
    pub ttl_max: Duration,
    /// Longest time that starting a process may take.
    pub start_max: Duration,
}

impl Default for LiveLimits {
    fn default() -> Self {
        Self {
            sandboxes_max: 1000,
            ended_max: 1000,
            processes_max: 256,
            ended_processes_max: 256,
            readers_max: 32,
            files_max: 64,
            contexts_max: 64,
            cells_max: 64,
            moments_max: 64,
            ring_bytes: 256 * 1024,
            ttl_max: Duration::from_secs(366 * 86400),
            start_max: Duration::from_secs(60),
        }
    }
}

/// Output that may be on its way to one reader before it has taken some, in bytes.
pub const READER_WINDOW_BYTES: u64 = 256 * 1024;
/// Input that may be on its way to one process before it has taken some, in bytes.
pub const INPUT_WINDOW_BYTES: usize = 256 * 1024;
