//! The daemon's own words, a line each on standard error, and traces of requests for a collector. What programs say
//! and what is put into sandboxes is in neither.

mod lines;
mod otlp;
mod requests;

pub use requests::traced;

use anyhow::Context;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::time::Duration;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, fmt, registry};

/// How long the last traces may take to reach their collector.
const LAST_MAX: Duration = Duration::from_secs(3);
/// What all of our crates are called begins so.
const OURS: &str = "zygote";

/// How much is told, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telemetry {
    /// Of what weight lines are written.
    pub level: LevelFilter,
    /// Whether each is an object of JSON.
    pub is_json: bool,
    /// Where a collector takes traces (OTLP over HTTP), such as `http://127.0.0.1:4318/v1/traces`.
    pub otlp: Option<String>,
}

/// Lines for people, and no traces.
impl Default for Telemetry {
    fn default() -> Self {
        Self {
            level: LevelFilter::INFO,
            is_json: false,
            otlp: None,
        }
    }
}

/// Traces that go to a collector.
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// From here on lines are written and traces sent. Once a process: a second time nothing changes. Needs a
    /// runtime, on which they are sent.
    ///
    /// # Errors
    /// If the collector's address is none.
    pub fn begin(telemetry: &Telemetry) -> anyhow::Result<Self> {
        let lines = fmt::layer()
            .with_writer(crate::log::lines)
            .with_ansi(false)
            .with_target(false);
        let lines = if telemetry.is_json {
            let json = lines.json().flatten_event(true).with_span_list(false);
            json.boxed()
        } else {
            lines.compact().fmt_fields(lines::ForPeople).boxed()
        };
        let lines = lines.with_filter(Targets::new().with_target(OURS, telemetry.level));
        let exporter = telemetry.otlp.as_deref().map(otlp::provider);
        let provider = exporter
            .transpose()
            .context("cannot send traces there (--otlp)")?;
        let spans = provider.as_ref().map(|provider| {
            let layer = tracing_opentelemetry::layer()
                .with_tracer(provider.tracer(OURS))
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false);
            layer.with_filter(Targets::new().with_target(OURS, LevelFilter::DEBUG))
        });
        let all = registry().with(lines).with(spans);
        // Fails if that was done before.
        let _ = tracing::subscriber::set_global_default(all);
        Ok(Self(provider))
    }

    /// Sends what there still is.
    pub async fn end(self) {
        let Some(provider) = self.0 else { return };
        let ending = move || provider.shutdown_with_timeout(LAST_MAX);
        // What cannot be sent any more is lost; why that is has been told.
        let _ = tokio::task::spawn_blocking(ending).await;
    }
}
