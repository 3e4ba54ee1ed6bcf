//! `GET /v1/events`: what has happened to sandboxes, and what happens.

use super::words::event;
use crate::answer::json;
use crate::stream::{EVENTS_MAX, Form, answer_at_once};
use axum::response::Response;
use serde::Deserialize;
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_access::Caller;
use zygote_api::{Failure, SandboxEvent, SandboxEvents};
use zygote_engine::Engine;
use zygote_engine::live::Entry;

/// Most events of an answer that is one object.
const PAGE_MAX: usize = 1000;
/// Events that are taken at once.
const BATCH: usize = 100;

/// What is asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Asked {
    /// Events behind this number.
    after: u64,
    /// Whether to wait for more.
    follow: bool,
    /// Only of this sandbox: its id.
    sandbox: Option<String>,
}

/// The answer.
pub async fn events(
    engine: Arc<Engine>,
    caller: Caller,
    asked: Asked,
    form: Form,
) -> Result<Response, Failure> {
    let is_its = move |entry: &Entry| caller.owns(entry.tenant.as_deref());
    let is_wanted = move |event: &SandboxEvent| {
        let wanted = asked.sandbox.as_ref();
        wanted.is_none_or(|words| event.sandbox == *words || event.name.as_ref() == Some(words))
    };
    let journal = Arc::clone(&engine.live().journal);
    if form == Form::Json {
        // Those of others are no part of a page.
        let entries = journal.after(asked.after, usize::MAX).into_iter();
        let events = entries.filter(is_its).map(event).filter(is_wanted);
        let events = events.take(PAGE_MAX).collect();
        return Ok(json(&SandboxEvents { events }));
    }
    let (sender, happening) = mpsc::channel(EVENTS_MAX);
    let work = Box::pin(async move {
        let mut after = asked.after;
        loop {
            let batch = journal.after(after, BATCH);
            if batch.is_empty() && !asked.follow {
                return Ok(None);
            }
            for entry in batch {
                after = entry.number;
                if !is_its(&entry) {
                    continue;
                }
                let event = event(entry);
                if is_wanted(&event) {
                    // Who does not listen any more drops this.
                    let _ = sender.send(Told::Event(event)).await;
                }
            }
            if asked.follow {
                // For as long as the client listens.
                journal.wait(after).await;
            }
        }
    });
    Ok(answer_at_once(form, work, happening, |error| Told::Error {
        error,
    }))
}

/// A line of the answer.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Told {
    Event(SandboxEvent),
    Error { error: Failure },
}
