//! The engine against zygote processes that are not what they should be: this test's own binary
//! plays them, without any VM.

#![allow(clippy::unwrap_used, reason = "a test")]

use rustix::net::{SendFlags, send};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use zygote_engine::*;
use zygote_protocol::{AgentMessage, FrameDecoder, HostMessage, encode};
use zygote_runner::control::{
    FromRunner, FromZygote, Load, ToZygote, Usage, decode, encode as encode_packet,
};
use zygote_runner::packet;

const MODE: &str = "ZYGOTE_TEST_ROLE";

/// Not a test of its own: the zygote process of the others.
#[test]
fn role() {
    let Ok(mode) = std::env::var(MODE) else {
        return;
    };
    let control = rustix::io::dup(rustix::stdio::stdin()).unwrap();
    let (bytes, _) = packet::receive(&control).unwrap();
    assert!(matches!(decode(&bytes).unwrap(), ToZygote::Load(_)));
    if mode == "refuse" {
        let message = "flipped bit".to_owned();
        tell(&control, &FromZygote::Refused { message });
        std::process::exit(0);
    }
    let loaded = FromZygote::Loaded {
        memory_bytes: 1,
        vcpus: 1,
        missing_walls: vec![],
    };
    tell(&control, &loaded);
    for number in 1.. {
        let (bytes, descriptors) = packet::receive(&control).unwrap();
        if bytes.is_empty() || mode == "vanish" {
            std::process::exit(0);
        }
        let Ok([agent, runner]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            panic!("two descriptors");
        };
        tell(&control, &FromZygote::Forked { pid: number });
        let mode = mode.clone();
        let control = control.try_clone().unwrap();
        std::thread::spawn(move || {
            play(&mode, number, UnixStream::from(agent), runner);
            let ended = FromZygote::Ended {
                pid: number,
                status: 9,
            };
            tell(&control, &ended);
        });
    }
}

fn tell(control: &OwnedFd, message: &FromZygote) {
    let bytes = encode_packet(message).unwrap();
    // The engine may be gone already.
    let _ = send(control, &bytes, SendFlags::NOSIGNAL);
}

struct Agent {
    stream: UnixStream,
    decoder: FrameDecoder,
}

impl Agent {
    fn hear(&mut self) -> Option<HostMessage> {
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return Some(message);
            }
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.decoder.extend(&bytes[..count]),
            }
        }
    }

    fn say(&mut self, message: &AgentMessage) {
        // The engine may have hung up.
        let _ = self.stream.write_all(&encode(message).unwrap());
    }

    fn activate(&mut self, sample: u8) {
        let random_sample = vec![sample; 32];
        self.say(&AgentMessage::Activated { random_sample });
    }

    fn print(&mut self, text: &[u8]) {
        let data = text.to_vec();
        self.say(&AgentMessage::Stdout { process: 1, data });
    }

    fn exit(&mut self, code: u8) {
        let status = ExitStatus::Code(code);
        self.say(&AgentMessage::Exited { process: 1, status });
    }
}

/// One runner and its guest, as the mode says.
fn play(mode: &str, number: u32, stream: UnixStream, control: OwnedFd) {
    let mut agent = Agent {
        stream,
        decoder: FrameDecoder::default(),
    };
    assert!(matches!(agent.hear(), Some(HostMessage::Activate(_))));
    assert!(matches!(agent.hear(), Some(HostMessage::Start(_))));
    match mode {
        "repeat" => agent.activate(7),
        "silent" => agent.print(b"leak"),
        "unable" => agent.say(&AgentMessage::ActivateFailed {
            message: "no entropy".into(),
        }),
        _ => agent.activate(number as u8),
    }
    match mode {
        "hang" => drop(agent.hear()),
        "garbage" => drop(agent.stream.write_all(&[0xff; 64])),
        "die" => return,
        "crash" => {
            let stopped = FromRunner::Stopped {
                reason: "the guest has crashed: triple fault".into(),
                console: "Oops".into(),
            };
            packet::send(&control, &encode_packet(&stopped).unwrap(), &[]).unwrap();
            return;
        }
        "flood" => (0..1000).for_each(|_| agent.print(&[b'x'; 50_000])),
        "echo" => {
            let mut total = 0;
            while let Some(HostMessage::Stdin { data, .. }) = agent.hear() {
                total += data.len();
            }
            agent.print(total.to_string().as_bytes());
        }
        _ => agent.print(format!("fork {number}").as_bytes()),
    }
    agent.exit(3);
    let measured = FromRunner::Usage(Usage {
        private_kib: 5,
        page_tables_kib: 1,
    });
    while let Ok((bytes, _)) = packet::receive(&control) {
        if bytes.is_empty() {
            return;
        }
        packet::send(&control, &encode_packet(&measured).unwrap(), &[]).unwrap();
    }
}

fn config(mode: &str) -> EngineConfig {
    let me = std::env::current_exe().unwrap();
    let role = format!("{MODE}={mode}");
    let words = ["env", &role].map(OsString::from);
    let arguments = ["role", "--exact", "--nocapture"].map(OsString::from);
    EngineConfig {
        command: words
            .into_iter()
            .chain([me.into()])
            .chain(arguments)
            .collect(),
        load: Load {
            snapshot: "/nowhere".into(),
            pieces: "/nowhere".into(),
            stamps: "/nowhere".into(),
        },
    }
}

fn request(stdin: Stdin, timeout: Option<Duration>) -> RunRequest {
    RunRequest {
        program: Program::Command(vec!["true".into()]),
        env: vec![],
        cwd: String::new(),
        stdin,
        line_buffered: false,
        timeout,
    }
}

async fn run_once(mode: &str, stdin: Stdin, timeout: Option<Duration>) -> (RunResult, Captured) {
    let zygote = Zygote::load(&config(mode)).await.unwrap();
    let result = run_on(&zygote, stdin, timeout).await;
    zygote.shut_down().await;
    result
}

async fn run_on(zygote: &Zygote, stdin: Stdin, timeout: Option<Duration>) -> (RunResult, Captured) {
    let (sender, events) = mpsc::channel(4);
    let running = run(zygote, request(stdin, timeout), sender);
    tokio::join!(running, capture(events, 1 << 20))
}

async fn failure(mode: &str) -> String {
    match run_once(mode, Stdin::Empty, None).await.0.outcome {
        Outcome::Failed(sentence) => sentence,
        other => panic!("{mode}: {other:?}"),
    }
}

#[tokio::test]
async fn a_run_gives_output_status_times_and_cost() {
    let (result, output) = run_once("well", Stdin::Empty, None).await;
    assert_eq!(result.outcome, Outcome::Exited(ExitStatus::Code(3)));
    assert_eq!(output.stdout, b"fork 1");
    assert_eq!(result.usage.unwrap().private_kib, 5);
    assert!(result.fork_time.unwrap() + result.exec_time.unwrap() <= result.total_time * 2);
}

#[tokio::test]
async fn a_refused_snapshot_is_refused_in_its_own_words() {
    let refused = Zygote::load(&config("refuse")).await.err().unwrap();
    assert_eq!(refused.to_string(), "flipped bit");
}

#[tokio::test]
async fn a_fork_that_cannot_prove_who_it_is_is_not_used() {
    assert!(failure("unable").await.contains("no entropy"));
    let (result, output) = run_once("silent", Stdin::Empty, None).await;
    assert!(matches!(result.outcome, Outcome::Failed(_)));
    assert!(output.stdout.is_empty());
}

#[tokio::test]
async fn a_repeated_random_sample_is_noticed() {
    let zygote = Zygote::load(&config("repeat")).await.unwrap();
    let (first, _) = run_on(&zygote, Stdin::Empty, None).await;
    assert_eq!(first.outcome, Outcome::Exited(ExitStatus::Code(3)));
    let (second, output) = run_on(&zygote, Stdin::Empty, None).await;
    let Outcome::Failed(sentence) = second.outcome else {
        panic!("{second:?}");
    };
    assert!(sentence.contains("repeat") && output.stdout.is_empty());
    zygote.shut_down().await;
}

#[tokio::test]
async fn every_death_has_its_sentence() {
    assert!(failure("garbage").await.contains("nonsense"));
    assert!(failure("die").await.contains("signal 9"));
    let crash = failure("crash").await;
    assert!(crash.contains("triple fault") && crash.contains("Oops"));
    assert!(failure("vanish").await.contains("zygote process has ended"));
}

#[tokio::test]
async fn a_program_that_hangs_is_ended_at_its_limit() {
    let limit = Some(Duration::from_millis(50));
    let (result, _) = run_once("hang", Stdin::Empty, limit).await;
    assert_eq!(result.outcome, Outcome::TimedOut);
}

#[tokio::test]
async fn output_without_end_is_cut_and_the_program_goes_on() {
    let (result, output) = run_once("flood", Stdin::Empty, None).await;
    assert_eq!(result.outcome, Outcome::Exited(ExitStatus::Code(3)));
    assert_eq!((output.stdout.len(), output.truncated), (1 << 20, true));
}

#[tokio::test]
async fn ten_megabytes_of_input_arrive_whole() {
    let (sender, chunks) = mpsc::channel(2);
    let feed = tokio::spawn(async move {
        for _ in 0..10 {
            sender.send(vec![1; 1 << 20]).await.unwrap();
        }
    });
    let (_, output) = run_once("echo", Stdin::Stream(chunks), None).await;
    feed.await.unwrap();
    assert_eq!(output.stdout, (10 << 20).to_string().as_bytes());
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn fifty_at_once_and_many_in_a_row_leave_nothing_open() {
    let zygote = Arc::new(Zygote::load(&config("well")).await.unwrap());
    let mut runs = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let zygote = Arc::clone(&zygote);
        runs.spawn(async move { run_on(&zygote, Stdin::Empty, None).await.1.stdout });
    }
    let mut outputs = runs.join_all().await;
    outputs.sort();
    outputs.dedup();
    assert_eq!(outputs.len(), 50);
    let before = open_descriptors();
    for _ in 0..150 {
        run_on(&zygote, Stdin::Empty, None).await;
    }
    // Other tests of this process come and go; a leak would be 300 or more.
    assert!(open_descriptors() < before + 100);
    Arc::into_inner(zygote).unwrap().shut_down().await;
}

#[tokio::test]
async fn a_killed_run_lets_the_zygote_live() {
    let zygote = Zygote::load(&config("hang")).await.unwrap();
    let (sender, mut events) = mpsc::channel(4);
    {
        let running = run(&zygote, request(Stdin::Empty, None), sender);
        tokio::select! {
            result = running => panic!("{result:?}"),
            event = events.recv() => assert_eq!(event, Some(Event::Activated)),
        }
    }
    let limit = Some(Duration::from_millis(10));
    let (again, _) = run_on(&zygote, Stdin::Empty, limit).await;
    assert_eq!(again.outcome, Outcome::TimedOut);
    zygote.shut_down().await;
}
