//! The daemon is killed, and another one goes on.

use super::*;
use cells::value;

impl Box {
    /// The daemon is killed (SIGKILL), and the next one is there.
    async fn kill_daemon(&mut self, options: &[&str]) {
        kill(&self.client).await;
        self.client = started(&self.home, options).await;
        let said = self.home.said();
        assert!(!said.contains("cannot go on"), "{said}");
        let last = said.lines().rfind(|line| line.contains("engine 0"));
        let before = said.lines().take_while(|line| Some(*line) != last).last();
        assert!(
            before.is_some_and(|line| line.contains("goes on with")),
            "{said}"
        );
    }
}

pub async fn kill(client: &Client) {
    let pid = client.status().await.unwrap().health.pid;
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&process, rustix::process::Signal::KILL).unwrap();
    let mut fds = [rustix::event::PollFd::new(
        &process,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None).unwrap();
}

async fn kept(it: &Box, process: u32) -> String {
    let mut events = it
        .client
        .read_output(&it.id, process, None, false)
        .await
        .unwrap();
    let mut text = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        if let ProcessEvent::Stdout { data, .. } | ProcessEvent::Stderr { data, .. } = event {
            text.extend(data.0);
        }
    }
    String::from_utf8(text).unwrap()
}

pub fn a_sandbox_lives_on_when_the_daemon_is_killed() {
    runtime().block_on(async {
        let named = SandboxRequest {
            name: Some("box".to_owned()),
            ttl_seconds: 3600.0,
            env: [("OWN".to_owned(), "mine".to_owned())].into(),
            ..request()
        };
        let mut it = sandbox(named).await;
        let before = it.client.sandbox(&it.id).await.unwrap();
        assert_eq!(it.sh("exit 7").await.2, 7);
        // One ends while there is no daemon, one goes on for ever, one was given input.
        let fifo = it.home.folder.path().join("go");
        let fifo = fifo.to_str().unwrap();
        it.sh(&format!("mkfifo {fifo}")).await;
        let ends = it
            .detached(&format!("echo before; cat {fifo}; echo after; exit 5"))
            .await;
        let goes_on = it
            .detached("echo first; trap 'echo got; exit 9' TERM; while :; do sleep 0.01; done")
            .await;
        kill(&it.client).await;
        std::fs::write(fifo, "meanwhile\n").unwrap();
        it.client = started(&it.home, &[]).await;
        let after = it.client.sandbox("box").await.unwrap();
        assert_eq!(
            (
                &after.id,
                after.state,
                after.expires_unix_s,
                after.fork_time_ms
            ),
            (
                &before.id,
                SandboxState::Running,
                before.expires_unix_s,
                before.fork_time_ms
            )
        );
        let result = it
            .client
            .wait_process(&it.id, ends)
            .await
            .unwrap()
            .result
            .unwrap();
        assert_eq!(result.exit_code, 5);
        assert_eq!(kept(&it, ends).await, "before\nmeanwhile\nafter\n");
        let all = it.client.processes(&it.id).await.unwrap().processes;
        assert_eq!(
            all.iter().map(|one| one.process).collect::<Vec<_>>(),
            [1, 2, ends, goes_on]
        );
        assert_eq!(all[0].result.as_ref().unwrap().exit_code, 7);
        assert_eq!(
            (all[3].command[0].clone(), &all[3].state[..]),
            ("sh".into(), "running")
        );
        // It is used on as before.
        assert_eq!(it.sh("echo $OWN").await.0, "mine\n");
        let signal = ProcessSignal {
            signal: 15,
            only_process: true,
        };
        it.client
            .signal_process(&it.id, goes_on, signal)
            .await
            .unwrap();
        let result = it
            .client
            .wait_process(&it.id, goes_on)
            .await
            .unwrap()
            .result
            .unwrap();
        assert_eq!(result.exit_code, 9);
        assert_eq!(kept(&it, goes_on).await, "first\ngot\n");
        assert_eq!(
            it.client
                .end_sandbox(&it.id)
                .await
                .unwrap()
                .end
                .unwrap()
                .reason,
            "removed"
        );
    });
}

pub fn a_sandbox_survives_many_daemons_and_its_output_is_whole() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let counts = it
            .detached("i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo $i; sleep 0.005; done")
            .await;
        for _ in 0..6 {
            it.kill_daemon(&[]).await;
            // In the middle of something.
            let some = it
                .client
                .exec_in(&it.id, &shell("echo a; sleep 10"), None)
                .await;
            let mut some = some.unwrap();
            some.next().await.unwrap();
        }
        let ended = it.client.wait_process(&it.id, counts).await.unwrap();
        assert_eq!(ended.result.unwrap().exit_code, 0);
        let expected: String = (1..=400).map(|n| format!("{n}\n")).collect();
        assert_eq!(kept(&it, counts).await, expected);
    });
}

pub fn what_followed_a_process_is_resumed_at_its_offset() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i; sleep 0.005; done; exit 4";
        let mut events = it
            .client
            .exec_in(&it.id, &shell(script), None)
            .await
            .unwrap();
        let (mut text, mut process) = (Vec::new(), 0);
        while text.len() < 100 {
            match events.next().await.unwrap().unwrap() {
                ProcessEvent::Started {
                    process: number, ..
                } => process = number,
                ProcessEvent::Stdout { data, .. } => text.extend(data.0),
                other => panic!("{other:?}"),
            }
        }
        it.kill_daemon(&[]).await;
        // What the dead one had sent already may still be there.
        while let Ok(Some(ProcessEvent::Stdout { data, .. })) = events.next().await {
            text.extend(data.0);
        }
        let from = Some(text.len() as u64);
        let mut events = it
            .client
            .read_output(&it.id, process, from, true)
            .await
            .unwrap();
        let exit_code = loop {
            match events.next().await.unwrap().unwrap() {
                ProcessEvent::Stdout { data, offset } => {
                    assert_eq!(offset, text.len() as u64);
                    text.extend(data.0);
                }
                ProcessEvent::Result(result) => break result.exit_code,
                ProcessEvent::Started { .. } => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(exit_code, 4);
        let expected: String = (1..=300).map(|n| format!("{n}\n")).collect();
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    });
}

pub fn interpreters_keep_their_state_when_the_daemon_is_killed() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let other = ContextRequest {
            name: "other".to_owned(),
            language: String::new(),
            cwd: String::new(),
        };
        it.client.create_context(&it.id, &other).await.unwrap();
        it.cell("x = 41").await;
        let in_other = |source: &str| CodeRequest {
            context: "other".to_owned(),
            ..cell(source)
        };
        let busy = in_other(
            "import time\nfor i in range(200):\n  print(i)\n  time.sleep(0.01)\ny = 'done'",
        );
        let mut events = it.client.run_code(&it.id, &busy).await.unwrap();
        while !matches!(
            events.next().await.unwrap().unwrap(),
            CodeEvent::Stdout { .. }
        ) {}
        it.kill_daemon(&[]).await;
        let all = it.client.contexts(&it.id).await.unwrap().contexts;
        let states: Vec<_> = all
            .iter()
            .map(|one| (&one.name[..], &one.state[..], one.execution_count))
            .collect();
        assert_eq!(states, [("default", "idle", 1), ("other", "busy", 0)]);
        let (_, result) = it.try_cell(&cell("x + 1")).await.unwrap();
        assert_eq!(
            (
                &result.result.unwrap()["text/plain"][..],
                result.execution_count
            ),
            ("42", 2)
        );
        // Behind the cell that runs, of which nobody hears.
        let (shown, result) = it.try_cell(&in_other("print(y)")).await.unwrap();
        assert_eq!((&shown.concat()[..], result.execution_count), ("done\n", 2));
    });
}

pub fn a_cell_keeps_its_time_limit_and_a_display_holds_nobody_when_the_daemon_is_killed() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let limited = CodeRequest {
            timeout_seconds: 1.0,
            ..cell("print('begun', flush=True)\nwhile True: pass")
        };
        let mut events = it.client.run_code(&it.id, &limited).await.unwrap();
        assert!(matches!(
            events.next().await.unwrap(),
            Some(CodeEvent::Stdout { .. })
        ));
        it.kill_daemon(&[]).await;
        assert_eq!(it.cell("1 + 1").await.1, value("2"));
        let shows = cell("for i in range(20): display(i)\nz = 'shown'");
        let _unread = it.client.run_code(&it.id, &shows).await.unwrap();
        it.kill_daemon(&[]).await;
        assert_eq!(it.cell("z").await.1, value("'shown'"));
    });
}

pub fn time_limits_hold_across_daemons() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let limited = ProcessRequest {
            detach: true,
            timeout_seconds: 0.8,
            ..shell("sleep 1000")
        };
        let process = it.client.start_in(&it.id, &limited).await.unwrap().process;
        let short = SandboxRequest {
            ttl_seconds: 1.0,
            ..request()
        };
        let other = made(&it.client, &short).await.unwrap().id;
        it.kill_daemon(&[]).await;
        let result = it
            .client
            .wait_process(&it.id, process)
            .await
            .unwrap()
            .result
            .unwrap();
        assert_eq!((result.exit_code, result.timed_out), (124, true));
        let ended = it.client.wait_sandbox(&other).await.unwrap();
        assert_eq!(ended.end.unwrap().reason, "ttl");
        // While there is no daemon, the time of a sandbox goes on.
        let third = made(&it.client, &short).await.unwrap().id;
        kill(&it.client).await;
        tokio::time::sleep(Duration::from_millis(1300)).await;
        it.client = started(&it.home, &[]).await;
        let third = it.client.sandbox(&third).await.unwrap();
        assert_eq!(third.end.unwrap().reason, "ttl");
    });
}

pub fn what_has_ended_is_known_to_the_next_daemon() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let key = Some("key-1");
        let second = made_with(&it.client, &request(), key).await.unwrap().id;
        it.sh("exit 3").await;
        it.client.end_sandbox(&it.id).await.unwrap();
        it.kill_daemon(&[]).await;
        let ended = it.client.sandbox(&it.id).await.unwrap();
        assert_eq!(
            (ended.state, ended.end.unwrap().reason),
            (SandboxState::Ended, "removed".to_owned())
        );
        assert_eq!(
            it.client
                .process(&it.id, 1)
                .await
                .unwrap()
                .result
                .unwrap()
                .exit_code,
            3
        );
        // A request that is sent again after the kill makes no second one.
        assert_eq!(
            made_with(&it.client, &request(), key).await.unwrap().id,
            second
        );
        // Numbers of events go on.
        let mut events = it.client.sandbox_events(0, false).await.unwrap();
        let event = events.next().await.unwrap().unwrap();
        assert!(
            event.number > 4 && event.what == SandboxHappening::Adopted,
            "{event:?}"
        );
    });
}

pub fn another_version_ends_what_it_cannot_go_on_with_and_says_so() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let folder = it.home.folder.path().join("alive");
        it.detached(&format!(
            "while :; do touch {}; sleep 0.01; done",
            folder.display()
        ))
        .await;
        it.kill_daemon(&["version=2"]).await;
        let ended = it.client.sandbox(&it.id).await.unwrap();
        let end = ended.end.unwrap();
        assert_eq!(end.reason, "not_adopted");
        assert!(
            end.message.contains("version 1") && end.message.contains("version 2"),
            "{}",
            end.message
        );
        let mut events = it.client.sandbox_events(0, false).await.unwrap();
        let event = events.next().await.unwrap().unwrap();
        let is_its_end = matches!(&event.what, SandboxHappening::Ended { reason, .. } if reason == "not_adopted");
        assert!(is_its_end && event.sandbox == it.id, "{event:?}");
        // Nothing of it runs on.
        until("its processes have ended", || {
            std::fs::remove_file(&folder).ok();
            std::thread::sleep(Duration::from_millis(100));
            !folder.exists()
        });
        let again = made(&it.client, &request()).await.unwrap();
        assert_eq!(again.state, SandboxState::Running);
    });
}

pub fn a_holder_that_is_killed_is_replaced() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let holder = |home: &Home| {
            let path = home.folder.path().join("run/zygote.sock.held");
            let path = path.to_str().unwrap().to_owned();
            let is_holder = move |pid: &u32| {
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).into_owned();
                line.contains(HOLDER_VERB) && line.contains(&path)
            };
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
            pids.find(is_holder)
        };
        // One that has lived a while.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let first = holder(&it.home).unwrap();
        let pid = rustix::process::Pid::from_raw(first.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let home = &it.home;
        until("another holder", || {
            holder(home).is_some_and(|pid| pid != first)
        });
        assert_eq!(it.sh("echo on").await.0, "on\n");
        it.kill_daemon(&[]).await;
        assert_eq!(it.sh("echo still").await.0, "still\n");
        it.client.end_sandbox(&it.id).await.unwrap();
        // One that has nothing to hold does not stay without a daemon.
        kill(&it.client).await;
        let home = &it.home;
        until("no holder", || holder(home).is_none());
        started(&it.home, &[]).await;
    });
}

pub fn what_no_daemon_comes_for_ends() {
    runtime().block_on(async {
        let it = sandbox_with(request(), &["away_ms=300"]).await;
        let alive = it.home.folder.path().join("alive");
        it.detached(&format!(
            "while :; do touch {}; sleep 0.01; done",
            alive.display()
        ))
        .await;
        until("it runs", || alive.exists());
        kill(&it.client).await;
        until("nothing of it runs on", || {
            std::fs::remove_file(&alive).ok();
            std::thread::sleep(Duration::from_millis(100));
            !alive.exists()
        });
        started(&it.home, &[]).await;
    });
}

/// What a client does while its daemon is killed: each ends well, or by a connection that breaks off.
async fn meddle(client: Client, id: String, folder: String, round: u32) {
    let key = format!("key-{round}");
    let named = SandboxRequest {
        name: Some(format!("made-{round}")),
        ..request()
    };
    let line = shell(&format!("echo {round} >> {folder}/log; exit 3"));
    let whole = vec![round as u8; 200_000];
    let input = files::pieces(
        whole
            .chunks(10_000)
            .map(|piece| Ok(piece.to_vec()))
            .collect(),
    );
    let path = format!("{folder}/whole");
    let sum = cell(&format!("total = globals().get('total', 0) + {round}"));
    let (made, ran, written, summed) = tokio::join!(
        made_with(&client, &named, Some(&key)),
        client.exec_in(&id, &line, None),
        client.write_file(&id, path.as_bytes(), "", input),
        client.run_code(&id, &sum),
    );
    drop((made, ran, written, summed));
}

pub fn kills_at_random_lose_nothing() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let folder = it.home.folder.path().join("files");
        std::fs::create_dir(&folder).unwrap();
        let folder = folder.to_str().unwrap().to_owned();
        let count = "i=0; while [ ! -e end ]; do i=$((i+1)); echo $i; sleep 0.002; done; exit 6";
        let counts = it.detached(&format!("cd {folder}; {count}")).await;
        for round in 1..25 {
            let (own, id) = (
                Client::connect(&it.home.socket()).await.unwrap(),
                it.id.clone(),
            );
            let meddling = tokio::spawn(meddle(own, id, folder.clone(), round));
            tokio::time::sleep(Duration::from_micros(u64::from(round * 7919 % 30_000))).await;
            it.kill_daemon(&[]).await;
            meddling.await.unwrap();
            // What was asked for twice was made once.
            let named = SandboxRequest {
                name: Some(format!("made-{round}")),
                ..request()
            };
            let made = made_with(&it.client, &named, Some(&format!("key-{round}")))
                .await
                .unwrap();
            let found = it.client.sandbox(&format!("made-{round}")).await.unwrap();
            assert_eq!(
                (made.id, found.state),
                (found.id.clone(), SandboxState::Running)
            );
            it.client.end_sandbox(&found.id).await.unwrap();
            // A file is there whole or not at all.
            if let Ok(bytes) = std::fs::read(format!("{folder}/whole")) {
                let ends: Vec<(usize, u8)> = bytes
                    .iter()
                    .copied()
                    .enumerate()
                    .filter(|(at, byte)| *at > 0 && bytes[at - 1] != *byte)
                    .collect();
                assert!(
                    bytes.len() == 200_000 && ends.is_empty(),
                    "{} {ends:?} {round}",
                    bytes.len()
                );
            }
            // The interpreter answers, and goes on counting its cells.
            assert_eq!(it.cell("1 + 1").await.1, value("2"));
        }
        std::fs::write(format!("{folder}/end"), "").unwrap();
        let result = it
            .client
            .wait_process(&it.id, counts)
            .await
            .unwrap()
            .result
            .unwrap();
        assert_eq!(result.exit_code, 6);
        let text = kept(&it, counts).await;
        let lines: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert!(
            lines.windows(2).all(|two| two[1] == two[0] + 1),
            "a line is missing"
        );
        // Each process that has written its line has ended, and with its own status.
        until_ended(&it).await;
        let all = it.client.processes(&it.id).await.unwrap().processes;
        let ended = all
            .iter()
            .filter(|one| one.result.as_ref().is_some_and(|r| r.exit_code == 3));
        let log = std::fs::read_to_string(format!("{folder}/log")).unwrap_or_default();
        assert_eq!(ended.count(), log.lines().count());
        let left = it.client.sandboxes(None, None).await.unwrap().sandboxes;
        assert_eq!(left.len(), 1, "{left:?}");
    });
}

async fn until_ended(it: &Box) {
    let all = it.client.processes(&it.id).await.unwrap().processes;
    let runs = |one: &&ProcessInfo| one.state == "running" && one.command[0] == "sh".into();
    for process in all.iter().filter(runs) {
        it.client
            .wait_process(&it.id, process.process)
            .await
            .unwrap();
    }
}

pub fn a_file_that_was_on_its_way_in_is_not_there() {
    runtime().block_on(async {
        let mut it = sandbox(request()).await;
        let path = it.home.folder.path().join("whole");
        for round in 0..20 {
            let (sender, input) = mpsc::channel(100);
            let own = Client::connect(&it.home.socket()).await.unwrap();
            let (id, file) = (it.id.clone(), path.clone());
            let writing = tokio::spawn(async move {
                let file = file.to_str().unwrap();
                own.write_file(&id, file.as_bytes(), "", input).await
            });
            for _ in 0..round {
                sender.send(Ok(vec![b'x'; 10_000].into())).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(round)).await;
            it.kill_daemon(&[]).await;
            assert!(writing.await.unwrap().is_err());
            assert!(!path.exists(), "{round}: {:?}", std::fs::metadata(&path));
            drop(sender);
        }
    });
}

pub fn a_guest_that_lies_to_the_next_daemon_loses_its_sandbox_alone() {
    runtime().block_on(async {
        let mut it = sandbox_with(request(), &["patience_ms=1000"]).await;
        let liar = SandboxRequest {
            template: LIAR.to_owned(),
            ..request()
        };
        let lies = [
            "backwards",
            "note",
            "end",
            "other",
            "silent",
            "numbers",
            "last",
        ];
        let mut ids = Vec::new();
        for lie in lies {
            let id = made(&it.client, &liar).await.unwrap().id;
            let lying = process(&[&format!("resume-{lie}")]);
            let lying = ProcessRequest {
                detach: true,
                ..lying
            };
            it.client.start_in(&id, &lying).await.unwrap();
            ids.push(id);
        }
        it.kill_daemon(&["patience_ms=1000"]).await;
        for (id, lie) in ids.iter().zip(lies) {
            let end = it.client.wait_sandbox(id).await.unwrap().end.unwrap();
            assert_eq!(end.reason, "died", "{lie}: {end:?}");
        }
        assert_eq!(it.sh("echo on").await.0, "on\n");
    });
}

pub fn what_cannot_be_held_works_and_is_said() {
    runtime().block_on(async {
        let it = sandbox_with(request(), &["holder=/bin/false"]).await;
        assert_eq!(it.sh("echo on").await.0, "on\n");
        let status = it.client.status().await.unwrap();
        let why = status.sandboxes_not_held.unwrap();
        assert!(why.contains("as soon as it is started"), "{why}");
        // As before there were holders: it ends with its daemon.
        kill(&it.client).await;
        let client = started(&it.home, &[]).await;
        let gone = client.sandbox(&it.id).await;
        assert_eq!(code(gone), ErrorCode::SandboxNotFound);
    });
}

pub fn a_daemon_that_is_stopped_in_the_middle_of_a_copy_says_so() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let (sender, input) = mpsc::channel(100);
        sender.send(Ok(vec![b'x'; 10_000].into())).await.unwrap();
        let own = Client::connect(&it.home.socket()).await.unwrap();
        let (id, path) = (it.id.clone(), it.home.folder.path().join("copy"));
        let writing = tokio::spawn(async move {
            let path = path.to_str().unwrap();
            own.write_file(&id, path.as_bytes(), "", input).await
        });
        // Its task is there.
        let looks = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -q '[/]proc/self/exe files'";
        while it.sh(looks).await.2 != 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let now = StopRequest {
            now: true,
            if_idle: false,
        };
        it.client.stop(now).await.unwrap();
        let stopped = writing.await.unwrap();
        assert!(
            matches!(&stopped, Err(ClientError::Refused(failure)) if failure.code == ErrorCode::SandboxEnded)
                || matches!(&stopped, Err(ClientError::Broken(_))),
            "{stopped:?}"
        );
        drop(sender);
    });
}
