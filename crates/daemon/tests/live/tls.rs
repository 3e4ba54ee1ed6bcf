//! TLS over TCP.

use super::*;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Writes a fresh certificate and its key; gives back the certificate.
fn certificate(folder: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

/// The answer to a question for its health, over TLS, to somebody who trusts one certificate.
async fn health(address: &str, trusted: &CertificateDer<'static>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await?;
    let request = "GET /v1/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    // Some end without a word of TLS's.
    let _ = stream.read_to_string(&mut answer).await;
    Ok(answer)
}

pub fn tls_is_spoken_and_a_new_certificate_is_taken_at_a_signal() {
    let home = Home::new();
    let folder = home.folder.path().to_owned();
    let first = certificate(&folder);
    let option = format!("tls={}", folder.display());
    runtime().block_on(async {
        let client = started(&home, &["listen=127.0.0.1:0", &option]).await;
        let address = fs::read_to_string(folder.join("address")).unwrap();
        let answer = health(&address, &first).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // Who speaks something else is no client, and harms nobody.
        let mut plain = tokio::net::TcpStream::connect(&address).await.unwrap();
        plain
            .write_all(b"GET /v1/health HTTP/1.1\r\n\r\n")
            .await
            .unwrap();
        let mut said = Vec::new();
        let _ = plain.read_to_end(&mut said).await;
        assert!(!said.starts_with(b"HTTP"), "{said:?}");
        let second = certificate(&folder);
        let pid = client.health().await.unwrap().pid;
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        until("it is read again", || home.said().contains("SIGHUP"));
        assert!(health(&address, &second).await.is_ok());
        assert!(health(&address, &first).await.is_err());
        // One that makes no sense changes nothing.
        fs::write(folder.join("cert.pem"), "nonsense").unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        until("it is told", || home.said().contains("stayed as it was"));
        assert!(health(&address, &second).await.is_ok());
    });
}
