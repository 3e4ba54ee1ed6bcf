//! What `zygote run` is asked to run, from its command line.

use crate::args::RunArgs;
use crate::copy::{Files, normal};
use crate::failure;
use crate::host;
use crate::words::Given;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_api::{CHUNK_MAX_BYTES, ExecInput, ExecRequest, Failure, Octets, ProgramFile};

/// Where programs start in the guest.
const HOME: &str = "/root";

/// Pieces of files and input that wait for the guest to take them.
const WAITING_MAX: usize = 16;
const INPUT_CHUNK_BYTES: usize = 32 * 1024;

/// A program, and the files that go with it.
#[derive(Clone, Debug)]
pub struct Job {
    /// Says what to run, and nothing else.
    program: ExecRequest,
    files: Arc<Files>,
    /// The folder of a FILE on this host: what lies there does not go along by itself.
    pub beside: Option<PathBuf>,
}

/// A program's standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stdin {
    /// At its end from the start.
    Empty,
    /// This program's.
    Ours,
    /// These bytes.
    Copy(Arc<[u8]>),
}

/// What to run; files are found here and read while they are sent.
pub fn read(args: &RunArgs) -> Result<Job, Failure> {
    let mut files = Files::default();
    let cwd = Path::new(HOME).join(&args.cwd);
    let (program, beside) = program(args, &cwd, &mut files)?;
    let program_folder = match &program.file {
        Some(file) => Path::new(OsStr::from_bytes(&file.path.0)).parent(),
        None => None,
    };
    for copy in &args.copy {
        files
            .add_copy(copy, &cwd, program_folder)
            .map_err(|error| failure::of(&error))?;
    }
    Ok(Job {
        program,
        files: Arc::new(files),
        beside,
    })
}

fn program(
    args: &RunArgs,
    cwd: &Path,
    files: &mut Files,
) -> Result<(ExecRequest, Option<PathBuf>), Failure> {
    let nothing = ExecRequest::default();
    match &args.given {
        Some(Given::Command(command)) if !command.is_empty() => {
            let command = Some(words(command));
            Ok((ExecRequest { command, ..nothing }, None))
        }
        Some(Given::Code(code, arguments)) => {
            let (code, args) = (Some(octets(code)), words(arguments));
            Ok((
                ExecRequest {
                    code,
                    args,
                    ..nothing
                },
                None,
            ))
        }
        Some(Given::File(file, arguments)) if file == "-" => {
            let program = ExecRequest {
                program_from_stdin: true,
                args: words(arguments),
                ..nothing
            };
            Ok((program, None))
        }
        Some(Given::File(file, arguments)) => {
            let (file, beside) = file_source(file, cwd, files)?;
            let program = ExecRequest {
                file: Some(file),
                args: words(arguments),
                ..nothing
            };
            Ok((program, beside))
        }
        Some(Given::Command(_)) | None => Err(failure::usage("nothing to run")
            .remedy("give -c CODE, a FILE, - for standard input, or -- COMMAND")),
    }
}

fn octets(word: &OsStr) -> Octets {
    word.as_bytes().to_vec().into()
}

fn words(words: &[OsString]) -> Vec<Octets> {
    words.iter().map(|word| octets(word)).collect()
}

/// FILE lies in the guest where its name, as it was typed, leads to from the program's directory: what
/// else its path on this host is called is nobody's business there.
fn file_source(
    file: &OsStr,
    cwd: &Path,
    files: &mut Files,
) -> Result<(ProgramFile, Option<PathBuf>), Failure> {
    let name = Path::new(file);
    let cannot = |why: String| {
        let failure = failure::file(format!("cannot open {}", name.display())).cause(why);
        match looks_like_code(file) {
            true => failure.remedy("if it is code, write -c before it"),
            false => failure,
        }
    };
    let path = std::path::absolute(name).map_err(|error| cannot(error.to_string()))?;
    let in_guest = normal(&cwd.join(name));
    files
        .add_program(&path, &in_guest)
        .map_err(|error| cannot(format!("{error:#}")))?;
    let program = ProgramFile {
        argv0: Some(octets(file)),
        path: octets(in_guest.as_os_str()),
    };
    Ok((program, path.parent().map(Path::to_owned)))
}

/// `zygote run 'print(1)'`.
fn looks_like_code(file: &OsStr) -> bool {
    let is_of_code = |byte: &u8| b"()=;\n\"'".contains(byte);
    file.as_bytes().iter().any(is_of_code)
}

/// Standard input is the program's, unless several share it or a machine reads the results.
pub fn wants_stdin(args: &RunArgs) -> bool {
    args.stdin || is_stdin_program(args) || (!args.json && args.count == 1)
}

fn is_stdin_program(args: &RunArgs) -> bool {
    matches!(&args.given, Some(Given::File(file, _)) if file == "-")
}

impl Job {
    /// For one sandbox.
    pub fn request(&self, args: &RunArgs, has_stdin: bool) -> ExecRequest {
        ExecRequest {
            template: args.template.clone(),
            env: args.env.iter().cloned().collect(),
            cwd: args.cwd.clone(),
            stdin_stream: has_stdin,
            files_stream: !self.files.is_empty(),
            line_buffered: host::stdout_is_terminal(),
            unbuffered: args.unbuffered || args.json,
            get: args
                .get
                .iter()
                .map(|get| octets(get.source.as_os_str()))
                .collect(),
            timeout_seconds: args.timeout.0.map_or(0.0, |limit| limit.as_secs_f64()),
            measure: args.json,
            allow_missing_walls: args.allow_missing_walls,
            ..self.program.clone()
        }
    }

    /// What comes after the request: files first, then standard input.
    pub fn input(&self, stdin: Stdin) -> Option<mpsc::Receiver<ExecInput>> {
        if self.files.is_empty() && stdin == Stdin::Empty {
            return None;
        }
        let (sender, input) = mpsc::channel(WAITING_MAX);
        let files = Arc::clone(&self.files);
        // Its thread ends with the sandbox; one that waits for standard input, with this process.
        std::thread::spawn(move || send(&files, stdin, &sender));
        Some(input)
    }

    /// What to tell somebody whose FILE could not import a module that lies beside it; `stderr`: the
    /// end of what it said.
    pub fn import_hint(&self, stderr: &[u8]) -> Option<String> {
        let folder = self.beside.as_ref()?;
        let text = String::from_utf8_lossy(stderr);
        let (_, rest) = text.rsplit_once("ModuleNotFoundError: No module named '")?;
        let module = rest
            .split(['\'', '.'])
            .next()
            .filter(|name| !name.is_empty())?;
        let names = [format!("{module}.py"), module.to_owned()];
        let name = names.iter().find(|name| folder.join(name).exists())?;
        Some(format!(
            "{name} lies beside the program on this host, but only what is named goes into a \
             sandbox; add: --copy {}",
            folder.join(name).display()
        ))
    }
}

/// This program's standard input alone.
pub fn stdin_input() -> mpsc::Receiver<ExecInput> {
    let (sender, input) = mpsc::channel(WAITING_MAX);
    // Its thread may wait for input until this process ends.
    std::thread::spawn(move || send(&Files::default(), Stdin::Ours, &sender));
    input
}

/// Ends early when nobody takes it any more.
fn send(files: &Files, stdin: Stdin, sender: &mpsc::Sender<ExecInput>) -> Option<()> {
    if !files.is_empty() {
        files.send(sender)?;
        sender.blocking_send(ExecInput::Start).ok()?;
    }
    let send = |bytes: &[u8]| {
        let data = bytes.to_vec().into();
        sender.blocking_send(ExecInput::Stdin { data }).ok()
    };
    match stdin {
        Stdin::Empty => {}
        Stdin::Copy(bytes) => {
            for chunk in bytes.chunks(CHUNK_MAX_BYTES) {
                send(chunk)?;
            }
        }
        Stdin::Ours => {
            let mut input = io::stdin().lock();
            let mut chunk = vec![0; INPUT_CHUNK_BYTES];
            while let Ok(count) = input.read(&mut chunk)
                && count > 0
            {
                send(&chunk[..count])?;
            }
        }
    }
    sender.blocking_send(ExecInput::StdinEnd).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_imports_what_lies_beside_is_told_how_it_gets_in() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("helper.py"), "").unwrap();
        let job = Job {
            program: ExecRequest::default(),
            files: Arc::default(),
            beside: Some(folder.path().to_owned()),
        };
        let error = |module| format!("x\nModuleNotFoundError: No module named '{module}'\n");
        let hint = job.import_hint(error("helper").as_bytes()).unwrap();
        assert!(hint.contains("--copy") && hint.contains("helper.py"));
        assert_eq!(job.import_hint(error("other").as_bytes()), None);
        assert_eq!(job.import_hint(b"done"), None);
    }
}
