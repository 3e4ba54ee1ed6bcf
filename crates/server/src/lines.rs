//! A request's body: one object, or a line each; and its query.

use axum::body::Body;
use axum::extract::Query;
use axum::http::Uri;
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, LengthLimitError};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::error::Error;
use std::time::Duration;
use tokio::time::timeout;
use zygote_api::{ErrorCode, Failure, LINE_MAX_BYTES, LineSplitter};

/// How long a client may take for the next piece of its first object.
const PIECE_MAX: Duration = Duration::from_secs(60);

/// Up to here a number of 64 bits is whole, and no other (RFC 7493 §2.2).
const WHOLE_MAX: f64 = 9_007_199_254_740_991.0;

/// Lines of a body.
pub struct Lines {
    body: Body,
    splitter: LineSplitter,
    is_over: bool,
}

impl Lines {
    pub fn new(body: Body) -> Self {
        Self {
            body,
            splitter: LineSplitter::default(),
            is_over: false,
        }
    }

    /// The next line that is not empty; `None` at the end of the body. Waits for as long as the
    /// client takes.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        loop {
            if let Some(line) = self.splitter.next_line() {
                return parse(line).map(Some);
            }
            if self.splitter.is_too_long() {
                return Err(too_large());
            }
            if self.is_over {
                let rest = self.splitter.rest();
                return rest.map(|rest| parse(&rest)).transpose();
            }
            match piece(&mut self.body).await? {
                Some(piece) => self.splitter.push(&piece).map_err(|_| too_large())?,
                None => self.is_over = true,
            }
        }
    }

    /// The first line, which is not waited for without end.
    pub async fn first<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        let first = timeout(PIECE_MAX, self.next()).await.map_err(|_| late())?;
        first?
            .ok_or_else(|| Failure::bad_request("the body is empty: it must begin with an object"))
    }
}

/// A query's fields; an unknown one, or a wrong value, is told.
pub fn query<T: DeserializeOwned>(uri: &Uri) -> Result<T, Failure> {
    let parsed = Query::<T>::try_from_uri(uri);
    parsed.map(|Query(asked)| asked).map_err(|error| {
        Failure::bad_request("the query is not what it should be").cause(error.body_text())
    })
}

/// The whole body as one object; none is one without fields, where all may be left out.
pub async fn object<T: DeserializeOwned>(mut body: Body) -> Result<T, Failure> {
    let mut all = BytesMut::new();
    while let Some(piece) = timeout(PIECE_MAX, piece(&mut body))
        .await
        .map_err(|_| late())??
    {
        if all.len() + piece.len() > LINE_MAX_BYTES {
            return Err(too_large());
        }
        all.extend_from_slice(&piece);
    }
    if all.trim_ascii().is_empty() {
        let message = "the body is empty: it must be an object";
        return parse(b"{}").map_err(|_| Failure::bad_request(message));
    }
    parse(&all)
}

/// A body's bytes, in pieces as they come. Waits for as long as the client takes.
pub struct Pieces(Body);

impl Pieces {
    pub fn new(body: Body) -> Self {
        Self(body)
    }

    /// The next piece; `None` at the end. An error if the client has broken off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        piece(&mut self.0).await
    }
}

async fn piece(body: &mut Body) -> Result<Option<Bytes>, Failure> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Ok(frame)) => {
                // Trailers are nothing to us.
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(error)) if is_limit(&error) => {
                let message = "the body has more bytes than this key may send with a request";
                return Err(Failure::new(ErrorCode::TooLarge, message));
            }
            Some(Err(error)) => {
                let failure = Failure::bad_request("the body has broken off");
                return Err(failure.cause(error.to_string()));
            }
        }
    }
}

fn is_limit(error: &axum::Error) -> bool {
    let mut causes = std::iter::successors(error.source(), |error| (*error).source());
    causes.any(|cause| cause.is::<LengthLimitError>())
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, Failure> {
    // A list of its fields would be read as one.
    if text.trim_ascii_start().first() != Some(&b'{') {
        return Err(Failure::bad_request("the body is no object (JSON)"));
    }
    serde_json::from_slice(text).or_else(|error| {
        with_whole_numbers(text).ok_or_else(|| {
            let failure = Failure::bad_request("the body is not what it should be");
            failure.cause(error.to_string())
        })
    })
}

/// As JSON has it, 32.0 is a whole number like 32 (RFC 8259 §6; JSON Schema 2020-12 §4.2.3), and some clients write
/// nothing else.
fn with_whole_numbers<T: DeserializeOwned>(text: &[u8]) -> Option<T> {
    let mut value = serde_json::from_slice(text).ok()?;
    make_whole(&mut value).then(|| serde_json::from_value(value).ok())?
}

/// Whether there were some that were written otherwise.
fn make_whole(value: &mut Value) -> bool {
    // In all of them, and not until the first.
    match value {
        Value::Array(parts) => parts
            .iter_mut()
            .fold(false, |some, part| make_whole(part) | some),
        Value::Object(parts) => parts
            .values_mut()
            .fold(false, |some, part| make_whole(part) | some),
        Value::Number(number) if number.is_f64() => {
            let whole = number
                .as_f64()
                .filter(|number| number.fract() == 0.0 && (0.0..=WHOLE_MAX).contains(number));
            if let Some(whole) = whole {
                *value = Value::from(whole as u64);
            }
            whole.is_some()
        }
        _ => false,
    }
}

fn late() -> Failure {
    Failure::bad_request(format!(
        "nothing of the body has come for {} s",
        PIECE_MAX.as_secs()
    ))
}

fn too_large() -> Failure {
    let failure = Failure::new(
        ErrorCode::TooLarge,
        format!("an object may have {} MiB at most", LINE_MAX_BYTES >> 20),
    );
    failure.remedy("send files and standard input in pieces, as lines after the request")
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;

    fn body(pieces: &[&'static str]) -> Body {
        let pieces: Vec<Result<&'static str, std::io::Error>> =
            pieces.iter().copied().map(Ok).collect();
        Body::from_stream(stream::iter(pieces))
    }

    #[tokio::test]
    async fn lines_may_come_in_any_pieces() {
        let mut lines = Lines::new(body(&["{\"a\"", ":1}\n\n{", "}\r\n{\"b\":3", "", "4}"]));
        let mut seen = Vec::new();
        while let Some(value) = lines.next::<Value>().await.unwrap() {
            seen.push(value.to_string());
        }
        assert_eq!(seen, [r#"{"a":1}"#, "{}", r#"{"b":34}"#]);
        let error = Lines::new(body(&[])).first::<Value>().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
    }

    #[test]
    fn a_whole_number_may_be_written_with_a_point() {
        #[derive(serde::Deserialize)]
        struct Asked {
            numbers: Vec<u8>,
            seconds: f64,
        }
        let read = |numbers: &str, seconds: &str| {
            let text = format!(r#"{{"numbers": [{numbers}], "seconds": {seconds}}}"#);
            let asked: Asked = parse(text.as_bytes()).ok()?;
            Some((asked.numbers, asked.seconds))
        };
        assert_eq!(read("32.0, 7, 2.5e2", "2.0"), Some((vec![32, 7, 250], 2.0)));
        assert_eq!(read("3.0", "0.5"), Some((vec![3], 0.5)));
        for bad in ["32.5", "256.0", "-1.0", "1e300", "\"1\""] {
            assert_eq!(read(bad, "1"), None, "{bad}");
        }
        // Nor are its fields without their names one.
        assert!(parse::<Asked>(b"[[1], 2]").is_err() && parse::<Asked>(b"7").is_err());
    }

    #[tokio::test]
    async fn an_object_at_the_limit_is_read_and_a_longer_one_refused() {
        for (length, is_good) in [(LINE_MAX_BYTES, true), (LINE_MAX_BYTES + 1, false)] {
            let text = "{}".to_owned() + &" ".repeat(length - 2);
            let read = object::<Value>(Body::from(text.clone())).await;
            assert_eq!(read.is_ok(), is_good, "{length}");
            let line = Lines::new(Body::from(text)).first::<Value>().await;
            assert_eq!(line.is_ok(), is_good, "{length}");
        }
        let error = object::<Value>(Body::from("{")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
    }
}
