//! Gauges, and counters that others keep: as they are when somebody reads.

use super::{ABOUT, Metrics};
use metrics::{Key, Label, Recorder};
use zygote_api::{PoolStatus, Status};
use zygote_engine::{Census, Ended, Taken};

/// What an engine's sandboxes take from the host, and have taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Now.
    pub census: Census,
    /// Those that have ended.
    pub ended: Ended,
}

impl Metrics {
    pub(super) fn show(&self, status: &Status, measured: Option<&Measured>) {
        let runs = &status.runs;
        self.gauge("zygote_runs_running", runs.running as f64);
        self.gauge("zygote_runs_running_max", runs.running_max as f64);
        self.gauge("zygote_runs_waiting", runs.waiting as f64);
        self.gauge("zygote_runs_waiting_max", runs.waiting_max as f64);
        self.total("zygote_runs_cancelled_total", runs.cancelled);
        self.gauge("zygote_sandboxes", status.sandboxes as f64);
        self.gauge("zygote_uptime_seconds", status.uptime_seconds as f64);
        let all = runs.running + status.sandboxes;
        self.gauge("zeroboot_concurrent_forks", all as f64);
        if let Some(bytes) = resident_bytes() {
            self.gauge("zygote_engine_resident_bytes", bytes as f64);
            self.gauge("zeroboot_memory_usage_bytes", bytes as f64);
        }
        let about = vec![Label::new("version", status.health.version.clone())];
        self.labelled("zygote_engine_info", about, 1.0);
        status.templates.iter().for_each(|pool| self.pool(pool));
        if let Some(measured) = measured {
            self.measured(measured);
        }
    }

    fn gauge(&self, name: &'static str, value: f64) {
        self.labelled(name, Vec::new(), value);
    }

    fn labelled(&self, name: &'static str, labels: Vec<Label>, value: f64) {
        let gauge = self
            .recorder
            .register_gauge(&Key::from_parts(name, labels), &ABOUT);
        gauge.set(value);
    }

    fn total(&self, name: &'static str, value: u64) {
        self.total_labelled(name, Vec::new(), value);
    }

    fn total_labelled(&self, name: &'static str, labels: Vec<Label>, value: u64) {
        let counter = self
            .recorder
            .register_counter(&Key::from_parts(name, labels), &ABOUT);
        counter.absolute(value);
    }

    fn pool(&self, pool: &PoolStatus) {
        let labels = || {
            vec![
                Label::new("template", pool.template.clone()),
                Label::new("replica", pool.replica.to_string()),
            ]
        };
        self.labelled("zygote_pool_idle", labels(), pool.idle as f64);
        for (name, value) in [
            ("zygote_pool_hits_total", pool.hits),
            ("zygote_pool_misses_total", pool.misses),
            ("zygote_pool_refills_total", pool.refills),
            ("zygote_pool_lost_total", pool.lost),
        ] {
            self.total_labelled(name, labels(), value);
        }
    }

    fn measured(&self, measured: &Measured) {
        let Census {
            pooled,
            running,
            paused,
        } = measured.census;
        for (state, taken) in [("pooled", pooled), ("running", running), ("paused", paused)] {
            self.taken(state, taken);
        }
        let Ended {
            sandboxes, faults, ..
        } = measured.ended;
        self.total("zygote_machines_ended_total", sandboxes);
        self.total("zygote_page_faults_total", faults);
    }

    fn taken(&self, state: &'static str, taken: Taken) {
        let labels = |kind: Option<&'static str>| {
            let kind = kind.map(|kind| Label::from_static_parts("kind", kind));
            let state = Label::from_static_parts("state", state);
            std::iter::once(state).chain(kind).collect()
        };
        self.labelled("zygote_machines", labels(None), taken.sandboxes as f64);
        for (kind, kib) in [("private", taken.private_kib), ("shared", taken.shared_kib)] {
            let bytes = (kib << 10) as f64;
            self.labelled("zygote_memory_bytes", labels(Some(kind)), bytes);
        }
        self.labelled("zygote_disk_bytes", labels(None), taken.disk_bytes as f64);
    }
}

/// Those of [`write_times`].
#[cfg(test)]
pub const TIMES: [&str; 2] = [REFILLS, PROCESSORS];
const REFILLS: &str = "zygote_pool_refill_seconds_total";
const PROCESSORS: &str = "zygote_cpu_seconds_total";

/// Counters of time: seconds, which the counters of the library, whole numbers, cannot be.
pub fn write_times(text: &mut String, status: &Status, measured: Option<&Measured>) {
    if !status.templates.is_empty() {
        head(text, REFILLS, "What making forks ahead has taken.");
    }
    for pool in &status.templates {
        let template = escaped(&pool.template);
        let labels = format!("{{template=\"{template}\",replica=\"{}\"}}", pool.replica);
        sample(text, REFILLS, &labels, pool.refills_us);
    }
    if let Some(measured) = measured {
        let what = "Processor time of machines that have ended.";
        head(text, PROCESSORS, what);
        sample(text, PROCESSORS, "", measured.ended.cpu_us);
    }
}

fn head(text: &mut String, name: &str, what: &str) {
    text.push_str(&format!("# HELP {name} {what}\n# TYPE {name} counter\n"));
}

fn sample(text: &mut String, name: &str, labels: &str, micros: u64) {
    let seconds = micros as f64 / 1e6;
    text.push_str(&format!("{name}{labels} {seconds}\n"));
}

/// A label's value, as the format has it.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// Of this process (proc_pid_statm(5)).
fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
