//! Where a daemon of a test lives, how it is started, asked and waited for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use zygote_api::*;
use zygote_daemon::{
    Again, Client, ClientError, Config, Door, Events, LabSettings, LevelFilter, Limits, Machines,
    READY, Starter, Telemetry, TlsFiles, serve,
};
use zygote_engine::{HolderConfig, PoolConfig, QueueLimits, Settings, holder_main};
use zygote_template::{Store, Template};

pub const ZYGOTE_VERB: &str = "--zygote";
pub const SERVE_VERB: &str = "--serve";
pub const HOLDER_VERB: &str = "--holder";
pub const TEMPLATE: &str = "fake";
/// Its guests are the real agent, on this machine.
pub const HERE: &str = "here";
/// Its guests break the rules of live sandboxes.
pub const LIAR: &str = "liar";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a daemon of a test lives.
pub struct Home {
    pub folder: TempDir,
}

impl Home {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        fs::create_dir_all(state.join("templates")).unwrap();
        for template in [TEMPLATE, HERE, LIAR] {
            let generation = format!("{template}-1-1");
            let folder = state.join("generations").join(&generation);
            fs::create_dir_all(folder.join("replica-0")).unwrap();
            fs::write(folder.join("template.json"), description(template, None)).unwrap();
            let link = Path::new("../generations").join(generation);
            std::os::unix::fs::symlink(link, state.join("templates").join(template)).unwrap();
        }
        Self { folder }
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("run/zygote.sock")
    }

    pub fn log(&self) -> PathBuf {
        self.state().join("log/engine.log")
    }

    pub fn starter_with(&self, program: PathBuf, options: &[&str]) -> Starter {
        let mut command = vec![program.into(), SERVE_VERB.into(), self.folder.path().into()];
        command.extend(options.iter().map(Into::into));
        Starter {
            socket: self.socket(),
            state_dir: self.state(),
            place: None,
            command,
            log: self.log(),
        }
    }

    pub fn starter(&self, options: &[&str]) -> Starter {
        self.starter_with(std::env::current_exe().unwrap(), options)
    }

    pub fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}

/// Ends the daemon, whatever has become of the test.
impl Drop for Home {
    fn drop(&mut self) {
        let stopping = async {
            let Ok(client) = Client::connect(&self.socket()).await else {
                return;
            };
            let now = StopRequest {
                now: true,
                if_idle: false,
            };
            let _ = client.stop(now).await;
        };
        // A test may still be in its own runtime.
        std::thread::scope(|scope| {
            scope.spawn(|| runtime().block_on(stopping));
        });
        // The test's own failure is what is to be read.
        if !std::thread::panicking() {
            until("the daemon has gone", || !self.socket().exists());
        }
    }
}

pub fn config(home: &Path, options: &[String]) -> Config {
    let program = std::env::current_exe().unwrap();
    let options: BTreeMap<&str, &str> = options
        .iter()
        .filter_map(|option| option.split_once('='))
        .collect();
    let number = |name: &str| options.get(name).map(|value| value.parse::<u64>().unwrap());
    let command = vec![program.clone().into(), ZYGOTE_VERB.into()];
    let mut engine = Settings::new(command, Store::open(home.join("state")));
    engine.queue = QueueLimits {
        running_max: number("running").unwrap_or(16) as usize,
        waiting_max: number("waiting").unwrap_or(16) as usize,
        wait_max: Duration::from_secs(60),
    };
    engine.patience = number("patience_ms").map_or(engine.patience, Duration::from_millis);
    let live = &mut engine.live;
    live.sandboxes_max = number("live_max").map_or(live.sandboxes_max, |max| max as usize);
    live.start_max = number("start_ms").map_or(live.start_max, Duration::from_millis);
    live.processes_max = number("processes_max").map_or(live.processes_max, |max| max as usize);
    let held = home.join("run/zygote.sock.held");
    engine.holder = Some(HolderConfig {
        command: vec![
            options
                .get("holder")
                .map_or(program.clone(), PathBuf::from)
                .into(),
            HOLDER_VERB.into(),
            held.clone().into(),
            options.get("away_ms").unwrap_or(&"60000").into(),
        ],
        socket: held,
        version: options.get("version").unwrap_or(&"1").to_string(),
    });
    engine.pool = PoolConfig {
        idle_min: 1,
        idle_max: 2,
        ..PoolConfig::default()
    };
    Config {
        socket: home.join("run/zygote.sock"),
        listen: options
            .get("listen")
            .map(|address| address.parse().unwrap()),
        door: door(&options),
        lab_port: false,
        idle_exit: number("idle_ms").map(Duration::from_millis),
        place: PlaceKind::Kvm,
        machines: Machines::Here,
        engine,
        builder: vec!["false".into()],
        lab: LabSettings {
            memory_mib: 512,
            command: vec![],
        },
        log: Some(home.join("state/log/engine.log")),
        telemetry: Telemetry {
            level: options
                .get("log_level")
                .map_or(LevelFilter::INFO, |level| level.parse().unwrap()),
            is_json: options.contains_key("log_json"),
            otlp: options.get("otlp").map(ToString::to_string),
        },
    }
}

/// What a template says of itself, and whose it is.
pub fn description(name: &str, tenant: Option<&str>) -> String {
    let described = Template {
        name: name.to_owned(),
        tenant: tenant.map(str::to_owned),
        replicas: 1,
        ..serde_json::from_str(
            r#"{"name":"","created_unix_s":0,"memory_bytes":268435456,"vcpus":1,"replicas":1,"kernel_release":"",
                "interpreter":"","base":"","packages":[],"digest":"","disk_bytes":0}"#,
        )
        .unwrap()
    };
    serde_json::to_string(&described).unwrap()
}

/// Limits come from a file, so that they can change.
fn door(options: &BTreeMap<&str, &str>) -> Door {
    let file = options.get("limits").map(PathBuf::from);
    let read = move || match &file {
        Some(path) => Ok(serde_json::from_str(&fs::read_to_string(path)?)?),
        None => Ok(Limits::default()),
    };
    let tls = options.get("tls").map(Path::new).map(|folder| TlsFiles {
        certificate: folder.join("cert.pem"),
        key: folder.join("key.pem"),
    });
    let keys = options.get("keys").map(|word| word.parse().unwrap());
    Door {
        keys: keys.unwrap_or_default(),
        limits: read().unwrap(),
        tls,
        audit: options.get("audit").map(PathBuf::from),
        proxy: None,
        cors: options
            .get("cors")
            .map(|origin| origin.parse().unwrap())
            .into_iter()
            .collect(),
        again: Again(Arc::new(read)),
    }
}

/// Holds sandboxes: the words are a path and a number of milliseconds.
pub fn holder(words: &[String]) -> ExitCode {
    let away = Duration::from_millis(words[1].parse().unwrap());
    ExitCode::from(holder_main(Path::new(&words[0]), away))
}

/// A daemon in the background, as the command line's.
pub fn daemon(words: &[String]) -> ExitCode {
    let word = |word: &str| {
        println!("{word}");
        let null = fs::File::options().write(true).open("/dev/null").unwrap();
        rustix::stdio::dup2_stdout(&null).unwrap();
    };
    let served = serve(config(Path::new(&words[0]), &words[1..]), |ready| {
        if let Some(address) = ready.address {
            fs::write(Path::new(&words[0]).join("address"), address.to_string()).unwrap();
        }
        word(READY);
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.to_string().contains("already") => {
            word(READY);
            ExitCode::SUCCESS
        }
        Err(error) => {
            let failure = Failure::new(ErrorCode::Internal, format!("{error:#}"));
            word(&serde_json::to_string(&failure).unwrap());
            ExitCode::FAILURE
        }
    }
}

pub fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub async fn until_status(client: &Client, what: &str, condition: impl Fn(&Status) -> bool) {
    let begun = Instant::now();
    loop {
        let status = client.status().await.unwrap();
        if condition(&status) {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "not in time: {what}: {status:?}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn command(words: &[&str]) -> ExecRequest {
    ExecRequest {
        template: TEMPLATE.to_owned(),
        command: Some(words.iter().map(|word| Octets::from(*word)).collect()),
        ..ExecRequest::default()
    }
}

pub fn silent(sentence: &str) {
    panic!("nothing was to be said: {sentence}");
}

pub async fn started(home: &Home, options: &[&str]) -> Client {
    let starter = home.starter(options);
    starter.client(&mut silent).await.unwrap()
}

/// Output and result of a run.
pub async fn end(events: &mut Events<ExecEvent>) -> Result<(Vec<u8>, ExecResult), ClientError> {
    let mut output = Vec::new();
    while let Some(event) = events.next().await? {
        match event {
            ExecEvent::Stdout { data } => output.extend(data.0),
            ExecEvent::Result(result) => return Ok((output, *result)),
            ExecEvent::Error { error } => return Err(ClientError::Refused(Box::new(error))),
            _ => {}
        }
    }
    panic!("no result");
}

pub async fn echo(client: &Client, word: &str) {
    let mut events = client.exec(&command(&["echo", word]), None).await.unwrap();
    let (output, result) = end(&mut events).await.unwrap();
    assert_eq!((&output[..], result.exit_code), (word.as_bytes(), 3));
}

/// Waits for the first output; gives back the sandbox's id.
pub async fn first_output(events: &mut Events<ExecEvent>) -> String {
    let mut ready = String::new();
    loop {
        match events.next().await.unwrap().unwrap() {
            ExecEvent::Ready { id } => ready = id,
            ExecEvent::Stdout { .. } => return ready,
            _ => {}
        }
    }
}

/// What HTTP/1.1 gives for these bytes, as curl(1) would send them: status and body.
pub fn raw(stream: &mut (impl Read + Write), request: &str) -> (u16, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("x-request-id: "), "{head}");
    (status, format!("{head}\n{body}"))
}

pub fn post(path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}content-length: \
         {length}\r\n\r\n{body}"
    )
}
