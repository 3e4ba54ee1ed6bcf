//! Mixed load of two tenants, with clients that go away, read slowly, send too much or nonsense, and an engine that
//! is killed in the middle. Seconds in the suite; `SOAK_SECONDS=3600` for an hour.

use super::tenants::Shop;
use super::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use zygote_daemon::Role;

const SECONDS: u64 = 8;
/// The engine is killed so often.
const KILLS: u64 = 3;
/// Answers as one object, and as they happen.
const ONE: &str = "application/json";
const LINES: &str = zygote_api::NDJSON;
const TENANTS: [&str; 2] = ["acme", "other"];
/// How long a client waits for an engine that is about to be there again.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// What an engine may have after all that: bodies of 16 MiB came from two at once, and leave their mark on its heap
/// (60 to 110 MiB, after seconds as after an hour).
const RESIDENT_MAX_BYTES: u64 = 256 << 20;

/// What clients share.
struct Load<'a> {
    address: &'a str,
    is_over: AtomicBool,
    /// How often each answer came, by who asked and its status; 0: the connection broke.
    answers: Mutex<BTreeMap<(&'static str, u16), u64>>,
    numbers: AtomicU64,
}

/// A client, whose word nobody else's answer may have.
struct Visitor<'a> {
    load: &'a Load<'a>,
    tenant: &'static str,
    key: &'a str,
}

fn random(below: u64) -> u64 {
    u64::try_from(uuid::Uuid::new_v4().as_u128() % u128::from(below)).unwrap()
}

impl Load<'_> {
    fn counts(&self, who: &'static str, status: u16) {
        *self
            .answers
            .lock()
            .unwrap()
            .entry((who, status))
            .or_default() += 1;
    }

    fn goes_on(&self) -> bool {
        !self.is_over.load(Ordering::Relaxed)
    }
}

impl Visitor<'_> {
    fn word(&self) -> String {
        let number = self.load.numbers.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}-", self.tenant)
    }

    fn head(&self, method: &str, path: &str, accept: &str, length: usize) -> String {
        format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\naccept: {accept}\r\ncontent-length: {length}\r\n\r\n",
            self.key
        )
    }

    fn begin(&self, method: &str, path: &str, accept: &str, body: &[u8]) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect(self.load.address)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        stream.write_all(self.head(method, path, accept, body.len()).as_bytes())?;
        stream.write_all(body)?;
        Ok(stream)
    }

    /// Status and body; `None` if the engine was not there, or was killed meanwhile.
    fn ask(
        &self,
        who: &'static str,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> Option<(u16, String)> {
        let asked = self.begin(method, path, ONE, body).and_then(|mut stream| {
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        });
        let answer = match asked {
            Ok(answer) => String::from_utf8_lossy(&answer).into_owned(),
            Err(error) => {
                assert!(
                    error.kind() != io::ErrorKind::WouldBlock,
                    "{who} waits for ever"
                );
                String::new()
            }
        };
        let whole = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
            let status = head.split(' ').nth(1)?.parse().ok()?;
            Some((status, body.to_owned()))
        });
        self.load
            .counts(who, whole.as_ref().map_or(0, |(status, _)| *status));
        if let Some((status, body)) = &whole {
            let others = TENANTS.into_iter().filter(|tenant| *tenant != self.tenant);
            for other in others {
                assert!(!body.contains(&format!("{other}-")), "{who}: {body}");
            }
            let is_known = [200, 400, 404, 405, 409, 413, 429, 503].contains(status);
            assert!(is_known, "{who} {method} {path}: {status} {body}");
        } else {
            std::thread::sleep(Duration::from_millis(20));
        }
        whole
    }

    fn run(&self) {
        let word = self.word();
        let body = json!({"template": TEMPLATE, "command": ["echo", word]}).to_string();
        if let Some((200, answer)) = self.ask("run", "POST", "/v1/exec", body.as_bytes()) {
            let result: Value = serde_json::from_str(&answer).unwrap();
            assert!(
                result["stdout"] == *word || !result["error"].is_null(),
                "{result}"
            );
        }
    }

    fn batch(&self) {
        let words: Vec<_> = (0..5).map(|_| self.word()).collect();
        let one = |word| json!({"template": TEMPLATE, "command": ["echo", word]});
        let body = json!({"executions": words.iter().map(one).collect::<Vec<_>>()}).to_string();
        if let Some((200, answer)) = self.ask("batch", "POST", "/v1/exec/batch", body.as_bytes()) {
            let results: Value = serde_json::from_str(&answer).unwrap();
            for (word, result) in words.iter().zip(results["results"].as_array().unwrap()) {
                assert!(
                    result["stdout"] == **word || !result["error"].is_null(),
                    "{result}"
                );
            }
        }
    }

    /// A sandbox from its making to its end: a program, a file, somebody who asks for another's.
    fn live(&self) {
        let word = self.word();
        let body = json!({"template": HERE, "name": word, "ttl_seconds": 600.0}).to_string();
        let Some((200, made)) = self.ask("create", "POST", "/v1/sandboxes", body.as_bytes()) else {
            return;
        };
        let made: Value = serde_json::from_str(&made).unwrap();
        let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
        let body = json!({"command": ["sh", "-c", format!("echo {word}")]}).to_string();
        let ran = self.ask("exec", "POST", &format!("{path}/exec"), body.as_bytes());
        if let Some((200, answer)) = ran {
            assert!(answer.contains(&word), "{answer}");
        }
        let file = format!("{path}/files?path=/tmp/soak-{word}");
        if let Some((200, _)) = self.ask("write", "PUT", &file, word.as_bytes())
            && let Some((200, content)) = self.ask("read", "GET", &file, b"")
        {
            // In one piece, with its length before it.
            assert!(content.contains(&word), "{content}");
        }
        let _ = std::fs::remove_file(format!("/tmp/soak-{word}"));
        // Until it is gone: whoever is told that he must come again does.
        while !matches!(
            self.ask("remove", "DELETE", &path, b""),
            Some((200 | 404 | 409, _))
        ) {}
    }

    /// Goes away at any time.
    fn leave(&self) {
        let body = json!({"template": TEMPLATE, "command": ["wait"]}).to_string();
        if let Ok(stream) = self.begin("POST", "/v1/exec", ONE, body.as_bytes()) {
            std::thread::sleep(Duration::from_millis(random(30)));
            drop(stream);
            self.load.counts("leave", 0);
        }
    }

    /// Reads a byte now and then, and goes away.
    fn read_slowly(&self) {
        let Some((200, made)) = self.ask(
            "create",
            "POST",
            "/v1/sandboxes",
            json!({"template": HERE}).to_string().as_bytes(),
        ) else {
            return;
        };
        let made: Value = serde_json::from_str(&made).unwrap();
        let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
        let body = json!({"command": ["sh", "-c", "yes"]}).to_string();
        if let Ok(mut stream) = self.begin("POST", &format!("{path}/exec"), LINES, body.as_bytes())
        {
            let mut byte = [0];
            for _ in 0..10 {
                let _ = stream.read(&mut byte);
                std::thread::sleep(Duration::from_millis(10));
                if !self.load.goes_on() {
                    break;
                }
            }
            self.load.counts("slow", 0);
        }
        while !matches!(
            self.ask("remove", "DELETE", &path, b""),
            Some((200 | 404 | 409, _))
        ) {}
    }

    fn send_nonsense(&self) {
        let large = vec![b' '; 17 << 20];
        let deep = "[".repeat(100_000);
        let bodies: [&[u8]; 5] = [b"", b"{", b"\xff\xfe", deep.as_bytes(), b"{\"never\": 1}"];
        for body in bodies {
            if let Some((status, answer)) = self.ask("nonsense", "POST", "/v1/exec", body) {
                assert!([400, 429, 503].contains(&status), "{status} {answer}");
            }
        }
        // What is refused before all of it is read may break off.
        if let Some((status, _)) = self.ask("large", "POST", "/v1/exec", &large) {
            assert!([413, 429, 503].contains(&status), "{status}");
        }
        for path in [
            "/v1/sandboxes/../../etc",
            "/v1/sandboxes/%00",
            "/v1/exec/x/signal",
        ] {
            self.ask("path", "GET", path, b"");
        }
        if let Ok(mut stream) = TcpStream::connect(self.load.address) {
            let _ = stream.write_all(b"\x16\x03\x01 no http at all\r\n\r\n");
        }
    }
}

/// What the engine has: resident memory in bytes, and open descriptors.
fn held(pid: u32) -> (u64, usize) {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count();
    (pages * rustix::param::page_size() as u64, open)
}

pub fn mixed_load_leaves_nothing_behind_and_mixes_nobody_up() {
    let seconds = std::env::var("SOAK_SECONDS").ok();
    let seconds = seconds.map_or(SECONDS, |text| text.parse().unwrap());
    // A port of its own, at which the next engine listens, too.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let listen = format!("listen={address}");
    let options = [
        &*listen,
        "keys=always",
        "live_max=64",
        "running=8",
        "waiting=32",
    ];
    let mut shop = Shop::open(&options);
    let keys = TENANTS.map(|tenant| shop.key(tenant, Role::Run));
    let load = Load {
        address: &address,
        is_over: AtomicBool::new(false),
        answers: Mutex::default(),
        numbers: AtomicU64::new(0),
    };
    let work: [fn(&Visitor<'_>); 6] = [
        |visitor| visitor.run(),
        |visitor| visitor.batch(),
        |visitor| visitor.live(),
        |visitor| visitor.leave(),
        |visitor| visitor.read_slowly(),
        |visitor| visitor.send_nonsense(),
    ];
    let mut resident = Vec::new();
    std::thread::scope(|scope| {
        for (tenant, key) in TENANTS.into_iter().zip(&keys) {
            for (number, task) in work.iter().enumerate() {
                let visitor = Visitor {
                    load: &load,
                    tenant,
                    key,
                };
                let name = format!("{tenant} {number}");
                let at_it = move || {
                    while visitor.load.goes_on() {
                        task(&visitor);
                    }
                };
                let spawned = std::thread::Builder::new().name(name);
                spawned.spawn_scoped(scope, at_it).unwrap();
            }
        }
        let piece = Duration::from_secs(seconds).div_f64((KILLS + 1) as f64);
        for round in 0..=KILLS {
            std::thread::sleep(piece);
            resident.push(held(shop.pid()).0 >> 20);
            if round < KILLS {
                shop.again(&options);
            }
        }
        load.is_over.store(true, Ordering::Relaxed);
    });
    let answers = load.answers.into_inner().unwrap();
    println!("{answers:?}\nMiB of the engine, before each end: {resident:?}");
    let count = |who, status| answers.get(&(who, status)).copied().unwrap_or_default();
    for who in ["run", "batch", "create", "exec", "read", "remove"] {
        assert!(count(who, 200) > 0, "{who}: {answers:?}");
    }
    assert!(count("nonsense", 400) > 0 && count("leave", 0) > 0);
    // Nothing of all that is left.
    let pid = shop.pid();
    shop.runtime()
        .block_on(until_status(&shop.client, "nothing runs", |status| {
            status.runs.running == 0 && status.runs.waiting == 0 && status.sandboxes == 0
        }));
    until("connections are closed", || held(pid).1 < 64);
    let (resident, _) = held(pid);
    println!("at the end: {} MiB", resident >> 20);
    assert!(resident < RESIDENT_MAX_BYTES, "{resident}");
    let said = shop.home.said();
    assert!(
        !said.contains("panicked") && !said.contains("a request has failed"),
        "{said}"
    );
}
