//! Answers: objects, and failures in the one shape that they all have.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use uuid::Uuid;
use zygote_api::{ErrorBody, ErrorCode, Failure};

/// Names a request, in answers and logs.
pub const REQUEST_ID: &str = "x-request-id";

/// A request's name.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

impl RequestId {
    pub fn draw() -> Self {
        Self(Uuid::now_v7().to_string())
    }
}

/// The sandbox that an answer tells of as made, for the log of who asked for what.
#[derive(Clone, Debug)]
pub struct Made(pub String);

/// A code's word.
pub fn word(code: ErrorCode) -> String {
    let value = serde_json::to_value(code).ok();
    let word = value.and_then(|value| value.as_str().map(str::to_owned));
    word.unwrap_or_default()
}

/// A failure, without the request's name: a layer puts that in.
#[derive(Clone, Debug)]
pub struct Failed(pub Failure);

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let mut response = StatusCode::OK.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The answer to a failed request.
pub fn failed(failure: Failure, id: &RequestId) -> Response {
    let status = StatusCode::from_u16(failure.code.status());
    let (retry, needs_key) = (
        failure.retry_after_seconds,
        failure.code == ErrorCode::Unauthorized,
    );
    let body = ErrorBody {
        error: failure,
        request_id: id.0.clone(),
    };
    let mut response = json(&body);
    *response.status_mut() = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if needs_key {
        // RFC 6750 §3.
        let scheme = HeaderValue::from_static("Bearer realm=\"zygote\"");
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, scheme);
    }
    if let Some(seconds) = retry {
        let seconds = HeaderValue::from(seconds);
        response.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    response
}

/// An object.
pub fn json(value: &impl Serialize) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            (kind, body).into_response()
        }
        // None of our types does that.
        Err(error) => {
            let failure = Failure::new(ErrorCode::Internal, error.to_string());
            Failed(failure).into_response()
        }
    }
}
