//! `zygote python`: code in an interpreter of a sandbox, whose state stays.

use super::streams::Printer;
use crate::args::{Global, PythonArgs};
use crate::failure;
use crate::interrupt::Interrupts;
use crate::out::{complain, say};
use crate::report::die_of;
use anyhow::Context;
use serde_json::json;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use zygote_api::{
    Bundle, COLLECTED_MAX_BYTES, CodeEvent, CodeRequest, CodeResult, Collected, Exception,
    OutputBudget, from_base64,
};
use zygote_daemon::{ClientError, Events};

/// What a cell that raises an exception ends with, as python3 does.
const RAISED: u8 = 1;
/// The exception by which a program ends itself.
const SYSTEM_EXIT: &str = "SystemExit";

/// Runs code; gives back the exit code.
pub fn python(global: &Global, args: &PythonArgs) -> anyhow::Result<u8> {
    if args.restart && args.code.is_none() && args.file.is_none() {
        return restart(global, args);
    }
    let code = code(args)?;
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let client = super::engine_with(global, &args.sandbox).await?;
        if args.restart {
            client.restart(&args.sandbox, &args.context).await?;
        }
        let request = CodeRequest {
            code: code.into(),
            context: args.context.clone(),
            timeout_seconds: args.timeout.0.map_or(0.0, |limit| limit.as_secs_f64()),
            interrupt_on_disconnect: false,
        };
        let events = client.run_code(&args.sandbox, &request).await?;
        let running = follow(events, args);
        tokio::pin!(running);
        let interrupting = async {
            interrupts.after(1).await;
            // It may have ended.
            let _ = client.interrupt(&args.sandbox, &args.context).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            code = &mut running => code,
            () = interrupting => Ok(0),
            signal = interrupts.after(2) => Ok(die_of(signal)),
        }
    })
}

fn restart(global: &Global, args: &PythonArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = super::engine_with(global, &args.sandbox).await?;
        let info = client.restart(&args.sandbox, &args.context).await?;
        if args.json {
            say!("{}", json!(info));
        }
        Ok(0)
    })
}

fn code(args: &PythonArgs) -> anyhow::Result<Vec<u8>> {
    match (&args.code, &args.file) {
        (Some(code), None) => Ok(code.as_bytes().to_vec()),
        (None, Some(file)) if file == OsStr::new("-") => {
            let mut code = Vec::new();
            let read = std::io::stdin().read_to_end(&mut code);
            read.context("cannot read standard input")?;
            Ok(code)
        }
        (None, Some(file)) => {
            let path = Path::new(file);
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
        }
        _ => {
            let failure = failure::usage("nothing to run");
            Err(failure
                .remedy("give -c CODE, a FILE, or - for standard input")
                .into())
        }
    }
}

/// Output as it comes, and then the value or the exception.
async fn follow(mut events: Events<CodeEvent>, args: &PythonArgs) -> anyhow::Result<u8> {
    let mut kept = Collected::new(COLLECTED_MAX_BYTES, &OutputBudget::new(usize::MAX));
    let mut printer = Printer::new();
    let mut shown = Shown::new(args.save.clone());
    let mut displays = Vec::new();
    loop {
        let broken = || ClientError::Broken("it ended without a result".to_owned());
        let next = tokio::select! {
            next = events.next() => next?,
            code = printer.gone() => return Ok(code),
        };
        match next.ok_or_else(broken)? {
            CodeEvent::Stdout { data } if args.json => kept.push_stdout(&data.0),
            CodeEvent::Stderr { data } if args.json => kept.push_stderr(&data.0),
            CodeEvent::Stdout { data } => printer.print(true, data.0).await,
            CodeEvent::Stderr { data } => printer.print(false, data.0).await,
            CodeEvent::Display { data } => {
                let line = shown.line(&data)?;
                if args.json {
                    displays.push(data);
                } else {
                    printer.print(true, line.into_bytes()).await;
                }
            }
            CodeEvent::Result(result) => {
                printer.end().await?;
                return ended(*result, kept, displays, &mut shown, args);
            }
            CodeEvent::Error { error } => {
                printer.end().await?;
                return Err(error.into());
            }
        }
    }
}

fn ended(
    mut result: CodeResult,
    mut kept: Collected,
    displays: Vec<Bundle>,
    shown: &mut Shown,
    args: &PythonArgs,
) -> anyhow::Result<u8> {
    let value = match &result.result {
        Some(value) => Some(shown.line(value)?),
        None => None,
    };
    let code = result.exception.as_ref().map_or(0, exit_code);
    if args.json {
        let (stdout, stderr) = kept.take();
        let text = |bytes: Vec<u8>| Some(String::from_utf8_lossy(&bytes).into_owned());
        (result.stdout, result.stderr) = (text(stdout), text(stderr));
        result.truncated |= kept.truncated;
        result.displays = displays;
        say!("{}", json!(result));
        return Ok(code);
    }
    if let Some(value) = value {
        say!("{}", value.trim_end_matches('\n'));
    }
    if let Some(exception) = &result.exception
        && let Some(words) = last_words(exception)
    {
        complain!("{words}");
    }
    if result.truncated {
        complain!("zygote: some of its output was not kept");
    }
    Ok(code)
}

/// As python3 ends: `sys.exit` in a cell ends that alone, and with its own code.
fn exit_code(exception: &Exception) -> u8 {
    if exception.name != SYSTEM_EXIT {
        return RAISED;
    }
    match &exception.value[..] {
        "" | "None" => 0,
        // The low bits, as exit(3) has it.
        value => value.parse().map_or(RAISED, |code: i64| code as u8),
    }
}

/// What python3 says of an exception.
fn last_words(exception: &Exception) -> Option<String> {
    if exception.name != SYSTEM_EXIT {
        return Some(exception.traceback.join("\n"));
    }
    let value = &exception.value;
    let is_words = !["", "None"].contains(&&value[..]) && value.parse::<i64>().is_err();
    is_words.then(|| value.clone())
}

/// What has been shown: text for the terminal, anything richer into files, if somebody wants them.
struct Shown {
    folder: Option<PathBuf>,
    count: u32,
}

/// Endings of files, by media type.
const ENDINGS: [(&str, &str); 8] = [
    ("image/png", "png"),
    ("image/jpeg", "jpg"),
    ("image/svg+xml", "svg"),
    ("text/html", "html"),
    ("text/markdown", "md"),
    ("text/latex", "tex"),
    ("application/json", "json"),
    ("application/pdf", "pdf"),
];

impl Shown {
    fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, count: 0 }
    }

    /// A line for people; files are written on the way.
    fn line(&mut self, bundle: &Bundle) -> anyhow::Result<String> {
        let mut line = bundle.get("text/plain").cloned().unwrap_or_default();
        let Some(folder) = &self.folder else {
            return Ok(line + "\n");
        };
        self.count += 1;
        for (kind, ending) in ENDINGS {
            let Some(data) = bundle.get(kind) else {
                continue;
            };
            let path = folder.join(format!("{}.{ending}", self.count));
            let is_base64 = kind.starts_with("image/") && kind != "image/svg+xml";
            let decoded = is_base64.then(|| from_base64(data)).flatten();
            let bytes = decoded.unwrap_or_else(|| data.clone().into_bytes());
            std::fs::create_dir_all(folder)
                .and_then(|()| std::fs::write(&path, bytes))
                .with_context(|| format!("cannot write {}", path.display()))?;
            line.push_str(&format!("\n[{}]", path.display()));
        }
        Ok(line + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_that_exits_has_the_code_and_the_words_of_python3() {
        let exit = |value: &str| Exception {
            name: SYSTEM_EXIT.to_owned(),
            value: value.to_owned(),
            traceback: vec!["Traceback".to_owned()],
        };
        for (value, code, words) in [
            ("", 0, None),
            ("None", 0, None),
            ("3", 3, None),
            ("-1", 255, None),
            ("bad end", 1, Some("bad end")),
        ] {
            let exit = exit(value);
            assert_eq!(
                (exit_code(&exit), last_words(&exit).as_deref()),
                (code, words)
            );
        }
        let raised = Exception {
            name: "ValueError".to_owned(),
            ..exit("3")
        };
        assert_eq!(
            (exit_code(&raised), last_words(&raised).as_deref()),
            (1, Some("Traceback"))
        );
    }
}
