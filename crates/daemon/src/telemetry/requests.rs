//! A span for each request, from its head to the last byte of its answer.

use axum::Router;
use axum::body::Body;
use axum::extract::MatchedPath;
use axum::http::{HeaderMap, Request, Response};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use std::time::Duration;
use tower_http::trace::TraceLayer;
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Traces what is asked of these routes.
pub fn traced(router: Router) -> Router {
    let layer = TraceLayer::new_for_http()
        .make_span_with(begun)
        .on_request(())
        .on_response(answered)
        .on_body_chunk(())
        .on_eos(())
        .on_failure(());
    router.layer(layer)
}

/// Named and described as the field does (https://opentelemetry.io/docs/specs/semconv/http/http-spans). Nothing of a
/// query or a body.
fn begun(request: &Request<Body>) -> Span {
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("", MatchedPath::as_str);
    let method = request.method().as_str();
    let span = tracing::info_span!(
        "request",
        otel.name = %format_args!("{method} {route}"),
        otel.kind = "server",
        http.request.method = method,
        http.route = route,
        url.path = request.uri().path(),
        http.response.status_code = Empty,
        otel.status_code = Empty,
        request_id = Empty,
        trace_id = Empty,
        key = Empty,
        tenant = Empty,
    );
    follow(&span, request.headers());
    span
}

/// Goes on with the trace of whoever asks (https://www.w3.org/TR/trace-context/).
fn follow(span: &Span, headers: &HeaderMap) {
    if span.is_disabled() {
        return;
    }
    let context = TraceContextPropagator::new().extract(&Headers(headers));
    // Fails where no traces are sent.
    if span.set_parent(context).is_ok() {
        let own = span.context();
        let id = own.span().span_context().trace_id();
        span.record("trace_id", tracing::field::display(id));
    }
}

fn answered(answer: &Response<Body>, took: Duration, span: &Span) {
    let status = answer.status();
    span.record("http.response.status_code", status.as_u16());
    let ms = took.as_secs_f64() * 1e3;
    if status.as_u16() == 500 {
        span.record("otel.status_code", "ERROR");
        tracing::error!(status = status.as_u16(), ms, "a request has failed");
    } else {
        tracing::debug!(status = status.as_u16(), ms, "answered");
    }
}

/// Header fields, as the library reads them.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}
