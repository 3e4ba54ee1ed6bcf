//! What a monitor reads: Prometheus' text format, version 0.0.4. Counters and histograms are written as runs end,
//! gauges as they are read.

use metrics::{Counter, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use std::sync::atomic::{AtomicU64, Ordering};
use zygote_api::{ErrorCode, ExecResult, Failure, PoolStatus, Status};

/// Content type of the format.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// From a parked fork's first answer to a program that runs for minutes.
const SECONDS: [f64; 21] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025,
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 300.0,
];
/// Those of zeroboot, whose dashboards know them.
const MILLISECONDS: [f64; 13] = [
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0,
];
/// After so many runs, what histograms have been given is added up, whether anybody reads it or not.
const UPKEEP_EVERY: u64 = 256;

static ABOUT: Metadata<'static> = Metadata::new("zygote", Level::INFO, None);

/// A time, under our name and under zeroboot's.
struct Time {
    seconds: Histogram,
    milliseconds: Histogram,
}

impl Time {
    fn record(&self, milliseconds: Option<f64>) {
        if let Some(milliseconds) = milliseconds {
            self.seconds.record(milliseconds / 1000.0);
            self.milliseconds.record(milliseconds);
        }
    }
}

/// How runs ended, for a counter's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// With exit status 0.
    Ok,
    /// With another one, or by a signal.
    Failed,
    /// At its time limit.
    TimedOut,
    /// There was no sandbox for it, or it died.
    Error,
    /// A limit was reached.
    Refused,
}

const ENDINGS: [(Ended, &str); 5] = [
    (Ended::Ok, "ok"),
    (Ended::Failed, "failed"),
    (Ended::TimedOut, "timeout"),
    (Ended::Error, "error"),
    (Ended::Refused, "refused"),
];

/// What is counted.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    runs: Vec<(Ended, Counter)>,
    /// `success` and `error`.
    executions: [Counter; 2],
    fork: Time,
    exec: Time,
    total: Time,
    recorded: AtomicU64,
}

/// Nothing yet.
impl Default for Metrics {
    fn default() -> Self {
        let builder = PrometheusBuilder::new();
        let builder = with_buckets(builder, "_seconds", &SECONDS);
        let recorder = with_buckets(builder, "_milliseconds", &MILLISECONDS).build_recorder();
        describe(&recorder);
        let counter = |name: &'static str, label: &'static str, value: &'static str| {
            let key = Key::from_parts(name, vec![Label::new(label, value)]);
            recorder.register_counter(&key, &ABOUT)
        };
        let runs =
            ENDINGS.map(|(ended, name)| (ended, counter("zygote_runs_total", "ended", name)));
        let executions = ["success", "error"]
            .map(|status| counter("zeroboot_total_executions", "status", status));
        let time = |seconds: &'static str, milliseconds: &'static str| Time {
            seconds: recorder.register_histogram(&Key::from_name(seconds), &ABOUT),
            milliseconds: recorder.register_histogram(&Key::from_name(milliseconds), &ABOUT),
        };
        Self {
            runs: runs.into(),
            executions,
            fork: time("zygote_fork_seconds", "zeroboot_fork_time_milliseconds"),
            exec: time("zygote_exec_seconds", "zeroboot_exec_time_milliseconds"),
            total: time("zygote_run_seconds", "zeroboot_total_time_milliseconds"),
            handle: recorder.handle(),
            recorder,
            recorded: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// A run has ended.
    pub fn run_ended(&self, result: &ExecResult) {
        self.count(match result {
            ExecResult {
                timed_out: true, ..
            } => Ended::TimedOut,
            ExecResult {
                error: Some(failure),
                ..
            } if failure.code == ErrorCode::SandboxDied => Ended::Error,
            ExecResult { exit_code: 0, .. } => Ended::Ok,
            _ => Ended::Failed,
        });
        self.fork.record(result.fork_time_ms);
        self.exec.record(result.exec_time_ms);
        self.total.record(Some(result.total_time_ms));
        let before = self.recorded.fetch_add(1, Ordering::Relaxed);
        if before.is_multiple_of(UPKEEP_EVERY) {
            self.handle.run_upkeep();
        }
    }

    /// There was none.
    pub fn run_refused(&self, failure: &Failure) {
        self.count(match failure.code.status() {
            429 | 503 => Ended::Refused,
            _ => Ended::Error,
        });
    }

    fn count(&self, ended: Ended) {
        if let Some((_, counter)) = self.runs.iter().find(|(known, _)| *known == ended) {
            counter.increment(1);
        }
        let has_run = matches!(ended, Ended::Ok | Ended::Failed);
        self.executions[usize::from(!has_run)].increment(1);
    }

    /// All of it, as text.
    pub fn text(&self, status: &Status) -> String {
        self.gauge("zygote_runs_running", status.runs.running);
        self.gauge("zygote_runs_waiting", status.runs.waiting);
        self.gauge("zygote_sandboxes", status.sandboxes);
        self.gauge("zygote_uptime_seconds", status.uptime_seconds);
        self.gauge(
            "zeroboot_concurrent_forks",
            status.runs.running + status.sandboxes,
        );
        if let Some(bytes) = resident_bytes() {
            self.gauge("zygote_engine_resident_bytes", bytes);
            self.gauge("zeroboot_memory_usage_bytes", bytes);
        }
        status.templates.iter().for_each(|pool| self.pool(pool));
        self.handle.render()
    }

    fn gauge(&self, name: &'static str, value: u64) {
        let gauge = self.recorder.register_gauge(&Key::from_name(name), &ABOUT);
        gauge.set(value as f64);
    }

    fn pool(&self, pool: &PoolStatus) {
        let labels = || {
            vec![
                Label::new("template", pool.template.clone()),
                Label::new("replica", pool.replica.to_string()),
            ]
        };
        let key = |name: &'static str| Key::from_parts(name, labels());
        let idle = self
            .recorder
            .register_gauge(&key("zygote_pool_idle"), &ABOUT);
        idle.set(pool.idle as f64);
        for (name, value) in [
            ("zygote_pool_hits_total", pool.hits),
            ("zygote_pool_misses_total", pool.misses),
            ("zygote_pool_refills_total", pool.refills),
            ("zygote_pool_lost_total", pool.lost),
        ] {
            let counter = self.recorder.register_counter(&key(name), &ABOUT);
            counter.absolute(value);
        }
    }
}

fn with_buckets(builder: PrometheusBuilder, suffix: &str, buckets: &[f64]) -> PrometheusBuilder {
    let matcher = Matcher::Suffix(suffix.to_owned());
    // It refuses none at all, and there are some.
    let with = builder.set_buckets_for_metric(matcher, buckets);
    with.unwrap_or_default()
}

fn describe(recorder: &PrometheusRecorder) {
    let text = |words: &'static str| words.into();
    for (name, what) in [
        ("zygote_runs_total", "Runs, by how they ended."),
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
    ] {
        recorder.describe_counter(name.into(), None, text(what));
    }
    for (name, what) in [
        (
            "zygote_fork_seconds",
            "From a request to a fork that has its identity.",
        ),
        ("zygote_exec_seconds", "From there to the program's end."),
        ("zygote_run_seconds", "From a request to the program's end."),
    ] {
        recorder.describe_histogram(name.into(), Some(Unit::Seconds), text(what));
    }
    for (name, what) in [
        ("zygote_runs_running", "Runs now."),
        (
            "zygote_runs_waiting",
            "Runs that wait for one of those to end.",
        ),
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
    ] {
        recorder.describe_gauge(name.into(), None, text(what));
    }
}

/// Of this process (proc_pid_statm(5)).
fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        serde_json::from_value(serde_json::json!({
            "status": "ok", "version": "1", "program": "p", "pid": 1, "host": "kvm", "state_dir": "/s",
            "socket": "/x", "log": null, "uptime_seconds": 7, "started": "", "started_unix_s": 0,
            "idle_exit_seconds": null, "sandboxes": 2, "lab": null,
            "runs": {"running": 3, "running_max": 9, "waiting": 1, "waiting_max": 9, "ended": 0,
                "refused": 0, "cancelled": 0},
            "templates": [{"template": "py\"thon", "build": "b", "replica": 0, "idle": 4, "hits": 5,
                "misses": 6, "refills": 7, "lost": 0}],
        }))
        .unwrap()
    }

    #[test]
    fn runs_are_counted_by_their_ends_and_timed_under_both_names() {
        let metrics = Metrics::default();
        let run = |exit_code, timed_out| ExecResult {
            exit_code,
            timed_out,
            fork_time_ms: Some(0.06),
            exec_time_ms: Some(3.0),
            total_time_ms: 3.06,
            ..ExecResult::default()
        };
        for (code, timed_out) in [(0, false), (0, false), (7, false), (124, true)] {
            metrics.run_ended(&run(code, timed_out));
        }
        metrics.run_refused(&Failure::new(ErrorCode::Busy, "full"));
        metrics.run_refused(&Failure::new(ErrorCode::TemplateNotFound, "none"));
        let text = metrics.text(&status());
        for line in [
            "zygote_runs_total{ended=\"ok\"} 2",
            "zygote_runs_total{ended=\"failed\"} 1",
            "zygote_runs_total{ended=\"timeout\"} 1",
            "zygote_runs_total{ended=\"refused\"} 1",
            "zygote_runs_total{ended=\"error\"} 1",
            "zeroboot_total_executions{status=\"success\"} 3",
            "zeroboot_total_executions{status=\"error\"} 3",
            "zygote_fork_seconds_bucket{le=\"0.0001\"} 4",
            "zygote_fork_seconds_bucket{le=\"0.00005\"} 0",
            "zeroboot_fork_time_milliseconds_bucket{le=\"0.1\"} 4",
            "zeroboot_total_time_milliseconds_count 4",
            "zeroboot_concurrent_forks 5",
            "zygote_pool_idle{template=\"py\\\"thon\",replica=\"0\"} 4",
            "zygote_pool_hits_total{template=\"py\\\"thon\",replica=\"0\"} 5",
        ] {
            assert!(text.lines().any(|own| own == line), "{line}\n{text}");
        }
        // Read once more, nothing is counted twice.
        let again = metrics.text(&status());
        assert!(
            again.contains("zygote_pool_hits_total{template=\"py\\\"thon\",replica=\"0\"} 5\n")
        );
        assert!(again.contains("zygote_run_seconds_count 4\n"));
    }
}
