//! What a daemon is started with.

use crate::telemetry::Telemetry;
use axum::http::HeaderValue;
use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use zygote_access::{KeyFile, KeysWanted, Limits};
use zygote_api::PlaceKind;
use zygote_engine::Settings;
use zygote_template::Store;

/// How a daemon works.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub socket: PathBuf,
    /// Where else, over TCP.
    pub listen: Option<SocketAddr>,
    /// Who may come by there.
    pub door: Door,
    /// Whether it also serves the port of a kept lab in which it runs.
    pub lab_port: bool,
    /// It ends by itself after so long without work; `None`: it stays.
    pub idle_exit: Option<Duration>,
    /// Where machines run, in the answers' word.
    pub place: PlaceKind,
    /// Where machines run.
    pub machines: Machines,
    /// The engine's settings.
    pub engine: Settings,
    /// Program and arguments that end in [`crate::build_main`]; the mode is added.
    pub builder: Vec<OsString>,
    /// The emulated host, if it is needed.
    pub lab: LabSettings,
    /// Where its log is, in the background.
    pub log: Option<PathBuf>,
    /// What is told there, and to collectors.
    pub telemetry: Telemetry,
}

/// Who may come over TCP, and how.
#[derive(Clone, Debug)]
pub struct Door {
    /// Where a key must be shown.
    pub keys: KeysWanted,
    /// What keys that say nothing of it may have.
    pub limits: Limits,
    /// The files of a certificate; `None`: without TLS.
    pub tls: Option<TlsFiles>,
    /// Where it is written down who asks for what; `None`: nowhere.
    pub audit: Option<PathBuf>,
    /// A proxy whose word for where a request comes from is believed there.
    pub proxy: Option<IpAddr>,
    /// Sites whose pages may ask, such as `https://app.example`; with a key.
    pub cors: Vec<HeaderValue>,
    /// What the limits are now, when a signal asks for them to be read again.
    pub again: Again,
}

/// Reads limits once more.
#[derive(Clone)]
pub struct Again(pub Arc<dyn Fn() -> anyhow::Result<Limits> + Send + Sync>);

impl fmt::Debug for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Again")
    }
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, then those that vouch for it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Nobody without a key from outside, and no limits.
impl Default for Door {
    fn default() -> Self {
        Self {
            keys: KeysWanted::default(),
            limits: Limits::default(),
            tls: None,
            audit: None,
            proxy: None,
            cors: Vec::new(),
            again: Again(Arc::new(|| Ok(Limits::default()))),
        }
    }
}

/// Where machines run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machines {
    /// In this process's host, which may itself be a lab.
    Here,
    /// In a lab that the daemon keeps.
    InLab,
}

/// The emulated host.
#[derive(Clone, Debug)]
pub struct LabSettings {
    /// All the memory that it can ever take, in MiB.
    pub memory_mib: u32,
    /// Program and arguments of the engine in there.
    pub command: Vec<OsString>,
}

impl Config {
    /// Where templates are.
    pub fn store(&self) -> &Store {
        &self.engine.store
    }

    /// Where its keys are.
    pub fn keys(&self) -> KeyFile {
        keys(self.store())
    }
}

/// Where the keys of an engine are that has a store.
pub fn keys(store: &Store) -> KeyFile {
    KeyFile::at(store.state_dir().join("keys.json"))
}
