//! What a monitor reads: Prometheus' text format, version 0.0.4. Counters and histograms are written as things
//! happen, gauges as they are read.

mod merged;
mod state;
mod words;

pub use merged::merged;
pub use state::Measured;

use crate::answer::word;
use metrics::{Counter, Histogram, Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use zygote_api::{BranchPause, ErrorCode, ExecResult, Failure, Status};

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
/// After so many of them, what histograms have been given is added up, whether anybody reads it or not.
const UPKEEP_EVERY: u64 = 256;

static ABOUT: Metadata<'static> = Metadata::new("zygote", Level::INFO, None);

/// A time, under our name, and under zeroboot's if that has one.
struct Time {
    seconds: Histogram,
    milliseconds: Option<Histogram>,
}

impl Time {
    fn record(&self, milliseconds: Option<f64>) {
        if let Some(milliseconds) = milliseconds {
            self.seconds.record(milliseconds / 1000.0);
            if let Some(theirs) = &self.milliseconds {
                theirs.record(milliseconds);
            }
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

/// A request that has been answered.
#[derive(Clone, Copy, Debug)]
pub struct Answered<'a> {
    /// `GET`, and so on.
    pub method: &'a str,
    /// `/v1/sandboxes/{id}`, and so on.
    pub route: &'a str,
    /// HTTP status.
    pub status: u16,
    /// What was wrong.
    pub error: Option<ErrorCode>,
    /// Until the answer began.
    pub took: Duration,
}

/// What is counted.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    runs: Vec<(Ended, Counter)>,
    /// `success` and `error`.
    executions: [Counter; 2],
    fork: Time,
    first_output: Time,
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
        words::describe(&recorder);
        let counter = |name: &'static str, label: &'static str, value: &'static str| {
            let key = Key::from_parts(name, vec![Label::new(label, value)]);
            recorder.register_counter(&key, &ABOUT)
        };
        let runs =
            ENDINGS.map(|(ended, name)| (ended, counter("zygote_runs_total", "ended", name)));
        let executions = ["success", "error"]
            .map(|status| counter("zeroboot_total_executions", "status", status));
        let histogram =
            |name: &'static str| recorder.register_histogram(&Key::from_static_name(name), &ABOUT);
        let time = |seconds: &'static str, milliseconds: Option<&'static str>| Time {
            seconds: histogram(seconds),
            milliseconds: milliseconds.map(histogram),
        };
        Self {
            runs: runs.into(),
            executions,
            fork: time(
                "zygote_fork_seconds",
                Some("zeroboot_fork_time_milliseconds"),
            ),
            first_output: time("zygote_first_output_seconds", None),
            exec: time(
                "zygote_exec_seconds",
                Some("zeroboot_exec_time_milliseconds"),
            ),
            total: time(
                "zygote_run_seconds",
                Some("zeroboot_total_time_milliseconds"),
            ),
            handle: recorder.handle(),
            recorder,
            recorded: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// A run has ended.
    pub fn run_ended(&self, result: &ExecResult) {
        self.ended(match result {
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
        self.first_output.record(result.first_output_time_ms);
        self.exec.record(result.exec_time_ms);
        self.total.record(Some(result.total_time_ms));
        self.recorded();
    }

    fn recorded(&self) {
        let before = self.recorded.fetch_add(1, Ordering::Relaxed);
        if before.is_multiple_of(UPKEEP_EVERY) {
            self.handle.run_upkeep();
        }
    }

    /// A request has its answer, or the first of it. `route`: as the description has it, so that there are not
    /// more of these than of those.
    pub fn answered(&self, answered: &Answered) {
        let Answered {
            method,
            route,
            status,
            error,
            took,
        } = *answered;
        let labels = vec![
            Label::new("method", method.to_owned()),
            Label::new("route", route.to_owned()),
        ];
        let key = Key::from_parts("zygote_http_request_seconds", labels.clone());
        let seconds = self.recorder.register_histogram(&key, &ABOUT);
        seconds.record(took.as_secs_f64());
        let status = Label::new("status", status.to_string());
        let labels = [labels, vec![status]].concat();
        self.add("zygote_http_requests_total", labels);
        if let Some(code) = error {
            self.add("zygote_errors_total", vec![Label::new("code", word(code))]);
        }
        self.recorded();
    }

    /// A sandbox has been branched, and stood still for so long.
    pub fn branched(&self, pause: &BranchPause) {
        let BranchPause {
            stop_us,
            save_us,
            fork_us,
            resume_us,
        } = *pause;
        let total: u32 = [stop_us, save_us, fork_us, resume_us].iter().sum();
        let key = Key::from_static_name("zygote_branch_pause_seconds");
        let seconds = self.recorder.register_histogram(&key, &ABOUT);
        seconds.record(Duration::from_micros(total.into()).as_secs_f64());
    }

    fn add(&self, name: &'static str, labels: Vec<Label>) {
        let counter = self
            .recorder
            .register_counter(&Key::from_parts(name, labels), &ABOUT);
        counter.increment(1);
    }

    /// There was none.
    pub fn run_refused(&self, failure: &Failure) {
        self.ended(match failure.code.status() {
            429 | 503 => Ended::Refused,
            _ => Ended::Error,
        });
    }

    fn ended(&self, ended: Ended) {
        if let Some((_, counter)) = self.runs.iter().find(|(known, _)| *known == ended) {
            counter.increment(1);
        }
        let has_run = matches!(ended, Ended::Ok | Ended::Failed);
        self.executions[usize::from(!has_run)].increment(1);
    }

    /// All of it, as text; `measured`: what the machines of this process take, if it has some.
    pub fn text(&self, status: &Status, measured: Option<&Measured>) -> String {
        self.show(status, measured);
        let mut text = self.handle.render();
        state::write_times(&mut text, status, measured);
        text
    }
}

fn with_buckets(builder: PrometheusBuilder, suffix: &str, buckets: &[f64]) -> PrometheusBuilder {
    let matcher = Matcher::Suffix(suffix.to_owned());
    // It refuses none at all, and there are some.
    let with = builder.set_buckets_for_metric(matcher, buckets);
    with.unwrap_or_default()
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
                "misses": 6, "refills": 7, "refills_us": 2100, "lost": 0}],
        }))
        .unwrap()
    }

    #[test]
    fn requests_are_counted_by_what_came_of_them() {
        let metrics = Metrics::default();
        let mut answered = Answered {
            method: "POST",
            route: "/v1/sandboxes/{id}",
            status: 200,
            error: None,
            took: Duration::from_micros(20),
        };
        metrics.answered(&answered);
        answered.status = 429;
        answered.error = Some(ErrorCode::LimitReached);
        metrics.answered(&answered);
        metrics.branched(&BranchPause {
            stop_us: 100,
            save_us: 50,
            fork_us: 700,
            resume_us: 0,
        });
        let kib = |private_kib| zygote_engine::Taken {
            private_kib,
            sandboxes: 2,
            ..Default::default()
        };
        let mut measured = Measured::default();
        measured.census.pooled = kib(3);
        measured.census.running = kib(4);
        measured.ended.faults = 12;
        measured.ended.cpu_us = 1_500_000;
        let text = metrics.text(&status(), Some(&measured));
        let route = "method=\"POST\",route=\"/v1/sandboxes/{id}\"";
        for line in [
            &format!("zygote_http_requests_total{{{route},status=\"200\"}} 1"),
            &format!("zygote_http_requests_total{{{route},status=\"429\"}} 1"),
            &format!("zygote_http_request_seconds_bucket{{{route},le=\"0.000025\"}} 2"),
            "zygote_errors_total{code=\"limit_reached\"} 1",
            "zygote_branch_pause_seconds_bucket{le=\"0.001\"} 1",
            "zygote_branch_pause_seconds_bucket{le=\"0.0005\"} 0",
            "zygote_memory_bytes{state=\"pooled\",kind=\"private\"} 3072",
            "zygote_machines{state=\"running\"} 2",
            "zygote_page_faults_total 12",
            "zygote_cpu_seconds_total 1.5",
            "zygote_pool_refill_seconds_total{template=\"py\\\"thon\",replica=\"0\"} 0.0021",
        ] {
            assert!(text.lines().any(|own| own == line), "{line}\n{text}");
        }
    }

    /// A metric without words, or words without one, is a mistake.
    #[test]
    fn each_has_words() {
        let metrics = Metrics::default();
        metrics.run_ended(&ExecResult {
            fork_time_ms: Some(1.0),
            first_output_time_ms: Some(1.0),
            exec_time_ms: Some(1.0),
            ..ExecResult::default()
        });
        metrics.branched(&BranchPause::default());
        metrics.answered(&Answered {
            method: "GET",
            route: "/",
            status: 404,
            error: Some(ErrorCode::NotFound),
            took: Duration::ZERO,
        });
        let text = metrics.text(&status(), Some(&Measured::default()));
        let of = |word: &str| -> std::collections::BTreeSet<String> {
            text.lines()
                .filter_map(|line| line.strip_prefix(word)?.split(' ').next())
                .filter(|name| !name.starts_with("zeroboot_"))
                .map(str::to_owned)
                .collect()
        };
        assert_eq!(of("# HELP "), of("# TYPE "));
        let described = words::names().filter(|name| !name.starts_with("zeroboot_"));
        for name in described {
            assert!(of("# TYPE ").contains(name), "{name}");
        }
    }

    #[test]
    fn the_dashboard_shows_what_there_is() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../packaging/grafana/zygote.json"
        );
        let text = std::fs::read_to_string(path).unwrap();
        let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
        let known: Vec<_> = words::names().chain(state::TIMES).collect();
        let mut shown = 0;
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let expr = target["expr"].as_str().unwrap();
                let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
                let words = expr.split(|letter| !is_part(letter));
                for name in words.filter(|word| word.starts_with("zygote_")) {
                    let name = name.strip_suffix("_bucket").unwrap_or(name);
                    assert!(known.contains(&name), "{name} in {expr}");
                    shown += 1;
                }
            }
        }
        assert!(shown > 30, "{shown}");
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
        let text = metrics.text(&status(), None);
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
        let again = metrics.text(&status(), None);
        assert!(
            again.contains("zygote_pool_hits_total{template=\"py\\\"thon\",replica=\"0\"} 5\n")
        );
        assert!(again.contains("zygote_run_seconds_count 4\n"));
    }
}
