//! Where clients come in over TCP, and who may.

use crate::config::{Config, Door};
use crate::tls::Tls;
use anyhow::{Context, anyhow, bail};
use axum::Router;
use axum::http::{HeaderName, Method};
use std::future::pending;
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::cors::CorsLayer;
use zygote_access::{Access, Audit};
use zygote_server::Origin;

/// How long a browser need not ask again whether a page may ask.
const PREFLIGHT_MAX: Duration = Duration::from_secs(600);
/// Connections over TCP at once; each takes a descriptor.
const CONNECTIONS_MAX: usize = 10_000;

/// See the module.
pub struct Doorway {
    /// Whom it lets in.
    pub access: Arc<Access>,
    /// What is spoken.
    pub tls: Option<Tls>,
    listener: Option<TcpListener>,
    door: Door,
    places: Arc<Semaphore>,
}

fn audit(path: PathBuf) -> anyhow::Result<Audit> {
    let shown = path.display().to_string();
    let told = shown.clone();
    let opened = Audit::to(path, move |error| {
        tracing::warn!("cannot write {told}: {error}; what is asked for meanwhile is not in it");
    });
    opened.with_context(|| format!("cannot open {shown}; name another file with --audit, or none"))
}

fn no_keys(why: String) -> anyhow::Error {
    anyhow!("{why}; what to do about it is told by: zygote key ls")
}

impl Doorway {
    /// As it is configured, at the listener of a service manager if there is one; nobody comes in if there is no
    /// address.
    ///
    /// # Errors
    /// If it cannot listen there, keys cannot be read, or the certificate is none.
    pub async fn open(config: &Config, given: Option<StdTcpListener>) -> anyhow::Result<Self> {
        let door = config.door.clone();
        let audit = door.audit.clone().map(audit).transpose()?;
        let access = Access::new(config.keys(), door.limits.clone());
        let access = access.with_audit(audit).with_proxy(door.proxy);
        if config.listen.is_some() || given.is_some() {
            access.check().map_err(no_keys)?;
        }
        let listener = match (given, config.listen) {
            (Some(given), None) => Some(TcpListener::from_std(given).context("cannot listen")?),
            (Some(_), Some(address)) => {
                bail!(
                    "the service manager listens at TCP for it, and it is to listen at {address}, too; leave one out"
                )
            }
            (None, Some(address)) => {
                let bound = TcpListener::bind(address).await;
                Some(bound.with_context(|| format!("cannot listen at {address}"))?)
            }
            (None, None) => None,
        };
        Ok(Self {
            access: Arc::new(access),
            tls: door.tls.clone().map(Tls::new).transpose()?,
            listener,
            door,
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        })
    }

    /// Where it is.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.as_ref()?.local_addr().ok()
    }

    fn is_loopback(&self) -> bool {
        self.address()
            .is_none_or(|address| address.ip().is_loopback())
    }

    /// What its owner should know.
    pub fn warning(&self) -> Option<String> {
        let (address, is_loopback) = (self.address()?, self.is_loopback());
        let is_open = !self.door.keys.at(is_loopback);
        let mut words = Vec::new();
        if is_open && !is_loopback {
            words.push(format!(
                "WARNING: no keys are asked for at {address}: whoever reaches it has this engine and all that is in it"
            ));
        }
        if !is_open && self.access.check() == Ok(0) {
            words.push(format!(
                "a key is needed at {address}, and there is none yet; make one: zygote key create"
            ));
        }
        if self.tls.is_none() && !is_loopback {
            words.push(format!(
                "WARNING: there is no TLS at {address}, so keys and all else can be read on the way; \
                 see: zygote serve --tls-cert, --tls-key"
            ));
        }
        (!words.is_empty()).then(|| words.join(". "))
    }

    /// With answers that browsers give to pages of the sites that may ask (https://fetch.spec.whatwg.org/#http-cors-protocol).
    pub fn open_to_pages(&self, router: Router) -> Router {
        if self.door.cors.is_empty() {
            return router;
        }
        let own = ["x-request-id", "retry-after"].map(HeaderName::from_static);
        let sent = ["authorization", "content-type", "idempotency-key", "range"];
        let layer = CorsLayer::new()
            .allow_origin(self.door.cors.clone())
            .allow_methods([
                Method::GET,
                Method::POST,
                Method::PUT,
                Method::PATCH,
                Method::DELETE,
            ])
            .allow_headers(sent.map(HeaderName::from_static))
            .expose_headers(own)
            .max_age(PREFLIGHT_MAX);
        router.layer(layer)
    }

    /// The next client; nobody if it is shut.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        match &self.listener {
            Some(listener) => listener.accept().await,
            None => pending().await,
        }
    }

    /// Room for one more connection.
    pub fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// A client of there.
    pub fn origin(&self, peer: SocketAddr) -> Origin {
        Origin::Tcp {
            peer,
            needs_key: self.door.keys.at(self.is_loopback()),
        }
    }

    /// Reads the limits of keys, and the certificate, again.
    ///
    /// # Errors
    /// If they are not what they should be; then nothing has changed.
    pub fn reload(&self) -> anyhow::Result<()> {
        let limits = self.door.again.0()?;
        if let Some(tls) = &self.tls {
            tls.reload()?;
        }
        self.access.set_defaults(limits);
        self.access.check().map_err(no_keys)?;
        Ok(())
    }
}
