//! TLS for those who come over TCP (RFC 8446, RFC 5246), by rustls. The files are read again when that is asked for.

use crate::config::TlsFiles;
use anyhow::{Context, bail};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;

/// How long a client may take to shake hands.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// A certificate, as it is now.
pub struct Tls {
    files: TlsFiles,
    config: Mutex<Arc<ServerConfig>>,
}

impl Tls {
    /// With what is in the files.
    ///
    /// # Errors
    /// If they are no certificate and key that belong together.
    pub fn new(files: TlsFiles) -> anyhow::Result<Self> {
        let config = Mutex::new(Arc::new(load(&files)?));
        Ok(Self { files, config })
    }

    fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the files again; without success all stays as it is.
    ///
    /// # Errors
    /// See [`Tls::new`].
    pub fn reload(&self) -> anyhow::Result<()> {
        let fresh = Arc::new(load(&self.files)?);
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Shakes hands.
    ///
    /// # Errors
    /// If the client does not, or speaks no TLS.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = self.config();
        timeout(HANDSHAKE_MAX, TlsAcceptor::from(config).accept(stream)).await?
    }
}

fn load(files: &TlsFiles) -> anyhow::Result<ServerConfig> {
    let bad = |what: &str, path: &Path| {
        format!("cannot read a {what} in {}: it must be PEM", path.display())
    };
    let certificates = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| bad("certificate", &files.certificate))?;
    if certificates.is_empty() {
        bail!("there is no certificate in {}", files.certificate.display());
    }
    let key =
        PrivateKeyDer::from_pem_file(&files.key).with_context(|| bad("private key", &files.key))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(certificates, key)
        });
    let mut config = config.with_context(|| {
        format!(
            "the certificate in {} does not go with the key in {}",
            files.certificate.display(),
            files.key.display()
        )
    })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
