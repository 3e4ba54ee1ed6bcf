//! The daemon as its clients see it: real processes, real sockets, and zygotes without any VM. This
//! program plays the daemon and its zygotes too.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "daemon/batch.rs"]
mod batch;
#[path = "support/fake.rs"]
mod fake;
#[path = "support/home.rs"]
mod home;

use batch::a_batch_has_a_result_for_each_in_their_order;
use home::*;
use libtest_mimic::{Arguments, Trial};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::sync::mpsc;
use zygote_api::*;
use zygote_daemon::{Client, Embedded, Starter};

const CONNECT_VERB: &str = "--connect";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some(ZYGOTE_VERB) => fake::zygote(),
        Some(SERVE_VERB) => return daemon(&words[2..]),
        Some(HOLDER_VERB) => return holder(&words[2..]),
        Some(CONNECT_VERB) => return connect(Path::new(&words[2])),
        _ => {}
    }
    let tests: Vec<Trial> = TESTS
        .iter()
        .map(|(name, check)| {
            Trial::test(*name, move || {
                check();
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

type Check = fn();
macro_rules! tests {
    ($($name:ident),* $(,)?) => { const TESTS: &[(&str, Check)] = &[$((stringify!($name), $name)),*]; };
}
tests!(
    a_run_over_http_gives_output_and_status,
    what_cannot_be_asked_is_refused_with_its_code,
    a_batch_has_a_result_for_each_in_their_order,
    files_and_input_go_in_as_lines,
    a_signal_reaches_the_program,
    a_client_that_goes_away_ends_its_run,
    a_slow_reader_slows_only_itself,
    who_finds_the_line_full_is_told_when_to_come_again,
    two_that_start_at_once_end_up_as_one,
    a_killed_daemon_is_replaced_without_a_word,
    another_user_is_kept_out_by_the_sockets_mode_and_by_the_engine,
    another_build_is_replaced_when_it_is_idle_and_left_alone_when_not,
    a_daemon_without_work_ends_by_itself_and_leaves_nothing,
    stop_waits_for_what_runs_and_stop_now_does_not,
    a_killed_zygote_is_replaced_by_the_next_run,
    a_sandbox_that_dies_ends_its_run_alone,
    a_log_that_cannot_be_written_is_told_with_a_remedy,
    a_full_disk_costs_the_log_and_nothing_else,
    what_listens_there_and_is_no_engine_is_told,
    tcp_is_for_loopback_and_not_for_pages_in_a_browser,
    a_build_that_dies_is_told_and_a_template_is_removed,
    an_embedded_engine_leaves_nothing,
    a_thousand_runs_leave_nothing,
);

fn a_run_over_http_gives_output_and_status() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        echo(&client, "first").await;
        let ask = |headers: &str, body: &str| {
            let mut stream = UnixStream::connect(home.socket()).unwrap();
            raw(&mut stream, &post("/v1/exec", headers, body))
        };
        let body = r#"{"template":"fake","command":["bytes"]}"#;
        let (status, answer) = ask("", body);
        assert_eq!(status, 200, "{answer}");
        let result: ExecResult = serde_json::from_str(
            answer
                .split_once("\n{")
                .map(|(_, b)| format!("{{{b}"))
                .unwrap()
                .trim(),
        )
        .unwrap();
        assert_eq!(result.stdout_base64.as_deref(), Some("/wB4"));
        assert_eq!((result.exit_code, result.host.as_str()), (3, "kvm"));
        let (_, answer) = ask("accept: text/event-stream\r\n", body);
        assert!(answer.contains("data: {\"type\":\"ready\""), "{answer}");
        assert!(answer.contains("data: {\"type\":\"result\""), "{answer}");
        let (_, answer) = ask("accept: application/x-ndjson\r\n", body);
        assert!(
            answer.contains("{\"type\":\"stdout\",\"data\":{\"base64\""),
            "{answer}"
        );
    });
}

fn what_cannot_be_asked_is_refused_with_its_code() {
    let home = Home::new();
    let _client = runtime().block_on(started(&home, &[]));
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let exec = |body: &str| post("/v1/exec", "", body);
    let lines = |body: &str| post("/v1/exec", "content-type: application/x-ndjson\r\n", body);
    let cases = [
        (get("/nope"), 404, "not_found"),
        (get("/v1/exec"), 405, "method_not_allowed"),
        (get("/v1/templates/nope"), 404, "template_not_found"),
        (get("/v1/templates/..%2f..%2fetc"), 400, "bad_request"),
        (exec(""), 400, "bad_request"),
        // Nothing is all that may be left out.
        (post("/v1/sandboxes", "", ""), 404, "template_not_found"),
        (exec("{"), 400, "bad_request"),
        (exec("[]"), 400, "bad_request"),
        (exec(r#"{"cod":"1"}"#), 400, "cod"),
        (
            exec(r#"{"code":"1","template":"nope"}"#),
            404,
            "template_not_found",
        ),
        (
            exec(r#"{"code":"1","template":"../x"}"#),
            400,
            "bad_request",
        ),
        (
            exec(r#"{"code":"1","template":"fake","build":"fake-/../../x"}"#),
            400,
            "bad_request",
        ),
        (exec(r#"{"template":"fake"}"#), 400, "exactly one of"),
        (
            exec(r#"{"code":"1","template":"fake","timeout_seconds":-1}"#),
            400,
            "timeout_seconds",
        ),
        (
            exec(r#"{"code":{"base64":"?"},"template":"fake"}"#),
            400,
            "base64",
        ),
        (
            exec(r#"{"code":"1","template":"fake","env":{"A=B":"c"}}"#),
            400,
            "env",
        ),
        (
            post("/v1/exec/nobody/signal", "", r#"{"signal":15}"#),
            404,
            "sandbox_not_found",
        ),
        (
            post("/v1/exec/nobody/signal", "", r#"{"signal":0}"#),
            400,
            "signal",
        ),
        (post("/v1/stop", "", r#"{"never":true}"#), 400, "never"),
        (
            lines(
                "{\"command\":[\"cat\"],\"template\":\"fake\"}\n{\"type\":\"stdin\",\"data\":\"x\"}\n",
            ),
            400,
            "stdin_stream",
        ),
        (
            lines(
                "{\"command\":[\"cat\"],\"template\":\"fake\",\"stdin_stream\":true}\nnonsense\n",
            ),
            400,
            "bad_request",
        ),
    ];
    for (request, expected, word) in cases {
        let mut stream = UnixStream::connect(home.socket()).unwrap();
        let (status, answer) = raw(&mut stream, &request);
        assert_eq!(status, expected, "{request}\n{answer}");
        assert!(answer.contains(word), "{request}\n{answer}");
        assert!(answer.contains("\"request_id\""), "{request}\n{answer}");
    }
    // What is no HTTP at all ends its own connection.
    let mut stream = UnixStream::connect(home.socket()).unwrap();
    stream.write_all(&[0xff; 3000]).unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
    runtime().block_on(async {
        echo(&Client::connect(&home.socket()).await.unwrap(), "alive").await;
    });
}

fn files_and_input_go_in_as_lines() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        let (sender, input) = mpsc::channel(4);
        let request = ExecRequest {
            stdin_stream: true,
            ..command(&["cat"])
        };
        let mut events = client.exec(&request, Some(input)).await.unwrap();
        let mut sent: Vec<u8> = Vec::new();
        let feeding = async {
            for number in 0..40_u8 {
                let data = vec![number; 100_000];
                sent.extend(&data);
                sender
                    .send(ExecInput::Stdin { data: data.into() })
                    .await
                    .unwrap();
            }
            sender.send(ExecInput::StdinEnd).await.unwrap();
        };
        let (ended, ()) = tokio::join!(end(&mut events), feeding);
        assert_eq!(ended.unwrap().0, sent);
        let (sender, input) = mpsc::channel(4);
        let request = ExecRequest {
            files_stream: true,
            files: vec![SentFile {
                path: "whole".into(),
                content: "1".into(),
                mode: 0o600,
            }],
            ..command(&["files"])
        };
        let feeding = async {
            let (path, mode) = ("pieces".into(), 0o755);
            sender.send(ExecInput::File { path, mode }).await.unwrap();
            let data = vec![7; 150_000].into();
            sender.send(ExecInput::Data { data }).await.unwrap();
            sender.send(ExecInput::Start).await.unwrap();
        };
        let asking = async { end(&mut client.exec(&request, Some(input)).await.unwrap()).await };
        let (ended, ()) = tokio::join!(asking, feeding);
        let told = String::from_utf8(ended.unwrap().0).unwrap();
        let kinds: Vec<&str> = told
            .lines()
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        assert_eq!(kinds, ["File", "Data", "File", "Data", "Data", "Data"]);
    });
}

fn a_signal_reaches_the_program() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        let mut events = client.exec(&command(&["wait"]), None).await.unwrap();
        let id = first_output(&mut events).await;
        client.signal(&id, 15).await.unwrap();
        let (output, _) = end(&mut events).await.unwrap();
        assert_eq!(output, b" 15");
        let gone = client.signal(&id, 15).await.unwrap_err();
        assert_eq!(gone.failure().unwrap().code, ErrorCode::SandboxNotFound);
    });
}

fn a_client_that_goes_away_ends_its_run() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        // By HTTP/2: one stream of many.
        let mut events = client.exec(&command(&["wait"]), None).await.unwrap();
        first_output(&mut events).await;
        drop(events);
        until_status(&client, "the run was given up", |status| {
            status.runs.cancelled == 1 && status.runs.running == 0
        })
        .await;
        // By HTTP/1.1, also while nothing has been answered yet.
        for headers in ["", "accept: application/x-ndjson\r\n"] {
            let mut stream = UnixStream::connect(home.socket()).unwrap();
            let body = r#"{"template":"fake","command":["wait"]}"#;
            let request = post("/v1/exec", headers, body);
            stream.write_all(request.as_bytes()).unwrap();
            until_status(&client, "it runs", |status| status.runs.running == 1).await;
            drop(stream);
            until_status(&client, "it was given up", |status| {
                status.runs.running == 0
            })
            .await;
        }
        echo(&client, "goes on").await;
    });
}

fn a_slow_reader_slows_only_itself() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        let mut slow = Vec::new();
        // Several windows full, on the same connection.
        for _ in 0..4 {
            let mut events = client.exec(&command(&["flood"]), None).await.unwrap();
            first_output(&mut events).await;
            slow.push(events);
        }
        for _ in 0..5 {
            echo(&client, "quick").await;
        }
        until_status(&client, "they wait", |status| status.runs.running == 4).await;
        drop(slow);
        until_status(&client, "they end", |status| status.runs.running == 0).await;
    });
}

fn who_finds_the_line_full_is_told_when_to_come_again() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &["running=1", "waiting=1"]).await;
        let mut first = client.exec(&command(&["wait"]), None).await.unwrap();
        let id = first_output(&mut first).await;
        let second = async { echo(&client, "second").await };
        let third = async {
            until_status(&client, "one waits", |status| status.runs.waiting == 1).await;
            let refused = client.exec(&command(&["echo", "third"]), None).await;
            let refused = refused.err().unwrap();
            let failure = refused.failure().unwrap();
            assert_eq!(failure.code, ErrorCode::Busy);
            assert_eq!(failure.retry_after_seconds, Some(1));
            let mut stream = UnixStream::connect(home.socket()).unwrap();
            let body = r#"{"template":"fake","command":["echo","x"]}"#;
            let (status, answer) = raw(&mut stream, &post("/v1/exec", "", body));
            assert!(
                status == 503 && answer.contains("retry-after: 1"),
                "{answer}"
            );
            client.signal(&id, 9).await.unwrap();
        };
        tokio::join!(second, third);
        assert_eq!(client.status().await.unwrap().runs.refused, 2);
    });
}

fn two_that_start_at_once_end_up_as_one() {
    let home = Home::new();
    let pids: Vec<u32> = std::thread::scope(|scope| {
        let one = || {
            runtime().block_on(async {
                let client = started(&home, &[]).await;
                echo(&client, "both").await;
                client.health().await.unwrap().pid
            })
        };
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(one)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
}

fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// Processes that a daemon's only thread has started.
fn children(parent: u32) -> Vec<u32> {
    started_by(&format!("{parent}/task/{parent}"))
}

fn started_by(thread: &str) -> Vec<u32> {
    let path = format!("/proc/{thread}/children");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_none_or(|(_, rest)| rest.starts_with('Z'))
}

fn a_killed_daemon_is_replaced_without_a_word() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        let mut events = client.exec(&command(&["wait"]), None).await.unwrap();
        first_output(&mut events).await;
        let pid = client.health().await.unwrap().pid;
        let zygotes = children(pid);
        assert!(!zygotes.is_empty());
        kill(pid, Signal::KILL);
        // Whoever waited is told.
        let error = end(&mut events).await.unwrap_err().to_string();
        assert!(
            error.contains("broke off") && error.contains("again"),
            "{error}"
        );
        until("its processes end", || {
            zygotes.iter().all(|pid| is_gone(*pid))
        });
        let again = started(&home, &[]).await;
        echo(&again, "new").await;
        assert_ne!(again.health().await.unwrap().pid, pid);
    });
}

/// Asks an engine how it is.
fn connect(socket: &Path) -> ExitCode {
    let asked = runtime().block_on(async { Client::connect(socket).await?.health().await });
    match asked {
        Ok(health) => println!("{health:?}"),
        Err(error) => println!("{error}"),
    }
    ExitCode::SUCCESS
}

fn another_user_is_kept_out_by_the_sockets_mode_and_by_the_engine() {
    if !rustix::process::geteuid().is_root() {
        println!("not checked: only root can become another user");
        return;
    }
    let home = Home::new();
    let client = runtime().block_on(started(&home, &[]));
    let open = |path: &Path, mode: u32| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    let program = home.folder.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    open(home.folder.path(), 0o755);
    let ask = || {
        let output = std::process::Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .args([
                program.as_os_str(),
                CONNECT_VERB.as_ref(),
                home.socket().as_os_str(),
            ])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let kept_out = ask();
    assert!(kept_out.contains("denied"), "{kept_out}");
    // As if somebody had changed the modes.
    open(home.socket().parent().unwrap(), 0o755);
    open(&home.socket(), 0o666);
    let refused = ask();
    assert!(refused.contains("broke off"), "{refused}");
    assert!(
        home.said().contains("refused a client of user 65534"),
        "{}",
        home.said()
    );
    drop(client);
}

fn another_build_is_replaced_when_it_is_idle_and_left_alone_when_not() {
    let home = Home::new();
    let other = home.folder.path().join("other-build");
    fs::copy(std::env::current_exe().unwrap(), &other).unwrap();
    runtime().block_on(async {
        let old = home.starter_with(other, &[]);
        // It is not ours, so this one never gets it.
        let mut said = Vec::new();
        let _ = tokio::time::timeout(
            Duration::from_millis(1500),
            old.client(&mut |sentence| said.push(sentence.to_owned())),
        )
        .await;
        until("the other build listens", || home.socket().exists());
        let client = Client::connect(&home.socket()).await.unwrap();
        let pid = client.health().await.unwrap().pid;
        let mut events = client.exec(&command(&["wait"]), None).await.unwrap();
        let id = first_output(&mut events).await;
        let busy = home.starter(&[]).client(&mut |_| {}).await;
        let busy = busy.err().unwrap().to_string();
        assert!(
            busy.contains("has work") && busy.contains("zygote stop"),
            "{busy}"
        );
        client.signal(&id, 15).await.unwrap();
        end(&mut events).await.unwrap();
        until_status(&client, "it is idle", |status| status.runs.running == 0).await;
        drop((events, client));
        let mut said = Vec::new();
        let starter = home.starter(&[]);
        let mut say = |sentence: &str| said.push(sentence.to_owned());
        let new = starter.client(&mut say).await.unwrap();
        assert_ne!(new.health().await.unwrap().pid, pid);
        assert!(
            said.len() == 1 && said[0].contains("another build"),
            "{said:?}"
        );
        echo(&new, "new").await;
    });
}

fn a_daemon_without_work_ends_by_itself_and_leaves_nothing() {
    let home = Home::new();
    let pid = runtime().block_on(async {
        let client = started(&home, &["idle_ms=300"]).await;
        // Work keeps it.
        let mut events = client.exec(&command(&["wait"]), None).await.unwrap();
        let id = first_output(&mut events).await;
        tokio::time::sleep(Duration::from_millis(900)).await;
        client.signal(&id, 15).await.unwrap();
        end(&mut events).await.unwrap();
        client.health().await.unwrap().pid
    });
    until("it has gone", || is_gone(pid));
    let left: Vec<_> = fs::read_dir(home.socket().parent().unwrap())
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(home.said().contains("nothing to do"), "{}", home.said());
}

fn stop_waits_for_what_runs_and_stop_now_does_not() {
    let home = Home::new();
    runtime().block_on(async {
        for now in [false, true] {
            let client = started(&home, &[]).await;
            let pid = client.health().await.unwrap().pid;
            let mut events = client.exec(&command(&["wait"]), None).await.unwrap();
            let id = first_output(&mut events).await;
            let stop = StopRequest {
                now,
                if_idle: false,
            };
            assert_eq!(client.stop(stop).await.unwrap().running, 1);
            if now {
                assert!(end(&mut events).await.is_err());
            } else {
                let refused = client
                    .exec(&command(&["echo", "x"]), None)
                    .await
                    .err()
                    .unwrap();
                assert_eq!(refused.failure().unwrap().code, ErrorCode::Stopping);
                client.signal(&id, 15).await.unwrap();
                assert_eq!(end(&mut events).await.unwrap().0, b" 15");
            }
            until("it has gone", || is_gone(pid));
        }
    });
}

fn a_killed_zygote_is_replaced_by_the_next_run() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        echo(&client, "before").await;
        let pid = client.health().await.unwrap().pid;
        for zygote in children(pid) {
            kill(zygote, Signal::KILL);
        }
        // A run that comes before the engine has noticed may still get a fork of it, which dies.
        until("the engine has noticed", || children(pid).is_empty());
        echo(&client, "after").await;
    });
}

fn a_sandbox_that_dies_ends_its_run_alone() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        let mut other = client.exec(&command(&["wait"]), None).await.unwrap();
        let id = first_output(&mut other).await;
        let mut one = client.exec(&command(&["die"]), None).await.unwrap();
        let (_, result) = end(&mut one).await.unwrap();
        assert_eq!(result.exit_code, 125);
        assert!(result.error.unwrap().message.contains("has died"));
        client.signal(&id, 15).await.unwrap();
        assert_eq!(end(&mut other).await.unwrap().1.exit_code, 3);
    });
}

fn a_log_that_cannot_be_written_is_told_with_a_remedy() {
    let home = Home::new();
    let starter = Starter {
        log: "/proc/nowhere/engine.log".into(),
        ..home.starter(&[])
    };
    let error = runtime()
        .block_on(starter.client(&mut silent))
        .err()
        .unwrap();
    let error = format!("{error:#}");
    assert!(
        error.contains("/proc/nowhere") && error.contains("--no-daemon"),
        "{error}"
    );
}

fn a_full_disk_costs_the_log_and_nothing_else() {
    let home = Home::new();
    runtime().block_on(async {
        let starter = Starter {
            // Every write: no space left on device.
            log: "/dev/full".into(),
            ..home.starter(&[])
        };
        let client = starter.client(&mut silent).await.unwrap();
        echo(&client, "all the same").await;
    });
}

fn what_listens_there_and_is_no_engine_is_told() {
    // One that says nothing is gone before it is asked, or while it is.
    for word in ["SSH-2.0-something\r\n", ""] {
        let home = Home::new();
        fs::create_dir_all(home.socket().parent().unwrap()).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(home.socket()).unwrap();
        let others = std::thread::spawn(move || {
            // Us, and the engine that we start.
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.write_all(word.as_bytes());
            }
        });
        let error = runtime().block_on(home.starter(&[]).client(&mut silent));
        let error = error.err().unwrap().to_string();
        assert!(
            error.contains("no engine") && error.contains("--socket"),
            "{error}"
        );
        others.join().unwrap();
        fs::remove_file(home.socket()).unwrap();
    }
}

fn tcp_is_for_loopback_and_not_for_pages_in_a_browser() {
    let home = Home::new();
    runtime().block_on(async { started(&home, &["listen=127.0.0.1:0"]).await });
    let address = fs::read_to_string(home.folder.path().join("address")).unwrap();
    let ask = |headers: &str, host: &str| {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        let body = r#"{"template":"fake","command":["echo","hi"]}"#;
        let request = post("/v1/exec", headers, body).replace("localhost", host);
        raw(&mut stream, &request)
    };
    let json = "content-type: application/json\r\n";
    let (status, answer) = ask(json, &address);
    assert!(status == 200 && answer.contains("hi"), "{answer}");
    assert_eq!(ask("content-type: text/plain\r\n", &address).0, 400);
    assert_eq!(ask(json, "evil.example").0, 403);
}

fn a_build_that_dies_is_told_and_a_template_is_removed() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        echo(&client, "loaded").await;
        let request = BuildRequest {
            recipe: "python".to_owned(),
            ..BuildRequest::default()
        };
        let failed = client.build(&request).await.err().unwrap();
        let failure = failed.failure().unwrap();
        assert_eq!(failure.code, ErrorCode::Internal);
        assert!(failure.message.contains("builds"), "{failure:?}");
        assert_eq!(client.status().await.unwrap().templates.len(), 1);
        assert_eq!(
            client
                .remove_template(TEMPLATE, false)
                .await
                .unwrap()
                .template,
            TEMPLATE
        );
        let gone = client
            .exec(&command(&["echo", "x"]), None)
            .await
            .err()
            .unwrap();
        assert_eq!(gone.failure().unwrap().code, ErrorCode::TemplateNotFound);
        until_status(&client, "it is unloaded", |status| {
            status.templates.is_empty()
        })
        .await;
    });
}

fn an_embedded_engine_leaves_nothing() {
    let home = Home::new();
    runtime().block_on(async {
        let embedded = Embedded::start(config(home.folder.path(), &[]))
            .await
            .unwrap();
        echo(&embedded.client, "in here").await;
        assert!(!started_by("thread-self").is_empty());
        embedded.shut_down().await;
    });
    assert!(started_by("thread-self").iter().all(|pid| is_gone(*pid)));
    assert!(!home.socket().exists());
}

/// Descriptors and resident KiB of a process.
fn belongings(pid: u32) -> (usize, u64) {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    (
        descriptors,
        line.split_whitespace().nth(1).unwrap().parse().unwrap(),
    )
}

fn a_thousand_runs_leave_nothing() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &[]).await;
        let pid = client.health().await.unwrap().pid;
        let idle = |status: &Status| {
            let pool = status.templates.first();
            status.runs.running == 0 && pool.is_some_and(|pool| pool.idle >= 1)
        };
        let mut seen = Vec::new();
        for hundred in 0..11 {
            for _ in 0..100 {
                echo(&client, "again").await;
            }
            until_status(&client, "it rests", idle).await;
            if hundred == 0 || hundred == 10 {
                seen.push(belongings(pid));
            }
        }
        let status = client.status().await.unwrap();
        assert_eq!((status.runs.ended, status.runs.cancelled), (1100, 0));
        let ((fds, kib), (fds_later, kib_later)) = (seen[0], seen[1]);
        // A second fork may wait.
        assert!(fds_later <= fds + 6, "{seen:?}");
        assert!(kib_later <= kib + kib / 20 + 512, "{seen:?}");
    });
}
