//! Live sandboxes as the API's clients see them: a real daemon and the real agent, without any VM. This
//! program plays the daemon, its zygotes and their guests too.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]
#![allow(dead_code, reason = "shared with other tests")]

#[path = "support/fake.rs"]
mod fake;
#[path = "support/home.rs"]
mod home;
#[path = "support/model.rs"]
mod model;

use fake::AGENT_VERB;
use home::*;
use libtest_mimic::{Arguments, Trial};
use rustix::process::{Pid, Signal, kill_process};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use zygote_api::*;
use zygote_daemon::{Client, ClientError, Events};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some(ZYGOTE_VERB) => fake::zygote(),
        Some(AGENT_VERB) => agent(),
        Some(zygote_agent::FILES_VERB) => return zygote_agent::main(),
        Some(SERVE_VERB) => return daemon(&words[2..]),
        _ => {}
    }
    let tests = TESTS.iter().map(|(name, check)| {
        Trial::test(*name, move || {
            check();
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), tests.collect()).exit_code()
}

type Check = fn();
macro_rules! tests {
    ($($name:ident),* $(,)?) => { const TESTS: &[(&str, Check)] = &[$((stringify!($name), $name)),*]; };
}
tests!(
    a_sandbox_is_made_used_and_ended,
    what_cannot_be_done_is_refused_with_its_code,
    names_and_beginnings_of_ids_find_a_sandbox,
    input_goes_in_with_back_pressure_and_has_an_end,
    a_detached_process_goes_on_and_its_newest_output_is_kept,
    who_comes_back_reads_on_from_an_offset,
    a_slow_reader_holds_its_process_and_nobody_else,
    two_clients_may_read_one_process,
    sixty_four_processes_at_once_lose_no_byte,
    signals_reach_a_process_or_its_group,
    a_terminal_is_one_and_has_a_size,
    a_process_runs_as_a_user,
    time_limits_of_processes_and_of_sandboxes_hold,
    an_idle_sandbox_ends_and_a_used_one_does_not,
    a_request_that_is_sent_twice_makes_one_sandbox,
    events_tell_what_has_happened,
    what_a_process_leaves_behind_may_still_write,
    limits_are_told_by_name,
    stop_does_not_end_sandboxes_without_a_word,
    a_sandbox_whose_guest_dies_is_told_to_have_died,
    a_cell_has_output_a_value_and_a_number_and_state_stays,
    what_is_displayed_comes_between_what_is_printed,
    an_exception_is_told_with_its_lines,
    top_level_await_and_threads_work,
    a_cell_is_interrupted_and_its_state_stays,
    a_context_that_dies_is_told_and_restarted,
    contexts_have_states_of_their_own,
    cells_wait_for_each_other,
    a_cell_goes_on_when_its_client_has_gone,
    a_flood_of_output_and_of_displays_is_slowed_by_its_reader,
    an_interpreter_that_breaks_the_rules_harms_itself_alone,
    files_are_written_read_listed_and_removed,
    names_of_any_bytes_survive,
    what_cannot_be_done_with_files_has_the_kernels_name,
    a_large_file_goes_in_and_out_in_pieces,
    a_write_that_breaks_off_leaves_what_was_there,
    a_read_that_is_given_up_leaves_no_task,
    folders_go_in_and_out_as_archives,
    changes_of_files_are_told,
    ranges_of_files_are_those_of_http,
    a_terminal_on_a_websocket,
    random_sequences_of_verbs_do_what_a_model_does,
);

/// The program behind [`AGENT_VERB`].
fn agent() -> ! {
    let stream = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    rustix::stdio::dup2_stdin(&null).unwrap();
    // Its host has hung up.
    let _ = zygote_agent::serve_here(stream);
    std::process::exit(0)
}

/// A daemon with one sandbox.
struct Box {
    home: Home,
    client: Client,
    id: String,
}

fn request() -> SandboxRequest {
    SandboxRequest {
        template: HERE.to_owned(),
        ..SandboxRequest::default()
    }
}

async fn made(client: &Client, request: &SandboxRequest) -> Result<SandboxInfo, ClientError> {
    made_with(client, request, None).await
}

async fn made_with(
    client: &Client,
    request: &SandboxRequest,
    key: Option<&str>,
) -> Result<SandboxInfo, ClientError> {
    let mut events = client.create(request, key).await?;
    while let Some(event) = events.next().await? {
        match event {
            CreateEvent::Created(info) => return Ok(*info),
            CreateEvent::Error { error } => {
                return Err(ClientError::Refused(std::boxed::Box::new(error)));
            }
            _ => {}
        }
    }
    panic!("no end");
}

async fn sandbox(request: SandboxRequest) -> Box {
    sandbox_with(request, &[]).await
}

async fn sandbox_with(request: SandboxRequest, options: &[&str]) -> Box {
    let home = Home::new();
    let client = started(&home, options).await;
    let id = made(&client, &request).await.unwrap().id;
    Box { home, client, id }
}

fn process(words: &[&str]) -> ProcessRequest {
    ProcessRequest {
        command: words.iter().map(|word| Octets::from(*word)).collect(),
        cwd: "/".to_owned(),
        ..ProcessRequest::default()
    }
}

fn shell(script: &str) -> ProcessRequest {
    process(&["sh", "-c", script])
}

/// Output of both streams and the result of a process.
async fn finished(
    events: &mut Events<ProcessEvent>,
) -> Result<(Vec<u8>, Vec<u8>, ProcessResult), ClientError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut next = 0;
    while let Some(event) = events.next().await? {
        match event {
            ProcessEvent::Stdout { data, offset } => {
                assert_eq!(offset, next);
                next += data.0.len() as u64;
                stdout.extend(data.0);
            }
            ProcessEvent::Stderr { data, offset } => {
                assert_eq!(offset, next);
                next += data.0.len() as u64;
                stderr.extend(data.0);
            }
            ProcessEvent::Result(result) => return Ok((stdout, stderr, *result)),
            ProcessEvent::Error { error } => {
                return Err(ClientError::Refused(std::boxed::Box::new(error)));
            }
            ProcessEvent::Started { .. } => {}
            ProcessEvent::Skipped { .. } => panic!("nothing was to be skipped"),
        }
    }
    panic!("no result");
}

impl Box {
    async fn run(&self, request: &ProcessRequest) -> (String, String, ProcessResult) {
        let mut events = self.client.exec_in(&self.id, request, None).await.unwrap();
        let (stdout, stderr, result) = finished(&mut events).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(stdout), text(stderr), result)
    }

    async fn sh(&self, script: &str) -> (String, String, u8) {
        let (stdout, stderr, result) = self.run(&shell(script)).await;
        (stdout, stderr, result.exit_code)
    }

    async fn detached(&self, script: &str) -> u32 {
        let request = ProcessRequest {
            detach: true,
            ..shell(script)
        };
        let info = self.client.start_in(&self.id, &request).await.unwrap();
        assert_eq!(info.state, "running");
        info.process
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Refused(failure)) => failure.code,
        other => panic!("{other:?}"),
    }
}

fn a_sandbox_is_made_used_and_ended() {
    runtime().block_on(async {
        let request = SandboxRequest {
            env: [
                ("A".to_owned(), "1".to_owned()),
                ("B".to_owned(), "2".to_owned()),
            ]
            .into(),
            ..request()
        };
        let it = sandbox(request).await;
        let info = it.client.sandbox(&it.id).await.unwrap();
        assert_eq!((info.state, info.processes), (SandboxState::Running, 0));
        let own = ProcessRequest {
            env: [("B".to_owned(), "3".to_owned())].into(),
            ..shell("echo $A$B; echo bad >&2; exit 7")
        };
        let (stdout, stderr, result) = it.run(&own).await;
        assert_eq!((&stdout[..], &stderr[..]), ("13\n", "bad\n"));
        assert_eq!((result.exit_code, result.process), (7, 1));
        // Files and processes of one call are there for the next.
        let file = it.home.folder.path().join("state-of-mine");
        let file = file.to_str().unwrap();
        it.sh(&format!("echo hello > {file}")).await;
        assert_eq!(it.sh(&format!("cat {file}")).await.0, "hello\n");
        let all = it.client.processes(&it.id).await.unwrap().processes;
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].result.as_ref().unwrap().exit_code, 7);
        assert_eq!(all[0].output_kept_bytes, Some(7));
        let ended = it.client.end_sandbox(&it.id).await.unwrap();
        assert_eq!(ended.state, SandboxState::Ended);
        assert_eq!(ended.end.unwrap().reason, "removed");
        let listed = |state| it.client.sandboxes(state, None);
        assert_eq!(listed(None).await.unwrap().sandboxes.len(), 0);
        assert_eq!(listed(Some("all")).await.unwrap().sandboxes.len(), 1);
        // What has become of its processes is known still.
        let one = it.client.process(&it.id, 1).await.unwrap();
        assert_eq!(one.result.unwrap().exit_code, 7);
        let again = it.client.exec_in(&it.id, &shell("true"), None).await;
        assert_eq!(code(again.map(drop)), ErrorCode::SandboxEnded);
    });
}

fn what_cannot_be_done_is_refused_with_its_code() {
    runtime().block_on(async {
        let it = &sandbox(request()).await;
        let start = |request| async move {
            code(it.client.exec_in(&it.id, &request, None).await.map(drop))
        };
        assert_eq!(start(process(&[])).await, ErrorCode::BadRequest);
        let nowhere = ProcessRequest {
            cwd: "/no/such".to_owned(),
            ..shell("true")
        };
        let nobody = ProcessRequest {
            user: "no-such-user".to_owned(),
            ..shell("true")
        };
        for (request, exit_code, wanted) in [
            (
                process(&["no-such-program"]),
                127,
                ErrorCode::ProgramNotFound,
            ),
            (
                process(&["/etc/passwd"]),
                126,
                ErrorCode::ProgramNotExecutable,
            ),
            (nowhere, 125, ErrorCode::ProgramNotStarted),
            (nobody, 125, ErrorCode::ProgramNotStarted),
        ] {
            let (.., result) = it.run(&request).await;
            assert_eq!(result.exit_code, exit_code);
            assert_eq!(result.error.unwrap().code, wanted);
            let detached = ProcessRequest {
                detach: true,
                ..request
            };
            let refused = it.client.start_in(&it.id, &detached).await;
            assert_eq!(code(refused), wanted);
        }
        let bad = ProcessRequest {
            env: [("A=B".to_owned(), String::new())].into(),
            ..shell("true")
        };
        assert_eq!(start(bad).await, ErrorCode::BadRequest);
        let negative = ProcessRequest {
            timeout_seconds: -1.0,
            ..shell("true")
        };
        assert_eq!(start(negative).await, ErrorCode::BadRequest);
        let client = &it.client;
        let id = &it.id;
        let other = client.sandbox("no-such-sandbox").await;
        assert_eq!(code(other), ErrorCode::SandboxNotFound);
        assert_eq!(
            code(client.process(id, 99).await),
            ErrorCode::ProcessNotFound
        );
        it.sh("true").await;
        let signal = ProcessSignal {
            signal: 15,
            only_process: false,
        };
        let ended = client.process(id, 1).await;
        // What did not start has no number that is known.
        assert_eq!(code(ended), ErrorCode::ProcessNotFound);
        let last = client.processes(id).await.unwrap().processes[0].process;
        assert_eq!(
            code(client.signal_process(id, last, signal).await),
            ErrorCode::ProcessEnded
        );
        for template in ["no-such-template", "../x"] {
            let wrong = SandboxRequest {
                template: template.to_owned(),
                ..request()
            };
            let refused = code(made(client, &wrong).await);
            assert!(matches!(
                refused,
                ErrorCode::TemplateNotFound | ErrorCode::BadRequest
            ));
        }
    });
}

fn names_and_beginnings_of_ids_find_a_sandbox() {
    runtime().block_on(async {
        let named = SandboxRequest {
            name: Some("box".to_owned()),
            ..request()
        };
        let it = sandbox(named.clone()).await;
        assert_eq!(it.client.sandbox("box").await.unwrap().id, it.id);
        let tail = &it.id[it.id.len() - 12..];
        assert_eq!(it.client.sandbox(tail).await.unwrap().id, it.id);
        assert_eq!(it.client.sandbox(&it.id[..30]).await.unwrap().id, it.id);
        assert_eq!(code(made(&it.client, &named).await), ErrorCode::NameTaken);
        let bad = SandboxRequest {
            name: Some("a b".to_owned()),
            ..request()
        };
        assert_eq!(code(made(&it.client, &bad).await), ErrorCode::BadRequest);
        // Made in one moment, they begin alike.
        let second = made(&it.client, &request()).await.unwrap().id;
        let same = it.id.bytes().zip(second.bytes());
        let same = same.take_while(|(a, b)| a == b).count();
        if same >= 4 {
            let both = it.client.sandbox(&it.id[..same]).await;
            assert_eq!(code(both), ErrorCode::Ambiguous);
        }
        it.client.end_sandbox("box").await.unwrap();
        assert_eq!(it.client.sandbox("box").await.unwrap().id, it.id);
        let third = made(&it.client, &named).await.unwrap().id;
        assert_eq!(it.client.sandbox("box").await.unwrap().id, third);
    });
}

fn input_goes_in_with_back_pressure_and_has_an_end() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let (sender, input) = mpsc::channel(4);
        let with_input = ProcessRequest {
            stdin_stream: true,
            ..shell("wc -c; echo done")
        };
        let started = it.client.exec_in(&it.id, &with_input, Some(input)).await;
        let mut events = started.unwrap();
        let pieces = 200;
        let feeding = async move {
            for _ in 0..pieces {
                let data = vec![b'x'; 60_000].into();
                sender.send(ProcessInput::Stdin { data }).await.unwrap();
            }
            sender.send(ProcessInput::StdinEnd).await.unwrap();
            // The request goes on: its end is not what ends the input.
            sender
        };
        let (sender, ended) = tokio::join!(feeding, finished(&mut events));
        drop(sender);
        let stdout = String::from_utf8(ended.unwrap().0).unwrap();
        assert_eq!(stdout, format!("{}\ndone\n", 60_000 * pieces));
        // All of it in the request.
        let whole = ProcessRequest {
            stdin: Some("one\ntwo\n".into()),
            ..process(&["cat"])
        };
        assert_eq!(it.run(&whole).await.0, "one\ntwo\n");
        // One that reads nothing and ends does not keep its client.
        let deaf = ProcessRequest {
            stdin: Some(vec![b'x'; 1 << 20].into()),
            ..shell("exit 3")
        };
        assert_eq!(it.run(&deaf).await.2.exit_code, 3);
    });
}

fn a_detached_process_goes_on_and_its_newest_output_is_kept() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let number = it.detached("seq 1 200000; echo end >&2").await;
        let ended = it.client.wait_process(&it.id, number).await.unwrap();
        assert_eq!(ended.result.unwrap().exit_code, 0);
        let whole: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
        let total = whole.len() as u64 + 4;
        let info = it.client.process(&it.id, number).await.unwrap();
        let (kept, dropped) = (
            info.output_kept_bytes.unwrap(),
            info.output_dropped_bytes.unwrap(),
        );
        assert_eq!((kept, kept + dropped), (256 * 1024, total));
        let output = it.client.output(&it.id, number, None).await.unwrap();
        assert_eq!(output.stderr.unwrap(), "end\n");
        assert_eq!(output.stdout.unwrap(), whole[dropped as usize..]);
        assert_eq!((output.next, output.skipped_bytes), (total, 0));
        let from_start = it.client.output(&it.id, number, Some(0)).await.unwrap();
        assert_eq!(from_start.skipped_bytes, dropped);
    });
}

fn who_comes_back_reads_on_from_an_offset() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let script = "for i in 1 2 3 4 5 6 7 8 9; do echo line $i; done; read x; echo got $x";
        let request = ProcessRequest {
            stdin_stream: true,
            ..shell(script)
        };
        let (keep, input) = mpsc::channel(4);
        let started = it.client.exec_in(&it.id, &request, Some(input)).await;
        let mut events = started.unwrap();
        let mut seen = 0;
        while seen < 30 {
            if let ProcessEvent::Stdout { data, offset } = events.next().await.unwrap().unwrap() {
                seen = offset + data.0.len() as u64;
            }
        }
        // The connection breaks off; the process goes on.
        drop((events, keep));
        let from = 21;
        let (sender, input) = mpsc::channel(4);
        let attach = AttachRequest {
            from: Some(from),
            hold: true,
        };
        let attached = it.client.attach(&it.id, 1, attach, Some(input)).await;
        let mut events = attached.unwrap();
        let data = "hello\n".into();
        sender.send(ProcessInput::Stdin { data }).await.unwrap();
        let mut text = Vec::new();
        let result = loop {
            match events.next().await.unwrap().unwrap() {
                ProcessEvent::Stdout { data, offset } => {
                    assert_eq!(offset, from + text.len() as u64);
                    text.extend(data.0);
                }
                ProcessEvent::Result(result) => break result,
                other => panic!("{other:?}"),
            }
        };
        let text = String::from_utf8(text).unwrap();
        assert!(
            text.starts_with("line 4\n") && text.ends_with("line 9\ngot hello\n"),
            "{text}"
        );
        assert_eq!(result.exit_code, 0);
    });
}

fn a_slow_reader_holds_its_process_and_nobody_else() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let flood = process(&["sh", "-c", "head -c 50000000 /dev/zero"]);
        let mut slow = it.client.exec_in(&it.id, &flood, None).await.unwrap();
        while !matches!(
            slow.next().await.unwrap(),
            Some(ProcessEvent::Stdout { .. })
        ) {}
        // Not read any further: its process waits, others do not.
        for number in 0..20 {
            assert_eq!(
                it.sh(&format!("echo {number}")).await.0,
                format!("{number}\n")
            );
        }
        let info = it.client.process(&it.id, 1).await.unwrap();
        assert_eq!(info.state, "running");
        let mut count = 0;
        let result = loop {
            match slow.next().await.unwrap().unwrap() {
                ProcessEvent::Stdout { data, offset } => {
                    assert!(data.0.iter().all(|byte| *byte == 0));
                    count = offset + data.0.len() as u64;
                }
                ProcessEvent::Result(result) => break result,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((count, result.exit_code), (50_000_000, 0));
    });
}

fn two_clients_may_read_one_process() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let request = ProcessRequest {
            stdin_stream: true,
            ..process(&["cat"])
        };
        let (sender, input) = mpsc::channel(4);
        let started = it.client.exec_in(&it.id, &request, Some(input)).await;
        let mut first = started.unwrap();
        assert!(matches!(
            first.next().await.unwrap(),
            Some(ProcessEvent::Started { process: 1, .. })
        ));
        let attach = AttachRequest::default();
        let attached = it.client.attach(&it.id, 1, attach, None).await;
        let mut second = attached.unwrap();
        let data: Octets = "for both".into();
        sender
            .send(ProcessInput::Stdin { data: data.clone() })
            .await
            .unwrap();
        sender.send(ProcessInput::StdinEnd).await.unwrap();
        for events in [&mut first, &mut second] {
            let (stdout, _, result) = finished(events).await.unwrap();
            assert_eq!((stdout, result.exit_code), (data.0.clone(), 0));
        }
    });
}

fn sixty_four_processes_at_once_lose_no_byte() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let it = &it;
        let one = |number: u32| async move {
            let script = format!("seq {number} 3 30000; seq {number} 7 20000 >&2");
            let (stdout, stderr, code) = it.sh(&script).await;
            let lines = |step: usize, end: u32| -> String {
                (number..=end)
                    .step_by(step)
                    .map(|n| format!("{n}\n"))
                    .collect()
            };
            assert_eq!(code, 0);
            assert!(stdout == lines(3, 30_000) && stderr == lines(7, 20_000));
        };
        futures_util::future::join_all((0..64).map(one)).await;
    });
}

fn signals_reach_a_process_or_its_group() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let number = it.detached("sleep 1000 & sleep 1000").await;
        let signal = |signal, only_process| ProcessSignal {
            signal,
            only_process,
        };
        let kill = it.client.signal_process(&it.id, number, signal(9, false));
        kill.await.unwrap();
        let ended = it.client.wait_process(&it.id, number).await.unwrap();
        let result = ended.result.unwrap();
        assert_eq!((result.exit_code, result.signal), (137, Some(9)));
        let number = it
            .detached("trap 'echo term; exit 5' TERM; echo up; while :; do sleep 0.01; done")
            .await;
        let begun = Instant::now();
        while it.client.output(&it.id, number, None).await.unwrap().next < 3 {
            assert!(begun.elapsed() < Duration::from_secs(30));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let term = it.client.signal_process(&it.id, number, signal(15, true));
        term.await.unwrap();
        let ended = it.client.wait_process(&it.id, number).await.unwrap();
        assert_eq!(ended.result.unwrap().exit_code, 5);
        let bad = it.client.signal_process(&it.id, number, signal(65, true));
        assert_eq!(code(bad.await), ErrorCode::BadRequest);
    });
}

fn a_terminal_is_one_and_has_a_size() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let request = ProcessRequest {
            terminal: Some(TerminalSize {
                rows: 40,
                columns: 100,
            }),
            ..shell("test -t 0 -a -t 1 -a -t 2 && stty size; read x; stty size; cat")
        };
        let (sender, input) = mpsc::channel(4);
        let started = it.client.exec_in(&it.id, &request, Some(input)).await;
        let mut events = started.unwrap();
        let resize = ProcessInput::Resize {
            rows: 50,
            columns: 120,
        };
        sender.send(resize).await.unwrap();
        let typed = |text: &str| ProcessInput::Stdin { data: text.into() };
        sender.send(typed("go\r")).await.unwrap();
        sender.send(typed("text\r")).await.unwrap();
        // A terminal's end of input is a character, which cat takes for its end.
        sender.send(ProcessInput::StdinEnd).await.unwrap();
        let (stdout, stderr, result) = finished(&mut events).await.unwrap();
        let shown = String::from_utf8(stdout).unwrap();
        // The terminal shows what is typed, and cat what it has read.
        assert!(shown.contains("50 120\r\n"), "{shown:?}");
        assert_eq!(shown.matches("text\r\n").count(), 2, "{shown:?}");
        assert_eq!((stderr.len(), result.exit_code), (0, 0));
        let number = it.detached("sleep 1000").await;
        let attached = it
            .client
            .attach(&it.id, number, AttachRequest::default(), None)
            .await;
        drop(attached.unwrap());
        // Ctrl-C ends what runs in front.
        let request = ProcessRequest {
            command: vec!["sleep".into(), "1000".into()],
            ..request
        };
        let (sender, input) = mpsc::channel(4);
        let started = it.client.exec_in(&it.id, &request, Some(input)).await;
        let mut events = started.unwrap();
        sender.send(typed("\u{3}")).await.unwrap();
        let (_, _, result) = finished(&mut events).await.unwrap();
        assert_eq!(result.signal, Some(2));
    });
}

fn a_process_runs_as_a_user() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let as_user = |user: &str| ProcessRequest {
            user: user.to_owned(),
            ..shell("id -u; id -g; id -G; echo $HOME")
        };
        let (stdout, ..) = it.run(&as_user("nobody")).await;
        let lines: Vec<&str> = stdout.lines().collect();
        assert_eq!(lines[0], "65534", "{stdout}");
        let (stdout, ..) = it.run(&as_user("1234:5678")).await;
        assert_eq!(stdout, "1234\n5678\n5678\n/\n");
        let (stdout, ..) = it.run(&as_user("")).await;
        assert!(stdout.starts_with("0\n0\n"), "{stdout}");
    });
}

fn time_limits_of_processes_and_of_sandboxes_hold() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let limited = ProcessRequest {
            timeout_seconds: 0.2,
            ..shell("echo first; sleep 1000 & sleep 1000")
        };
        let (stdout, _, result) = it.run(&limited).await;
        assert_eq!(
            (&stdout[..], result.exit_code, result.timed_out),
            ("first\n", 124, true)
        );
        assert_eq!(result.error.unwrap().code, ErrorCode::TimedOut);
        // In the middle of an exec.
        let short = SandboxRequest {
            ttl_seconds: 0.3,
            ..request()
        };
        let id = made(&it.client, &short).await.unwrap().id;
        let sleeping = it
            .client
            .exec_in(&id, &shell("echo a; sleep 1000"), None)
            .await;
        let ended = finished(&mut sleeping.unwrap()).await;
        assert_eq!(code(ended), ErrorCode::SandboxEnded);
        let info = it.client.wait_sandbox(&id).await.unwrap();
        assert_eq!(info.end.unwrap().reason, "ttl");
        assert_eq!(it.client.process(&id, 1).await.unwrap().state, "lost");
        // A time to live can be made longer, and taken away.
        let id = made(&it.client, &short).await.unwrap().id;
        let longer = SandboxChange {
            ttl_seconds: Some(0.0),
            idle_seconds: None,
        };
        let info = it.client.change_sandbox(&id, longer).await.unwrap();
        assert_eq!(info.expires_unix_s, None);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let info = it.client.sandbox(&id).await.unwrap();
        assert_eq!(info.state, SandboxState::Running);
    });
}

fn an_idle_sandbox_ends_and_a_used_one_does_not() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let idle = SandboxRequest {
            idle_seconds: 0.4,
            ..request()
        };
        let id = made(&it.client, &idle).await.unwrap().id;
        // Somebody reads: it is used, for longer than it may be idle.
        let mut events = it
            .client
            .exec_in(&id, &shell("sleep 1; echo a"), None)
            .await
            .unwrap();
        let (stdout, ..) = finished(&mut events).await.unwrap();
        assert_eq!(stdout, b"a\n");
        let info = it.client.wait_sandbox(&id).await.unwrap();
        assert_eq!(info.end.unwrap().reason, "idle");
    });
}

fn a_request_that_is_sent_twice_makes_one_sandbox() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let key = Some("key-1");
        let request = request();
        let (one, two) = tokio::join!(
            made_with(&it.client, &request, key),
            made_with(&it.client, &request, key)
        );
        assert_eq!(one.unwrap().id, two.unwrap().id);
        let other = SandboxRequest {
            ttl_seconds: 5.0,
            ..request
        };
        let refused = made_with(&it.client, &other, key).await;
        assert_eq!(code(refused), ErrorCode::Conflict);
        let count = it.client.status().await.unwrap().sandboxes;
        assert_eq!(count, 2);
    });
}

fn events_tell_what_has_happened() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.sh("exit 4").await;
        let mut events = it.client.sandbox_events(0, true).await.unwrap();
        it.client.end_sandbox(&it.id).await.unwrap();
        let mut seen = Vec::new();
        while seen.len() < 4 {
            let event = events.next().await.unwrap().unwrap();
            assert_eq!(
                (event.number, &event.sandbox),
                (seen.len() as u64 + 1, &it.id)
            );
            seen.push(event.what);
        }
        assert_eq!(seen[0], SandboxHappening::Made);
        assert!(matches!(
            &seen[1],
            SandboxHappening::ProcessStarted { process: 1, command } if command[0] == "sh".into()
        ));
        assert!(matches!(
            seen[2],
            SandboxHappening::ProcessEnded { exit_code: 4, .. }
        ));
        assert!(matches!(&seen[3], SandboxHappening::Ended { reason, .. } if reason == "removed"));
    });
}

fn what_a_process_leaves_behind_may_still_write() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let folder = it.home.folder.path().to_str().unwrap().to_owned();
        let script = format!(
            "(while ! test -e {folder}/go; do sleep 0.01; done; echo later; touch {folder}/done) & echo now"
        );
        assert_eq!(it.sh(&script).await.0, "now\n");
        it.sh(&format!("touch {folder}/go; while ! test -e {folder}/done; do sleep 0.01; done"))
            .await;
        let output = it.client.output(&it.id, 1, None).await.unwrap();
        assert_eq!(output.stdout.unwrap(), "now\nlater\n");
    });
}

fn limits_are_told_by_name() {
    runtime().block_on(async {
        let it = sandbox_with(request(), &["live_max=2", "processes_max=2"]).await;
        let second = made(&it.client, &request()).await.unwrap();
        let third = made(&it.client, &request()).await;
        assert_eq!(code(third), ErrorCode::LimitReached);
        it.client.end_sandbox(&second.id).await.unwrap();
        made(&it.client, &request()).await.unwrap();
        it.detached("sleep 1000").await;
        it.detached("sleep 1000").await;
        let refused = it.client.exec_in(&it.id, &shell("true"), None).await;
        assert_eq!(code(refused.map(drop)), ErrorCode::LimitReached);
    });
}

fn stop_does_not_end_sandboxes_without_a_word() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let stop = |now| StopRequest {
            now,
            if_idle: false,
        };
        assert_eq!(code(it.client.stop(stop(false)).await), ErrorCode::Conflict);
        let mut events = it
            .client
            .exec_in(&it.id, &shell("sleep 1000"), None)
            .await
            .unwrap();
        it.client.stop(stop(true)).await.unwrap();
        let ended = finished(&mut events).await;
        assert!(ended.is_err());
    });
}

fn a_sandbox_whose_guest_dies_is_told_to_have_died() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let mut events = it
            .client
            .exec_in(&it.id, &shell("sleep 1000"), None)
            .await
            .unwrap();
        events.next().await.unwrap();
        let daemon = it.client.health().await.unwrap().pid;
        for guest in children(daemon).into_iter().flat_map(children) {
            kill_process(Pid::from_raw(guest.cast_signed()).unwrap(), Signal::KILL).unwrap();
        }
        let ended = finished(&mut events).await;
        assert_eq!(code(ended), ErrorCode::SandboxEnded);
        let info = it.client.wait_sandbox(&it.id).await.unwrap();
        assert_eq!(info.end.unwrap().reason, "died");
    });
}

/// Processes that another's first thread has started.
fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

fn cell(code: &str) -> CodeRequest {
    CodeRequest {
        code: code.into(),
        context: "default".to_owned(),
        timeout_seconds: 0.0,
    }
}

/// What a cell has printed and displayed, in order, and how it ended.
async fn cell_end(
    events: &mut Events<CodeEvent>,
) -> Result<(Vec<String>, CodeResult), ClientError> {
    let mut shown: Vec<String> = Vec::new();
    let mut last_printed = false;
    while let Some(event) = events.next().await? {
        match event {
            CodeEvent::Stdout { data } | CodeEvent::Stderr { data } => {
                let text = String::from_utf8(data.0).unwrap();
                match shown.last_mut().filter(|_| last_printed) {
                    Some(last) => last.push_str(&text),
                    None => shown.push(text),
                }
                last_printed = true;
            }
            CodeEvent::Display { data } => {
                shown.push(format!("display {}", data["text/plain"]));
                last_printed = false;
            }
            CodeEvent::Result(result) => return Ok((shown, *result)),
            CodeEvent::Error { error } => {
                return Err(ClientError::Refused(std::boxed::Box::new(error)));
            }
        }
    }
    panic!("no result");
}

impl Box {
    async fn try_cell(
        &self,
        request: &CodeRequest,
    ) -> Result<(Vec<String>, CodeResult), ClientError> {
        let mut events = self.client.run_code(&self.id, request).await?;
        cell_end(&mut events).await
    }

    /// Output and the value's text.
    async fn cell(&self, code: &str) -> (String, Option<String>) {
        let (shown, result) = self.try_cell(&cell(code)).await.unwrap();
        assert_eq!(result.exception, None, "{code}");
        let value = result.result.map(|bundle| bundle["text/plain"].clone());
        (shown.concat(), value)
    }
}

fn value(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn a_cell_has_output_a_value_and_a_number_and_state_stays() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        assert_eq!(it.cell("x = 20; print('hi')").await, ("hi\n".into(), None));
        assert_eq!(
            it.cell("def f(n):\n    return n + x\nf(22)").await.1,
            value("42")
        );
        assert_eq!(it.cell("f(1);").await.1, None);
        assert_eq!(it.cell("# nothing; at all").await.1, None);
        assert_eq!(it.cell("None").await.1, None);
        assert_eq!(it.cell("_ + 1").await.1, value("43"));
        let (_, result) = it
            .try_cell(&cell("import sys; print('e', file=sys.stderr)"))
            .await
            .unwrap();
        assert_eq!(result.execution_count, 7);
        // Classes can be pickled, as those of a program: their module is __main__.
        let pickled =
            "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A())).__class__.__module__";
        assert_eq!(it.cell(pickled).await.1, value("'__main__'"));
        let html = "class T:\n    def _repr_html_(self): return '<b>x</b>'\n    \
            def _repr_png_(self): return b'\\x89PNG'\n    \
            def _repr_json_(self): return {'a': [1]}\nT()";
        let (_, result) = it.try_cell(&cell(html)).await.unwrap();
        let bundle = result.result.unwrap();
        assert_eq!(bundle["text/html"], "<b>x</b>");
        assert_eq!(bundle["image/png"], base64(b"\x89PNG"));
        assert_eq!(bundle["application/json"], r#"{"a": [1]}"#);
        let input = it.try_cell(&cell("input()")).await.unwrap().1;
        assert_eq!(input.exception.unwrap().name, "EOFError");
        let many = "for n in range(100000): print(n)";
        let whole: String = (0..100_000).map(|n| format!("{n}\n")).collect();
        assert!(it.cell(many).await.0 == whole);
    });
}

fn what_is_displayed_comes_between_what_is_printed() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "import os\nfor n in range(50):\n    print('before', n, end='')\n    \
            display(n)\n    os.write(1, b'after')";
        let (shown, _) = it.try_cell(&cell(code)).await.unwrap();
        let mut expected = Vec::new();
        for n in 0..50 {
            let after = if n == 0 { "" } else { "after" };
            expected.push(format!("{after}before {n}"));
            expected.push(format!("display {n}"));
        }
        expected.push("after".to_owned());
        assert_eq!(shown, expected);
        // Several at once, and one that is larger than any message.
        let big = "display('a', 'b'); display('x' * 3_000_000)";
        let (shown, _) = it.try_cell(&cell(big)).await.unwrap();
        assert_eq!((&shown[0][..], shown[2].len()), ("display 'a'", 3_000_010));
        let too_big = it.try_cell(&cell("'x' * 30_000_000")).await.unwrap().1;
        assert!(too_big.exception.unwrap().value.contains("bytes"));
        assert_eq!(it.cell("1 + 1").await.1, value("2"));
    });
}

fn an_exception_is_told_with_its_lines() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "def f():\n    raise ValueError('bad ü')\nprint('first')\nf()";
        let (shown, result) = it.try_cell(&cell(code)).await.unwrap();
        assert_eq!(shown, ["first\n"]);
        let exception = result.exception.unwrap();
        assert_eq!(
            (&exception.name[..], &exception.value[..]),
            ("ValueError", "bad ü")
        );
        let trace = exception.traceback.join("\n");
        assert!(
            trace.starts_with("Traceback (most recent call last)"),
            "{trace}"
        );
        assert!(
            trace.contains("<cell 1>") && trace.contains("raise ValueError"),
            "{trace}"
        );
        assert!(!trace.contains("driver"), "{trace}");
        let wrong = it
            .try_cell(&cell("x = ("))
            .await
            .unwrap()
            .1
            .exception
            .unwrap();
        assert_eq!(wrong.name, "SyntaxError");
        let stop = it
            .try_cell(&cell("import sys; sys.exit(3)"))
            .await
            .unwrap()
            .1;
        assert_eq!(stop.exception.unwrap().name, "SystemExit");
        let deep = it.try_cell(&cell("def g(): g()\ng()")).await.unwrap().1;
        assert_eq!(deep.exception.unwrap().name, "RecursionError");
        let odd = "class E(Exception):\n    def __str__(self): raise OSError\nraise E";
        assert_eq!(
            it.try_cell(&cell(odd))
                .await
                .unwrap()
                .1
                .exception
                .unwrap()
                .name,
            "E"
        );
        assert_eq!(it.cell("1").await.1, value("1"));
    });
}

fn top_level_await_and_threads_work() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code =
            "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 7\nawait f()";
        assert_eq!(it.cell(code).await.1, value("7"));
        assert_eq!(
            it.cell("t = asyncio.ensure_future(f())\nawait t + 1")
                .await
                .1,
            value("8")
        );
        let code = "async for n in (i async for i in aiter_()): print(n)";
        let failed = it.try_cell(&cell(code)).await.unwrap().1;
        assert_eq!(failed.exception.unwrap().name, "NameError");
        let threads = "import threading\nl = []\nt = threading.Thread(target=lambda: l.append(1))\n\
            t.start(); t.join(); l";
        assert_eq!(it.cell(threads).await.1, value("[1]"));
        let sub = "import subprocess\nsubprocess.run(['echo', 'from a program']).returncode";
        assert_eq!(it.cell(sub).await, ("from a program\n".into(), value("0")));
    });
}

fn a_cell_is_interrupted_and_its_state_stays() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.cell("x = 1").await;
        let code = "print('up', flush=True)\nimport time\ntime.sleep(1000)";
        let mut events = it.client.run_code(&it.id, &cell(code)).await.unwrap();
        assert!(matches!(
            events.next().await.unwrap(),
            Some(CodeEvent::Stdout { .. })
        ));
        it.client.interrupt(&it.id, "default").await.unwrap();
        let (_, result) = cell_end(&mut events).await.unwrap();
        assert_eq!(result.exception.unwrap().name, "KeyboardInterrupt");
        assert!(!result.timed_out);
        // With nothing to interrupt, nothing is.
        it.client.interrupt(&it.id, "default").await.unwrap();
        assert_eq!(it.cell("x").await.1, value("1"));
        let limited = CodeRequest {
            timeout_seconds: 0.3,
            ..cell("while True: pass")
        };
        let (_, result) = it.try_cell(&limited).await.unwrap();
        assert!(result.timed_out);
        assert_eq!(it.cell("x").await.1, value("1"));
        let none = it.client.interrupt(&it.id, "nope").await;
        assert_eq!(code_of(none), ErrorCode::ContextNotFound);
    });
}

fn code_of<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    code(result)
}

fn a_context_that_dies_is_told_and_restarted() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.cell("x = 1").await;
        let died = it
            .try_cell(&cell("print('last')\nimport os\nos._exit(3)"))
            .await;
        let Err(ClientError::Refused(failure)) = died else {
            panic!("{died:?}");
        };
        assert_eq!(failure.code, ErrorCode::ContextDead);
        assert!(failure.message.contains("exit status 3"), "{failure}");
        let again = it.try_cell(&cell("1")).await;
        assert_eq!(code_of(again), ErrorCode::ContextDead);
        let listed = it.client.contexts(&it.id).await.unwrap().contexts;
        assert_eq!(
            (&listed[0].name[..], &listed[0].state[..]),
            ("default", "dead")
        );
        // The sandbox lives on.
        assert_eq!(it.sh("echo on").await.0, "on\n");
        let fresh = it.client.restart(&it.id, "default").await.unwrap();
        assert_eq!((&fresh.state[..], fresh.execution_count), ("idle", 0));
        let gone = it.try_cell(&cell("x")).await.unwrap().1;
        assert_eq!(
            (gone.exception.unwrap().name, gone.execution_count),
            ("NameError".into(), 1)
        );
        // In the middle of a cell.
        let mut events = it
            .client
            .run_code(&it.id, &cell("while True: pass"))
            .await
            .unwrap();
        let restarting = async {
            while it.client.contexts(&it.id).await.unwrap().contexts[0].state != "busy" {}
            it.client.restart(&it.id, "default").await.unwrap()
        };
        let (ended, _) = tokio::join!(cell_end(&mut events), restarting);
        assert_eq!(code_of(ended), ErrorCode::ContextDead);
        assert_eq!(it.cell("1").await.1, value("1"));
        it.client.remove_context(&it.id, "default").await.unwrap();
        assert!(
            it.client
                .contexts(&it.id)
                .await
                .unwrap()
                .contexts
                .is_empty()
        );
        assert_eq!(it.cell("2").await.1, value("2"));
    });
}

fn contexts_have_states_of_their_own() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.cell("x = 1").await;
        let asked = ContextRequest {
            name: "other".to_owned(),
            language: "python".to_owned(),
            cwd: "/tmp".to_owned(),
        };
        let made = it.client.create_context(&it.id, &asked).await.unwrap();
        assert_eq!(made.state, "idle");
        let twice = it.client.create_context(&it.id, &asked).await;
        assert_eq!(code_of(twice), ErrorCode::NameTaken);
        let wrong = ContextRequest {
            name: "third".to_owned(),
            language: "cobol".to_owned(),
            ..asked.clone()
        };
        let wrong = it.client.create_context(&it.id, &wrong).await;
        assert_eq!(code_of(wrong), ErrorCode::BadRequest);
        let within = |code: &str| CodeRequest {
            context: "other".to_owned(),
            ..cell(code)
        };
        let (_, result) = it
            .try_cell(&within("import os; os.getcwd()"))
            .await
            .unwrap();
        assert_eq!(result.result.unwrap()["text/plain"], "'/tmp'");
        let (_, result) = it.try_cell(&within("x")).await.unwrap();
        assert_eq!(result.exception.unwrap().name, "NameError");
        let nowhere = ContextRequest {
            name: "nowhere".to_owned(),
            cwd: "/no/such".to_owned(),
            ..asked
        };
        it.client.create_context(&it.id, &nowhere).await.unwrap();
        let failed = CodeRequest {
            context: "nowhere".to_owned(),
            ..cell("1")
        };
        let failed = it.try_cell(&failed).await;
        assert_eq!(code_of(failed), ErrorCode::ContextDead);
    });
}

fn cells_wait_for_each_other() {
    runtime().block_on(async {
        let it = &sandbox(request()).await;
        it.cell("l = []").await;
        let one = |n: u32| async move {
            it.cell(&format!("import time; time.sleep(0.02); l.append({n})"))
                .await
        };
        futures_util::future::join_all((0..10).map(one)).await;
        assert_eq!(
            it.cell("sorted(l) == list(range(10)), len(l)").await.1,
            value("(True, 10)")
        );
    });
}

fn a_cell_goes_on_when_its_client_has_gone() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "display(0)\nimport time\ntime.sleep(0.2)\nfor n in range(5): display(n)\nx = 5";
        let mut events = it.client.run_code(&it.id, &cell(code)).await.unwrap();
        assert!(matches!(
            events.next().await.unwrap(),
            Some(CodeEvent::Display { .. })
        ));
        drop(events);
        assert_eq!(it.cell("x").await.1, value("5"));
    });
}

fn a_flood_of_output_and_of_displays_is_slowed_by_its_reader() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "for n in range(300):\n    print('x' * 100_000)\n    display('y' * 100_000)";
        let mut events = it.client.run_code(&it.id, &cell(code)).await.unwrap();
        // Others are served meanwhile.
        for _ in 0..5 {
            assert_eq!(it.sh("echo a").await.0, "a\n");
        }
        let (shown, _) = cell_end(&mut events).await.unwrap();
        assert_eq!(shown.len(), 600);
        assert!(shown.iter().step_by(2).all(|text| text.len() == 100_001));
    });
}

fn an_interpreter_that_breaks_the_rules_harms_itself_alone() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let find = "import os, socket, stat\nfds = [int(n) for n in os.listdir('/proc/self/fd')]\n\
            def good(n):\n    try: return stat.S_ISSOCK(os.fstat(n).st_mode)\n    except OSError: return False\n\
            control = [n for n in fds if good(n)][-1]";
        for lie in [
            "os.write(control, (2).to_bytes(4, 'little') + b'\\xff\\xff')",
            "os.write(control, b'\\xff' * 100)",
            "os.close(control)",
        ] {
            it.cell(find).await;
            let lied = it.try_cell(&cell(lie)).await;
            assert!(lied.is_err(), "{lie}: {lied:?}");
            assert_eq!(it.sh("echo on").await.0, "on\n");
            it.client.restart(&it.id, "default").await.unwrap();
        }
    });
}

async fn all_of(mut octets: zygote_daemon::Octets) -> Result<Vec<u8>, ClientError> {
    let mut all = Vec::new();
    while let Some(piece) = octets.next().await? {
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

/// Input of these pieces.
fn pieces(all: Vec<std::io::Result<Vec<u8>>>) -> mpsc::Receiver<std::io::Result<bytes::Bytes>> {
    let (sender, input) = mpsc::channel(all.len().max(1));
    for piece in all {
        sender.try_send(piece.map(Into::into)).unwrap();
    }
    input
}

impl Box {
    async fn write(&self, path: &str, options: &str, data: &[u8]) -> Result<FileInfo, ClientError> {
        let input = pieces(vec![Ok(data.to_vec())]);
        self.client
            .write_file(&self.id, path.as_bytes(), options, input)
            .await
    }

    async fn read(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        let reading = self.client.read_file(&self.id, path.as_bytes(), 0, None);
        all_of(reading.await?).await
    }

    async fn act(&self, action: serde_json::Value) -> Result<serde_json::Value, ClientError> {
        let action: FileAction = serde_json::from_value(action).unwrap();
        self.client.files(&self.id, &action).await
    }

    /// A folder of this test's own, as the guest sees it too.
    fn folder(&self) -> String {
        let folder = self.home.folder.path().join("files");
        std::fs::create_dir_all(&folder).unwrap();
        folder.to_str().unwrap().to_owned()
    }
}

fn files_are_written_read_listed_and_removed() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        let file = format!("{f}/new/a.txt");
        let info = it.write(&file, "&parents=true&mode=640", b"one").await.unwrap();
        assert_eq!((info.bytes, info.mode, info.kind), (3, 0o640, FileType::File));
        it.write(&file, "&append=true", b" two").await.unwrap();
        assert_eq!(it.read(&file).await.unwrap(), b"one two");
        let part = it.client.read_file(&it.id, file.as_bytes(), 2, Some(3)).await.unwrap();
        assert_eq!(all_of(part).await.unwrap(), b"e t");
        // In place of what is there, whose permissions stay.
        let info = it.write(&file, "", b"three").await.unwrap();
        assert_eq!((info.bytes, info.mode), (5, 0o640));
        assert_eq!(it.read(&file).await.unwrap(), b"three");
        it.act(serde_json::json!({"action": "mkdir", "path": format!("{f}/new/sub/deep"), "parents": true}))
            .await
            .unwrap();
        it.act(serde_json::json!({"action": "symlink", "path": format!("{f}/new/link"), "target": "a.txt"}))
            .await
            .unwrap();
        let list = |depth: u32| serde_json::json!({"action": "list", "path": format!("{f}/new"), "depth": depth});
        let listed: FileList = serde_json::from_value(it.act(list(1)).await.unwrap()).unwrap();
        let names: Vec<String> = listed
            .files
            .iter()
            .map(|file| String::from_utf8(file.path.0.clone()).unwrap())
            .collect();
        assert_eq!(names, ["a.txt", "link", "sub"]);
        assert_eq!(listed.files[1].target, Some("a.txt".into()));
        let deep: FileList = serde_json::from_value(it.act(list(9)).await.unwrap()).unwrap();
        assert_eq!(deep.files.last().unwrap().path, "sub/deep".into());
        it.act(serde_json::json!({"action": "chmod", "path": file, "mode": 0o600})).await.unwrap();
        it.act(serde_json::json!({"action": "chown", "path": file, "owner": "1:2"})).await.unwrap();
        let stat = it.act(serde_json::json!({"action": "stat", "path": file})).await.unwrap();
        let stat: FileInfo = serde_json::from_value(stat).unwrap();
        assert_eq!((stat.mode, stat.uid, stat.gid), (0o600, 1, 2));
        it.act(serde_json::json!({"action": "move", "path": file, "to": format!("{f}/b")})).await.unwrap();
        assert_eq!(it.read(&format!("{f}/b")).await.unwrap(), b"three");
        it.act(serde_json::json!({"action": "remove", "path": format!("{f}/new"), "recursive": true}))
            .await
            .unwrap();
        assert_eq!(code_of(it.read(&file).await), ErrorCode::FileNotFound);
        // None of that is a process of the user's.
        assert!(it.client.processes(&it.id).await.unwrap().processes.is_empty());
    });
}

fn names_of_any_bytes_survive() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        let long = "x".repeat(255);
        let names: [&[u8]; 5] = [
            b"a\nb",
            b"\xff\xfe",
            "ü €".as_bytes(),
            long.as_bytes(),
            b"-rf * ' \" &?#%",
        ];
        for name in names {
            let path = [f.as_bytes(), b"/", name].concat();
            let input = pieces(vec![Ok(b"hello".to_vec())]);
            let info = it
                .client
                .write_file(&it.id, &path, "", input)
                .await
                .unwrap();
            assert_eq!(info.path.0, path);
            let read = it.client.read_file(&it.id, &path, 0, None).await.unwrap();
            assert_eq!(all_of(read).await.unwrap(), b"hello");
            let stat = FileAction::Stat {
                path: path.clone().into(),
                no_follow: false,
            };
            let info: FileInfo = it.client.files(&it.id, &stat).await.unwrap();
            assert_eq!(info.bytes, 5);
        }
        let list = FileAction::List {
            path: f.as_str().into(),
            depth: 1,
        };
        let listed: FileList = it.client.files(&it.id, &list).await.unwrap();
        let mut found: Vec<Vec<u8>> = listed.files.into_iter().map(|file| file.path.0).collect();
        let mut expected: Vec<Vec<u8>> = names.iter().map(|name| name.to_vec()).collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    });
}

fn what_cannot_be_done_with_files_has_the_kernels_name() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        it.write(&format!("{f}/file"), "", b"x").await.unwrap();
        it.sh(&format!(
            "mkdir {f}/full; touch {f}/full/a; ln -s loop {f}/loop"
        ))
        .await;
        let at = |name: &str| format!("{f}/{name}");
        let act = |action| async { it.act(action).await.map(drop) };
        let j = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
        let cases = [
            (it.read(&at("nope")).await.map(drop), "ENOENT"),
            (it.read(&f).await.map(drop), "EISDIR"),
            (it.read(&at("file/x")).await.map(drop), "ENOTDIR"),
            (it.read(&at("loop")).await.map(drop), "ELOOP"),
            (it.write(&f, "", b"x").await.map(drop), "EISDIR"),
            (it.write("/proc/self/nope", "", b"x").await.map(drop), ""),
            (it.write("/proc/version", "", b"x").await.map(drop), ""),
            (
                it.write(&at(&"y".repeat(256)), "", b"x").await.map(drop),
                "ENAMETOOLONG",
            ),
            (
                act(j(format!(
                    r#"{{"action":"mkdir","path":"{}"}}"#,
                    at("file")
                )))
                .await,
                "EEXIST",
            ),
            (
                act(j(format!(
                    r#"{{"action":"remove","path":"{}"}}"#,
                    at("full")
                )))
                .await,
                "ENOTEMPTY",
            ),
            (
                act(j(format!(
                    r#"{{"action":"move","path":"{}","to":"{}"}}"#,
                    at("file"),
                    at("full")
                )))
                .await,
                "EEXIST",
            ),
            (
                act(j(
                    r#"{"action":"remove","path":"/proc","recursive":true}"#.to_owned()
                ))
                .await,
                "",
            ),
            (
                act(j(format!(
                    r#"{{"action":"chown","path":"{}","owner":"nobody-here"}}"#,
                    at("file")
                )))
                .await,
                "",
            ),
        ];
        for (result, name) in cases {
            let Err(ClientError::Refused(failure)) = result else {
                panic!("{name}: {result:?}");
            };
            let is_file = [ErrorCode::FileNotFound, ErrorCode::FileFailed].contains(&failure.code);
            assert!(is_file, "{failure}");
            assert!(
                name.is_empty() || failure.cause.as_deref() == Some(name),
                "{name}: {failure:?}"
            );
        }
        let empty = it.read("").await;
        assert_eq!(code_of(empty), ErrorCode::BadRequest);
        assert_eq!(it.sh("echo on").await.0, "on\n");
    });
}

fn a_large_file_goes_in_and_out_in_pieces() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let path = format!("{}/big", it.folder());
        let piece: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
        let all = (0..100).map(|_| Ok(piece.clone())).collect();
        let info = it
            .client
            .write_file(&it.id, path.as_bytes(), "", pieces(all))
            .await
            .unwrap();
        assert_eq!(info.bytes, 100_000_000);
        let mut octets = it
            .client
            .read_file(&it.id, path.as_bytes(), 0, None)
            .await
            .unwrap();
        let mut at = 0;
        while let Some(data) = octets.next().await.unwrap() {
            assert!(
                data.iter()
                    .enumerate()
                    .all(|(n, byte)| *byte == piece[(at + n) % piece.len()])
            );
            at += data.len();
        }
        assert_eq!(at, 100_000_000);
    });
}

fn a_write_that_breaks_off_leaves_what_was_there() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        let path = format!("{f}/kept");
        it.write(&path, "", b"before").await.unwrap();
        let broken = pieces(vec![
            Ok(vec![b'x'; 500_000]),
            Err(std::io::Error::other("gone")),
        ]);
        let failed = it
            .client
            .write_file(&it.id, path.as_bytes(), "", broken)
            .await;
        assert!(failed.is_err());
        assert_eq!(it.read(&path).await.unwrap(), b"before");
        // Nothing of it is left, once its task has ended.
        let begun = Instant::now();
        while it.sh("ls -d /proc/[0-9]*").await.0.lines().count() > 3 {
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
        assert_eq!(it.sh(&format!("ls -A {f}")).await.0, "kept\n");
    });
}

fn a_read_that_is_given_up_leaves_no_task() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        it.sh(&format!("mkfifo {f}/pipe")).await;
        for path in ["/dev/zero".to_owned(), format!("{f}/pipe")] {
            let reading = it.client.read_file(&it.id, path.as_bytes(), 0, None);
            // A pipe that nobody writes to says nothing.
            let begun = tokio::time::timeout(Duration::from_millis(300), reading).await;
            if let Ok(octets) = begun {
                octets.unwrap().next().await.unwrap();
            }
        }
        let begun = Instant::now();
        while it.sh("ls -d /proc/[0-9]*").await.0.lines().count() > 3 {
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
    });
}

fn folders_go_in_and_out_as_archives() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        it.sh(&format!(
            "mkdir -p {f}/d/sub; echo hello > {f}/d/sub/a; chmod 750 {f}/d/sub; ln -s sub/a {f}/d/link; \
             ln {f}/d/sub/a {f}/d/hard"
        ))
        .await;
        let packed = it.client.pack(&it.id, format!("{f}/d").as_bytes()).await.unwrap();
        let archive = all_of(packed).await.unwrap();
        let input = pieces(archive.chunks(10_000).map(|piece| Ok(piece.to_vec())).collect());
        it.client.unpack(&it.id, format!("{f}/other").as_bytes(), input).await.unwrap();
        let shown = it.sh(&format!("cd {f}/other/d; cat sub/a hard; readlink link; stat -c %a sub")).await;
        assert_eq!(shown.0, "hello\nhello\nsub/a\n750\n");
        let nonsense = pieces(vec![Ok(vec![b'x'; 5000])]);
        let failed = it.client.unpack(&it.id, f.as_bytes(), nonsense).await;
        assert_eq!(code_of(failed), ErrorCode::FileFailed);
        let gone = it.client.pack(&it.id, b"/no/such").await;
        assert_eq!(code_of(gone.map(|_| ())), ErrorCode::FileNotFound);
    });
}

fn changes_of_files_are_told() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        let mut events = it.client.watch(&it.id, f.as_bytes(), true).await.unwrap();
        assert_eq!(events.next().await.unwrap(), Some(FileEvent::Watching));
        it.sh(&format!(
            "cd {f}; echo 1 > a; mv a b; rm b; mkdir d; sleep 0.2; echo 2 > d/c; rm -r d"
        ))
        .await;
        let mut seen = Vec::new();
        let path = |text: &str| Octets::from(text);
        let last = FileEvent::Removed {
            path: path("d"),
            folder: true,
        };
        while seen.last() != Some(&last) {
            seen.push(events.next().await.unwrap().unwrap());
        }
        for expected in [
            FileEvent::Created {
                path: path("a"),
                folder: false,
            },
            FileEvent::Written { path: path("a") },
            FileEvent::Renamed {
                path: path("a"),
                to: path("b"),
                folder: false,
            },
            FileEvent::Removed {
                path: path("b"),
                folder: false,
            },
            FileEvent::Created {
                path: path("d"),
                folder: true,
            },
            FileEvent::Written { path: path("d/c") },
            FileEvent::Removed {
                path: path("d/c"),
                folder: false,
            },
        ] {
            assert!(seen.contains(&expected), "{expected:?}: {seen:?}");
        }
        let gone = it.client.watch(&it.id, b"/no/such", false).await;
        assert_eq!(code_of(gone.map(|_| ())), ErrorCode::FileNotFound);
    });
}

fn ranges_of_files_are_those_of_http() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let f = it.folder();
        it.write(&format!("{f}/r"), "", b"0123456789")
            .await
            .unwrap();
        let ask = |range: &str| {
            let mut stream = std::os::unix::net::UnixStream::connect(it.home.socket()).unwrap();
            let request = format!(
                "GET /v1/sandboxes/{}/files?path={f}/r HTTP/1.1\r\nhost: localhost\r\n\
                 connection: close\r\nrange: {range}\r\n\r\n",
                it.id
            );
            raw(&mut stream, &request)
        };
        let (status, text) = ask("bytes=2-4");
        assert_eq!(status, 206);
        assert!(
            text.contains("content-range: bytes 2-4/10") && text.contains("234"),
            "{text}"
        );
        assert_eq!(ask("bytes=-3").0, 206);
        assert_eq!(ask("bytes=10-").0, 416);
    });
}

fn a_terminal_on_a_websocket() {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let asked = ProcessRequest {
            detach: true,
            terminal: Some(TerminalSize {
                rows: 24,
                columns: 80,
            }),
            ..shell("read x; stty size; echo got $x; exit 4")
        };
        it.client.start_in(&it.id, &asked).await.unwrap();
        let it = &it;
        let connect = |process: u32| async move {
            let stream = tokio::net::UnixStream::connect(it.home.socket())
                .await
                .unwrap();
            let url = format!(
                "ws://localhost/v1/sandboxes/{}/processes/{process}/socket",
                it.id
            );
            tokio_tungstenite::client_async(url, stream)
                .await
                .map(|(socket, _)| socket)
        };
        let mut socket = connect(1).await.unwrap();
        let resize = r#"{"type": "resize", "rows": 30, "columns": 90}"#;
        socket.send(Message::text(resize)).await.unwrap();
        socket
            .send(Message::binary(b"word\r".to_vec()))
            .await
            .unwrap();
        let (mut shown, mut texts) = (Vec::new(), Vec::new());
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Binary(data) => shown.extend(data),
                Message::Text(text) => texts.push(text.to_string()),
                _ => {}
            }
        }
        let shown = String::from_utf8(shown).unwrap();
        assert!(
            shown.contains("30 90") && shown.contains("got word"),
            "{shown}"
        );
        let last: ProcessEvent = serde_json::from_str(texts.last().unwrap()).unwrap();
        assert!(matches!(last, ProcessEvent::Result(result) if result.exit_code == 4));
        // What is not there, and what makes no sense.
        let mut none = connect(99).await.unwrap();
        let told = none.next().await.unwrap().unwrap().into_text().unwrap();
        assert!(told.contains("process_not_found"), "{told}");
        it.detached("sleep 1000").await;
        let mut odd = connect(2).await.unwrap();
        odd.send(Message::text("{\"type\": \"nope\"}"))
            .await
            .unwrap();
        let told = odd.next().await.unwrap().unwrap().into_text().unwrap();
        assert!(told.contains("bad_request"), "{told}");
        // Who goes away leaves the process.
        drop(odd);
        assert_eq!(it.client.process(&it.id, 2).await.unwrap().state, "running");
        let mut stream = std::os::unix::net::UnixStream::connect(it.home.socket()).unwrap();
        let plain = format!(
            "GET /v1/sandboxes/{}/processes/2/socket HTTP/1.1\r\nhost: localhost\r\nconnection: \
             close\r\n\r\n",
            it.id
        );
        assert_eq!(raw(&mut stream, &plain).0, 400);
    });
}

fn random_sequences_of_verbs_do_what_a_model_does() {
    model::check();
}
