//! Keys over TCP: who gets in, what each may, and that nobody reaches what is another's.

use super::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use zygote_daemon::{KeyFile, Limits, NewKey, Role};

/// A daemon at TCP, for those with keys.
pub struct Shop {
    pub home: Home,
    pub client: Client,
    pub address: String,
    runtime: tokio::runtime::Runtime,
}

impl Shop {
    pub fn open(options: &[&str]) -> Self {
        Self::with(Home::new(), options)
    }

    fn with(home: Home, options: &[&str]) -> Self {
        let mut all = vec!["listen=127.0.0.1:0", "keys=always"];
        all.extend(options);
        let runtime = runtime();
        let client = runtime.block_on(started(&home, &all));
        let address = fs::read_to_string(home.folder.path().join("address")).unwrap();
        Self {
            home,
            client,
            address,
            runtime,
        }
    }

    pub fn keys(&self) -> KeyFile {
        KeyFile::at(self.home.state().join("keys.json"))
    }

    pub fn pid(&self) -> u32 {
        self.runtime
            .block_on(self.client.status())
            .unwrap()
            .health
            .pid
    }

    pub fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }

    /// The daemon is killed, and the next one is there.
    pub fn again(&mut self, options: &[&str]) {
        self.runtime.block_on(killed::kill(&self.client));
        self.client = self.runtime.block_on(started(&self.home, options));
    }

    /// Ends the daemon, and waits until it is gone.
    pub fn stop(&self) {
        let request = StopRequest {
            now: true,
            if_idle: false,
        };
        let stopped = self.runtime.block_on(self.client.stop(request)).unwrap();
        // A child of this process, which does not ask how it has ended.
        until("it is gone", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", stopped.pid));
            stat.map_or(true, |stat| stat.contains(") Z "))
        });
    }

    pub fn key(&self, tenant: &str, role: Role) -> String {
        self.limited(tenant, role, Limits::default())
    }

    fn limited(&self, tenant: &str, role: Role, limits: Limits) -> String {
        let tenant = (role != Role::Admin).then(|| tenant.to_owned());
        let new = NewKey {
            name: None,
            role,
            tenant,
            expires_unix_s: None,
            limits,
        };
        self.keys().create(new).unwrap().0.reveal()
    }

    /// Status, head and body of an answer.
    fn ask(&self, key: &str, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let authorization = match key {
            "" => String::new(),
            key => format!("authorization: Bearer {key}\r\n"),
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: example.org\r\nconnection: close\r\n{authorization}\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        raw(&mut stream, &request)
    }

    pub fn asked(&self, key: &str, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask(key, method, path, &body.to_string());
        assert_eq!(status, 200, "{method} {path}: {answer}");
        serde_json::from_str(
            answer
                .rsplit_once("\r\n")
                .map_or(&answer, |_| body_of(&answer)),
        )
        .unwrap()
    }

    fn made(&self, key: &str, name: &str) -> String {
        let made = self.asked(
            key,
            "POST",
            "/v1/sandboxes",
            &json!({"template": HERE, "name": name}),
        );
        made["id"].as_str().unwrap().to_owned()
    }
}

/// Behind the head, without the sizes of chunks: an object in one line.
fn body_of(answer: &str) -> &str {
    let object = answer.lines().find(|line| line.starts_with('{'));
    object.unwrap_or_else(|| panic!("no object in {answer}"))
}

/// All that the API has, from its own description: method and path.
fn everything() -> Vec<(String, String)> {
    let document = zygote_server::document();
    let paths = document["paths"].as_object().unwrap();
    let of = |(path, methods): (&String, &Value)| {
        let methods = methods.as_object().unwrap().keys();
        let known = ["get", "post", "put", "patch", "delete"];
        let methods = methods.filter(|method| known.contains(&method.as_str()));
        methods
            .map(|method| (method.to_uppercase(), path.clone()))
            .collect::<Vec<_>>()
    };
    paths.iter().flat_map(of).collect()
}

pub fn no_tenant_reaches_anothers_sandbox_by_any_path() {
    let shop = Shop::open(&[]);
    let (acme, other) = (
        shop.key("acme", Role::Manage),
        shop.key("other", Role::Manage),
    );
    let id = shop.made(&acme, "box");
    let path = |rest: &str| format!("/v1/sandboxes/box{rest}");
    let started = json!({"command": ["sleep", "600"], "detach": true, "cwd": "/"});
    shop.asked(&acme, "POST", &path("/exec"), &started);
    let mut tried = 0;
    let words = [id.as_str(), "box", &id[id.len() - 8..]];
    for (method, path) in everything() {
        if !path.starts_with("/v1/sandboxes/{id}") {
            continue;
        }
        for word in words {
            let path = path.replace("{id}", word).replace("{process}", "1");
            let path = path.replace("{moment}", "1").replace("{name}", "default");
            for body in ["", r#"{"template":"x"}"#] {
                if body.is_empty() && path.ends_with("/template") {
                    // It has no way to be asked for without one.
                    continue;
                }
                let (status, answer) = shop.ask(&other, &method, &path, body);
                let is_none = status == 404 && answer.contains("\"sandbox_not_found\"");
                assert!(is_none, "{method} {path}: {status} {answer}");
                tried += 1;
            }
        }
    }
    assert!(tried > 200, "{tried}");
    // By a comparison with one's own.
    shop.made(&other, "own");
    let from = json!({"from": {"sandbox": id}});
    let (status, answer) = shop.ask(&other, "POST", "/v1/sandboxes/own/diff", &from.to_string());
    assert!(
        status == 404 && answer.contains("sandbox_not_found"),
        "{answer}"
    );
    // By a WebSocket.
    shop.runtime.block_on(async {
        let reach = |key: String| {
            let address = shop.address.clone();
            let path = format!("/v1/sandboxes/{id}/processes/1/socket?from=0");
            async move { websocket(&address, &path, &key).await }
        };
        let told = reach(other.clone()).await;
        assert!(told.contains("sandbox_not_found"), "{told}");
        let told = reach(acme.clone()).await;
        assert!(!told.contains("sandbox_not_found"), "{told}");
    });
    // And it is as it was.
    let still = shop.asked(&acme, "GET", &path(""), &Value::Null);
    assert_eq!(
        (&still["state"], &still["tenant"]),
        (&json!("running"), &json!("acme"))
    );
    let admin = shop.key("", Role::Admin);
    assert_eq!(
        shop.asked(&admin, "GET", &path(""), &Value::Null)["id"],
        json!(id)
    );
}

/// The first text message, or an empty one if none comes for a second.
async fn websocket(address: &str, path: &str, key: &str) -> String {
    use futures_util::StreamExt;
    use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut request = format!("ws://example.org{path}")
        .into_client_request()
        .unwrap();
    let offered = format!("zygote, zygote.key.{key}").parse().unwrap();
    request
        .headers_mut()
        .insert("sec-websocket-protocol", offered);
    let (mut socket, answer) = tokio_tungstenite::client_async(request, stream)
        .await
        .unwrap();
    assert_eq!(answer.headers()["sec-websocket-protocol"], "zygote");
    let text = async {
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Text(text) = message {
                return text.to_string();
            }
        }
        String::new()
    };
    let told = tokio::time::timeout(Duration::from_secs(1), text).await;
    told.unwrap_or_default()
}

pub fn what_is_a_tenants_own_is_its_own_and_names_do_not_meet() {
    let home = Home::new();
    let described = home.state().join("generations/fake-1-1/template.json");
    fs::write(&described, description(TEMPLATE, Some("acme"))).unwrap();
    let shop = Shop::with(home, &[]);
    let (acme, other) = (shop.key("acme", Role::Run), shop.key("other", Role::Run));
    let second = shop.key("acme", Role::Run);
    let id = shop.made(&acme, "box");
    // The same name, and the same idempotency key, are another sandbox to another tenant.
    assert_ne!(shop.made(&other, "box"), id);
    let (status, answer) = shop.ask(
        &second,
        "POST",
        "/v1/sandboxes",
        &json!({"template": HERE, "name": "box"}).to_string(),
    );
    assert!(status == 409 && answer.contains("name_taken"), "{answer}");
    let owners = shop.runtime.block_on(made(
        &shop.client,
        &SandboxRequest {
            name: Some("box".to_owned()),
            ..request()
        },
    ));
    let owners = owners.unwrap();
    assert!(owners.tenant.is_none() && owners.id != id);
    let ids = |key: &str| {
        let list = shop.asked(key, "GET", "/v1/sandboxes?state=all", &Value::Null);
        let all = list["sandboxes"].as_array().unwrap().clone();
        all.iter()
            .map(|one| one["id"].as_str().unwrap().to_owned())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(ids(&acme), BTreeSet::from([id.clone()]));
    assert_eq!(ids(&second), ids(&acme));
    assert_eq!(ids(&other).len(), 1);
    // The owner, who sees all, means his own by a name that several have.
    let (found, all) = shop.runtime.block_on(async {
        let found = shop.client.sandbox("box").await.unwrap();
        (
            found,
            shop.client.sandboxes(Some("all"), None).await.unwrap(),
        )
    });
    assert_eq!((found.id, all.sandboxes.len()), (owners.id, 3));
    let events = |key: &str| {
        let events = shop.asked(key, "GET", "/v1/events", &Value::Null);
        let all = events["events"].as_array().unwrap().clone();
        all.iter()
            .map(|one| one["sandbox"].as_str().unwrap().to_owned())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(events(&acme), BTreeSet::from([id.clone()]));
    assert!(!events(&other).contains(&id) && events(&other).len() == 1);
    // Templates of another tenant are not there.
    let templates = |key: &str| {
        let list = shop.asked(key, "GET", "/v1/templates", &Value::Null);
        list["templates"].as_array().unwrap().len()
    };
    assert_eq!((templates(&acme), templates(&other)), (3, 2));
    let run = json!({"template": TEMPLATE, "command": ["echo", "x"]}).to_string();
    let by_build = json!({"template": TEMPLATE, "build": "fake-1-1", "command": ["echo", "x"]});
    assert_eq!(shop.ask(&acme, "POST", "/v1/exec", &run).0, 200);
    for body in [run, by_build.to_string()] {
        let (status, answer) = shop.ask(&other, "POST", "/v1/exec", &body);
        assert!(
            status == 404 && answer.contains("template_not_found"),
            "{answer}"
        );
        assert!(
            !answer.contains("fake,") && !answer.contains(", fake"),
            "{answer}"
        );
    }
    let (status, answer) = shop.ask(&other, "GET", "/v1/templates/fake", "");
    assert!(
        status == 404 && answer.contains("template_not_found"),
        "{answer}"
    );
    let (_, health) = shop.ask(&other, "GET", "/v1/health", "");
    assert!(
        !health.contains("fake") && health.contains(HERE),
        "{health}"
    );
    // Signals to runs do not cross either.
    shop.runtime.block_on(async {
        let mut events = shop.client.exec(&command(&["wait"]), None).await.unwrap();
        let run = first_output(&mut events).await;
        let path = format!("/v1/exec/{run}/signal");
        let signal = r#"{"signal":15}"#;
        assert_eq!(shop.ask(&acme, "POST", &path, signal).0, 404);
        shop.client.signal(&run, 15).await.unwrap();
        end(&mut events).await.unwrap();
    });
}

pub fn without_a_key_there_is_nothing_but_what_is_everybodys() {
    let shop = Shop::open(&[]);
    for (method, path) in everything() {
        let path = path
            .replace("{id}", "x")
            .replace("{name}", "x")
            .replace("{process}", "1");
        for key in ["", "zyg_x", "zb_live_0123456789"] {
            let (status, answer) = shop.ask(key, &method, &path, "{}");
            let is_public = ["/v1/health", "/v1/openapi.json"].contains(&path.as_str());
            if is_public && key.is_empty() {
                assert_eq!(status, 200, "{path}");
                assert!(!answer.contains("state_dir\":\""), "{answer}");
            } else {
                assert_eq!(status, 401, "{method} {path}: {answer}");
                let head = answer.to_lowercase();
                assert!(head.contains("www-authenticate: bearer"), "{answer}");
                assert!(answer.contains("\"unauthorized\""), "{answer}");
            }
        }
    }
    // The description as a page, which takes nothing from elsewhere.
    let (status, page) = shop.ask("", "GET", "/docs/", "");
    assert!(status == 200 && page.contains("text/html"), "{page}");
    assert!(
        page.contains("default-src 'self'") && !page.contains("src=\"http"),
        "{page}"
    );
    let (status, script) = shop.ask("", "GET", "/docs/swagger-initializer.js", "");
    assert!(
        status == 200 && script.contains("/v1/openapi.json"),
        "{script}"
    );
    for (path, expected) in [
        ("/docs/swagger-ui-bundle.js", 200),
        ("/docs", 308),
        ("/docs/x", 404),
    ] {
        assert_eq!(shop.ask("", "GET", path, "").0, expected, "{path}");
    }
    assert_eq!(shop.ask("", "GET", "/docs/../v1/status", "").0, 404);
    // A page of no site may ask.
    let preflight = |shop: &Shop, origin: &str| {
        let mut stream = TcpStream::connect(&shop.address).unwrap();
        let request = format!(
            "OPTIONS /v1/exec HTTP/1.1\r\nhost: x\r\nconnection: close\r\norigin: {origin}\r\n\
             access-control-request-method: POST\r\naccess-control-request-headers: authorization\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.to_lowercase()
    };
    let allowed = "access-control-allow-origin: https://app.example";
    assert!(!preflight(&shop, "https://app.example").contains("access-control"));
    let open = Shop::open(&["cors=https://app.example"]);
    let answer = preflight(&open, "https://app.example");
    assert!(
        answer.contains(allowed) && answer.contains("authorization"),
        "{answer}"
    );
    assert!(!preflight(&open, "https://evil.example").contains("allow-origin: https://evil"));
    // What there is not is nobody's business either.
    assert_eq!(shop.ask("", "GET", "/nothing", "").0, 401);
}

pub fn roles_are_kept_to() {
    let shop = Shop::open(&[]);
    let [run, manage, admin] =
        [Role::Run, Role::Manage, Role::Admin].map(|role| shop.key("acme", role));
    let echo = json!({"template": TEMPLATE, "command": ["echo", "x"]}).to_string();
    let cases = [
        ("GET", "/v1/templates", "", [200, 200, 200]),
        ("POST", "/v1/exec", &*echo, [200, 200, 200]),
        ("GET", "/v1/status", "", [403, 403, 200]),
        ("GET", "/v1/metrics", "", [403, 403, 200]),
        (
            "POST",
            "/v1/templates",
            r#"{"recipe":"x.toml"}"#,
            [403, 403, 400],
        ),
        (
            "POST",
            "/v1/sandboxes/nothing/template",
            r#"{"template":"x"}"#,
            [403, 404, 404],
        ),
        // What is everybody's is not a tenant's to remove.
        ("DELETE", "/v1/templates/liar", "", [403, 403, 200]),
        (
            "POST",
            "/v1/lab/exec",
            r#"{"command":["id"]}"#,
            [403, 403, 403],
        ),
        ("POST", "/v1/lab/down", "", [403, 403, 403]),
        ("POST", "/v1/stop", r#"{"never":1}"#, [403, 403, 400]),
    ];
    for (method, path, body, expected) in cases {
        for (key, expected) in [&run, &manage, &admin].into_iter().zip(expected) {
            let (status, answer) = shop.ask(key, method, path, body);
            assert_eq!(status, expected, "{method} {path}: {answer}");
        }
    }
    // Its walls are not for a tenant to lower.
    let low = json!({"template": TEMPLATE, "command": ["echo"], "allow_missing_walls": true});
    assert_eq!(shop.ask(&run, "POST", "/v1/exec", &low.to_string()).0, 403);
    let low = json!({"template": HERE, "allow_missing_walls": true});
    assert_eq!(
        shop.ask(&run, "POST", "/v1/sandboxes", &low.to_string()).0,
        403
    );
    // Whom a key stands for is not for its client to say.
    let mut stream = TcpStream::connect(&shop.address).unwrap();
    let request = format!(
        "GET /v1/sandboxes HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {run}\r\n\
         zygote-on-behalf: {{\"tenant\":\"other\"}}\r\n\r\n"
    );
    shop.made(&shop.key("other", Role::Run), "others");
    let (status, answer) = raw(&mut stream, &request);
    assert!(status == 200 && !answer.contains("others"), "{answer}");
}

pub fn limits_of_keys_are_told_and_read_again() {
    let home = Home::new();
    let file = home.folder.path().join("limits.json");
    fs::write(&file, r#"{"sandboxes": 2, "batch": 3}"#).unwrap();
    let option = format!("limits={}", file.display());
    let shop = Shop::with(home, &[&option]);
    let key = shop.key("acme", Role::Run);
    let refused = |key: &str, path: &str, body: Value| {
        let (status, answer) = shop.ask(key, "POST", path, &body.to_string());
        assert!(
            status == 429 && answer.contains("limit_reached"),
            "{status} {answer}"
        );
        answer
    };
    // Sandboxes count by tenant, whichever of its keys makes them, and branches are some.
    let first = shop.made(&key, "first");
    let second = shop.key("acme", Role::Run);
    shop.made(&second, "second");
    refused(&second, "/v1/sandboxes", json!({"template": HERE}));
    refused(&key, &format!("/v1/sandboxes/{first}/branch"), json!({}));
    shop.made(&shop.key("other", Role::Run), "first");
    let one = json!({"template": TEMPLATE, "command": ["echo", "x"]});
    let batch = |count: usize| json!({"executions": vec![one.clone(); count]});
    assert_eq!(
        shop.ask(&key, "POST", "/v1/exec/batch", &batch(4).to_string())
            .0,
        400
    );
    let done = shop.asked(&key, "POST", "/v1/exec/batch", &batch(3));
    assert_eq!(done["results"].as_array().unwrap().len(), 3);
    // As they are now.
    fs::write(&file, r#"{"sandboxes": 3, "timeout_s": 0.2}"#).unwrap();
    let pid = shop
        .runtime
        .block_on(shop.client.status())
        .unwrap()
        .health
        .pid;
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    until("they are read again", || {
        shop.home.said().contains("SIGHUP")
    });
    shop.made(&key, "third");
    let waits = json!({"template": TEMPLATE, "command": ["wait"], "timeout_seconds": 0});
    let ended = shop.asked(&key, "POST", "/v1/exec", &waits);
    assert_eq!(ended["timed_out"], json!(true));
    fs::write(&file, "nonsense").unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    until("it is told", || {
        shop.home.said().contains("stayed as it was")
    });
    let ended = shop.asked(&key, "POST", "/v1/exec", &waits);
    assert_eq!(ended["timed_out"], json!(true));
    // A key's own.
    let limits = Limits {
        rate: Some(1),
        runs: Some(1),
        timeout_s: Some(30.0),
        ..Limits::default()
    };
    let slow = shop.limited("acme", Role::Run, limits);
    assert_eq!(shop.ask(&slow, "GET", "/v1/sandboxes", "").0, 200);
    let (status, answer) = shop.ask(&slow, "GET", "/v1/sandboxes", "");
    assert!(
        status == 429 && answer.to_lowercase().contains("retry-after: 1"),
        "{answer}"
    );
    let limits = Limits {
        runs: Some(1),
        timeout_s: Some(30.0),
        ..Limits::default()
    };
    let single = shop.limited("acme", Role::Run, limits);
    std::thread::scope(|scope| {
        let long = scope.spawn(|| {
            shop.ask(
                &single,
                "POST",
                "/v1/exec",
                &waits.to_string().replace(":0}", ":2}"),
            )
        });
        let one = one.to_string();
        until("the other one runs", || {
            shop.runtime
                .block_on(shop.client.status())
                .unwrap()
                .runs
                .running
                > 0
        });
        let (status, answer) = shop.ask(&single, "POST", "/v1/exec", &one);
        assert!(
            status == 429 && answer.contains("runs of this key"),
            "{status} {answer}"
        );
        assert_eq!(shop.ask(&key, "POST", "/v1/exec", &one).0, 200);
        assert_eq!(long.join().unwrap().0, 200);
    });
    assert_eq!(
        shop.ask(&single, "POST", "/v1/exec", &one.to_string()).0,
        200
    );
}

pub fn a_revoked_key_counts_no_more() {
    let home = Home::new();
    let audit = home.state().join("log/audit.jsonl");
    let option = format!("audit={}", audit.display());
    let shop = Shop::with(home, &[&option]);
    let key = shop.key("acme", Role::Run);
    let id = shop.made(&key, "box");
    shop.keys().revoke(&key).unwrap();
    assert_eq!(shop.ask(&key, "GET", "/v1/sandboxes", "").0, 401);
    // What its tenant has lives on, for its next key.
    let next = shop.key("acme", Role::Run);
    let found = shop.asked(&next, "GET", "/v1/sandboxes/box", &Value::Null);
    assert_eq!(found["id"], json!(id));
    // Who asked for what is written down, without keys and bodies.
    let written = || {
        let text = fs::read_to_string(&audit).unwrap_or_default();
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        (lines.collect::<Vec<Value>>(), text)
    };
    let find = |method: &str, path: &str, status: u16| {
        let (lines, _) = written();
        lines.into_iter().find(|line| {
            line["method"] == method && line["path"] == path && line["status"] == status
        })
    };
    until("it is written", || {
        find("GET", "/v1/sandboxes/box", 200).is_some()
    });
    let made = find("POST", "/v1/sandboxes", 200).unwrap();
    assert_eq!(
        (&made["made"], &made["tenant"]),
        (&json!(id), &json!("acme"))
    );
    assert_eq!(
        (&made["from"], made["key"].as_str().map(str::len)),
        (&json!("127.0.0.1"), Some(12))
    );
    let refused = find("GET", "/v1/sandboxes", 401).unwrap();
    assert_eq!(
        (&refused["error"], &refused["key"]),
        (&json!("unauthorized"), &Value::Null)
    );
    let text = written().1;
    assert!(
        !text.contains(&key[17..]) && !text.contains("\"template\""),
        "{text}"
    );
    // So is what a client did not wait for.
    let mut stream = TcpStream::connect(&shop.address).unwrap();
    let body = json!({"template": TEMPLATE, "command": ["wait"]}).to_string();
    let headers = format!("authorization: Bearer {next}\r\n");
    stream
        .write_all(post("/v1/exec", &headers, &body).as_bytes())
        .unwrap();
    until("it runs", || {
        shop.runtime
            .block_on(shop.client.status())
            .unwrap()
            .runs
            .running
            > 0
    });
    drop(stream);
    until("it is written", || find("POST", "/v1/exec", 499).is_some());
    assert_eq!(
        find("POST", "/v1/exec", 499).unwrap()["tenant"],
        json!("acme")
    );
    fs::write(shop.keys().path(), "{").unwrap();
    let (status, answer) = shop.ask(&next, "GET", "/v1/sandboxes", "");
    assert!(
        status == 500 && answer.contains("keys"),
        "{status} {answer}"
    );
    assert_eq!(
        shop.runtime
            .block_on(shop.client.sandbox("box"))
            .unwrap()
            .id,
        id
    );
}

pub fn a_tenants_machines_take_no_more_together_than_they_may() {
    let shop = Shop::open(&[]);
    let with = |memory_mib: Option<u64>, cpus| Limits {
        memory_bytes: memory_mib.map(|mib| mib << 20),
        cpus,
        ..Limits::default()
    };
    let by_memory = shop.limited("acme", Role::Run, with(Some(700), None));
    let by_cpus = shop.limited("acme", Role::Run, with(None, Some(2)));
    let first = shop.made(&by_memory, "first");
    shop.made(&by_memory, "second");
    // Each has 256 MiB and a processor.
    let refused = |key: &str, path: &str, body: Value, word: &str| {
        let (status, answer) = shop.ask(key, "POST", path, &body.to_string());
        assert!(
            status == 429 && answer.contains("limit_reached") && answer.contains(word),
            "{status} {answer}"
        );
    };
    let run = json!({"template": TEMPLATE, "command": ["echo", "x"]});
    let branch = format!("/v1/sandboxes/{first}/branch");
    for (key, word) in [
        (&by_memory, "700 MiB of memory"),
        (&by_cpus, "2 processors"),
    ] {
        refused(key, "/v1/sandboxes", json!({"template": HERE}), word);
        refused(key, "/v1/exec", run.clone(), word);
        refused(key, &branch, json!({}), word);
    }
    // Another tenant has its own.
    let other = shop.limited("other", Role::Run, with(Some(256), Some(1)));
    shop.asked(&other, "POST", "/v1/exec", &run);
    assert_eq!(
        shop.ask(&by_cpus, "DELETE", &format!("/v1/sandboxes/{first}"), "")
            .0,
        200
    );
    // A run gives back what it had.
    for key in [&by_memory, &by_cpus, &by_memory] {
        shop.asked(key, "POST", "/v1/exec", &run);
    }
    shop.made(&by_cpus, "third");
}

pub fn what_stands_in_a_path_is_told_as_all_failures_are() {
    let shop = Shop::open(&[]);
    let key = shop.key("acme", Role::Run);
    let id = shop.made(&key, "first");
    for bad in ["null", "-1", "4294967296", "1.5", "%00"] {
        for (method, rest) in [("GET", ""), ("GET", "/wait"), ("POST", "/signal")] {
            let path = format!("/v1/sandboxes/{id}/processes/{bad}{rest}");
            let (status, answer) = shop.ask(&key, method, &path, r#"{"signal": 15}"#);
            assert!(
                status == 400 && answer.contains("bad_request"),
                "{path}: {answer}"
            );
        }
    }
    // A list of an object's fields is none.
    let sandbox = format!("/v1/sandboxes/{id}");
    assert_eq!(shop.ask(&key, "PATCH", &sandbox, "[]").0, 400);
    // A build that a template never had is not there, and whole numbers may come with a point.
    let asked = json!({"template": TEMPLATE, "build": "other-1", "command": ["echo"]});
    assert_eq!(
        shop.ask(&key, "POST", "/v1/exec", &asked.to_string()).0,
        404
    );
    let signal = format!("/v1/sandboxes/{id}/processes/1/signal");
    assert_eq!(
        shop.ask(&key, "POST", &signal, r#"{"signal": 15.0}"#).0,
        404
    );
}

pub fn what_a_key_sends_and_gets_back_ends_somewhere() {
    let shop = Shop::open(&[]);
    let limits = Limits {
        output_bytes: Some(4),
        upload_bytes: Some(300),
        ..Limits::default()
    };
    let key = shop.limited("acme", Role::Run, limits);
    let run = json!({"template": TEMPLATE, "command": ["echo", "abcdefgh"]});
    let result = shop.asked(&key, "POST", "/v1/exec", &run);
    assert_eq!(
        (&result["stdout"], &result["truncated"]),
        (&json!("abcd"), &json!(true))
    );
    let short = json!({"template": TEMPLATE, "command": ["echo", "abcd"]});
    let result = shop.asked(&key, "POST", "/v1/exec", &short);
    assert_eq!(
        (&result["stdout"], &result["truncated"]),
        (&json!("abcd"), &json!(false))
    );
    let batch = json!({"executions": [run.clone()]});
    let results = shop.asked(&key, "POST", "/v1/exec/batch", &batch);
    assert_eq!(results["results"][0]["stdout"], "abcd");
    let body = run.to_string();
    let stream = format!(
        "POST /v1/exec HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\naccept: \
         application/x-ndjson\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let (status, answer) = raw(&mut TcpStream::connect(&shop.address).unwrap(), &stream);
    assert!(
        status == 200 && answer.contains("\"abcd\"") && !answer.contains("efgh"),
        "{answer}"
    );
    assert!(answer.contains("\"truncated\":true"), "{answer}");
    // Larger than what it may send: an object, and a file in pieces.
    let large = json!({"template": TEMPLATE, "command": ["echo", "x".repeat(300)]});
    let (status, answer) = shop.ask(&key, "POST", "/v1/exec", &large.to_string());
    assert!(
        status == 413 && answer.contains("too_large"),
        "{status} {answer}"
    );
    let id = shop.made(&key, "first");
    let put = |bytes: usize| {
        let piece = format!("{:x}\r\n{}\r\n", bytes / 2, "y".repeat(bytes / 2));
        let request = format!(
            "PUT /v1/sandboxes/{id}/files?path=/tmp/{id} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             authorization: Bearer {key}\r\ncontent-type: application/octet-stream\r\n\
             transfer-encoding: chunked\r\n\r\n{piece}{piece}0\r\n\r\n"
        );
        raw(&mut TcpStream::connect(&shop.address).unwrap(), &request)
    };
    let (status, answer) = put(302);
    assert!(
        status == 413 && answer.contains("too_large"),
        "{status} {answer}"
    );
    assert_eq!(put(300).0, 200);
    let _ = fs::remove_file(format!("/tmp/{id}"));
}
