//! Traces to a collector: OTLP over HTTP, in protocol buffers (https://opentelemetry.io/docs/specs/otlp/#otlphttp).

use anyhow::bail;
use axum::http::Uri;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry::KeyValue;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// How long a collector may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Most of an answer that is read.
const ANSWER_MAX_BYTES: usize = 1 << 20;
/// Where collectors take traces, unless it is said.
const PATH: &str = "/v1/traces";
/// What the engine is called, unless the environment says something else.
const SERVICE: &str = "zygote";

/// Sends spans to a collector, many at once, from a thread of its own.
pub fn provider(address: &str) -> anyhow::Result<SdkTracerProvider> {
    let sender = Sender {
        runtime: Handle::current(),
        client: Client::builder(TokioExecutor::new()).build(HttpConnector::new()),
        is_broken: Arc::default(),
    };
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(sender)
        .with_endpoint(endpoint(address)?)
        .build()?;
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(SERVICE);
    }
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = resource.with_attribute(version).build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build())
}

fn endpoint(address: &str) -> anyhow::Result<String> {
    let uri: Uri = address.parse()?;
    if uri.scheme_str() != Some("http") || uri.host().is_none() {
        bail!(
            "{address}: write it as http://HOST:PORT; a collector that needs TLS is reached through one on this machine"
        );
    }
    Ok(match uri.path() {
        "" | "/" => format!("{}{PATH}", address.trim_end_matches('/')),
        _ => address.to_owned(),
    })
}

/// The library asks from a thread that has no runtime: the engine's does the work.
#[derive(Debug)]
struct Sender {
    runtime: Handle,
    client: Client<HttpConnector, Full<Bytes>>,
    is_broken: Arc<AtomicBool>,
}

impl HttpClient for Sender {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        let client = self.client.clone();
        let sending = self.runtime.spawn(async move {
            let answer = timeout(ANSWER_MAX, send(&client, request)).await;
            answer.unwrap_or_else(|_| Err("it does not answer".into()))
        });
        Box::pin(async move {
            let sent = sending.await?;
            let problem = match &sent {
                Ok(answer) if answer.status().is_success() => None,
                Ok(answer) => Some(answer.status().to_string()),
                Err(error) => Some(error.to_string()),
            };
            self.tell(problem);
            sent
        })
    }
}

impl Sender {
    /// Once, until it has worked again.
    fn tell(&self, problem: Option<String>) {
        let was_broken = self.is_broken.swap(problem.is_some(), Ordering::Relaxed);
        if let Some(problem) = problem.filter(|_| !was_broken) {
            tracing::warn!("traces do not reach their collector: {problem}");
        }
    }
}

async fn send(
    client: &Client<HttpConnector, Full<Bytes>>,
    request: Request<Bytes>,
) -> Result<Response<Bytes>, HttpError> {
    let answer = client.request(request.map(Full::new)).await?;
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, ANSWER_MAX_BYTES).collect().await?;
    Ok(Response::from_parts(head, body.to_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_completed_or_refused() {
        let full = "http://127.0.0.1:4318/v1/traces";
        for address in ["http://127.0.0.1:4318", "http://127.0.0.1:4318/", full] {
            assert_eq!(endpoint(address).unwrap(), full);
        }
        assert_eq!(endpoint("http://h/x").unwrap(), "http://h/x");
        for address in ["https://h", "h:1", "/x", "", "grpc://h"] {
            assert!(endpoint(address).is_err(), "{address}");
        }
    }
}
