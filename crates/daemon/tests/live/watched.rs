//! What others see of an engine: metrics, its log, and traces.

use super::tenants::Shop;
use super::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use zygote_daemon::Role;

/// What must be in no log, and reach no collector.
const SECRET: &str = "word-that-is-nobodys-business";

/// The samples of a text of metrics.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let samples = lines.filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().unwrap()))
    });
    samples.collect()
}

pub fn metrics_tell_what_has_happened() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.sh("exit 4").await;
        let missing = it.client.sandbox("nobody").await;
        assert_eq!(code(missing), ErrorCode::SandboxNotFound);
        echo(&it.client, "x").await;
        let text = it.client.metrics().await.unwrap();
        let samples = samples(&text);
        let value = |name: &str| {
            *samples
                .get(name)
                .unwrap_or_else(|| panic!("{name}\n{text}"))
        };
        let requests = |rest: &str| value(&format!("zygote_http_requests_total{{{rest}}}"));
        let (made, named) = (
            "method=\"POST\",route=\"/v1/sandboxes\"",
            "method=\"GET\",route=\"/v1/sandboxes/{id}\"",
        );
        assert_eq!(requests(&format!("{made},status=\"200\"")), 1.0);
        assert_eq!(requests(&format!("{named},status=\"404\"")), 1.0);
        assert_eq!(
            value("zygote_errors_total{code=\"sandbox_not_found\"}"),
            1.0
        );
        for name in ["zygote_fork_seconds", "zygote_first_output_seconds"] {
            assert_eq!(value(&format!("{name}_count")), 1.0);
        }
        assert_eq!(value("zygote_machines{state=\"running\"}"), 1.0);
        // A sandbox that lives is no run.
        assert_eq!(value("zygote_runs_total{ended=\"failed\"}"), 1.0);
        assert_eq!(value("zygote_runs_cancelled_total"), 0.0);
        let private = value("zygote_memory_bytes{state=\"running\",kind=\"private\"}");
        assert!(private > 4096.0, "{private}");
        // Nobody makes a series of his own by what he asks for.
        assert!(!text.contains("nobody"), "{text}");
    });
}

/// Takes all that is posted, as a collector does, until the end of the test.
fn collector() -> (String, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let taken = Arc::<Mutex<Vec<u8>>>::default();
    let own = Arc::clone(&taken);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let own = Arc::clone(&own);
            std::thread::spawn(move || take(stream.unwrap(), &own));
        }
    });
    (address, taken)
}

fn take(mut stream: TcpStream, taken: &Mutex<Vec<u8>>) {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut piece) {
        bytes.extend(&piece[..length]);
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        let Some(head) = text.find("\r\n\r\n") else {
            continue;
        };
        let length = text[..head].lines().find_map(|line| {
            let value = line.strip_prefix("content-length:")?;
            value.trim().parse::<usize>().ok()
        });
        let end = bytes
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap()
            + 4;
        if bytes.len() < end + length.unwrap_or_default() {
            continue;
        }
        taken.lock().unwrap().append(&mut bytes);
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        stream.write_all(answer).unwrap();
    }
}

pub fn traces_reach_a_collector_and_the_log_names_requests() {
    let (address, taken) = collector();
    let otlp = format!("otlp={address}");
    let shop = Shop::open(&[&otlp, "log_json=1", "log_level=debug"]);
    let key = shop.key("acme", Role::Run);
    let trace: [u8; 16] = [0xab; 16];
    let parent = format!(
        "traceparent: 00-{}-{}-01\r\n",
        "ab".repeat(16),
        "cd".repeat(8)
    );
    let body = json!({"template": TEMPLATE, "command": ["echo", SECRET]}).to_string();
    let request = format!(
        "POST /v1/exec HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\n{parent}\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let (status, answer) = raw(&mut TcpStream::connect(&shop.address).unwrap(), &request);
    assert_eq!(status, 200, "{answer}");
    let id = answer
        .lines()
        .find_map(|line| line.strip_prefix("x-request-id: "));
    let id = id.unwrap().to_owned();
    shop.stop();
    let log = fs::read_to_string(shop.home.log()).unwrap();
    let lines: Vec<Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let answered = lines
        .iter()
        .find(|line| line["message"] == "answered" && line["span"]["request_id"] == id);
    let answered = answered.unwrap_or_else(|| panic!("{log}"));
    assert_eq!(answered["status"], 200);
    assert_eq!(answered["span"]["http.route"], "/v1/exec");
    assert_eq!(answered["span"]["tenant"], "acme");
    assert_eq!(answered["span"]["trace_id"], "ab".repeat(16));
    let (_, secret) = key.rsplit_once('_').unwrap();
    let sent = taken.lock().unwrap().clone();
    let has = |what: &[u8]| sent.windows(what.len()).any(|window| window == what);
    for name in ["POST /v1/exec", "queue", "fork", "exec", "acme", &id] {
        assert!(has(name.as_bytes()), "{name}");
    }
    assert!(has(&trace));
    for word in [SECRET, secret] {
        assert!(!log.contains(word) && !has(word.as_bytes()), "{word}");
    }
}

/// As a service manager starts it: it listens, and the engine has what it listens at.
pub fn a_service_manager_may_listen_for_it() {
    let home = Home::new();
    fs::create_dir_all(home.socket().parent().unwrap()).unwrap();
    let unix = UnixListener::bind(home.socket()).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    // The descriptors 3 and 4, and the process that they are for (sd_listen_fds(3)).
    let script =
        "exec 3<&0 4>&1 0</dev/null 1>/dev/null; export LISTEN_PID=$$ LISTEN_FDS=2; exec \"$@\"";
    let program = std::env::current_exe().unwrap();
    let start = || {
        Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(&program)
            .arg(SERVE_VERB)
            .args([home.folder.path().as_os_str(), "keys=always".as_ref()])
            .stdin(OwnedFd::from(unix.try_clone().unwrap()))
            .stdout(OwnedFd::from(tcp.try_clone().unwrap()))
            .spawn()
            .unwrap()
    };
    for _ in 0..2 {
        let mut engine = start();
        // Who came before it listened is served all the same.
        let (status, _) = raw(
            &mut UnixStream::connect(home.socket()).unwrap(),
            "GET /v1/status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        );
        assert_eq!(status, 200);
        let mut visitor = TcpStream::connect(address).unwrap();
        let asked = "GET /v1/templates HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        assert_eq!(raw(&mut visitor, asked).0, 401);
        let pid = rustix::process::Pid::from_child(&engine);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(engine.wait().unwrap().success());
        // It is the service manager's to remove.
        assert!(home.socket().exists());
    }
    fs::remove_file(home.socket()).unwrap();
}

/// A collector that is not there costs a line of the log, and nothing else.
pub fn a_collector_that_is_away_is_told_of_once() {
    let nowhere = TcpListener::bind("127.0.0.1:0").unwrap();
    let otlp = format!("otlp=http://{}", nowhere.local_addr().unwrap());
    drop(nowhere);
    let shop = Shop::open(&[&otlp]);
    let key = shop.key("acme", Role::Run);
    shop.asked(&key, "POST", "/v1/sandboxes", &json!({"template": HERE}));
    shop.stop();
    let log = fs::read_to_string(shop.home.log()).unwrap();
    let told = log.matches("traces do not reach their collector");
    assert_eq!(told.count(), 1, "{log}");
}
