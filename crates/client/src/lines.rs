//! An answer's body, line by line.

use crate::error::ClientError;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use zygote_api::LineSplitter;

pub struct Lines {
    body: Incoming,
    splitter: LineSplitter,
}

impl Lines {
    pub fn new(body: Incoming) -> Self {
        Self {
            body,
            splitter: LineSplitter::default(),
        }
    }

    /// The next line; waits for as long as the engine is alive, which the connection sees to.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(line) = self.splitter.next_line() {
                let value = serde_json::from_slice(line);
                return value.map(Some).map_err(ClientError::nonsense);
            }
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            // Trailers are nothing to us.
            if let Ok(data) = frame.map_err(ClientError::broken)?.into_data() {
                let pushed = self.splitter.push(&data);
                pushed.map_err(|_| ClientError::Nonsense("a line without end".to_owned()))?;
            }
        }
    }
}
