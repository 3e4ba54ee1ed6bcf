//! What each metric is, for who reads it.

use metrics::{Recorder, Unit};

const COUNTERS: [(&str, &str); 11] = [
    ("zygote_runs_total", "Runs, by how they ended."),
    (
        "zygote_runs_cancelled_total",
        "Runs whose client went away before their end.",
    ),
    (
        "zygote_errors_total",
        "Requests that were refused or failed, by the code of their error.",
    ),
    (
        "zygote_http_requests_total",
        "Requests, by method, route and HTTP status.",
    ),
    (
        "zeroboot_total_executions",
        "Runs, by whether the program came to its end.",
    ),
    (
        "zygote_pool_hits_total",
        "Requests that found a fork made ahead.",
    ),
    ("zygote_pool_misses_total", "Requests that found none."),
    ("zygote_pool_refills_total", "Forks made ahead."),
    (
        "zygote_pool_lost_total",
        "Forks that could not be made, or died waiting.",
    ),
    (
        "zygote_machines_ended_total",
        "Machines that have ended, of runs and of sandboxes.",
    ),
    (
        "zygote_page_faults_total",
        "Page faults of machines that have ended: pages that were copied or mapped for them.",
    ),
];

const HISTOGRAMS: [(&str, &str); 6] = [
    (
        "zygote_fork_seconds",
        "From a request to a fork that has its identity.",
    ),
    (
        "zygote_first_output_seconds",
        "From a request to the first byte of output.",
    ),
    (
        "zygote_exec_seconds",
        "From a fork that has its identity to the program's end.",
    ),
    ("zygote_run_seconds", "From a request to the program's end."),
    (
        "zygote_branch_pause_seconds",
        "How long a sandbox stood still to be branched.",
    ),
    (
        "zygote_http_request_seconds",
        "From a request to the beginning of its answer, by method and route.",
    ),
];

const GAUGES: [(&str, &str); 12] = [
    ("zygote_engine_info", "1, with the engine's version."),
    ("zygote_runs_running", "Runs now."),
    ("zygote_runs_running_max", "As many may run at once."),
    (
        "zygote_runs_waiting",
        "Runs that wait for one of those to end.",
    ),
    ("zygote_runs_waiting_max", "As many may wait."),
    (
        "zygote_sandboxes",
        "Sandboxes that live until they are ended.",
    ),
    (
        "zygote_uptime_seconds",
        "For how long the engine has been there.",
    ),
    (
        "zygote_engine_resident_bytes",
        "Memory of the engine itself, without sandboxes.",
    ),
    ("zygote_pool_idle", "Forks made ahead that wait."),
    (
        "zygote_machines",
        "Machines by state: pooled (made ahead), running, paused. Those of runs are not counted.",
    ),
    (
        "zygote_memory_bytes",
        "Memory of machines by state: private to one, or shared with their template, where each is counted.",
    ),
    ("zygote_disk_bytes", "What machines have on disk."),
];

pub fn describe(recorder: &impl Recorder) {
    for (name, what) in COUNTERS {
        recorder.describe_counter(name.into(), None, what.into());
    }
    for (name, what) in HISTOGRAMS {
        recorder.describe_histogram(name.into(), Some(Unit::Seconds), what.into());
    }
    for (name, what) in GAUGES {
        recorder.describe_gauge(name.into(), None, what.into());
    }
}

/// The names of all.
#[cfg(test)]
pub fn names() -> impl Iterator<Item = &'static str> {
    let all = COUNTERS.into_iter().chain(HISTOGRAMS).chain(GAUGES);
    all.map(|(name, _)| name)
}
