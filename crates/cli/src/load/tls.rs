//! TLS to an engine, by rustls, with the certificates that this machine trusts.

use crate::failure::usage;
use anyhow::anyhow;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use zygote_api::{ErrorCode, Failure};

/// What connections are made with.
pub fn connector() -> anyhow::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    // What is no certificate among them is left out; the handshake tells when that matters.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| anyhow!("cannot use TLS: {error}"))?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Shakes hands with the host of `HOST:PORT`.
pub async fn shake_hands(
    connector: &TlsConnector,
    address: &str,
    stream: TcpStream,
) -> anyhow::Result<TlsStream<TcpStream>> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
    let name = name.map_err(|_| usage(format!("--url: {host} is no name of a host")))?;
    let shaken = connector.connect(name, stream).await;
    shaken.map_err(|error| {
        let message = format!("no TLS with {address}");
        let failure = Failure::new(ErrorCode::EngineUnreachable, message).cause(error.to_string());
        let remedy = "have its certificate trusted: SSL_CERT_FILE=cert.pem zygote bench --url …";
        failure.remedy(remedy).into()
    })
}
