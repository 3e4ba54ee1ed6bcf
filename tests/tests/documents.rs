//! What people read first works as printed: the commands of README, of the docs and of every help page,
//! and the examples.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use zygote_tests::*;

/// What the commands find in their folder.
const FILES: [(&str, &str); 7] = [
    ("script.py", "open('plot.png', 'w').write('x')"),
    (
        "plot.py",
        "open('plot.png', 'w').write(open('data.csv').read())",
    ),
    ("job.py", "import sys; open('output.csv', 'w').write('1')"),
    ("data.csv", "1,2"),
    ("input.csv", "1,2"),
    ("helper.py", "X = 1"),
    ("solution.py", "def add(a, b): return a + b"),
];
/// They end the engine, need a network, a lab or a template of somebody's, or take minutes; that their
/// words are right is tested elsewhere (the program's own tests parse them).
const NOT_HERE: [&str; 15] = [
    "zygote stop",
    "zygote serve",
    "zygote lab",
    "zygote bench",
    "zygote demo",
    "zygote template build",
    "zygote template init",
    "zygote template inspect mine",
    "zygote completions",
    "zygote prune",
    "-t mine",
    "--pip",
    "-t grader",
    "./work",
    "sudo ",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The commands of a text: indented lines that begin as commands do, without what explains them.
fn commands(text: &str) -> Vec<String> {
    let is_command = |line: &&str| {
        let first = line.split_whitespace().next().unwrap_or_default();
        line.starts_with("  ")
            && !line.contains("[OPTIONS]")
            && ["zygote", "echo", "curl", "printf"].contains(&first)
    };
    let bare = |line: &str| {
        let line = line.split(" #").next().unwrap_or_default().trim();
        let line = line.split("     ").next().unwrap_or_default();
        line.trim_end_matches('\\').trim().to_owned()
    };
    let lines = text.lines().filter(is_command);
    // What goes on in the next line is an example of the API's, which has tests of its own.
    let whole = lines.filter(|line| !line.trim_end().ends_with(['\\', '|']));
    whole.map(bare).collect()
}

fn help_pages() -> Vec<String> {
    let verbs: [&[&str]; 8] = [
        &[],
        &["run"],
        &["status"],
        &["doctor"],
        &["df"],
        &["template", "build"],
        &["bench"],
        &["lab"],
    ];
    let page = |verb: &&[&str]| zygote(&[*verb, &["--help"]].concat()).good().text();
    verbs.iter().map(page).collect()
}

/// A folder on the PATH in which this program is called `zygote`.
fn on_path(folder: &Path) -> String {
    let bin = folder.join("bin");
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(program(), bin.join("zygote")).unwrap();
    let path = std::env::var("PATH").unwrap();
    format!("{}:{path}", bin.display())
}

fn shell(folder: &Path, path: &str, line: &str) -> Ran {
    let mut command = Command::new("bash");
    command
        .args(["-c", line])
        .current_dir(folder)
        .env("PATH", path)
        .stdin(Stdio::null());
    feed(command, b"")
}

fn socket() -> String {
    let status = zygote(&["status", "--json"]).json();
    status[0]["socket"].as_str().unwrap().to_owned()
}

/// Their order matters: a sandbox is made, used and removed.
#[test]
fn the_page_about_sandboxes_works_from_top_to_bottom() {
    let folder = tempfile::tempdir().unwrap();
    let path = on_path(folder.path());
    let page = fs::read_to_string(root().join("docs/sandboxes.md")).unwrap();
    let is_command = |line: &&str| line.starts_with("    ");
    let mut count = 0;
    for line in page.lines().filter(is_command) {
        let line = line.split("     (").next().unwrap().trim();
        let mut ran = shell(folder.path(), &path, line);
        // A server takes a moment to be up, on an emulated host several.
        let begun = std::time::Instant::now();
        while line.contains("urlopen") && ran.code != 0 && begun.elapsed().as_secs() < 60 {
            ran = shell(folder.path(), &path, line);
        }
        assert_eq!(ran.code, 0, "{line}: {ran:?}");
        let expected = match line {
            "zygote python box -c 'x + 22'" => "42\n",
            "zygote exec box -- cat /tmp/file" => "hello\n",
            "zygote wait web 1; echo $?" => "143\n",
            _ => "",
        };
        assert!(ran.text().ends_with(expected), "{line}: {ran:?}");
        count += 1;
    }
    assert!(count > 25, "only {count} commands were found");
    assert_eq!(
        fs::read(folder.path().join("copy.csv")).unwrap(),
        b"1,2,3\n"
    );
}

#[test]
fn every_command_that_is_printed_works_as_printed() {
    let folder = tempfile::tempdir().unwrap();
    let path = on_path(folder.path());
    for (name, text) in FILES {
        fs::write(folder.path().join(name), text).unwrap();
    }
    zygote(&["run", "-c", "pass"]).good();
    let mut texts = help_pages();
    for page in [
        "README.md",
        "docs/running.md",
        "docs/recipes.md",
        "docs/engine.md",
    ] {
        texts.push(fs::read_to_string(root().join(page)).unwrap());
    }
    // In the order of the pages: a sandbox is made before it is used, on each.
    let mut seen = HashSet::new();
    let all = texts.iter().flat_map(|text| commands(text));
    let is_new = |line: &String| line.contains("box") || seen.insert(line.clone());
    let all: Vec<String> = all.filter(is_new).collect();
    let socket = socket();
    let mut count = 0;
    for line in all {
        if NOT_HERE.iter().any(|word| line.contains(word)) || line.contains("| jq") {
            continue;
        }
        let line = line.replace("/run/zygote/zygote.sock", &socket);
        let ran = shell(folder.path(), &path, &line);
        assert_eq!(ran.code, 0, "{line}: {ran:?}");
        if line.contains("while True") {
            assert!(ran.text().contains("124"), "{line}: {ran:?}");
        }
        count += 1;
    }
    assert!(count >= 15, "only {count} commands were found");
    assert_eq!(fs::read(folder.path().join("output.csv")).unwrap(), b"1");
}

#[test]
fn every_example_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = on_path(folder.path());
    for (name, text) in FILES {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let examples = root().join("examples").canonicalize().unwrap();
    let cases = [
        ("run.py", String::new(), "after it said so far"),
        ("api.py", socket_of_engine(), "file: 42"),
        (
            "grade.py",
            "solution.py helper.py".to_owned(),
            "\"passed\": true",
        ),
        ("agent_tool.py", String::new(), "No module named 'requests'"),
    ];
    let listed = fs::read_dir(&examples).unwrap().count();
    assert_eq!(listed, cases.len());
    for (name, arguments, word) in cases {
        let line = format!("/usr/bin/python3 {}/{name} {arguments}", examples.display());
        let ran = shell(folder.path(), &path, &line).good();
        assert!(ran.text().contains(word), "{name}: {ran:?}");
    }
}

fn socket_of_engine() -> String {
    zygote(&["run", "-c", "pass"]).good();
    socket()
}

/// The wire format of zeroboot's clients, as docs/api.md describes it.
#[test]
fn clients_of_zeroboot_find_what_they_know() {
    zygote(&["run", "-c", "pass"]).good();
    let socket = socket();
    let ask = |path: &str, body: &str| {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "--fail", "--unix-socket", &socket])
            .arg(format!("http://localhost{path}"));
        if !body.is_empty() {
            command.args(["-H", "Content-Type: application/json", "-d", body]);
        }
        feed(command, b"").good()
    };
    let code = r#"import sys, numpy; print(numpy.arange(3).sum()); print('why', file=sys.stderr); sys.exit(4)"#;
    let request = format!(r#"{{"code": "{code}", "language": "python", "timeout_seconds": 30}}"#);
    for path in ["/v1/exec", "/exec"] {
        let result = ask(path, &request).json().remove(0);
        assert_eq!(
            (&result["stdout"], &result["stderr"]),
            (&"3\n".into(), &"why\n".into())
        );
        assert_eq!(result["exit_code"], 4);
        assert_eq!(result["id"].as_str().unwrap().len(), 36);
        for time in ["fork_time_ms", "exec_time_ms", "total_time_ms"] {
            assert!(result[time].as_f64().unwrap() > 0.0, "{result}");
        }
    }
    let batch = r#"{"executions": [{"code": "print(1)"}, {"code": "x", "language": "node"}, {"code": "print(3)"}]}"#;
    let batch = ask("/v1/exec/batch", batch).json().remove(0);
    let outputs = batch["results"].as_array().unwrap().iter();
    let outputs: Vec<_> = outputs
        .map(|one| (one["stdout"].clone(), one["exit_code"].clone()))
        .collect();
    let expected = [("1\n", 0), ("", 125), ("3\n", 0)].map(|(out, code)| (out.into(), code.into()));
    assert_eq!(outputs, expected);
    let health = ask("/health", "").json().remove(0);
    assert_eq!(health["status"], "ok");
    let python = serde_json::json!({"ready": true, "numpy": true});
    assert_eq!(health["templates"]["python"], python, "{health}");
    let metrics = ask("/v1/metrics", "").text();
    for name in [
        "zeroboot_total_executions{status=\"success\"} ",
        "zeroboot_concurrent_forks ",
        "zeroboot_memory_usage_bytes ",
        "zeroboot_fork_time_milliseconds_bucket{le=\"0.5\"} ",
        "zeroboot_exec_time_milliseconds_count ",
        "zeroboot_total_time_milliseconds_sum ",
    ] {
        assert!(
            metrics.lines().any(|line| line.starts_with(name)),
            "{name}\n{metrics}"
        );
    }
}
