//! `zygote run`: fork, run, pass streams and the exit code on.

use crate::args::{Global, RunArgs};
use crate::host::{self, Place};
use crate::report::{RunRecord, exit_code, sentence};
use crate::template;
use anyhow::{Context, bail};
use futures_util::future::join_all;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use zygote_engine::{run as run_request, *};
use zygote_runner::control::Load;
use zygote_template::Store;

/// Hidden verb by which this program becomes a zygote process.
pub const ZYGOTE_VERB: &str = "zygote-process";
/// Output that waits for a slow reader, in messages of up to 64 KiB.
const EVENTS_MAX: usize = 16;
const INPUT_CHUNK_BYTES: usize = 32 * 1024;
/// What a lab may take beside a program's own time: loading and checking the template,
const LAB_OVERHEAD_MAX: Duration = Duration::from_secs(300);
/// and making each fork. Ten times what has been seen.
const LAB_FORK_MAX: Duration = Duration::from_secs(10);
/// python3's own code for a program that it cannot open.
const CANNOT_OPEN: u8 = 2;

/// Runs; gives back the exit code.
pub fn run(global: &Global, args: &RunArgs) -> anyhow::Result<u8> {
    let program = match program(args) {
        Ok(program) => program,
        Err(Unreadable::File(sentence)) => {
            eprintln!("zygote: {sentence}");
            return Ok(CANNOT_OPEN);
        }
        Err(Unreadable::Usage(sentence)) => bail!(sentence),
    };
    let store = host::store(global)?;
    let place = host::choose(global)?;
    let missing = template::is_missing(&store, &args.template)?;
    if place == Place::Lab {
        let _lock = if missing {
            eprintln!(
                "zygote: there is no template {} yet; building it first",
                args.template
            );
            Some(template::gather_for(&store, &args.template)?)
        } else {
            None
        };
        return host::again_in_lab(&store, wants_stdin(args), lab_timeout(args));
    }
    if missing {
        template::build_missing(&store, &args.template)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let code = runtime.block_on(conduct(&store, args, &program));
    // A thread may still wait for standard input that nobody wants any more.
    runtime.shutdown_background();
    code
}

/// How long a lab may take for runs that keep their own time limits inside.
fn lab_timeout(args: &RunArgs) -> Option<Duration> {
    let limit = args.timeout.0?;
    Some(limit + LAB_OVERHEAD_MAX + LAB_FORK_MAX * args.count)
}

/// Standard input is the program's, unless several share it or a machine reads the results.
fn wants_stdin(args: &RunArgs) -> bool {
    args.stdin || is_stdin_program(args) || (!args.json && args.count == 1)
}

fn is_stdin_program(args: &RunArgs) -> bool {
    args.code.is_none() && args.words.first().is_some_and(|word| word == "-")
}

enum Unreadable {
    File(String),
    Usage(String),
}

/// What to run, from the command line; a FILE is read here and goes along.
fn program(args: &RunArgs) -> Result<Program, Unreadable> {
    let usage = |text: &str| Unreadable::Usage(text.to_owned());
    let words = |words: &[OsString]| -> Result<Vec<String>, Unreadable> {
        let texts = words.iter().map(|word| word.to_str().map(str::to_owned));
        let texts: Option<Vec<String>> = texts.collect();
        texts.ok_or_else(|| usage("an argument is not UTF-8"))
    };
    if !args.command.is_empty() {
        if args.code.is_some() || !args.words.is_empty() {
            return Err(usage(
                "give either Python code or a command after --, not both",
            ));
        }
        return Ok(Program::Command(words(&args.command)?));
    }
    if let Some(code) = &args.code {
        return Ok(Program::Python {
            source: PythonSource::Code(code.as_encoded_bytes().to_vec()),
            arguments: words(&args.words)?,
        });
    }
    let Some((file, arguments)) = args.words.split_first() else {
        return Err(usage(
            "nothing to run: give -c CODE, a FILE, `-` for standard input, or `-- COMMAND`",
        ));
    };
    let source = if file == "-" {
        PythonSource::Stdin
    } else {
        read_program(file)?
    };
    Ok(Program::Python {
        source,
        arguments: words(arguments)?,
    })
}

fn read_program(file: &OsStr) -> Result<PythonSource, Unreadable> {
    let cannot =
        |why: String| Unreadable::File(format!("cannot open {}: {why}", Path::new(file).display()));
    let path = std::path::absolute(file).map_err(|e| cannot(e.to_string()))?;
    let content = fs::read(&path).map_err(|e| cannot(e.to_string()))?;
    let limit = zygote_protocol::FRAME_PAYLOAD_MAX_BYTES - 64 * 1024;
    if content.len() > limit {
        return Err(cannot(format!("it is larger than {limit} bytes")));
    }
    let text = |path: &Path| path.to_str().map(str::to_owned);
    match (text(Path::new(file)), text(&path)) {
        (Some(argv0), Some(path)) => Ok(PythonSource::File {
            argv0,
            path,
            content,
        }),
        _ => Err(cannot("its name is not UTF-8".to_owned())),
    }
}

/// Runs all forks to their ends.
async fn conduct(store: &Store, args: &RunArgs, program: &Program) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch signals")?;
    let work = async {
        let zygotes = load(store, args).await?;
        let code = if args.count == 1 && !args.json {
            stream_one(&zygotes[0], args, program).await
        } else {
            capture_all(&zygotes, args, program).await
        };
        for zygote in zygotes {
            zygote.shut_down().await;
        }
        code
    };
    // Leaving the block drops whatever runs, and with it the forks.
    tokio::select! {
        code = work => code,
        _ = interrupt.recv() => Ok(130),
        _ = terminate.recv() => Ok(143),
    }
}

/// A zygote for each replica that will be forked; they take turns, from a random one on.
async fn load(store: &Store, args: &RunArgs) -> anyhow::Result<Vec<Zygote>> {
    let mut replicas = store.replicas(&args.template)?;
    let random = uuid::Uuid::new_v4().as_u128() % replicas.len().max(1) as u128;
    replicas.rotate_left(random as usize);
    replicas.truncate(args.count as usize);
    let mut zygotes = Vec::new();
    for snapshot in replicas {
        let load = Load {
            snapshot,
            pieces: store.pieces(),
            stamps: store.stamps(),
        };
        let zygote = Zygote::load(&config(args, load)?).await;
        let zygote =
            zygote.with_context(|| format!("cannot fork the template {}", args.template))?;
        let walls = list_walls(zygote.missing_walls());
        if !walls.is_empty() && zygotes.is_empty() {
            eprintln!("zygote: warning: untrusted code could reach this host: no {walls}");
        }
        zygotes.push(zygote);
    }
    Ok(zygotes)
}

/// This program is also the zygote process.
fn config(args: &RunArgs, load: Load) -> anyhow::Result<EngineConfig> {
    let program: PathBuf = std::env::current_exe().context("cannot find this program")?;
    Ok(EngineConfig {
        command: vec![program.into(), ZYGOTE_VERB.into()],
        load,
        allow_missing_walls: args.allow_missing_walls,
        patience: if host::in_lab() {
            PATIENCE_EMULATED
        } else {
            PATIENCE
        },
    })
}

fn request(args: &RunArgs, program: &Program, stdin: Stdin) -> RunRequest {
    RunRequest {
        program: program.clone(),
        env: args.env.clone(),
        cwd: args.cwd.clone(),
        stdin,
        line_buffered: !args.json && host::stdout_is_terminal(),
        timeout: args.timeout.0,
        measure: args.json,
    }
}

async fn stream_one(zygote: &Zygote, args: &RunArgs, program: &Program) -> anyhow::Result<u8> {
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    let running = run_request(zygote, request(args, program, stdin_stream()), sender);
    let mut printing = tokio::task::spawn_blocking(move || print_events(events));
    let result = tokio::select! {
        result = running => result,
        // Only an error ends it first: nobody reads the output, and the fork is killed.
        printed = &mut printing => return reader_gone(printed.context("printing panicked")?),
    };
    if let Some(sentence) = sentence(&result.outcome, args.timeout.0) {
        eprintln!("zygote: {sentence}");
    }
    match printing.await.context("printing panicked")? {
        Ok(()) => Ok(exit_code(&result.outcome)),
        error => reader_gone(error),
    }
}

/// As a shell tells a program that SIGPIPE has ended.
fn reader_gone(printed: io::Result<()>) -> anyhow::Result<u8> {
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write the program's output")
        }
        _ => Ok(141),
    }
}

/// Prints output as it comes, until it ends; a reader that has gone ends it early.
fn print_events(mut events: mpsc::Receiver<Event>) -> io::Result<()> {
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Activated => {}
            Event::Stdout(data) => {
                stdout.write_all(&data)?;
                stdout.flush()?;
            }
            Event::Stderr(data) => stderr.write_all(&data)?,
        }
    }
    Ok(())
}

/// Standard input in chunks. The thread that reads it ends with the process.
fn stdin_stream() -> Stdin {
    let (sender, chunks) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut chunk = vec![0; INPUT_CHUNK_BYTES];
        while let Ok(count) = input.read(&mut chunk) {
            if count == 0 || sender.blocking_send(chunk[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    Stdin::Stream(chunks)
}

/// All of standard input, for each fork anew.
fn stdin_copy(input: Option<&[u8]>) -> Stdin {
    let Some(input) = input else {
        return Stdin::Empty;
    };
    let (sender, chunks) = mpsc::channel(1);
    let input = input.to_vec();
    tokio::spawn(async move {
        // The program may have ended before it has read all.
        let _ = sender.send(input).await;
    });
    Stdin::Stream(chunks)
}

async fn capture_all(zygotes: &[Zygote], args: &RunArgs, program: &Program) -> anyhow::Result<u8> {
    let input = if wants_stdin(args) {
        let mut bytes = Vec::new();
        io::stdin()
            .read_to_end(&mut bytes)
            .context("cannot read standard input")?;
        Some(bytes)
    } else {
        None
    };
    let one = |zygote| {
        let request = request(args, program, stdin_copy(input.as_deref()));
        async move {
            let (sender, events) = mpsc::channel(EVENTS_MAX);
            let running = run_request(zygote, request, sender);
            tokio::join!(running, capture(events, CAPTURE_MAX_BYTES))
        }
    };
    let runs = zygotes.iter().cycle().take(args.count as usize).map(one);
    let mut code = 0;
    for (result, output) in join_all(runs).await {
        print_captured(args, &result, &output)?;
        if code == 0 {
            code = exit_code(&result.outcome);
        }
    }
    Ok(code)
}

fn print_captured(args: &RunArgs, result: &RunResult, output: &Captured) -> anyhow::Result<()> {
    let limit = args.timeout.0;
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    let written = if args.json {
        let host = host::name(Place::Here);
        let record = RunRecord::new(&args.template, host, limit, result, output);
        let line = serde_json::to_string(&record).context("cannot print JSON")?;
        writeln!(stdout, "{line}")
    } else {
        let both = stdout
            .write_all(&output.stdout)
            .and(stderr.write_all(&output.stderr));
        match sentence(&result.outcome, limit) {
            Some(sentence) => both.and(writeln!(stderr, "zygote: {sentence}")),
            None => both,
        }
    };
    written
        .and(stdout.flush())
        .context("cannot write the results")
}
