//! What stands in a path, read as the type that it should have: another one is told as all failures are.

use crate::answer::Failed;
use axum::extract::FromRequestParts;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::PathRejection;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use zygote_api::Failure;

/// As axum's.
pub struct Path<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        let read = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        let axum::extract::Path(value) = read.map_err(|error| refused(&error))?;
        Ok(Self(value))
    }
}

fn refused(error: &PathRejection) -> Failed {
    let cause = match error {
        PathRejection::FailedToDeserializePathParams(error) => match error.kind() {
            ErrorKind::ParseErrorAtIndex { value, .. } | ErrorKind::ParseError { value, .. } => {
                format!("{value:?} is no number that there could be")
            }
            other => other.to_string(),
        },
        other => other.body_text(),
    };
    let failure = Failure::bad_request("the path is not what it should be");
    Failed(failure.cause(cause))
}
