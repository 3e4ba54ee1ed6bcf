//! What the API costs on top of the engine's own call: the same pooled run, of a guest that answers at
//! once (no VM), asked in the process and over HTTP on a Unix socket.
//!
//!     cargo bench -p zygote-daemon
//!
//! One after the other, in turns, so that what else goes on meets all of them; medians of 1000.

#![allow(clippy::unwrap_used, reason = "a bench")]

#[path = "../tests/support/fake.rs"]
mod fake;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use zygote_api::{ExecEvent, ExecRequest, PlaceKind, StopRequest};
use zygote_daemon::{
    Client, Config, Door, KeysWanted, LabSettings, Limits, Machines, NewKey, Ready, Role,
    Telemetry, keys, serve,
};
use zygote_engine::*;
use zygote_template::Store;

const ZYGOTE_VERB: &str = "--zygote";
const SERVE_VERB: &str = "--serve";
const ROUNDS: usize = 1000;
/// Of the template: without one it would be for nobody but its owner.
const DESCRIPTION: &str = r#"{"name":"fake","created_unix_s":0,"memory_bytes":0,"vcpus":1,"replicas":1,
    "kernel_release":"","interpreter":"","base":"","packages":[],"digest":"","disk_bytes":0}"#;
/// Clients of each of two keys at once.
const CLIENTS: usize = 32;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some(ZYGOTE_VERB) => fake::zygote(),
        Some(SERVE_VERB) => {
            let home = Path::new(&words[2]);
            let ready = |ready: &Ready| {
                let address = ready.address.unwrap().to_string();
                let fresh = home.join("address.new");
                fs::write(&fresh, address).unwrap();
                fs::rename(fresh, home.join("address")).unwrap();
            };
            return serve(config(home), ready).unwrap();
        }
        _ => {}
    }
    let home = tempfile::tempdir().unwrap();
    let generation = home.path().join("generations/fake-1-1/replica-0");
    fs::create_dir_all(&generation).unwrap();
    fs::write(generation.with_file_name("template.json"), DESCRIPTION).unwrap();
    fs::create_dir_all(home.path().join("templates")).unwrap();
    let link = home.path().join("templates/fake");
    std::os::unix::fs::symlink("../generations/fake-1-1", link).unwrap();
    // A process of its own, as in life.
    let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
        .arg(SERVE_VERB)
        .arg(home.path())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder
        .enable_all()
        .build()
        .unwrap()
        .block_on(measure(home.path()));
    daemon.wait().unwrap();
}

fn config(home: &Path) -> Config {
    Config {
        door: Door {
            keys: KeysWanted::Always,
            ..Door::default()
        },
        socket: home.join("zygote.sock"),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        lab_port: false,
        idle_exit: None,
        place: PlaceKind::Kvm,
        machines: Machines::Here,
        engine: settings(home),
        builder: vec![],
        lab: LabSettings {
            memory_mib: 512,
            command: vec![],
        },
        log: None,
        telemetry: Telemetry::default(),
    }
}

fn settings(home: &Path) -> Settings {
    let command = vec![std::env::current_exe().unwrap().into(), ZYGOTE_VERB.into()];
    let mut settings = Settings::new(command, Store::open(home.to_owned()));
    settings.pool.idle_min = 4;
    // Fewer than its clients, so that they wait for each other.
    settings.queue.running_max = 8;
    settings
}

async fn measure(home: &Path) {
    let engine = Engine::new(settings(home));
    let address = loop {
        match fs::read_to_string(home.join("address")) {
            Ok(address) => break address,
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    };
    let client = Client::connect(&home.join("zygote.sock")).await.unwrap();
    let mut plain = UnixStream::connect(home.join("zygote.sock")).unwrap();
    let key = key(home, "acme");
    let mut keyed = TcpStream::connect(&address).unwrap();
    keyed.set_nodelay(true).unwrap();
    let mut times: [Vec<Duration>; 5] = Default::default();
    // The first loads.
    own_call(&engine).await;
    over(&client).await;
    for _ in 0..ROUNDS {
        while engine.status().await[0].pool.idle < 4 {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        times[0].push(own_call(&engine).await);
        for (way, times) in times[1..].iter_mut().enumerate() {
            while client.status().await.unwrap().templates[0].idle < 4 {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            times.push(match way {
                0 => over_plain(&mut plain, ""),
                1 => over_plain(&mut keyed, &key),
                2 => over(&client).await,
                _ => {
                    let begun = Instant::now();
                    let client = Client::connect(&home.join("zygote.sock")).await.unwrap();
                    over(&client).await;
                    begun.elapsed()
                }
            });
        }
    }
    let hits = client.status().await.unwrap().templates[0].hits;
    assert!(hits as usize >= 4 * ROUNDS, "not all were pooled: {hits}");
    let names = [
        "the engine's own call",
        "HTTP/1.1, one object, connection kept",
        "the same over TCP, with a key",
        "HTTP/2, events, connection kept",
        "HTTP/2, events, connection made for it",
    ];
    for (name, mut times) in names.into_iter().zip(times) {
        times.sort_unstable();
        let at = |share: f64| times[(times.len() as f64 * share) as usize].as_micros();
        println!("{name:<40} p50 {:>5} us   p90 {:>5} us", at(0.5), at(0.9));
    }
    fair(home, &address);
    let request = StopRequest {
        now: true,
        if_idle: false,
    };
    client.stop(request).await.unwrap();
    engine.shut_down().await;
}

async fn own_call(engine: &Arc<Engine>) -> Duration {
    let begun = Instant::now();
    let (sender, mut events) = mpsc::channel(16);
    let (_signals, taken) = mpsc::channel(1);
    let order = Order {
        tenant: None,
        whose: String::new(),
        quota: zygote_engine::Quota::default(),
        template: "fake".to_owned(),
        build: None,
        allow_missing_walls: false,
        request: RunRequest {
            program: Program::Command(vec![b"echo".to_vec(), b"1".to_vec()]),
            env: vec![],
            cwd: String::new(),
            stdin: Stdin::Empty,
            buffering: Buffering::Full,
            gets: Vec::new(),
            puts: None,
            signals: Some(taken),
            timeout: None,
            measure: false,
        },
    };
    let reading = async { while events.recv().await.is_some() {} };
    let (result, ()) = tokio::join!(engine.run(order, sender, &|_| {}), reading);
    assert_eq!(
        result.unwrap().outcome,
        Outcome::Exited(ExitStatus::Code(3))
    );
    begun.elapsed()
}

fn key(home: &Path, tenant: &str) -> String {
    let new = NewKey {
        name: None,
        role: Role::Run,
        tenant: Some(tenant.to_owned()),
        expires_unix_s: None,
        limits: Limits::default(),
    };
    let (secret, _) = keys(&Store::open(home.to_owned())).create(new).unwrap();
    format!("authorization: Bearer {}\r\n", secret.reveal())
}

/// Many clients of two keys at once, on fewer places: how many runs each key gets, and how long they take.
fn fair(home: &Path, address: &str) {
    let until = Instant::now() + Duration::from_secs(5);
    let ask = move |key: String| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut times = Vec::new();
        while Instant::now() < until {
            times.push(over_plain(&mut stream, &key));
        }
        times
    };
    std::thread::scope(|scope| {
        let mut all = Vec::new();
        // One asks three times as hard as the other.
        for (tenant, clients) in [("many", CLIENTS * 3 / 2), ("few", CLIENTS / 2)] {
            let key = key(home, tenant);
            let clients: Vec<_> = (0..clients)
                .map(|_| {
                    let key = key.clone();
                    scope.spawn(move || ask(key))
                })
                .collect();
            all.push((tenant, clients));
        }
        for (tenant, clients) in all {
            let count = clients.len();
            let times = clients.into_iter().flat_map(|one| one.join().unwrap());
            let mut times: Vec<Duration> = times.collect();
            times.sort_unstable();
            let at = |share: f64| times[(times.len() as f64 * share) as usize].as_micros();
            println!(
                "{tenant:<5} {count:>3} clients: {:>6} runs   p50 {:>6} us   p99 {:>6} us",
                times.len(),
                at(0.5),
                at(0.99)
            );
        }
    });
}

/// As an SDK asks: one answer with everything.
fn over_plain(stream: &mut (impl Read + Write), key: &str) -> Duration {
    let begun = Instant::now();
    let body = r#"{"template":"fake","command":["echo","1"],"timeout_seconds":0}"#;
    let length = body.len();
    let request =
        format!("POST /v1/exec HTTP/1.1\r\nhost: x\r\n{key}content-length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    while !answer.ends_with(b"}\n") {
        let count = stream.read(&mut piece).unwrap();
        answer.extend_from_slice(&piece[..count]);
    }
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    begun.elapsed()
}

async fn over(client: &Client) -> Duration {
    let begun = Instant::now();
    let request = ExecRequest {
        template: "fake".to_owned(),
        command: Some(vec!["echo".into(), "1".into()]),
        timeout_seconds: 0.0,
        ..ExecRequest::default()
    };
    let mut events = client.exec(&request, None).await.unwrap();
    while let Some(event) = events.next().await.unwrap() {
        if let ExecEvent::Result(result) = event {
            assert_eq!(result.exit_code, 3);
        }
    }
    begun.elapsed()
}
