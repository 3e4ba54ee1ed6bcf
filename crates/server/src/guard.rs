//! Who may ask. On the Unix socket that is settled before a request is read; over TCP, which any
//! program and any web page of this machine can reach, requests must be meant for us.

use crate::answer::Failed;
use axum::extract::Request;
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use zygote_api::{ErrorCode, Failure, NDJSON};

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A Unix socket or a pipe, by which only its owner comes.
    Owner,
    /// TCP, from this machine.
    Loopback,
}

/// Lets through what may pass.
pub async fn guarded(request: Request, next: Next) -> Response {
    let origin = request.extensions().get::<Origin>().copied();
    if origin == Some(Origin::Owner) {
        return next.run(request).await;
    }
    match refusal(&request) {
        Some(failure) => Failed(failure).into_response(),
        None => next.run(request).await,
    }
}

/// A page in a browser can send requests here, under its own name (DNS rebinding) or as a form: the
/// first has another host, the second another content type.
fn refusal(request: &Request) -> Option<Failure> {
    let value = |name| request.headers().get(name)?.to_str().ok();
    let host = value(header::HOST).or(request.uri().authority().map(|host| host.as_str()));
    if !host.is_some_and(is_loopback) {
        let failure = Failure::new(
            ErrorCode::Forbidden,
            "this request is meant for another host",
        );
        return Some(failure.remedy("address it to 127.0.0.1, [::1] or localhost"));
    }
    // A page may open a WebSocket here, and its browser says whose page it is.
    let origin =
        value(header::ORIGIN).map(|origin| origin.split_once("://").map_or("", |(_, host)| host));
    if origin.is_some_and(|host| !is_loopback(host)) {
        let message = "this request comes from a page of another site";
        return Some(Failure::new(ErrorCode::Forbidden, message));
    }
    let kind = value(header::CONTENT_TYPE).and_then(|kind| kind.split(';').next());
    // None of these can a page send without asking first.
    let kinds = ["application/json", NDJSON, "application/octet-stream"];
    let is_ours = kind.is_some_and(|kind| kinds.contains(&kind.trim()));
    if request.method() == Method::POST && !is_ours {
        let message = "over TCP the content type must be application/json, application/x-ndjson or \
                       application/octet-stream";
        return Some(Failure::bad_request(message));
    }
    None
}

fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "127.0.0.1" | "[::1]" | "localhost")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn request(host: &str, kind: &str) -> Request {
        let builder = Request::builder().method("POST").uri("/v1/exec");
        let builder = builder.header("host", host).header("content-type", kind);
        builder.body(Body::empty()).unwrap()
    }

    #[test]
    fn a_page_in_a_browser_does_not_get_in() {
        let json = "application/json; charset=utf-8";
        for host in ["127.0.0.1:8080", "[::1]:80", "localhost", "[::1]"] {
            assert!(refusal(&request(host, json)).is_none(), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:80",
            "127.0.0.1.evil.example",
            "",
        ] {
            assert!(refusal(&request(host, json)).is_some(), "{host}");
        }
        for (origin, is_good) in [
            ("http://127.0.0.1:8080", true),
            ("https://evil.example", false),
            ("null", false),
        ] {
            let mut request = request("localhost", json);
            let value = origin.parse().unwrap();
            request.headers_mut().insert("origin", value);
            assert_eq!(refusal(&request).is_none(), is_good, "{origin}");
        }
        let form = request("localhost", "application/x-www-form-urlencoded");
        assert!(refusal(&form).is_some());
        assert!(refusal(&request("localhost", "text/plain")).is_some());
    }
}
