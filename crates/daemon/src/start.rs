//! Finding the engine that is there, or starting one.

use crate::program;
use crate::{log, socket};
use anyhow::{Context, bail};
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::time::sleep;
use zygote_api::{ErrorCode, Failure, Health, PlaceKind, StopRequest};
use zygote_client::{Client, ClientError};

/// How long a new engine may take until it listens: it only checks its settings.
const READY_MAX: Duration = Duration::from_secs(60);
/// How long an engine of another version may take to end.
const END_MAX: Duration = Duration::from_secs(60);
/// How often it is looked whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often an engine may end between being found and being asked.
const TRIES_MAX: u32 = 5;

/// How to start one.
#[derive(Debug)]
pub struct Starter {
    /// Where it listens.
    pub socket: PathBuf,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Where machines must run, if that matters.
    pub place: Option<PlaceKind>,
    /// Program and arguments that end in [`crate::serve`].
    pub command: Vec<OsString>,
    /// Its log.
    pub log: PathBuf,
}

/// Who answers, if anybody does.
pub enum Found {
    /// An engine of this program.
    Own(Client, Health),
    /// One of another version.
    Other(Client, Health),
    /// Nobody.
    Nobody,
}

/// Looks for an engine.
///
/// # Errors
/// If what is there is none, or belongs to somebody else.
pub async fn find(path: &Path) -> anyhow::Result<Found> {
    socket::check(path)?;
    let client = match Client::connect(path).await {
        Ok(client) => client,
        Err(ClientError::Connect(error)) => return no_one(path, &error),
        // It ended just now, or is no engine: the one that is started next finds out.
        Err(ClientError::Broken(_)) => return Ok(Found::Nobody),
        Err(error) => return Err(error.into()),
    };
    match client.health().await {
        Ok(health) => {
            let is_own = health.version == env!("CARGO_PKG_VERSION")
                && health.program == program::identity();
            Ok(if is_own {
                Found::Own(client, health)
            } else {
                Found::Other(client, health)
            })
        }
        // It ended just now.
        Err(ClientError::Broken(_)) => Ok(Found::Nobody),
        Err(error) => Err(error.into()),
    }
}

fn no_one(path: &Path, error: &io::Error) -> anyhow::Result<Found> {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(Found::Nobody),
        io::ErrorKind::PermissionDenied => bail!(
            "the engine at {} belongs to another user; name a socket of your own with --socket, or \
             run without an engine that stays: --no-daemon",
            path.display()
        ),
        _ => bail!("cannot connect to {}: {error}", path.display()),
    }
}

impl Starter {
    /// The engine that is there, or a new one. `say` gets a sentence if one of another version is
    /// replaced.
    ///
    /// # Errors
    /// If there is none of this version and none can be started, with the remedy.
    pub async fn client(&self, say: &mut dyn FnMut(&str)) -> anyhow::Result<Client> {
        for _ in 0..TRIES_MAX {
            match find(&self.socket).await? {
                Found::Own(client, health) if health.status == "stopping" => {
                    drop(client);
                    self.wait_for_its_end().await?;
                }
                Found::Own(client, health) => {
                    self.check(&health)?;
                    return Ok(client);
                }
                Found::Other(client, health) => self.replace(client, &health, say).await?,
                Found::Nobody => self.start_or_wait().await?,
            }
        }
        bail!(
            "an engine starts at {} and ends at once; see its log: {}",
            self.socket.display(),
            self.log.display()
        )
    }

    /// Whether it is the one that was meant.
    fn check(&self, health: &Health) -> anyhow::Result<()> {
        if Path::new(&health.state_dir) != self.state_dir {
            bail!(
                "the engine at {} has the state directory {}, not {}; leave --socket out, or stop \
                 that engine: zygote stop --socket {}",
                self.socket.display(),
                health.state_dir,
                self.state_dir.display(),
                self.socket.display()
            );
        }
        if let Some(place) = self.place.filter(|place| *place != health.host) {
            bail!(
                "the engine that is there runs machines in: {}; for {} stop it first: zygote stop",
                health.host.name(),
                place.name()
            );
        }
        Ok(())
    }

    async fn replace(
        &self,
        client: Client,
        health: &Health,
        say: &mut dyn FnMut(&str),
    ) -> anyhow::Result<()> {
        let stop = StopRequest {
            now: false,
            if_idle: true,
        };
        match client.stop(stop).await {
            Ok(_) => {}
            Err(ClientError::Refused(failure))
                if failure.code == zygote_api::ErrorCode::Conflict =>
            {
                bail!(
                    "the engine that is there is of another version ({}, this is {}) and has work: \
                     {}; wait for it, stop it with: zygote stop, or go without: --no-daemon",
                    health.version,
                    env!("CARGO_PKG_VERSION"),
                    failure.message
                )
            }
            // It ends of itself.
            Err(ClientError::Broken(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let own = env!("CARGO_PKG_VERSION");
        say(&if health.version == own {
            format!("the engine that was there was another build of {own}; starting one of this")
        } else {
            let other = &health.version;
            format!(
                "the engine that was there was of another version ({other}, this is {own}); starting one of this"
            )
        });
        drop(client);
        self.wait_for_its_end().await
    }

    /// Until nobody is there any more; one that listens again is somebody else.
    async fn wait_for_its_end(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        // Nothing tells of a lock's release but taking it, which is for the new engine to do.
        while socket::is_held(&self.socket) {
            if begun.elapsed() > END_MAX {
                bail!(
                    "the engine that is there is stopping and does not come to its end; see its log: \
                     {}, or: zygote stop --now",
                    self.log.display()
                );
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Nobody listens: one may be starting or ending just now.
    async fn start_or_wait(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while socket::is_held(&self.socket) && begun.elapsed() < END_MAX {
            sleep(LOOK_EVERY).await;
            if self.socket.exists() {
                return Ok(());
            }
        }
        self.start().await
    }

    /// Starts one in the background: no terminal, no folder of ours, nothing of our environment that
    /// it does not need.
    async fn start(&self) -> anyhow::Result<()> {
        let log = log::open(&self.log).map_err(|error| {
            let message = format!("cannot write the engine's log {}", self.log.display());
            Failure::new(ErrorCode::File, message)
                .cause(error.to_string())
                .remedy(
                    "free some space or name another state directory with --state-dir, or go \
                     without an engine that stays: --no-daemon",
                )
        })?;
        let [program, arguments @ ..] = &self.command[..] else {
            bail!("no program to start an engine with");
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(std::env::vars_os().filter(|(key, _)| is_needed(&key.to_string_lossy())))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C is for us. It makes a session of its own as soon as it runs.
            .process_group(0);
        let mut child = command.spawn().context("cannot start an engine")?;
        let Some(mut output) = child.stdout.take() else {
            bail!("the new engine has no output");
        };
        let word = tokio::task::spawn_blocking(move || {
            let mut word = String::new();
            output.read_to_string(&mut word).map(|_| word)
        });
        let word = tokio::time::timeout(READY_MAX, word).await;
        let Ok(word) = word else {
            let _ = child.kill();
            bail!(
                "the new engine did not get ready within {} s; see its log: {}",
                READY_MAX.as_secs(),
                self.log.display()
            );
        };
        let word = word.context("reading panicked")?.unwrap_or_default();
        self.judge(&word)
    }

    /// The new engine's first word: nothing if it listens, or if another one does.
    fn judge(&self, word: &str) -> anyhow::Result<()> {
        match word.lines().next() {
            Some(READY) => Ok(()),
            Some(line) => match serde_json::from_str::<Failure>(line) {
                Ok(failure) => Err(failure.into()),
                Err(_) => bail!("the new engine said: {line}"),
            },
            None => bail!(
                "the new engine has ended at once; see its log: {}",
                self.log.display()
            ),
        }
    }
}

/// What a new engine in the background says on its output when it, or another one, listens.
pub const READY: &str = "ready";

/// Variables that an engine, its builds and its lab use.
fn is_needed(key: &str) -> bool {
    let names = [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "TMPDIR",
        "RUST_BACKTRACE",
        "ZYGOTE_AGENT",
        zygote_lab::IN_LAB,
        crate::BUILDS_LOCK_HINT,
    ];
    let prefixes = ["LC_", "OTEL_", "XDG_"];
    let lower = key.to_ascii_lowercase();
    names.contains(&key)
        || prefixes.iter().any(|prefix| key.starts_with(prefix))
        || lower.ends_with("_proxy")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_inherits_no_secrets() {
        for key in ["PATH", "https_proxy", "NO_PROXY", "ZYGOTE_AGENT", "LC_ALL"] {
            assert!(is_needed(key), "{key}");
        }
        for key in [
            "AWS_SECRET_ACCESS_KEY",
            "GITHUB_TOKEN",
            "ZYGOTE_ALLOW_MISSING_WALLS",
            "SSH_AUTH_SOCK",
            "PS1",
        ] {
            assert!(!is_needed(key), "{key}");
        }
    }
}
