//! Many programs in one request, and what is counted of them.

use super::*;

pub fn a_batch_has_a_result_for_each_in_their_order() {
    let home = Home::new();
    runtime().block_on(async {
        let client = started(&home, &["--waiting-max", "40"]).await;
        let one = |index: usize| match index {
            7 => ExecRequest {
                template: "nothing".to_owned(),
                ..command(&["echo", "x"])
            },
            8 => ExecRequest {
                language: Some("node".to_owned()),
                code: Some("1".into()),
                ..ExecRequest::default()
            },
            index => command(&["echo", &index.to_string()]),
        };
        let request = BatchRequest {
            executions: (0..100).map(one).collect(),
        };
        let found = client.batch(&request).await.unwrap();
        assert_eq!(found.results.len(), 100);
        for (index, result) in found.results.iter().enumerate() {
            let code = result.error.as_ref().map(|failure| failure.code);
            let expected = match index {
                7 | 8 => Some(ErrorCode::TemplateNotFound),
                _ => None,
            };
            assert_eq!(code, expected, "{index}: {result:?}");
            let (status, text) = match expected {
                Some(_) => (125, String::new()),
                None => (3, index.to_string()),
            };
            assert_eq!(
                (result.exit_code, result.stdout.as_ref()),
                (status, Some(&text))
            );
        }
        let many = |count| BatchRequest {
            executions: vec![command(&["echo", "x"]); count],
        };
        let streamed = BatchRequest {
            executions: vec![ExecRequest {
                stdin_stream: true,
                ..command(&["cat"])
            }],
        };
        let endless = BatchRequest {
            executions: vec![
                command(&["echo", "x"]),
                ExecRequest {
                    timeout_seconds: -1.0,
                    ..command(&["echo", "x"])
                },
            ],
        };
        for (bad, what) in [
            (many(0), "executions: 1 to 1000"),
            (many(1001), "executions: 1 to 1000"),
            (streamed, "executions[0]: no lines"),
            (endless, "executions[1]: timeout_seconds: from 0"),
        ] {
            let refused = client.batch(&bad).await.unwrap_err();
            let refused = refused.failure().unwrap();
            assert_eq!(refused.code, ErrorCode::BadRequest);
            assert!(refused.message.starts_with(what), "{refused:?}");
        }
        // Who goes away leaves nothing that runs.
        let waiting = BatchRequest {
            executions: vec![command(&["wait"]); 40],
        };
        let gone = tokio::time::timeout(Duration::from_secs(1), client.batch(&waiting)).await;
        assert!(gone.is_err());
        let begun = std::time::Instant::now();
        while client.status().await.unwrap().runs.running > 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "they run on");
        }
        // All of that has been counted.
        let mut stream = UnixStream::connect(home.socket()).unwrap();
        let asked = "GET /v1/metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        let (status, text) = raw(&mut stream, asked);
        assert_eq!(status, 200);
        for line in [
            "content-type: text/plain; version=0.0.4; charset=utf-8",
            "zygote_runs_total{ended=\"failed\"} 98",
            "zygote_runs_total{ended=\"error\"} 2",
            "zeroboot_total_executions{status=\"success\"} 98",
            "zygote_run_seconds_count 98",
            "zygote_runs_running 0",
        ] {
            let is_there = text.lines().any(|own| own.trim_end() == line);
            assert!(is_there, "{line}\n{text}");
        }
        // The names that clients of another project know.
        let mut stream = UnixStream::connect(home.socket()).unwrap();
        let body = r#"{"template":"fake","command":["bytes"],"timeout_seconds":5}"#;
        assert_eq!(raw(&mut stream, &post("/exec", "", body)).0, 200);
    });
}
