//! Whether a request is one, and what it runs.

use crate::template::template_failure;
use std::collections::BTreeMap;
use std::time::Duration;
use zygote_api::{ErrorCode, ExecRequest, Failure, Octets};
use zygote_engine::{Program, PythonSource};
use zygote_template::{StoreError, is_name};

/// The language that there is.
const LANGUAGE: &str = "python";
/// Longest time limit: a year.
const TIMEOUT_MAX_S: f64 = 366.0 * 86400.0;

/// Whether a request is one that can be run, whatever there is to run it in.
///
/// # Errors
/// What is wrong with it.
pub fn check(request: &ExecRequest) -> Result<(), Failure> {
    let given = [
        request.code.is_some(),
        request.file.is_some(),
        request.command.is_some(),
        request.program_from_stdin,
    ];
    if given.into_iter().filter(|is_given| *is_given).count() != 1 {
        return Err(Failure::bad_request(
            "exactly one of code, file, command and program_from_stdin says what to run",
        ));
    }
    if let Some(command) = &request.command {
        if command.is_empty() {
            return Err(Failure::bad_request("command: it has no program"));
        }
        if !request.args.is_empty() {
            return Err(Failure::bad_request(
                "args: a command has its arguments in itself",
            ));
        }
    }
    if request.stdin_stream && request.stdin.is_some() {
        return Err(Failure::bad_request(
            "give stdin, or stdin_stream and lines, not both",
        ));
    }
    if !is_name(&request.template) {
        let name = request.template.clone();
        return Err(template_failure(&StoreError::Name { name }));
    }
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
    let build = request.build.as_ref();
    if build.is_some_and(|build| build.is_empty() || !build.chars().all(is_letter)) {
        return Err(Failure::bad_request("build: letters, digits, -, _ and ."));
    }
    if request.cwd.contains('\0') {
        return Err(Failure::bad_request("cwd: it may have no NUL"));
    }
    time_limit(request.timeout_seconds)?;
    check_env(&request.env)
}

/// Of a request that [`check`] finds good.
pub fn program(request: &ExecRequest) -> Result<Program, Failure> {
    let words = |words: &[Octets]| words.iter().map(|word| word.0.clone()).collect::<Vec<_>>();
    let language = request.language.as_ref();
    if let Some(language) = language.filter(|language| *language != LANGUAGE) {
        let message = format!("language: there is no interpreter for {language:?}");
        let failure = Failure::new(ErrorCode::TemplateNotFound, message);
        return Err(failure.remedy("python is there"));
    }
    let source = match (&request.code, &request.file, &request.command) {
        (_, _, Some(command)) => return Ok(Program::Command(words(command))),
        (Some(code), _, _) => PythonSource::Code(code.0.clone()),
        (_, Some(file), _) => PythonSource::File {
            argv0: file.argv0.as_ref().unwrap_or(&file.path).0.clone(),
            path: file.path.0.clone(),
        },
        (None, None, None) => PythonSource::Stdin,
    };
    Ok(Program::Python {
        source,
        arguments: words(&request.args),
    })
}

/// How long it may run, if that has an end.
pub fn time_limit(seconds: f64) -> Result<Option<Duration>, Failure> {
    if !(0.0..=TIMEOUT_MAX_S).contains(&seconds) {
        return Err(Failure::bad_request(format!(
            "timeout_seconds: from 0 (no limit) to {TIMEOUT_MAX_S}"
        )));
    }
    let limit = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    Ok((!limit.is_zero()).then_some(limit))
}

/// Whether these can be variables of a program (environ(7)).
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), Failure> {
    let is_name = |key: &String| !key.is_empty() && !key.contains(['=', '\0']);
    if env.keys().all(is_name) && !env.values().any(|value| value.contains('\0')) {
        return Ok(());
    }
    Err(Failure::bad_request(
        "env: names are not empty and have no =, and nothing has a NUL",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_thing_is_run() {
        let parse = |text: &str| {
            let request = serde_json::from_str(text).unwrap();
            check(&request).and_then(|()| program(&request))
        };
        assert!(matches!(
            parse(r#"{"code":"1","args":["a"]}"#).unwrap(),
            Program::Python { arguments, .. } if arguments == [b"a"]
        ));
        assert!(parse(r#"{"command":["ls","-l"]}"#).is_ok());
        for bad in [
            "{}",
            r#"{"code":"1","command":["ls"]}"#,
            r#"{"command":[]}"#,
            r#"{"command":["ls"],"args":["-l"]}"#,
            r#"{"code":"1","program_from_stdin":true}"#,
        ] {
            assert_eq!(parse(bad).unwrap_err().code, ErrorCode::BadRequest, "{bad}");
        }
    }

    #[test]
    fn a_time_limit_is_a_number_of_seconds_or_none() {
        assert_eq!(time_limit(0.0).unwrap(), None);
        assert_eq!(time_limit(0.5).unwrap(), Some(Duration::from_millis(500)));
        for bad in [-1.0, f64::NAN, f64::INFINITY, TIMEOUT_MAX_S * 2.0] {
            assert!(time_limit(bad).is_err(), "{bad}");
        }
    }
}
