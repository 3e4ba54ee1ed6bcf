//! The engine against zygote processes that are not what they should be: this test's own binary
//! plays them, without any VM.

#![allow(clippy::unwrap_used, reason = "a test")]

use rustix::net::{SendFlags, send};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use zygote_engine::*;
use zygote_protocol::{AgentMessage, FrameDecoder, HostMessage, encode};
use zygote_runner::control::{
    FromRunner, FromZygote, Load, PACKET_MAX_BYTES, Spent, ToZygote, decode,
    encode as encode_packet,
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
    let mut bytes = [0; PACKET_MAX_BYTES];
    let (length, _) = packet::receive(&control, &mut bytes).unwrap();
    assert!(matches!(
        decode(&bytes[..length]).unwrap(),
        ToZygote::Load(_)
    ));
    if mode == "refuse" {
        let message = "flipped bit".to_owned();
        tell(&control, &FromZygote::Refused { message });
        std::process::exit(0);
    }
    let loaded = FromZygote::Loaded {
        memory_bytes: 1,
        vcpus: 1,
        missing_walls: walls(&mode),
    };
    tell(&control, &loaded);
    if mode == "deaf" {
        std::thread::sleep(Duration::from_secs(1000));
    }
    // Where there are too many for a process each.
    let one = exited();
    for number in 1.. {
        let (length, descriptors) = packet::receive(&control, &mut bytes).unwrap();
        if length == 0 || mode == "vanish" {
            std::process::exit(0);
        }
        let Ok([agent, runner]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            panic!("two descriptors");
        };
        let forked = encode_packet(&FromZygote::Forked { pid: number }).unwrap();
        if mode == "burst" {
            // Blocks while the engine takes nothing, as a zygote does.
            packet::send(&control, &forked, &[one.as_fd()]).unwrap();
            drop((agent, runner));
            tell(
                &control,
                &FromZygote::Ended {
                    pid: number,
                    status: 0,
                    spent: Spent::default(),
                },
            );
            continue;
        }
        // A process that the engine can measure, and ends.
        let mut measured = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = pidfd_open(Pid::from_child(&measured), PidfdFlags::empty()).unwrap();
        packet::send(&control, &forked, &[process.as_fd()]).unwrap();
        let mode = mode.clone();
        let control = control.try_clone().unwrap();
        std::thread::spawn(move || {
            play(&mode, number, UnixStream::from(agent), runner);
            let ended = FromZygote::Ended {
                pid: number,
                status: 9,
                spent: Spent::default(),
            };
            // The engine may have ended it.
            let _ = measured.kill();
            measured.wait().unwrap();
            tell(&control, &ended);
        });
    }
}

fn walls(mode: &str) -> Vec<MissingWall> {
    let wall = |wall: &str, is_main| MissingWall {
        wall: wall.into(),
        why: "EPERM".into(),
        is_main,
    };
    match mode {
        "exposed" => vec![wall("mount namespace", true)],
        "less" => vec![wall("limit of core files", false)],
        _ => vec![],
    }
}

/// The pidfd of a process that has ended.
fn exited() -> OwnedFd {
    let mut child = Command::new("true").spawn().unwrap();
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    child.wait().unwrap();
    process
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
        self.say(&AgentMessage::Started { process: 1, pid: 2 });
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
    agent.stream.set_nonblocking(false).unwrap();
    if mode != "stuck" {
        let parked = encode_packet(&FromRunner::Parked).unwrap();
        // The engine may have let go already.
        let _ = packet::send(&control, &parked, &[]);
    }
    if agent.hear().is_none() {
        return;
    }
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
        "gives" if number == 2 => {
            // Until it is killed, for its files.
            while !matches!(
                agent.hear(),
                Some(HostMessage::Signal { signal: 9, .. }) | None
            ) {}
        }
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
    give(&mut agent, mode);
    // Until the engine lets go.
    let _ = packet::receive(&control, &mut [0]);
}

/// Gives files, as the mode says.
fn give(agent: &mut Agent, mode: &str) {
    let got = |agent: &mut Agent, got| agent.say(&AgentMessage::Got(got));
    if !matches!(mode, "gives" | "gives-half") {
        return;
    }
    loop {
        let Some(HostMessage::Get { path }) = agent.hear() else {
            return;
        };
        if path == b"nope" {
            let message = "no such file".into();
            got(agent, Got::Failed { message });
            continue;
        }
        let is_half = mode == "gives-half";
        let (path, mode, bytes) = (vec![], 0o644, 3);
        got(agent, Got::File { path, mode, bytes });
        let data = b"abc".to_vec();
        got(agent, Got::Data { data });
        if is_half {
            return drop(agent.stream.shutdown(std::net::Shutdown::Both));
        }
        got(agent, Got::End);
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
            group: None,
        },
        admission: Admission::new(Budget::default()),
        allow_missing_walls: false,
        patience: PATIENCE,
    }
}

fn request(stdin: Stdin, timeout: Option<Duration>) -> RunRequest {
    RunRequest {
        program: Program::Command(vec![b"true".to_vec()]),
        env: vec![],
        cwd: String::new(),
        stdin,
        buffering: Buffering::Full,
        gets: Vec::new(),
        puts: None,
        signals: None,
        timeout,
        measure: true,
    }
}

/// What a program has written.
#[derive(Debug, Default)]
struct Captured {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    got: Vec<(usize, Got)>,
}

async fn capture(mut events: mpsc::Receiver<Event>) -> Captured {
    let mut captured = Captured::default();
    while let Some(event) = events.recv().await {
        match event {
            Event::Activated { .. } => {}
            Event::Stdout(data) => captured.stdout.extend(data),
            Event::Stderr(data) => captured.stderr.extend(data),
            Event::Got { index, got } => captured.got.push((index, got)),
        }
    }
    captured
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
    tokio::join!(running, capture(events))
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
    assert!(result.usage.unwrap().private_kib > 0);
    assert!(result.fork_time <= result.first_output_time);
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

async fn got_of(zygote: &Zygote, timeout: Option<Duration>) -> (RunResult, Vec<(usize, Got)>) {
    let (sender, events) = mpsc::channel(4);
    let request = RunRequest {
        gets: vec![b"a".to_vec(), b"nope".to_vec()],
        ..request(Stdin::Empty, timeout)
    };
    let running = run(zygote, request, sender);
    let (result, captured) = tokio::join!(running, capture(events));
    (result, captured.got)
}

#[tokio::test]
async fn files_come_after_the_end_and_after_the_time_limit_too() {
    let zygote = Zygote::load(&config("gives")).await.unwrap();
    let message = "no such file".into();
    let data = b"abc".to_vec();
    let (path, mode, bytes) = (vec![], 0o644, 3);
    let expected = vec![
        (0, Got::File { path, mode, bytes }),
        (0, Got::Data { data }),
        (0, Got::End),
        (1, Got::Failed { message }),
    ];
    let (result, got) = got_of(&zygote, None).await;
    assert_eq!(result.outcome, Outcome::Exited(ExitStatus::Code(3)));
    assert_eq!(got, expected);
    let limit = Some(Duration::from_millis(50));
    let (result, got) = got_of(&zygote, limit).await;
    assert_eq!(result.outcome, Outcome::TimedOut);
    assert_eq!(got, expected);
    zygote.shut_down().await;
}

#[tokio::test]
async fn a_sandbox_that_dies_while_it_gives_is_told_and_the_program_has_ended_all_the_same() {
    let zygote = Zygote::load(&config("gives-half")).await.unwrap();
    let (result, got) = got_of(&zygote, None).await;
    zygote.shut_down().await;
    assert_eq!(result.outcome, Outcome::Exited(ExitStatus::Code(3)));
    let failed = |index| {
        got.iter()
            .any(|(of, got)| *of == index && matches!(got, Got::Failed { .. }))
    };
    assert!(failed(0) && failed(1), "{got:?}");
}

#[tokio::test]
async fn much_output_comes_whole() {
    let (result, output) = run_once("flood", Stdin::Empty, None).await;
    assert_eq!(result.outcome, Outcome::Exited(ExitStatus::Code(3)));
    assert_eq!(output.stdout.len(), 50_000_000);
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
            event = events.recv() => assert!(matches!(event, Some(Event::Activated { .. }))),
        }
    }
    let limit = Some(Duration::from_millis(10));
    let (again, _) = run_on(&zygote, Stdin::Empty, limit).await;
    assert_eq!(again.outcome, Outcome::TimedOut);
    zygote.shut_down().await;
}

fn pool_of(zygote: Zygote, idle_min: usize, idle_max: usize) -> Pool {
    let config = PoolConfig {
        idle_min,
        idle_max,
        drain_after: Duration::from_millis(50),
        ..PoolConfig::default()
    };
    Pool::new(zygote, config, RunKind::Command)
}

async fn run_pooled(pool: &Pool) -> Vec<u8> {
    let (sender, events) = mpsc::channel(4);
    let running = pool.run(request(Stdin::Empty, None), sender);
    let (result, output) = tokio::join!(running, capture(events));
    assert_eq!(result.outcome, Outcome::Exited(ExitStatus::Code(3)));
    output.stdout
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let patience = Duration::from_secs(60);
    let waiting = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(patience, waiting).await;
    assert!(waited.is_ok(), "not seen: {what}");
}

#[tokio::test]
async fn a_pool_gives_each_request_a_fork_of_its_own_and_refills() {
    let zygote = Zygote::load(&config("well")).await.unwrap();
    let pool = pool_of(zygote, 2, 8);
    pool.filled(2).await;
    assert_eq!((pool.stats().idle, pool.stats().made), (2, 2));
    let mut outputs = Vec::new();
    for _ in 0..6 {
        pool.filled(1).await;
        outputs.push(run_pooled(&pool).await);
    }
    outputs.sort();
    outputs.dedup();
    assert_eq!(outputs.len(), 6);
    assert_eq!((pool.stats().hits, pool.stats().misses), (6, 0));
    until("two again", || pool.stats().idle == 2).await;
    pool.shut_down().await;
}

#[tokio::test]
async fn a_burst_beyond_the_pool_is_served_and_the_pool_grows_and_drains() {
    let zygote = Zygote::load(&config("well")).await.unwrap();
    let pool = pool_of(zygote, 1, 4);
    pool.filled(1).await;
    let mut runs = Vec::new();
    for _ in 0..20 {
        runs.push(run_pooled(&pool));
    }
    let outputs: std::collections::HashSet<_> = futures_util::future::join_all(runs)
        .await
        .into_iter()
        .collect();
    assert_eq!(outputs.len(), 20);
    assert!(pool.stats().misses > 0);
    until("growth", || pool.stats().idle > 1).await;
    assert!(pool.stats().idle <= 4);
    until("the minimum", || pool.stats().idle == 1).await;
    pool.shut_down().await;
}

#[tokio::test]
async fn a_pool_keeps_to_its_memory_and_survives_what_dies_in_it() {
    let zygote = Zygote::load(&config("well")).await.unwrap();
    let config_of_one = PoolConfig {
        idle_min: 50,
        // Room for a few of what the fake runner costs, and far fewer than 50.
        memory_max_kib: 1000,
        ..PoolConfig::default()
    };
    let pool = Pool::new(zygote, config_of_one, RunKind::Command);
    pool.filled(1).await;
    run_pooled(&pool).await;
    assert!(pool.stats().made < 50);
    pool.shut_down().await;

    let zygote = Zygote::load(&config("die")).await.unwrap();
    let pool = pool_of(zygote, 1, 1);
    pool.filled(1).await;
    let (sender, _events) = mpsc::channel(4);
    let result = pool.run(request(Stdin::Empty, None), sender).await;
    assert!(matches!(result.outcome, Outcome::Failed(_)));
    pool.filled(1).await;
    pool.shut_down().await;
}

#[tokio::test]
async fn a_burst_of_a_thousand_forks_ends() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, most).unwrap();
    let zygote = Zygote::load(&config("burst")).await.unwrap();
    let forks = (0..1000).map(|_| async {
        let (agent, _) = UnixStream::pair().unwrap();
        let (control, _) = packet::pair().unwrap();
        zygote
            .fork(RunKind::Python, agent.into(), control)
            .await
            .unwrap()
    });
    let burst = futures_util::future::join_all(forks);
    let runners = tokio::time::timeout(Duration::from_secs(60), burst).await;
    let runners = runners.expect("a deadlock");
    for mut runner in runners {
        assert_eq!(runner.ended().await, Some(0));
    }
    zygote.shut_down().await;
}

#[tokio::test]
async fn a_zygote_that_does_not_answer_is_given_up_and_killed() {
    let mut config = config("deaf");
    config.patience = Duration::from_millis(200);
    let zygote = Zygote::load(&config).await.unwrap();
    let (agent, _) = UnixStream::pair().unwrap();
    let (control, _) = packet::pair().unwrap();
    let error = zygote
        .fork(RunKind::Python, agent.into(), control)
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("did not fork"), "{error}");
    let ended = tokio::time::timeout(Duration::from_secs(20), zygote.shut_down()).await;
    assert!(ended.is_ok());
}

#[tokio::test]
async fn a_host_that_does_not_allow_a_main_wall_is_refused_unless_that_is_allowed() {
    let mut exposed = config("exposed");
    let error = Zygote::load(&exposed).await.err().unwrap().to_string();
    assert!(error.contains("mount namespace (EPERM)"), "{error}");
    assert!(error.contains("--allow-missing-walls"), "{error}");
    exposed.allow_missing_walls = true;
    let zygote = Zygote::load(&exposed).await.unwrap();
    let main = zygote.missing_walls().iter().filter(|wall| wall.is_main);
    assert_eq!(main.count(), 1);
    zygote.shut_down().await;
    Zygote::load(&config("less"))
        .await
        .unwrap()
        .shut_down()
        .await;
}
