//! The engine that a command asks: the one that stays, or one of its own.

use crate::args::{Global, HostChoice, Settings};
use crate::host::Place;
use crate::out::complain;
use crate::settings;
use anyhow::Context;
use std::ffi::OsString;
use zygote_api::PlaceKind;
use zygote_daemon::{Client, Embedded, Found, Starter, find};
use zygote_template::Store;

/// An engine, asked by way of its client.
pub enum Engine {
    /// The one that stays.
    Shared(Client),
    /// One in this process, which ends with it.
    Own(Box<Embedded>),
}

impl Engine {
    /// The one that stays; it is started if it is not there.
    pub async fn shared(global: &Global, store: &Store) -> anyhow::Result<Self> {
        let starter = starter(global, store)?;
        let mut say = |sentence: &str| complain!("zygote: {sentence}");
        Ok(Self::Shared(starter.client(&mut say).await?))
    }

    /// One of our own, on this host. Needs a runtime.
    pub async fn own(global: &Global, store: &Store, own: &Settings) -> anyhow::Result<Self> {
        let config = settings::config(global, store, Place::Here, own)?;
        let embedded = Embedded::start(config).await;
        Ok(Self::Own(Box::new(
            embedded.context("cannot start an engine")?,
        )))
    }

    /// To it.
    pub fn client(&self) -> &Client {
        match self {
            Self::Shared(client) => client,
            Self::Own(embedded) => &embedded.client,
        }
    }

    /// Ends what was asked of it, and waits until our own has gone.
    pub async fn leave(self) {
        if let Self::Own(embedded) = self {
            embedded.shut_down().await;
        }
    }
}

/// The engine that is there. If one was killed whose sandboxes live on, or sandboxes are paused, another is
/// started for them.
pub async fn there(global: &Global, store: &Store) -> anyhow::Result<Option<Client>> {
    let socket = settings::socket(global, store)?;
    Ok(match find(&socket).await? {
        Found::Own(client, _) | Found::Other(client, _) => Some(client),
        Found::Nobody if settings::held(&socket).exists() || store.has_sandboxes() => {
            let mut say = |sentence: &str| complain!("zygote: {sentence}");
            Some(starter(global, store)?.client(&mut say).await?)
        }
        Found::Nobody => None,
    })
}

/// How an engine is found or started.
pub fn starter(global: &Global, store: &Store) -> anyhow::Result<Starter> {
    let socket = settings::socket(global, store)?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command: Vec<OsString> = vec![program.into(), "serve".into(), "--background".into()];
    command.extend([
        "--host".into(),
        global.host.word().into(),
        "--state-dir".into(),
    ]);
    command.push(store.state_dir().into());
    if let Some(shared) = store.shared_dir() {
        command.extend(["--shared-dir".into(), shared.into()]);
    }
    command.extend(["--socket".into(), socket.clone().into()]);
    Ok(Starter {
        socket,
        state_dir: store.state_dir().to_owned(),
        place: match global.host {
            HostChoice::Auto => None,
            HostChoice::Kvm => Some(PlaceKind::Kvm),
            HostChoice::Lab => Some(PlaceKind::Lab),
        },
        command,
        log: settings::log(store),
    })
}

/// A runtime for a command.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}
