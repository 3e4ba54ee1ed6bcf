//! One connection, HTTP/1.1 or HTTP/2, to its end.

use crate::guard::Origin;
use axum::Router;
use hyper::body::Incoming;
use hyper::{Request, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::ServiceExt;

/// How long a client may take for a request's head.
const HEAD_MAX: Duration = Duration::from_secs(30);
/// What may be on its way in one stream before its reader takes it,
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// and in all of a connection: a slow reader slows nobody but itself.
const CONNECTION_WINDOW_BYTES: u32 = 1 << 30;
/// Streams of a connection.
const STREAMS_MAX: u32 = 4096;

/// Serves a connection until the other side ends it, or `ending` is done and what was under way then
/// has been answered. Dropped, what is under way ends with it.
pub async fn serve<S>(stream: S, router: Router, origin: Origin, ending: impl Future<Output = ()>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(origin);
        router.clone().oneshot(request.map(axum::body::Body::new))
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MAX);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection, ending);
    // What breaks a connection off is the client's doing; it knows.
    tokio::select! {
        _ = &mut connection => {}
        () = ending => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}
