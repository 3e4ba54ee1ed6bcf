//! The daemon's life: it listens, serves whoever may come, and ends when it is told to, or when nobody
//! has wanted anything for a while.

use crate::activated::{Given, given};
use crate::config::{Config, Machines};
use crate::door::Doorway;
use crate::host::{Ending, Host};
use crate::keeper::GREETING;
use crate::port::Port;
use crate::socket::{self, Bound};
use crate::telemetry::{Traces, traced};
use anyhow::Context;
use axum::Router;
use rustix::process::geteuid;
use sd_notify::NotifyState;
use std::future::pending;
use std::io::IsTerminal;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use zygote_engine::live::Adopted;
use zygote_server::{Origin, router, serve as serve_connection};

/// How often it is looked whether anybody still wants something.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long answers may take to reach their clients once nothing runs any more.
const ANSWERS_MAX: Duration = Duration::from_secs(5);
/// How long what runs may go on after SIGTERM; a service manager waits 90 s before it kills.
const TERMINATE_MAX: Duration = Duration::from_secs(60);
/// After how long to listen again when the process has no descriptor left for one more client.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Where it can be asked.
#[derive(Debug)]
pub struct Ready {
    /// The socket.
    pub socket: PathBuf,
    /// The address of TCP, if it was wanted.
    pub address: Option<SocketAddr>,
    /// Whether TLS is spoken there.
    pub is_tls: bool,
    /// What its owner should know of who may come.
    pub warning: Option<String>,
}

/// Serves until its end. `ready` is called once clients can come.
///
/// # Errors
/// `SocketError::Taken` among them, if there is an engine already.
pub fn serve(mut config: Config, ready: impl FnOnce(&Ready)) -> anyhow::Result<()> {
    if let Some(path) = &config.log {
        crate::log::is_file(path.clone());
    }
    let Given { unix, tcp } = given()?;
    let (bound, listener) = match unix {
        Some(listener) => {
            config.socket = path_of(&listener)?;
            (socket::take_over(&config.socket)?, listener)
        }
        None => socket::bind(&config.socket)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(async {
        let traces = Traces::begin(&config.telemetry)?;
        let served = run(config, &bound, (listener, tcp), ready).await;
        traces.end().await;
        served
    });
    // A thread may still look at a large file.
    runtime.shutdown_background();
    drop(bound);
    served
}

/// Where a service manager listens.
fn path_of(listener: &StdUnixListener) -> anyhow::Result<PathBuf> {
    let address = listener.local_addr().context("cannot listen")?;
    let path = address.as_pathname().map(Path::to_owned);
    path.context("the service manager's socket has no path; name one with ListenStream=")
}

async fn run(
    config: Config,
    bound: &Bound,
    (listener, tcp): (StdUnixListener, Option<StdTcpListener>),
    ready: impl FnOnce(&Ready),
) -> anyhow::Result<()> {
    let host = Host::new(config);
    adopt(&host).await;
    let listener = UnixListener::from_std(listener).context("cannot listen")?;
    let door = Arc::new(Doorway::open(&host.config, tcp).await?);
    let address = door.address();
    ready(&Ready {
        socket: host.config.socket.clone(),
        address,
        is_tls: door.tls.is_some(),
        warning: door.warning(),
    });
    // Of a service manager, if one has started it (sd_notify(3)).
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    tracing::info!(
        "engine {} is ready at {} (process {}, machines run in: {})",
        env!("CARGO_PKG_VERSION"),
        host.config.socket.display(),
        std::process::id(),
        host.config.place.name(),
    );
    if let Some(warning) = door.warning() {
        tracing::warn!("{warning}");
    }
    if host.config.machines == Machines::InLab {
        host.keeper.start();
    }
    let router = router(Arc::clone(&host), Arc::clone(&door.access));
    let mut clients = Clients::new(door.open_to_pages(traced(router)));
    if host.config.lab_port {
        clients.add_port().await?;
    }
    let mut endings = host.ending.subscribe();
    tokio::select! {
        () = accept(&listener, &door, &mut clients) => {}
        () = host.local.engine().sweep() => {}
        () = idle(&host) => {}
        () = reload(&door) => {}
        why = signalled() => {
            tracing::info!("{why}: it ends");
            host.end(Ending::Drain);
            tokio::spawn(hurry(Arc::clone(&host)));
        }
        _ = endings.wait_for(|ending| *ending != Ending::Not) => {}
    }
    host.end(Ending::Drain);
    bound.unlink();
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    drop((listener, door));
    drain(&host, clients).await;
    host.local.engine().shut_down().await;
    host.keeper.end(true).await;
    tracing::info!("ended");
    Ok(())
}

/// Before anybody asks: what a killed engine has left lives on.
async fn adopt(host: &Host) {
    match host.local.engine().adopt().await {
        Ok(adopted) => {
            let Adopted { sandboxes, ended } = adopted;
            if sandboxes + ended > 0 {
                tracing::info!(
                    "goes on with {sandboxes} live sandboxes that another engine has left ({ended} have ended)"
                );
            }
        }
        Err(error) => {
            tracing::warn!("cannot go on with what another engine may have left: {error}")
        }
    }
    let asleep = host.find_asleep();
    if asleep > 0 {
        tracing::info!("{asleep} sandboxes are paused");
    }
}

/// Reads again what can change under a running engine, whenever it is told to.
async fn reload(door: &Doorway) {
    let hangup = signal(SignalKind::hangup()).ok();
    // Of a terminal that is closed it means the end.
    let Some(mut hangup) = hangup.filter(|_| !std::io::stdin().is_terminal()) else {
        return pending().await;
    };
    while hangup.recv().await.is_some() {
        let monotonic = NotifyState::monotonic_usec_now();
        let reloading = monotonic.map(|now| [NotifyState::Reloading, now]);
        let _ = reloading.map(|states| sd_notify::notify(&states));
        match door.reload() {
            Ok(()) => tracing::info!("SIGHUP: limits of keys, and the certificate, are read again"),
            Err(error) => tracing::warn!("SIGHUP: all stayed as it was: {error:#}"),
        }
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }
}

async fn drain(host: &Host, clients: Clients) {
    let mut endings = host.ending.subscribe();
    let count = host.activity.count();
    if count > 0 {
        tracing::info!("waiting for {count} runs or builds to end");
    }
    let is_drained = tokio::select! {
        () = host.activity.ended() => true,
        _ = endings.wait_for(|ending| *ending == Ending::Now) => false,
    };
    // Who is attached to one is told that it has ended.
    host.local.engine().live().end_all().await;
    clients.end(is_drained).await;
}

/// A second signal, or too long a wait, kills what runs.
async fn hurry(host: Arc<Host>) {
    let _ = timeout(TERMINATE_MAX, signalled()).await;
    host.end(Ending::Now);
}

async fn signalled() -> &'static str {
    let caught = |kind| signal(kind).ok();
    let mut terminate = caught(SignalKind::terminate());
    let mut interrupt = caught(SignalKind::interrupt());
    // See `reload`.
    let hangup = caught(SignalKind::hangup());
    let mut hangup = hangup.filter(|_| std::io::stdin().is_terminal());
    async fn next(signal: &mut Option<tokio::signal::unix::Signal>) {
        match signal {
            Some(signal) => drop(signal.recv().await),
            None => pending().await,
        }
    }
    tokio::select! {
        () = next(&mut terminate) => "SIGTERM",
        () = next(&mut interrupt) => "SIGINT",
        () = next(&mut hangup) => "SIGHUP",
    }
}

/// Until nobody has wanted anything for as long as is configured.
async fn idle(host: &Host) {
    let Some(limit) = host.config.idle_exit else {
        return pending().await;
    };
    loop {
        sleep(LOOK_EVERY.min(limit)).await;
        let is_idle = host.activity.idle_for().is_some_and(|idle| idle >= limit);
        if is_idle && host.live_count().await == 0 {
            tracing::info!("nothing to do for {} s: it ends", limit.as_secs());
            return;
        }
    }
}

async fn accept(listener: &UnixListener, door: &Arc<Doorway>, clients: &mut Clients) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted.map(|(stream, _)| clients.add_unix(stream)),
            accepted = door.accept() => accepted.map(|(stream, peer)| clients.add_tcp(stream, peer, door)),
            _ = clients.tasks.join_next(), if !clients.tasks.is_empty() => Ok(()),
        };
        if let Err(error) = accepted {
            tracing::warn!("cannot take one more client: {error}");
            sleep(ACCEPT_AGAIN).await;
        }
    }
}

/// Connections, each a task.
struct Clients {
    router: Router,
    tasks: JoinSet<()>,
    ending: watch::Sender<bool>,
}

impl Clients {
    fn new(router: Router) -> Self {
        Self {
            router,
            tasks: JoinSet::new(),
            ending: watch::Sender::new(false),
        }
    }

    fn add<S>(&mut self, stream: S, origin: Origin)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut ending = self.ending.subscribe();
        let ended = async move { drop(ending.wait_for(|ending| *ending).await) };
        let serving = serve_connection(stream, self.router.clone(), origin, ended);
        self.tasks.spawn(serving);
    }

    fn add_tcp(&mut self, stream: TcpStream, peer: SocketAddr, door: &Arc<Doorway>) {
        let Some(place) = door.place() else {
            // Nobody is told: what would be said takes a place.
            tracing::warn!("closed a connection of {peer}: there are too many");
            return;
        };
        // Small answers wait for nothing.
        let _ = stream.set_nodelay(true);
        let (router, door) = (self.router.clone(), Arc::clone(door));
        let mut ending = self.ending.subscribe();
        self.tasks.spawn(async move {
            let _place = place;
            let ended = async move { drop(ending.wait_for(|ending| *ending).await) };
            let origin = door.origin(peer);
            match &door.tls {
                None => serve_connection(stream, router, origin, ended).await,
                // Who does not shake hands is no client.
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve_connection(stream, router, origin, ended).await;
                    }
                }
            }
        });
    }

    /// The socket's mode keeps others out; so does this, should somebody have changed that.
    fn add_unix(&mut self, stream: UnixStream) {
        let own = geteuid().as_raw();
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == own || peer.uid() == 0 => self.add(stream, Origin::Owner),
            Ok(peer) => tracing::warn!("refused a client of user {}", peer.uid()),
            Err(error) => tracing::warn!("refused a client of nobody knows whom: {error}"),
        }
    }

    /// The port of the kept lab in which this process runs.
    async fn add_port(&mut self) -> anyhow::Result<()> {
        let port = zygote_lab::port().context("this is no kept lab")?;
        let mut port = Port::new(port.into()).context("cannot use the lab's port")?;
        port.write_all(GREETING).await.context("cannot greet")?;
        self.add(port, Origin::Owner);
        Ok(())
    }

    /// Lets answers out, if what they tell of has ended, and ends the connections.
    async fn end(mut self, is_drained: bool) {
        self.ending.send_replace(true);
        if is_drained {
            let ended = async { while self.tasks.join_next().await.is_some() {} };
            let _ = timeout(ANSWERS_MAX, ended).await;
        }
        self.tasks.shutdown().await;
    }
}
