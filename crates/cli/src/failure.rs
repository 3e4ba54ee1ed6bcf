//! Failures of this program itself, in the words that the API has for them: a sentence for people, an
//! object for machines, one exit code for all.

use crate::out::{complain, say};
use crate::report::FAILED;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Error as UsageError};
use serde_json::json;
use std::error::Error;
use std::io;
use zygote_api::{ErrorCode, Failure};
use zygote_daemon::{ClientError, KeyFileError, recipe_failure, template_failure};
use zygote_lab::LabError;
use zygote_template::{RecipeError, StoreError, nearest};

/// Of the command line.
pub fn usage(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::Usage, message)
}

/// A file of this machine.
pub fn file(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::File, message)
}

/// An error in the API's words: its code and remedy are those of the first that has any, from the outside
/// to the inside.
pub fn of(error: &anyhow::Error) -> Failure {
    let mut outer = Vec::new();
    for cause in error.chain() {
        if let Some(known) = known(cause) {
            return within(&outer, known);
        }
        outer.push(cause.to_string());
    }
    let code = if error.chain().any(|cause| cause.is::<io::Error>()) {
        ErrorCode::File
    } else {
        ErrorCode::Internal
    };
    outer.dedup();
    let mut words = outer.into_iter();
    let failure = Failure::new(code, words.next().unwrap_or_default());
    let causes: Vec<String> = words.collect();
    match causes.is_empty() {
        true => failure,
        false => failure.cause(causes.join(": ")),
    }
}

/// What is known to have a code of its own.
fn known(cause: &(dyn Error + 'static)) -> Option<Failure> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        Some(failure.clone())
    } else if let Some(error) = cause.downcast_ref::<ClientError>() {
        Some(error.to_failure())
    } else if let Some(error) = cause.downcast_ref::<StoreError>() {
        Some(template_failure(error))
    } else if let Some(error) = cause.downcast_ref::<KeyFileError>() {
        Some(key_failure(error))
    } else if let Some(error) = cause.downcast_ref::<RecipeError>() {
        Some(recipe_failure(error))
    } else {
        let error = cause.downcast_ref::<LabError>()?;
        Some(Failure::of(ErrorCode::LabDied, error))
    }
}

fn key_failure(error: &KeyFileError) -> Failure {
    let code = match error {
        KeyFileError::NotFound(_) => ErrorCode::NotFound,
        KeyFileError::TooMany => ErrorCode::LimitReached,
        KeyFileError::Bad(_) => ErrorCode::Usage,
        KeyFileError::File { .. } | KeyFileError::Damaged { .. } | KeyFileError::Writable(_) => {
            ErrorCode::File
        }
    };
    let failure = Failure::of(code, error);
    match error {
        KeyFileError::NotFound(_) => failure.remedy("see which there are: zygote key ls"),
        KeyFileError::TooMany => failure.remedy("revoke some: zygote key revoke ID"),
        KeyFileError::Writable(path) => failure.remedy(format!("chmod 600 {}", path.display())),
        KeyFileError::Damaged { .. } => failure
            .remedy("put it back as it was, or remove it and make keys anew: zygote key create"),
        KeyFileError::File { .. } | KeyFileError::Bad(_) => failure,
    }
}

/// A failure with the sentences that stand around it.
fn within(outer: &[String], inner: Failure) -> Failure {
    let Some((message, between)) = outer.split_first() else {
        return inner;
    };
    let mut causes = between.to_vec();
    causes.push(inner.message);
    causes.extend(inner.cause);
    causes.dedup();
    Failure {
        message: message.clone(),
        cause: Some(causes.join(": ")),
        ..inner
    }
}

/// A sandbox that has ended, and what was asked of it with it.
pub fn ended(why: &str) -> Failure {
    Failure::new(
        ErrorCode::SandboxEnded,
        format!("the sandbox has ended: {why}"),
    )
}

/// Tells it; gives back the exit code.
pub fn tell(failure: &Failure, as_json: bool) -> u8 {
    if as_json {
        say!("{}", json!({ "error": failure }));
    }
    complain!("zygote: {failure}");
    FAILED
}

/// Tells what the parser says of a command line; gives back the exit code.
pub fn tell_usage(error: &UsageError, as_json: bool) -> u8 {
    if !error.use_stderr() {
        // Help, or the version.
        let printed = error.print();
        return printed.err().map_or(0, |error| crate::out::code(&error));
    }
    if as_json {
        say!("{}", json!({ "error": of_usage(error) }));
    }
    if error.kind() == ErrorKind::InvalidSubcommand {
        complain!("error: {}", of_usage(error));
    } else {
        // A usage error without a terminal to write to is one all the same.
        let _ = error.print();
    }
    FAILED
}

fn of_usage(error: &UsageError) -> Failure {
    let word = |kind| match error.get(kind) {
        Some(ContextValue::String(word)) => Some(word.clone()),
        Some(ContextValue::Strings(words)) => words.first().cloned(),
        _ => None,
    };
    if let (ErrorKind::InvalidSubcommand, Some(wrong)) =
        (error.kind(), word(ContextKind::InvalidSubcommand))
    {
        let usage = match error.get(ContextKind::Usage) {
            Some(ContextValue::StyledStr(usage)) => usage.to_string(),
            _ => String::new(),
        };
        return no_verb(&wrong, &usage);
    }
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n");
    let message = paragraphs.next().unwrap_or_default();
    let message = message.trim().strip_prefix("error: ").unwrap_or(message);
    let tip = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("tip: "));
    let remedy = tip.unwrap_or("see: zygote --help");
    usage(message.split_whitespace().collect::<Vec<_>>().join(" ")).remedy(remedy)
}

/// A verb that is none, at whichever level; `usage` is that of the level at which it was typed.
fn no_verb(wrong: &str, usage_there: &str) -> Failure {
    let cli = crate::args::Cli::command();
    let verbs = cli.get_subcommands().filter(|verb| !verb.is_hide_set());
    let names: Vec<&str> = verbs.map(clap::Command::get_name).collect();
    let inner = cli.get_subcommands().flat_map(|verb| {
        let own = verb.get_subcommands();
        own.map(|inner| (verb.get_name(), inner.get_name()))
    });
    let inner: Vec<(&str, &str)> = inner.collect();
    let failure = usage(format!("there is no command {wrong}"));
    let outer_near = || nearest(wrong, names.iter().copied()).map(str::to_owned);
    let inner_near = || {
        let near = nearest(wrong, inner.iter().map(|(_, name)| *name))?;
        let (verb, _) = inner.iter().find(|(_, name)| *name == near)?;
        Some(format!("{verb} {near}"))
    };
    let is_inner = |(verb, _): &(&str, &str)| usage_there.contains(&format!("zygote {verb} "));
    let near = if inner.iter().any(is_inner) {
        inner_near().or_else(outer_near)
    } else {
        outer_near().or_else(inner_near)
    };
    match near {
        Some(near) => failure.remedy(format!("do you mean: zygote {near}")),
        None => failure.remedy(format!("there are: {}", names.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn code_and_remedy_come_from_within_and_the_sentence_from_without() {
        let inner: anyhow::Result<()> = Err(usage("no such size").remedy("write 512M").into());
        let error = inner.context("cannot read x.toml").unwrap_err();
        let failure = of(&error);
        assert_eq!(failure.code, ErrorCode::Usage);
        assert_eq!(failure.message, "cannot read x.toml");
        assert_eq!(failure.cause.as_deref(), Some("no such size"));
        assert_eq!(failure.remedy.as_deref(), Some("write 512M"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_a_failure_of_its_own_kind() {
        let error = std::fs::read("/no/such").context("cannot read /no/such");
        let failure = of(&error.unwrap_err());
        assert_eq!(failure.code, ErrorCode::File);
        assert_eq!(failure.message, "cannot read /no/such");
        assert!(failure.cause.unwrap().contains("No such file"));
        assert_eq!(of(&anyhow::anyhow!("odd")).code, ErrorCode::Internal);
    }

    #[test]
    fn a_wrong_verb_is_answered_with_the_one_that_was_meant_or_all() {
        let told = |wrong, usage| no_verb(wrong, usage).to_string();
        assert!(told("rnu", "").contains("zygote run"));
        assert!(told("inspct", "Usage: zygote [OPTIONS]").contains("zygote inspect"));
        let within = "Usage: zygote template [OPTIONS]";
        assert!(told("inspct", within).contains("zygote template inspect"));
        assert!(told("verfy", "").contains("zygote template verify"));
        assert!(told("xyzzy", "").contains("template, "));
    }
}
