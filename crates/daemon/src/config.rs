//! What a daemon is started with.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use zygote_api::PlaceKind;
use zygote_engine::Settings;
use zygote_template::Store;

/// How a daemon works.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub socket: PathBuf,
    /// Where else: a loopback address.
    pub listen: Option<SocketAddr>,
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
}
