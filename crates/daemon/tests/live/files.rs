//! Files of sandboxes.

use super::*;

pub async fn all_of(mut octets: zygote_daemon::Octets) -> Result<Vec<u8>, ClientError> {
    let mut all = Vec::new();
    while let Some(piece) = octets.next().await? {
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

/// Input of these pieces.
pub fn pieces(all: Vec<std::io::Result<Vec<u8>>>) -> mpsc::Receiver<std::io::Result<bytes::Bytes>> {
    let (sender, input) = mpsc::channel(all.len().max(1));
    for piece in all {
        sender.try_send(piece.map(Into::into)).unwrap();
    }
    input
}

impl Box {
    pub async fn write(
        &self,
        path: &str,
        options: &str,
        data: &[u8],
    ) -> Result<FileInfo, ClientError> {
        let input = pieces(vec![Ok(data.to_vec())]);
        self.client
            .write_file(&self.id, path.as_bytes(), options, input)
            .await
    }

    pub async fn read(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        let reading = self.client.read_file(&self.id, path.as_bytes(), 0, None);
        all_of(reading.await?).await
    }

    pub async fn act(&self, action: serde_json::Value) -> Result<serde_json::Value, ClientError> {
        let action: FileAction = serde_json::from_value(action).unwrap();
        self.client.files(&self.id, &action).await
    }

    /// A folder of this test's own, as the guest sees it too.
    pub fn folder(&self) -> String {
        let folder = self.home.folder.path().join("files");
        std::fs::create_dir_all(&folder).unwrap();
        folder.to_str().unwrap().to_owned()
    }
}

pub fn files_are_written_read_listed_and_removed() {
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

pub fn names_of_any_bytes_survive() {
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

pub fn what_cannot_be_done_with_files_has_the_kernels_name() {
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
            // A file system without room, and a folder that something is mounted on.
            (it.write("/dev/full", "", b"x").await.map(drop), "ENOSPC"),
            (
                act(j(r#"{"action":"remove","path":"/proc"}"#.to_owned())).await,
                "EBUSY",
            ),
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

pub fn a_large_file_goes_in_and_out_in_pieces() {
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

pub fn a_write_that_breaks_off_leaves_what_was_there() {
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

pub fn a_read_that_is_given_up_leaves_no_task() {
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

pub fn folders_go_in_and_out_as_archives() {
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

pub fn changes_of_files_are_told() {
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

pub fn ranges_of_files_are_those_of_http() {
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
