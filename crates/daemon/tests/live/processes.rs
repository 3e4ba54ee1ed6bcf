//! Processes of sandboxes: input, output, signals, terminals.

use super::*;

pub fn input_goes_in_with_back_pressure_and_has_an_end() {
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

pub fn a_detached_process_goes_on_and_its_newest_output_is_kept() {
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

pub fn who_comes_back_reads_on_from_an_offset() {
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

pub fn a_slow_reader_holds_its_process_and_nobody_else() {
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

pub fn two_clients_may_read_one_process() {
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

pub fn sixty_four_processes_at_once_lose_no_byte() {
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

pub fn signals_reach_a_process_or_its_group() {
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

pub fn a_process_that_is_bound_ends_with_its_client() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let bound = |script: &str| ProcessRequest {
            kill_on_disconnect: true,
            ..shell(script)
        };
        // Its end is its own if the client stays, and so is that of what it leaves behind.
        let marker = it.home.folder.path().join("left");
        let script = format!(
            "(sleep 0.3; touch {}) >/dev/null 2>&1 & echo hi; exit 3",
            marker.display()
        );
        let started = it.client.exec_in(&it.id, &bound(&script), None).await;
        let (stdout, _, result) = finished(&mut started.unwrap()).await.unwrap();
        assert_eq!((&stdout[..], result.exit_code), (&b"hi\n"[..], 3));
        until("what it has left behind goes on", || marker.exists());
        // Whether or not its number was told yet.
        let mut events = it.client.exec_in(&it.id, &bound("sleep 1000"), None).await;
        let first = events.as_mut().unwrap().next().await.unwrap();
        assert!(matches!(
            first,
            Some(ProcessEvent::Started { process: 2, .. })
        ));
        drop(events);
        for patience in 1..8 {
            let request = bound("sleep 1000");
            let asked = it.client.exec_in(&it.id, &request, None);
            let _ = tokio::time::timeout(Duration::from_millis(patience), asked).await;
        }
        // Others go on.
        let free = it.client.exec_in(&it.id, &shell("sleep 999"), None).await;
        drop(free);
        for process in it.client.processes(&it.id).await.unwrap().processes {
            let waiting = it.client.wait_process(&it.id, process.process);
            if process.command[2].0 == b"sleep 999" {
                let waited = tokio::time::timeout(Duration::from_secs(1), waiting).await;
                assert!(waited.is_err(), "{process:?}");
            } else {
                assert!(waiting.await.unwrap().result.is_some());
            }
        }
        let both = ProcessRequest {
            detach: true,
            ..bound("true")
        };
        let refused = it.client.exec_in(&it.id, &both, None).await;
        assert_eq!(code(refused.map(|_| ())), ErrorCode::BadRequest);
    });
}

pub fn a_terminal_is_one_and_has_a_size() {
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

pub fn a_process_runs_as_a_user() {
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

pub fn what_a_process_leaves_behind_may_still_write() {
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

pub fn a_terminal_on_a_websocket() {
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
                "ws://localhost/v1/sandboxes/{}/processes/{process}/socket?hold=true",
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
        // Much goes in while as much comes out.
        let cat = ProcessRequest {
            stdin_stream: true,
            detach: true,
            ..process(&["cat"])
        };
        let number = it.client.start_in(&it.id, &cat).await.unwrap().process;
        let (mut writer, mut reader) = connect(number).await.unwrap().split();
        let writing = async {
            for _ in 0..60 {
                writer
                    .send(Message::binary(vec![b'x'; 50_000]))
                    .await
                    .unwrap();
            }
            let end = r#"{"type": "stdin_end"}"#;
            writer.send(Message::text(end)).await.unwrap();
        };
        let reading = async {
            let mut count = 0;
            while let Some(Ok(message)) = reader.next().await {
                if let Message::Binary(data) = message {
                    count += data.len();
                }
            }
            count
        };
        let ((), count) = tokio::join!(writing, reading);
        assert_eq!(count, 3_000_000);
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
