//! An engine in the process that asks it: the same API over a pipe, and no socket, no log, nothing that
//! stays.

use crate::config::Config;
use crate::host::{Ending, Host};
use std::sync::Arc;
use tokio::task::JoinHandle;
use zygote_access::Access;
use zygote_client::{Client, ClientError};
use zygote_server::{Origin, router, serve};

/// What may be on its way in the pipe.
const PIPE_BYTES: usize = 256 * 1024;

/// An engine, and a client of it.
pub struct Embedded {
    /// To it.
    pub client: Client,
    host: Arc<Host>,
    serving: JoinHandle<()>,
}

impl Embedded {
    /// Begins. Needs a runtime.
    ///
    /// # Errors
    /// If the two do not understand each other.
    pub async fn start(config: Config) -> Result<Self, ClientError> {
        let host = Host::new(config);
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        let router = router(Arc::clone(&host), Arc::new(Access::of_owner()));
        let never = std::future::pending();
        let serving = tokio::spawn(serve(theirs, router, Origin::Owner, never));
        Ok(Self {
            client: Client::over(ours).await?,
            host,
            serving,
        })
    }

    /// Ends what runs, and waits until all of it is gone.
    pub async fn shut_down(self) {
        self.host.end(Ending::Now);
        drop(self.client);
        self.serving.abort();
        // Aborted, as asked for; what was under way is dropped with it.
        let _ = self.serving.await;
        self.host.activity.ended().await;
        self.host.local.engine().shut_down().await;
        self.host.keeper.end(true).await;
    }
}
