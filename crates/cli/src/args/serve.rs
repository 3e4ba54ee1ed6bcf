//! The words of `zygote serve`.

use clap::Args;
use std::path::PathBuf;

/// The engine's settings, from the command line or a file: what is not given is for the engine to
/// choose.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Listen on TCP too, such as at 127.0.0.1:7070; elsewhere than on loopback clients need a key
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<std::net::SocketAddr>,
    /// Where clients of TCP need a key (see: zygote key): auto (not on loopback), always, or never, if
    /// something in front of the engine knows who asks [default: auto]
    #[arg(long, value_name = "WHERE")]
    pub keys: Option<String>,
    /// A certificate and those that vouch for it, PEM: with TLS over TCP; read again at SIGHUP
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Where it is written down who asks for what, a line of JSON each; none: nowhere
    /// [default: STATE/log/audit.jsonl with --listen, else none]
    #[arg(long, value_name = "FILE")]
    pub audit: Option<PathBuf>,
    /// A proxy whose X-Forwarded-For is believed there
    #[arg(long, value_name = "IP")]
    pub proxy: Option<std::net::IpAddr>,
    /// Sites whose pages may ask from a browser, with a key, such as https://app.example; several with commas
    #[arg(long, value_name = "ORIGINS")]
    pub cors: Option<String>,
    /// Requests a second of a key that has no limit of its own [default: none]; these nine are read again at SIGHUP
    #[arg(long, value_name = "N")]
    pub key_rate: Option<u32>,
    /// Runs of such a key at once [default: as many as of the engine]
    #[arg(long, value_name = "N")]
    pub key_runs_max: Option<u32>,
    /// Sandboxes of its tenant that live at once [default: as many as of the engine]
    #[arg(long, value_name = "N")]
    pub key_sandboxes_max: Option<u32>,
    /// Longest time of its runs, which those get that ask for more [default: none]
    #[arg(long, value_name = "TIME")]
    pub key_timeout_max: Option<String>,
    /// Programs of its batches [default: 1000]
    #[arg(long, value_name = "N")]
    pub key_batch_max: Option<u32>,
    /// Memory that its tenant's machines may have at once, each with all that its template has [default: none]
    #[arg(long, value_name = "SIZE")]
    pub key_memory_max: Option<String>,
    /// Their processors [default: none]
    #[arg(long, value_name = "N")]
    pub key_cpus_max: Option<u32>,
    /// Output of its runs [default: 64M where it is one object, none in streams]
    #[arg(long, value_name = "SIZE")]
    pub key_output_max: Option<String>,
    /// Bytes of its requests [default: none]
    #[arg(long, value_name = "SIZE")]
    pub key_upload_max: Option<String>,
    /// Of what weight lines of the log are written: error, warn, info, debug (each request), trace, off
    /// [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// What they look like: text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Send traces of requests to this OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318
    /// [default: as OTEL_EXPORTER_OTLP_ENDPOINT says, else nowhere]
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
    /// End after so long without work; 0: stay [default: 15m in the background, 0 in the foreground]
    #[arg(long, value_name = "TIME")]
    pub idle_exit: Option<String>,
    /// Runs at once [default: 16 a processor, or one for each 64 MiB of memory if those are fewer]
    #[arg(long, value_name = "N")]
    pub runs_max: Option<usize>,
    /// Runs that wait for one of those to end [default: 1024]
    #[arg(long, value_name = "N")]
    pub waiting_max: Option<usize>,
    /// How long they wait [default: 60s; 300s in a lab]
    #[arg(long, value_name = "TIME")]
    pub wait_max: Option<String>,
    /// Memory that all sandboxes may take, such as 4G [default: nine tenths of what is available]
    #[arg(long, value_name = "SIZE")]
    pub memory_max: Option<String>,
    /// Forks made ahead of each loaded snapshot, always [default: 2]
    #[arg(long, value_name = "N")]
    pub pool_min: Option<usize>,
    /// The same, at most, under load [default: 32]
    #[arg(long, value_name = "N")]
    pub pool_max: Option<usize>,
    /// Memory that forks made ahead may take, of each loaded snapshot [default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub pool_memory: Option<String>,
    /// After so long without a run the forks made ahead go back to --pool-min [default: 60s]
    #[arg(long, value_name = "TIME")]
    pub drain_after: Option<String>,
    /// After so long without a run a template is unloaded [default: 10m]
    #[arg(long, value_name = "TIME")]
    pub unload_after: Option<String>,
    /// Sandboxes that live at once [default: 1000]
    #[arg(long, value_name = "N")]
    pub sandboxes_max: Option<usize>,
    /// Processes of one sandbox that run because somebody asked for them [default: 256]
    #[arg(long, value_name = "N")]
    pub processes_max: Option<usize>,
    /// Streams of one process that are open [default: 32]
    #[arg(long, value_name = "N")]
    pub streams_max: Option<usize>,
    /// Files of one sandbox that are in flight [default: 64]
    #[arg(long, value_name = "N")]
    pub files_max: Option<usize>,
    /// Output that is kept of each process, such as 256K, up to 4M [default: 256K]
    #[arg(long, value_name = "SIZE")]
    pub output_kept: Option<String>,
    /// How long live sandboxes run on when the engine was killed, until another one goes on with them; 0:
    /// not at all [default: 1h]
    #[arg(long, value_name = "TIME")]
    pub adopt_within: Option<String>,
    /// Memory of the lab, all that it can ever take [default: 6G]
    #[arg(long, value_name = "SIZE")]
    pub lab_memory: Option<String>,
}

#[derive(Args)]
pub struct ServeArgs {
    /// Settings in TOML, named as the options are, with _ for -: `idle_exit = "1h"`; options win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Print the settings as they are after options, variables and the file, in TOML, and end
    #[arg(long)]
    pub print_config: bool,
    /// Run although this host does not allow all walls between it and untrusted code; says so
    #[arg(long, env = "ZYGOTE_ALLOW_MISSING_WALLS", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_missing_walls: bool,
    /// No terminal; a word on standard output when it is ready
    #[arg(long, hide = true)]
    pub background: bool,
    /// Serve the port of the kept lab in which it runs
    #[arg(long, hide = true)]
    pub lab_port: bool,
}
