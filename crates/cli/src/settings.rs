//! From the command line and a file to what an engine is started with.

use crate::args::{Global, Settings, parse_duration, parse_size};
use crate::host::{self, Place};
use anyhow::{Context, anyhow};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use zygote_api::{ErrorCode, Failure, PlaceKind};
use zygote_daemon::{
    Again, Config, Door, HeaderValue, KeysWanted, LabSettings, LevelFilter, Limits, Machines,
    Telemetry, TlsFiles,
};
use zygote_engine::{HolderConfig, PATIENCE_EMULATED, Settings as EngineSettings, holder_main};
use zygote_template::Store;

/// Hidden verb by which this program becomes a zygote process.
pub const ZYGOTE_VERB: &str = "zygote-process";
/// Hidden verb by which this program builds a template for an engine.
pub const BUILD_VERB: &str = "build-process";
/// Hidden verb by which this program holds live sandboxes while there is no engine.
pub const HOLDER_VERB: &str = "holder-process";
/// How long that is, unless it is said otherwise.
const ADOPT_WITHIN: Duration = Duration::from_secs(3600);
/// Runs wait longer for each other where each takes a hundred times longer.
const WAIT_MAX_EMULATED: Duration = Duration::from_secs(300);

/// Where the engine listens that the user means.
pub fn socket(global: &Global, store: &Store) -> anyhow::Result<PathBuf> {
    match global.socket() {
        Some(path) => std::path::absolute(path).context("cannot resolve the socket's path"),
        None => Ok(zygote_daemon::default_socket(store.state_dir())),
    }
}

/// Most output that a guest keeps of each process.
const OUTPUT_KEPT_MAX: u64 = 4 << 20;

/// The log of an engine in the background.
pub fn log(store: &Store) -> PathBuf {
    store.state_dir().join("log/engine.log")
}

/// Reads a file of settings.
pub fn read(path: &Path) -> anyhow::Result<Settings> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    toml::from_str(&text).map_err(|error| {
        anyhow!(
            "{} is no configuration: {}; see: zygote serve --help",
            path.display(),
            error.to_string().trim_end()
        )
    })
}

impl Settings {
    /// These, and for what they do not say the others.
    pub fn over(self, other: Self) -> Self {
        Self {
            listen: self.listen.or(other.listen),
            keys: self.keys.or(other.keys),
            tls_cert: self.tls_cert.or(other.tls_cert),
            tls_key: self.tls_key.or(other.tls_key),
            audit: self.audit.or(other.audit),
            proxy: self.proxy.or(other.proxy),
            cors: self.cors.or(other.cors),
            key_rate: self.key_rate.or(other.key_rate),
            key_runs_max: self.key_runs_max.or(other.key_runs_max),
            key_sandboxes_max: self.key_sandboxes_max.or(other.key_sandboxes_max),
            key_timeout_max: self.key_timeout_max.or(other.key_timeout_max),
            key_batch_max: self.key_batch_max.or(other.key_batch_max),
            key_memory_max: self.key_memory_max.or(other.key_memory_max),
            key_cpus_max: self.key_cpus_max.or(other.key_cpus_max),
            key_output_max: self.key_output_max.or(other.key_output_max),
            key_upload_max: self.key_upload_max.or(other.key_upload_max),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
            otlp: self.otlp.or(other.otlp),
            idle_exit: self.idle_exit.or(other.idle_exit),
            runs_max: self.runs_max.or(other.runs_max),
            waiting_max: self.waiting_max.or(other.waiting_max),
            wait_max: self.wait_max.or(other.wait_max),
            memory_max: self.memory_max.or(other.memory_max),
            pool_min: self.pool_min.or(other.pool_min),
            pool_max: self.pool_max.or(other.pool_max),
            pool_memory: self.pool_memory.or(other.pool_memory),
            drain_after: self.drain_after.or(other.drain_after),
            unload_after: self.unload_after.or(other.unload_after),
            sandboxes_max: self.sandboxes_max.or(other.sandboxes_max),
            processes_max: self.processes_max.or(other.processes_max),
            streams_max: self.streams_max.or(other.streams_max),
            files_max: self.files_max.or(other.files_max),
            output_kept: self.output_kept.or(other.output_kept),
            adopt_within: self.adopt_within.or(other.adopt_within),
            lab_memory: self.lab_memory.or(other.lab_memory),
        }
    }

    /// As options, for the engine in a lab: all that is about sandboxes, and how it tells of them.
    fn words(&self) -> Vec<OsString> {
        let number = |n: &Option<usize>| n.map(|n| n.to_string());
        let options = [
            ("--runs-max", number(&self.runs_max)),
            ("--waiting-max", number(&self.waiting_max)),
            ("--wait-max", self.wait_max.clone()),
            ("--memory-max", self.memory_max.clone()),
            ("--pool-min", number(&self.pool_min)),
            ("--pool-max", number(&self.pool_max)),
            ("--pool-memory", self.pool_memory.clone()),
            ("--drain-after", self.drain_after.clone()),
            ("--unload-after", self.unload_after.clone()),
            ("--sandboxes-max", number(&self.sandboxes_max)),
            ("--processes-max", number(&self.processes_max)),
            ("--streams-max", number(&self.streams_max)),
            ("--files-max", number(&self.files_max)),
            ("--output-kept", self.output_kept.clone()),
            ("--adopt-within", self.adopt_within.clone()),
            // What it says is in the same log.
            ("--log-level", self.log_level.clone()),
            ("--log-format", self.log_format.clone()),
        ];
        let given = options.into_iter().filter_map(|(name, value)| {
            let value = value?;
            Some([OsString::from(name), OsString::from(value)])
        });
        given.flatten().collect()
    }
}

/// Settings, in a command line of their own.
#[derive(clap::Parser)]
#[command(no_binary_name = true)]
struct Words {
    #[command(flatten)]
    settings: Settings,
}

/// Settings of the environment: the option --runs-max is the variable ZYGOTE_RUNS_MAX. One that is empty says
/// nothing.
pub fn of_environment() -> anyhow::Result<Settings> {
    let command = <Words as clap::CommandFactory>::command();
    let mut words = Vec::new();
    for option in command.get_arguments().filter_map(clap::Arg::get_long) {
        let variable = format!("ZYGOTE_{}", option.to_uppercase().replace('-', "_"));
        if let Some(value) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
            let mut word = OsString::from(format!("--{option}="));
            word.push(value);
            words.push(word);
        }
    }
    let parsed = <Words as clap::Parser>::try_parse_from(words);
    parsed.map(|words| words.settings).map_err(|error| {
        let text = error.to_string();
        let text = text.lines().next().unwrap_or_default();
        let text = text.strip_prefix("error: ").unwrap_or(text);
        let failure = Failure::new(ErrorCode::Usage, format!("in the environment: {text}"));
        failure
            .remedy("the variable of an option is its name in capitals behind ZYGOTE_")
            .into()
    })
}

/// In TOML: what is set, and what could be, as comments.
pub fn print(settings: &Settings) -> anyhow::Result<String> {
    let set = toml::Table::try_from(settings).context("cannot write the settings")?;
    let command = <Words as clap::CommandFactory>::command();
    let mut text = String::new();
    for argument in command.get_arguments() {
        let Some(option) = argument.get_long() else {
            continue;
        };
        let name = option.replace('-', "_");
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        text.push_str(&format!("# {}\n", help.replace('\n', " ")));
        match set.get(&name) {
            Some(value) => text.push_str(&format!("{name} = {value}\n\n")),
            None => text.push_str(&format!("# {name} =\n\n")),
        }
    }
    Ok(text)
}

/// What keys may have that say nothing of it.
fn limits(settings: &Settings) -> anyhow::Result<Limits> {
    let timeout = time("key_timeout_max", settings.key_timeout_max.as_ref())?;
    Ok(Limits {
        rate: settings.key_rate.filter(|rate| *rate > 0),
        runs: settings.key_runs_max,
        sandboxes: settings.key_sandboxes_max,
        timeout_s: timeout
            .filter(|time| !time.is_zero())
            .map(|time| time.as_secs_f64()),
        batch: settings.key_batch_max,
        memory_bytes: size("key_memory_max", settings.key_memory_max.as_ref())?,
        cpus: settings.key_cpus_max,
        output_bytes: size("key_output_max", settings.key_output_max.as_ref())?,
        upload_bytes: size("key_upload_max", settings.key_upload_max.as_ref())?,
    })
}

/// What is told of itself, and where.
fn telemetry(settings: &Settings) -> anyhow::Result<Telemetry> {
    let level = settings.log_level.as_deref().map(str::parse::<LevelFilter>);
    let level = level
        .transpose()
        .map_err(|_| anyhow!("log_level: write error, warn, info, debug, trace or off"))?;
    let is_json = match settings.log_format.as_deref() {
        None | Some("text") => false,
        Some("json") => true,
        Some(_) => return Err(anyhow!("log_format: write text or json")),
    };
    Ok(Telemetry {
        level: level.unwrap_or(LevelFilter::INFO),
        is_json,
        otlp: settings.otlp.clone().or_else(collector),
    })
}

/// As all programs are told of it that send traces
/// (https://opentelemetry.io/docs/specs/otel/protocol/exporter/#endpoint-urls-for-otlphttp).
fn collector() -> Option<String> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let all = || {
        let base = variable("OTEL_EXPORTER_OTLP_ENDPOINT")?;
        Some(format!("{}/v1/traces", base.trim_end_matches('/')))
    };
    variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(all)
}

/// Sites, each a scheme and a host (RFC 6454 §6.1).
fn origins(words: &str) -> anyhow::Result<Vec<HeaderValue>> {
    let words = words
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty());
    let origin = |word: &str| {
        let host = word
            .strip_prefix("https://")
            .or(word.strip_prefix("http://"));
        let is_good = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '*']));
        let value = HeaderValue::from_str(word).ok().filter(|_| is_good);
        value.ok_or_else(|| anyhow!("cors: {word:?} is no site; write it as https://app.example"))
    };
    words.map(origin).collect()
}

/// Who may come over TCP. `file` is read again when limits are.
pub fn door(
    store: &Store,
    settings: &Settings,
    given: Settings,
    file: Option<PathBuf>,
) -> anyhow::Result<Door> {
    let keys = settings.keys.as_deref().map(str::parse::<KeysWanted>);
    let keys = keys.transpose().map_err(|why| anyhow!("keys: {why}"))?;
    let tls = match (settings.tls_cert.clone(), settings.tls_key.clone()) {
        (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
        (None, None) => None,
        _ => return Err(anyhow!("tls_cert and tls_key go together")),
    };
    Ok(Door {
        keys: keys.unwrap_or_default(),
        limits: limits(settings)?,
        tls,
        audit: match &settings.audit {
            Some(path) if path.as_os_str() == "none" => None,
            Some(path) => Some(std::path::absolute(path).context("audit: no such path")?),
            None => {
                let listens = settings.listen.is_some() || std::env::var_os("LISTEN_FDS").is_some();
                listens.then(|| store.state_dir().join("log/audit.jsonl"))
            }
        },
        proxy: settings.proxy,
        cors: origins(settings.cors.as_deref().unwrap_or_default())?,
        again: Again(Arc::new(move || {
            let settings = match &file {
                Some(path) => given.clone().over(read(path)?),
                None => given.clone(),
            };
            limits(&settings)
        })),
    })
}

fn time(name: &str, text: Option<&String>) -> anyhow::Result<Option<Duration>> {
    let parse = |text: &String| {
        let parsed = parse_duration(text).map_err(|why| anyhow!("{name} = {text:?}: {why}"))?;
        Ok(parsed.0.unwrap_or_default())
    };
    text.map(parse).transpose()
}

fn size(name: &str, text: Option<&String>) -> anyhow::Result<Option<u64>> {
    let parse = |text: &String| parse_size(text).map_err(|why| anyhow!("{name} = {text:?}: {why}"));
    text.map(parse).transpose()
}

/// All that an engine needs to know.
pub fn config(
    global: &Global,
    store: &Store,
    place: Place,
    settings: &Settings,
) -> anyhow::Result<Config> {
    let program: PathBuf = std::env::current_exe().context("cannot find this program")?;
    let command = |verb: &str| vec![OsString::from(&program), OsString::from(verb)];
    let mut engine = EngineSettings::new(command(ZYGOTE_VERB), store.clone());
    if host::in_lab() {
        engine.patience = PATIENCE_EMULATED;
        engine.queue.wait_max = WAIT_MAX_EMULATED;
    }
    apply(&mut engine, settings)?;
    let socket = socket(global, store)?;
    let within = time("adopt_within", settings.adopt_within.as_ref())?.unwrap_or(ADOPT_WITHIN);
    engine.holder = (!within.is_zero()).then(|| holder(&program, &socket, within));
    let mut inner = command("serve");
    inner.push("--lab-port".into());
    inner.extend(settings.words());
    let memory = size("lab_memory", settings.lab_memory.as_ref())?;
    let memory_mib = memory.map(|bytes| u32::try_from(bytes >> 20)).transpose();
    Ok(Config {
        socket,
        listen: settings.listen,
        door: Door::default(),
        lab_port: false,
        idle_exit: time("idle_exit", settings.idle_exit.as_ref())?.filter(|time| !time.is_zero()),
        place: if place == Place::Lab || host::in_lab() {
            PlaceKind::Lab
        } else {
            PlaceKind::Kvm
        },
        machines: match place {
            Place::Here => Machines::Here,
            Place::Lab => Machines::InLab,
        },
        engine,
        builder: command(BUILD_VERB),
        lab: LabSettings {
            memory_mib: memory_mib
                .map_err(|_| anyhow!("lab_memory: too much"))?
                .unwrap_or(host::LAB_MEMORY_MIB),
            command: inner,
        },
        log: None,
        telemetry: telemetry(settings)?,
    })
}

fn holder(program: &Path, socket: &Path, within: Duration) -> HolderConfig {
    let path = held(socket).into_os_string();
    let seconds = within.as_secs().max(1).to_string();
    let words = [
        program.as_os_str(),
        HOLDER_VERB.as_ref(),
        &path,
        seconds.as_ref(),
    ];
    HolderConfig {
        command: words.map(ToOwned::to_owned).to_vec(),
        socket: path.into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// Where the holder of an engine's sandboxes listens; there for as long as it holds some.
pub fn held(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".held");
    path.into()
}

/// What the hidden verb does: its words are the socket's path and a number of seconds.
pub fn hold(words: &[OsString]) -> u8 {
    let [path, seconds] = words else { return 2 };
    let seconds = seconds.to_str().and_then(|text| text.parse().ok());
    seconds.map_or(2, |seconds| {
        holder_main(path.as_ref(), Duration::from_secs(seconds))
    })
}

fn apply(engine: &mut EngineSettings, settings: &Settings) -> anyhow::Result<()> {
    let set = |place: &mut usize, value: Option<usize>| *place = value.unwrap_or(*place);
    let set_time = |place: &mut Duration, value: Option<Duration>| {
        *place = value.unwrap_or(*place);
    };
    set(&mut engine.queue.running_max, settings.runs_max);
    engine.queue.running_max = engine.queue.running_max.max(1);
    set(&mut engine.queue.waiting_max, settings.waiting_max);
    set_time(
        &mut engine.queue.wait_max,
        time("wait_max", settings.wait_max.as_ref())?,
    );
    let memory = size("memory_max", settings.memory_max.as_ref())?;
    engine.budget.memory_max_bytes = memory.unwrap_or(engine.budget.memory_max_bytes);
    set(&mut engine.pool.idle_min, settings.pool_min);
    set(&mut engine.pool.idle_max, settings.pool_max);
    engine.pool.idle_max = engine.pool.idle_max.max(engine.pool.idle_min);
    let memory = size("pool_memory", settings.pool_memory.as_ref())?;
    engine.pool.memory_max_kib = memory.map_or(engine.pool.memory_max_kib, |bytes| bytes >> 10);
    set_time(
        &mut engine.pool.drain_after,
        time("drain_after", settings.drain_after.as_ref())?,
    );
    set_time(
        &mut engine.unload_after,
        time("unload_after", settings.unload_after.as_ref())?,
    );
    let live = &mut engine.live;
    set(&mut live.sandboxes_max, settings.sandboxes_max);
    set(&mut live.processes_max, settings.processes_max);
    set(&mut live.readers_max, settings.streams_max);
    set(&mut live.files_max, settings.files_max);
    let kept = size("output_kept", settings.output_kept.as_ref())?;
    if kept.is_some_and(|kept| !(4096..=OUTPUT_KEPT_MAX).contains(&kept)) {
        return Err(anyhow!(
            "output_kept: from 4K to 4M; it is memory of the guest"
        ));
    }
    live.ring_bytes = kept.map_or(live.ring_bytes, |kept| kept as u32);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_win_over_the_file_and_a_wrong_word_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("zygote.toml");
        std::fs::write(&path, "idle_exit = \"1h\"\nruns_max = 3\n").unwrap();
        let given = Settings {
            runs_max: Some(7),
            ..Settings::default()
        };
        let both = given.over(read(&path).unwrap());
        assert_eq!(
            (both.runs_max, both.idle_exit.as_deref()),
            (Some(7), Some("1h"))
        );
        assert_eq!(both.words(), ["--runs-max", "7"]);
        std::fs::write(&path, "run_max = 3\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("run_max"));
        let bad = "soon".to_owned();
        let error = time("idle_exit", Some(&bad)).unwrap_err();
        assert!(error.to_string().contains("idle_exit"));
    }
}
