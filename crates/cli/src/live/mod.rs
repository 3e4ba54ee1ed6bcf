//! The verbs for sandboxes that live. Each is a call or two of the API; none knows more than that.

mod archive;
mod branch;
mod control;
mod cp;
mod create;
mod diff;
mod exec;
mod list;
mod logs;
mod moments;
mod pause;
mod python;
mod streams;
mod terminal;
mod top;
mod tree;

pub use branch::branch;
pub use control::{kill, rm, wait};
pub use cp::cp;
pub use create::create;
pub use diff::diff;
pub use exec::{attach, exec};
pub use list::{inspect, ps};
pub use logs::{events, logs};
pub use moments::{moments, rollback, snapshot};
pub use pause::{pause, resume};
pub use python::python;
pub use top::{stats, top};
pub use tree::tree;

use crate::args::Global;
use crate::{engine, host};
use anyhow::Context;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::timeout;
use zygote_api::{ErrorCode, Failure, SandboxInfo};
use zygote_daemon::{Client, default_socket};

/// How long a shell that completes waits for the engine.
const COMPLETE_MAX: Duration = Duration::from_millis(500);
/// What of an id is shown: its end, which is random. Its beginning is the time.
const SHOWN_CHARACTERS: usize = 12;

/// The engine that is there; sandboxes are nowhere else.
async fn engine_there(global: &Global) -> anyhow::Result<Option<Client>> {
    let store = host::store(global)?;
    engine::there(global, &store).await
}

/// The same, for a verb that names a sandbox.
async fn engine_with(global: &Global, sandbox: &str) -> anyhow::Result<Client> {
    let there = engine_there(global).await?;
    there.ok_or_else(|| {
        let message = format!("there is no sandbox {sandbox}: no engine runs");
        let failure = Failure::new(ErrorCode::SandboxNotFound, message);
        failure.remedy("make one: zygote create").into()
    })
}

/// Runs a verb to its end.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = engine::runtime()?;
    let ended = runtime.block_on(work);
    // A thread may still wait for standard input that nobody wants any more.
    runtime.shutdown_background();
    ended
}

/// All that live, or are known.
async fn all(client: &Client, state: Option<&str>) -> anyhow::Result<Vec<SandboxInfo>> {
    let mut all = Vec::new();
    let mut after = None;
    loop {
        let page = client.sandboxes(state, after.as_deref()).await?;
        all.extend(page.sandboxes);
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(all),
        }
    }
}

/// Names and ids of those that live, for a shell that completes.
pub fn known() -> Vec<String> {
    let asking = async {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let state = variable("ZYGOTE_STATE_DIR");
        let state = state.map_or_else(zygote_template::default_state_dir, Into::into);
        let socket = variable("ZYGOTE_SOCKET");
        let socket = socket.map_or_else(|| default_socket(&state), Into::into);
        let client = Client::connect(Path::new(&socket)).await?;
        let list = timeout(COMPLETE_MAX, all(&client, None)).await;
        list.context("late")?
    };
    let listed = engine::runtime().and_then(|runtime| runtime.block_on(asking));
    let words = listed.unwrap_or_default().into_iter();
    words
        .map(|info| info.name.unwrap_or_else(|| short(&info.id)))
        .collect()
}

/// As much of an id as is shown.
fn short(id: &str) -> String {
    id[id.len().saturating_sub(SHOWN_CHARACTERS)..].to_owned()
}

/// How people call it.
fn called(info: &SandboxInfo) -> String {
    info.name.clone().unwrap_or_else(|| short(&info.id))
}

fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// A time in the unit that fits.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A command as a line, shortened.
fn line(command: &[zygote_api::Octets]) -> String {
    const MOST: usize = 60;
    let words = command.iter().map(|word| {
        let word = String::from_utf8_lossy(&word.0);
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        if !word.is_empty() && word.chars().all(is_plain) {
            word.into_owned()
        } else {
            format!("{word:?}")
        }
    });
    let text = words.collect::<Vec<_>>().join(" ");
    if text.chars().count() <= MOST {
        return text;
    }
    let cut: String = text.chars().take(MOST - 1).collect();
    format!("{cut}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_in_a_line_that_harms_no_terminal() {
        let words = |words: &[&str]| -> Vec<zygote_api::Octets> {
            words.iter().map(|word| (*word).into()).collect()
        };
        assert_eq!(line(&words(&["ls", "-l", "a b"])), r#"ls -l "a b""#);
        assert!(!line(&words(&["\u{1b}[2J"])).contains('\u{1b}'));
        assert_eq!(line(&words(&[&"x".repeat(100)])).chars().count(), 60);
        assert_eq!(
            short("019ac2b0-1111-7222-8333-0123456789ab"),
            "0123456789ab"
        );
    }
}
