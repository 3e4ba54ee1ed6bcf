//! What `zygote run` is asked to run, from its command line.

use crate::args::RunArgs;
use crate::copy::Files;
use crate::host;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_engine::{Program, PythonSource, RunRequest, Stdin};

/// Where programs start in the guest.
const HOME: &str = "/root";

/// A program, and the files that go with it.
#[derive(Clone, Debug)]
pub struct Job {
    program: Program,
    files: Arc<Files>,
    /// The folder of a FILE on this host: what lies there does not go along by itself.
    pub beside: Option<PathBuf>,
}

/// Why there is nothing to run.
pub enum Unreadable {
    /// FILE, or what `--copy` names.
    File(String),
    /// The command line.
    Usage(String),
}

/// What to run; files are found here and read while they are sent.
pub fn read(args: &RunArgs) -> Result<Job, Unreadable> {
    let mut files = Files::default();
    let (program, beside) = program(args, &mut files)?;
    let cwd = Path::new(HOME).join(&args.cwd);
    for copy in &args.copy {
        files
            .add_copy(copy, &cwd, beside.as_deref())
            .map_err(|error| Unreadable::File(format!("{error:#}")))?;
    }
    Ok(Job {
        program,
        files: Arc::new(files),
        beside,
    })
}

fn program(args: &RunArgs, files: &mut Files) -> Result<(Program, Option<PathBuf>), Unreadable> {
    let usage = |text: &str| Unreadable::Usage(text.to_owned());
    if !args.command.is_empty() {
        if args.code.is_some() || !args.words.is_empty() {
            return Err(usage(
                "give either Python code or a command after --, not both",
            ));
        }
        return Ok((Program::Command(words(&args.command)), None));
    }
    if let Some(code) = &args.code {
        let source = PythonSource::Code(code.as_bytes().to_vec());
        let arguments = words(&args.words);
        return Ok((Program::Python { source, arguments }, None));
    }
    let Some((file, arguments)) = args.words.split_first() else {
        return Err(usage(
            "nothing to run: give -c CODE, a FILE, `-` for standard input, or `-- COMMAND`",
        ));
    };
    let arguments = words(arguments);
    if file == "-" {
        let source = PythonSource::Stdin;
        return Ok((Program::Python { source, arguments }, None));
    }
    let (source, beside) = file_source(file, files)?;
    Ok((Program::Python { source, arguments }, beside))
}

fn words(words: &[OsString]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

fn file_source(
    file: &OsStr,
    files: &mut Files,
) -> Result<(PythonSource, Option<PathBuf>), Unreadable> {
    let name = Path::new(file);
    let cannot = |why: String| Unreadable::File(format!("cannot open {}: {why}", name.display()));
    let path = std::path::absolute(name).map_err(|error| cannot(error.to_string()))?;
    files
        .add_program(&path)
        .map_err(|error| cannot(format!("{error:#}")))?;
    let source = PythonSource::File {
        argv0: file.as_bytes().to_vec(),
        path: path.as_os_str().as_bytes().to_vec(),
    };
    Ok((source, path.parent().map(Path::to_owned)))
}

/// Standard input is the program's, unless several share it or a machine reads the results.
pub fn wants_stdin(args: &RunArgs) -> bool {
    args.stdin || is_stdin_program(args) || (!args.json && args.count == 1)
}

fn is_stdin_program(args: &RunArgs) -> bool {
    args.code.is_none() && args.words.first().is_some_and(|word| word == "-")
}

impl Job {
    /// For one sandbox.
    pub fn request(&self, args: &RunArgs, stdin: Stdin, signals: mpsc::Receiver<u8>) -> RunRequest {
        RunRequest {
            program: self.program.clone(),
            env: args.env.clone(),
            cwd: args.cwd.clone(),
            stdin,
            line_buffered: !args.json && host::stdout_is_terminal(),
            puts: self.files.send(),
            signals: Some(signals),
            timeout: args.timeout.0,
            measure: args.json,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_imports_what_lies_beside_is_told_how_it_gets_in() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("helper.py"), "").unwrap();
        let job = Job {
            program: Program::Command(vec![]),
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
