//! `zygote status` and `zygote stop`.

use crate::args::Global;
use crate::engine::Engine;
use crate::out::{complain, say};
use crate::{engine, host, settings};
use anyhow::bail;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zygote_api::{LabStatus, PlaceKind, PoolStatus, Status, StopRequest};
use zygote_daemon::{Client, ClientError, Found, find};
use zygote_template::format_size;

/// Exit code of `status` where there is no engine, as systemctl(1) has it.
const NO_ENGINE: u8 = 3;
/// How often it is looked whether the engine has gone.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a killed engine's end is waited for: a lab ends with it.
const END_MAX: Duration = Duration::from_secs(60);

/// The engine that is there, of whatever version.
async fn found(socket: &Path) -> anyhow::Result<Option<Client>> {
    Ok(match find(socket).await? {
        Found::Own(client, _) | Found::Other(client, _) => Some(client),
        Found::Nobody => None,
    })
}

/// Has it there; gives back the exit code.
pub fn start(global: &Global, as_json: bool) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    let socket = settings::socket(global, &store)?;
    let health = engine::runtime()?.block_on(async {
        let engine = Engine::shared(global, &store).await?;
        anyhow::Ok(engine.client().health().await?)
    })?;
    if as_json {
        say!(
            "{}",
            json!({"socket": socket, "pid": health.pid, "version": health.version})
        );
    } else {
        say!("{}", socket.display());
    }
    Ok(0)
}

/// Shows it; gives back the exit code.
pub fn status(global: &Global, as_json: bool) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    let socket = settings::socket(global, &store)?;
    let status = engine::runtime()?.block_on(async {
        match found(&socket).await? {
            Some(client) => Ok(Some(client.status().await?)),
            None => anyhow::Ok(None),
        }
    })?;
    let Some(status) = status else {
        if as_json {
            let held = settings::held(&socket).exists();
            say!(
                "{}",
                json!({"status": "none", "socket": socket, "sandboxes_held": held})
            );
        } else {
            say!("there is no engine at {}", socket.display());
            if settings::held(&socket).exists() {
                say!(
                    "sandboxes of one that was killed live on; zygote ps has another go on with them"
                );
            }
            say!("one starts by itself when a command needs it; in the foreground: zygote serve");
        }
        return Ok(NO_ENGINE);
    };
    if as_json {
        say!("{}", serde_json::to_string(&status)?);
    } else {
        show(&status);
    }
    Ok(0)
}

fn show(status: &Status) {
    let health = &status.health;
    say!(
        "engine {}, {}, process {}, up for {}",
        health.version,
        if health.status == "ok" {
            "ready"
        } else {
            &health.status
        },
        health.pid,
        time(status.uptime_seconds)
    );
    say!("  socket      {}", status.socket);
    say!("  state       {}", health.state_dir);
    if let Some(log) = &status.log {
        say!("  log         {log}");
    }
    match status.idle_exit_seconds {
        Some(seconds) => say!("  ends        after {} without work", time(seconds)),
        None => say!("  ends        when it is stopped"),
    }
    let runs = &status.runs;
    say!(
        "  runs        {} now (of {}), {} waiting (of {}), {} ended, {} refused, {} given up",
        runs.running,
        runs.running_max,
        runs.waiting,
        runs.waiting_max,
        runs.ended,
        runs.refused,
        runs.cancelled
    );
    if status.sandboxes > 0 {
        say!("  sandboxes   {} live", status.sandboxes);
    }
    if let Some(why) = &status.sandboxes_not_held {
        say!("              they would end with the engine, should it be killed: {why}");
    }
    if health.host == PlaceKind::Kvm {
        say!("  machines    run on this host's KVM");
    }
    if let Some(lab) = &status.lab {
        show_lab(lab, health.host == PlaceKind::Lab);
    }
    for pool in &status.templates {
        show_pool(pool);
    }
}

fn show_lab(lab: &LabStatus, has_machines: bool) {
    let what = if has_machines {
        "machines    run in a lab, an emulated host"
    } else {
        "lab         an emulated host"
    };
    let memory = lab.memory_bytes.map(format_size).unwrap_or_default();
    let most = format_size(lab.memory_max_bytes);
    match (lab.pid, lab.uptime_seconds) {
        (Some(pid), Some(seconds)) => say!(
            "  {what}: up for {}, process {pid}, {memory} of memory (at most {most})",
            time(seconds)
        ),
        _ => say!("  {what}, which is {}", lab.state),
    }
    if let Some(why) = &lab.last_failure {
        say!("              the last one died: {why}");
    }
}

fn show_pool(pool: &PoolStatus) {
    say!(
        "  template    {} (replica {}): {} forks made ahead; {} found one, {} did not, {} made, {} lost",
        pool.template,
        pool.replica,
        pool.idle,
        pool.hits,
        pool.misses,
        pool.refills,
        pool.lost
    );
}

fn time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Stops it, and waits until it has gone; gives back the exit code.
pub fn stop(global: &Global, now: bool, as_json: bool) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    let socket = settings::socket(global, &store)?;
    let stopped = engine::runtime()?.block_on(async {
        match engine::there(global, &store).await? {
            Some(client) => ask_to_stop(client, now).await,
            None => Ok(None),
        }
    })?;
    let Some(pid) = stopped else {
        if as_json {
            say!("{}", json!({"stopped": false, "socket": socket}));
        } else {
            say!("there is no engine at {}", socket.display());
        }
        return Ok(0);
    };
    wait_for_its_end(pid, now.then_some(END_MAX))?;
    if as_json {
        say!("{}", json!({"stopped": true, "pid": pid}));
    } else {
        say!("the engine has stopped");
    }
    Ok(0)
}

async fn ask_to_stop(client: Client, now: bool) -> anyhow::Result<Option<u32>> {
    let request = StopRequest {
        now,
        if_idle: false,
    };
    let stopped = match client.stop(request).await {
        Ok(stopped) => stopped,
        // It has ended just now.
        Err(ClientError::Broken(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if stopped.running > 0 && !now {
        complain!(
            "zygote: waiting for {} runs or builds to end; to kill them: zygote stop --now",
            stopped.running
        );
    }
    Ok(Some(stopped.pid))
}

/// What runs may take as long as it likes, unless it is killed.
fn wait_for_its_end(pid: u32, limit: Option<Duration>) -> anyhow::Result<()> {
    let begun = Instant::now();
    let process = PathBuf::from(format!("/proc/{pid}"));
    while process.exists() && !is_zombie(&process) {
        if limit.is_some_and(|limit| begun.elapsed() > limit) {
            bail!("the engine (process {pid}) does not end; kill it: kill -9 {pid}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Dead, and its parent has not asked yet (proc_pid_stat(5)).
fn is_zombie(process: &Path) -> bool {
    let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.starts_with('Z'));
    state.unwrap_or(true)
}
