//! The fields of a line of the log that people read.

use std::fmt::{Debug, Result};
use tracing::field::{Field, Visit};
use tracing::span::Record;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormattedFields;
use tracing_subscriber::fmt::format::{FormatFields, Writer};

/// `message name=value …`, without what only a collector wants.
pub struct ForPeople;

impl<'writer> FormatFields<'writer> for ForPeople {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> Result {
        let mut line = Line {
            writer,
            is_empty: true,
            written: Ok(()),
        };
        fields.record(&mut line);
        line.written
    }

    fn add_fields(&self, there: &'writer mut FormattedFields<Self>, more: &Record<'_>) -> Result {
        let before = there.fields.len();
        if before > 0 {
            there.fields.push(' ');
        }
        let from = there.fields.len();
        let written = self.format_fields(Writer::new(&mut there.fields), more);
        if there.fields.len() == from {
            there.fields.truncate(before);
        }
        written
    }
}

struct Line<'writer> {
    writer: Writer<'writer>,
    is_empty: bool,
    written: Result,
}

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let name = field.name();
        if is_for_collectors(name) || self.written.is_err() {
            return;
        }
        let space = if self.is_empty { "" } else { " " };
        self.is_empty = false;
        self.written = match name {
            "message" => write!(self.writer, "{space}{value:?}"),
            _ => write!(self.writer, "{space}{name}={value:?}"),
        };
    }
}

/// The method and the path of a request say the same.
fn is_for_collectors(field: &str) -> bool {
    field.starts_with("otel.") || field == "http.route"
}

#[cfg(test)]
mod tests {
    use super::ForPeople;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_for_people_has_each_thing_once() {
        let written = Written::default();
        let to = written.clone();
        let lines = tracing_subscriber::fmt()
            .with_writer(move || to.clone())
            .with_ansi(false)
            .with_target(false)
            .without_time()
            .compact()
            .fmt_fields(ForPeople)
            .finish();
        tracing::subscriber::with_default(lines, || {
            let span = tracing::info_span!(
                "request",
                otel.name = "POST /v1/exec",
                http.request.method = "POST",
                http.route = "/v1/exec",
                url.path = "/v1/exec",
                otel.status_code = tracing::field::Empty,
                key = tracing::field::Empty,
            );
            span.record("key", "3f9c");
            span.record("otel.status_code", "ERROR");
            let _inside = span.entered();
            tracing::info!(template = "py", ms = 3.5, "loaded a template");
        });
        let written = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let expected = "INFO request: loaded a template template=\"py\" ms=3.5 \
                        http.request.method=\"POST\" url.path=\"/v1/exec\" key=\"3f9c\"";
        assert_eq!(written, format!(" {expected}\n"));
    }
}
