//! Events that become an answer while they happen: what makes them runs while the answer is read, and
//! is dropped with it.

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, stream};
use serde::Serialize;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use tokio::sync::mpsc;
use zygote_api::{Failure, NDJSON, SSE};

/// Events that wait for a slow reader.
pub const EVENTS_MAX: usize = 16;

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One object.
    Json,
    /// An object a line.
    Lines,
    /// Server-sent events.
    Events,
}

impl Form {
    /// What a client accepts (RFC 9110 §12.5.1); the order counts, weights do not.
    pub fn of(accept: Option<&str>) -> Self {
        for kind in accept.unwrap_or_default().split(',') {
            match kind.split(';').next().unwrap_or_default().trim() {
                NDJSON => return Self::Lines,
                SSE => return Self::Events,
                "application/json" | "*/*" => return Self::Json,
                _ => {}
            }
        }
        Self::Json
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Lines => NDJSON,
            Self::Events => SSE,
        }
    }

    fn write(self, value: &impl Serialize) -> Bytes {
        let mut text = Vec::new();
        if self == Self::Events {
            text.extend_from_slice(b"data: ");
        }
        // None of our types fails.
        let _ = serde_json::to_writer(&mut text, value);
        text.extend_from_slice(if self == Self::Events { b"\n\n" } else { b"\n" });
        text.into()
    }
}

/// Work that tells of itself by events, and ends in a last one, or in none.
pub type Work<E> = Pin<Box<dyn Future<Output = Result<Option<E>, Failure>> + Send>>;

/// An answer of the events of `work`, which has the other end of `events`. A failure before the first
/// one is the answer's.
pub async fn answer<E: Serialize + Send + 'static>(
    form: Form,
    work: Work<E>,
    events: mpsc::Receiver<E>,
    error: fn(Failure) -> E,
) -> Result<Response, Failure> {
    let mut running = Running {
        work: Some(work),
        events,
        end: None,
        error,
    };
    let first = match running.next().await {
        Next::Event(event) => Some(event),
        Next::Failure(failure) => return Err(failure),
        Next::End => None,
    };
    let head = stream::iter(first.map(|event| Ok::<_, Infallible>(form.write(&event))));
    let body = futures_util::StreamExt::chain(head, running.stream(form));
    Ok(streamed(form, Body::from_stream(body)))
}

/// The same, but the answer begins before there is an event, of which there may be none for long.
pub fn answer_at_once<E: Serialize + Send + 'static>(
    form: Form,
    work: Work<E>,
    events: mpsc::Receiver<E>,
    error: fn(Failure) -> E,
) -> Response {
    let running = Running {
        work: Some(work),
        events,
        end: None,
        error,
    };
    streamed(form, Body::from_stream(running.stream(form)))
}

fn streamed(form: Form, body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, form.content_type()),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, body).into_response()
}

struct Running<E> {
    work: Option<Work<E>>,
    events: mpsc::Receiver<E>,
    /// What the work has come to, behind the events that it has sent.
    end: Option<Result<Option<E>, Failure>>,
    error: fn(Failure) -> E,
}

enum Next<E> {
    Event(E),
    Failure(Failure),
    End,
}

impl<E: Serialize + Send + 'static> Running<E> {
    async fn next(&mut self) -> Next<E> {
        if let Some(work) = &mut self.work {
            tokio::select! {
                biased;
                Some(event) = self.events.recv() => return Next::Event(event),
                end = work => self.end = Some(end),
            }
            self.work = None;
        }
        if let Ok(event) = self.events.try_recv() {
            return Next::Event(event);
        }
        match self.end.take() {
            Some(Ok(Some(last))) => Next::Event(last),
            Some(Err(failure)) => Next::Failure(failure),
            Some(Ok(None)) | None => Next::End,
        }
    }

    fn stream(self, form: Form) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, move |mut running| async move {
            let event = match running.next().await {
                Next::Event(event) => event,
                Next::Failure(failure) => (running.error)(failure),
                Next::End => return None,
            };
            Some((Ok(form.write(&event)), running))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_kind_that_we_have_is_taken() {
        assert_eq!(Form::of(None), Form::Json);
        assert_eq!(Form::of(Some("text/html, */*;q=0.1")), Form::Json);
        assert_eq!(Form::of(Some("application/x-ndjson")), Form::Lines);
        assert_eq!(
            Form::of(Some("text/event-stream, application/json")),
            Form::Events
        );
    }
}
