//! The API's description as a page to look through and to try things from: Swagger UI, all of it from this program,
//! so that it works without a network.

use crate::answer::Failed;
use crate::path::Path;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Redirect, Response};
use std::sync::{Arc, LazyLock};
use utoipa_swagger_ui::Config;
use zygote_api::{ErrorCode, Failure};

/// Where the description is.
const DESCRIPTION: &str = "/v1/openapi.json";
/// Nothing of the page comes from elsewhere, nor goes there. It has styles in itself.
const POLICY: &str = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; \
                      frame-ancestors 'none'";

static CONFIG: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| {
    let config = Config::from(DESCRIPTION);
    Arc::new(config.persist_authorization(false).validator_url("none"))
});

/// `GET /docs`: its links are relative to a folder.
pub async fn folder() -> Redirect {
    Redirect::permanent("/docs/")
}

/// `GET /docs/`.
pub async fn index() -> Response {
    file("index.html")
}

/// `GET /docs/{name}`.
pub async fn part(Path(name): Path<String>) -> Response {
    file(&name)
}

fn file(name: &str) -> Response {
    match utoipa_swagger_ui::serve(name, Arc::clone(&CONFIG)) {
        Ok(Some(file)) => {
            let kind = HeaderValue::from_str(&file.content_type);
            let kind = kind.unwrap_or(HeaderValue::from_static("application/octet-stream"));
            let headers = [
                (header::CONTENT_TYPE, kind),
                (
                    header::CONTENT_SECURITY_POLICY,
                    HeaderValue::from_static(POLICY),
                ),
                (
                    header::X_CONTENT_TYPE_OPTIONS,
                    HeaderValue::from_static("nosniff"),
                ),
            ];
            (headers, file.bytes.into_owned()).into_response()
        }
        Ok(None) => {
            let message = format!("there is nothing at /docs/{name}");
            Failed(Failure::new(ErrorCode::NotFound, message)).into_response()
        }
        Err(error) => Failed(Failure::internal(error.to_string())).into_response(),
    }
}
