//! Live sandboxes as the API's clients see them: a real daemon and the real agent, without any VM. This
//! program plays the daemon, its zygotes and their guests too.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]
#![allow(dead_code, reason = "shared with other tests")]

mod branches;
mod cells;
#[path = "../support/fake.rs"]
mod fake;
mod files;
mod guests;
#[path = "../support/home.rs"]
mod home;
mod killed;
mod model;
mod processes;
mod sdks;
mod soak;
mod tenants;
mod tls;
mod watched;

use cells::{cell, cell_end, code_of};
use fake::AGENT_VERB;
use files::{all_of, pieces};
use home::*;
use libtest_mimic::{Arguments, Trial};
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
        Some(HOLDER_VERB) => return holder(&words[2..]),
        _ => {}
    }
    let tests = TESTS.iter().map(|(name, check)| {
        let trial = Trial::test(*name, move || {
            check();
            Ok(())
        });
        trial.with_ignored_flag(name.starts_with("sdks::") && !sdks::has_tools())
    });
    libtest_mimic::run(&Arguments::from_args(), tests.collect()).exit_code()
}

type Check = fn();
macro_rules! tests {
    ($($name:path),* $(,)?) => { const TESTS: &[(&str, Check)] = &[$((stringify!($name), $name)),*]; };
}
tests!(
    a_sandbox_is_made_used_and_ended,
    what_cannot_be_done_is_refused_with_its_code,
    names_and_beginnings_of_ids_find_a_sandbox,
    processes::input_goes_in_with_back_pressure_and_has_an_end,
    processes::a_detached_process_goes_on_and_its_newest_output_is_kept,
    processes::who_comes_back_reads_on_from_an_offset,
    processes::a_slow_reader_holds_its_process_and_nobody_else,
    processes::two_clients_may_read_one_process,
    processes::sixty_four_processes_at_once_lose_no_byte,
    processes::signals_reach_a_process_or_its_group,
    processes::a_process_that_is_bound_ends_with_its_client,
    processes::a_terminal_is_one_and_has_a_size,
    processes::a_process_runs_as_a_user,
    time_limits_of_processes_and_of_sandboxes_hold,
    an_idle_sandbox_ends_and_a_used_one_does_not,
    a_request_that_is_sent_twice_makes_one_sandbox,
    events_tell_what_has_happened,
    processes::what_a_process_leaves_behind_may_still_write,
    limits_are_told_by_name,
    stop_does_not_end_sandboxes_without_a_word,
    guests::a_sandbox_whose_guest_dies_is_told_to_have_died,
    cells::a_cell_has_output_a_value_and_a_number_and_state_stays,
    cells::what_is_displayed_comes_between_what_is_printed,
    cells::an_exception_is_told_with_its_lines,
    cells::top_level_await_and_threads_work,
    cells::a_cell_is_interrupted_and_its_state_stays,
    cells::a_context_that_dies_is_told_and_restarted,
    cells::contexts_have_states_of_their_own,
    cells::cells_wait_for_each_other,
    cells::a_cell_goes_on_when_its_client_has_gone,
    cells::a_cell_that_is_bound_is_interrupted_when_its_client_goes,
    cells::a_cell_goes_on_when_nobody_has_taken_what_it_displays,
    cells::a_flood_of_output_and_of_displays_is_slowed_by_its_reader,
    cells::an_interpreter_that_breaks_the_rules_harms_itself_alone,
    files::files_are_written_read_listed_and_removed,
    files::names_of_any_bytes_survive,
    files::what_cannot_be_done_with_files_has_the_kernels_name,
    files::a_large_file_goes_in_and_out_in_pieces,
    files::a_write_that_breaks_off_leaves_what_was_there,
    files::a_read_that_is_given_up_leaves_no_task,
    files::folders_go_in_and_out_as_archives,
    files::changes_of_files_are_told,
    files::ranges_of_files_are_those_of_http,
    processes::a_terminal_on_a_websocket,
    guests::a_guest_that_breaks_the_rules_loses_its_sandbox_alone,
    guests::a_guest_that_tells_an_end_twice_or_displays_without_end_loses_its_sandbox,
    guests::a_guest_that_does_not_answer_is_told_to_be_late,
    killed::a_sandbox_lives_on_when_the_daemon_is_killed,
    killed::a_sandbox_survives_many_daemons_and_its_output_is_whole,
    killed::what_followed_a_process_is_resumed_at_its_offset,
    killed::interpreters_keep_their_state_when_the_daemon_is_killed,
    killed::a_cell_keeps_its_time_limit_and_a_display_holds_nobody_when_the_daemon_is_killed,
    killed::time_limits_hold_across_daemons,
    killed::what_has_ended_is_known_to_the_next_daemon,
    killed::another_version_ends_what_it_cannot_go_on_with_and_says_so,
    killed::a_holder_that_is_killed_is_replaced,
    killed::what_no_daemon_comes_for_ends,
    killed::kills_at_random_lose_nothing,
    killed::a_file_that_was_on_its_way_in_is_not_there,
    killed::a_guest_that_lies_to_the_next_daemon_loses_its_sandbox_alone,
    killed::what_cannot_be_held_works_and_is_said,
    killed::a_daemon_that_is_stopped_in_the_middle_of_a_copy_says_so,
    branches::a_branch_that_cannot_be_made_leaves_its_source_as_it_was,
    branches::a_paused_sandbox_of_another_version_is_shown_refused_and_removed,
    tenants::no_tenant_reaches_anothers_sandbox_by_any_path,
    tenants::what_is_a_tenants_own_is_its_own_and_names_do_not_meet,
    tenants::without_a_key_there_is_nothing_but_what_is_everybodys,
    tenants::roles_are_kept_to,
    tenants::limits_of_keys_are_told_and_read_again,
    tenants::a_revoked_key_counts_no_more,
    sdks::the_python_sdk_does_what_it_says,
    sdks::the_typescript_sdk_does_what_it_says,
    tls::tls_is_spoken_and_a_new_certificate_is_taken_at_a_signal,
    tenants::a_tenants_machines_take_no_more_together_than_they_may,
    tenants::what_stands_in_a_path_is_told_as_all_failures_are,
    tenants::what_a_key_sends_and_gets_back_ends_somewhere,
    soak::mixed_load_leaves_nothing_behind_and_mixes_nobody_up,
    watched::metrics_tell_what_has_happened,
    watched::traces_reach_a_collector_and_the_log_names_requests,
    watched::a_service_manager_may_listen_for_it,
    watched::a_collector_that_is_away_is_told_of_once,
    model::random_sequences_of_verbs_do_what_a_model_does,
);

/// The program behind [`AGENT_VERB`].
fn agent() -> ! {
    let streams = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    rustix::stdio::dup2_stdin(&null).unwrap();
    // Its runner has gone.
    let _ = zygote_agent::serve_here(streams);
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
