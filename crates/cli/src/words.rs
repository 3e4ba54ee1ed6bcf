//! Where our words end on a command line and a program's begin: at its code. What comes after that is
//! the program's, whatever it looks like.

use clap::{Arg, Command};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The verb whose words end at a program.
const RUN: &str = "run";

/// What `run` is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Given {
    /// Python code, with the program's arguments.
    Code(OsString, Vec<OsString>),
    /// A file, or `-` for standard input, with the program's arguments.
    File(OsString, Vec<OsString>),
    /// A program of the guest, with its arguments.
    Command(Vec<OsString>),
}

/// A command line, divided.
#[derive(Debug, PartialEq, Eq)]
pub struct Words {
    /// For us to parse.
    pub ours: Vec<OsString>,
    /// The program of `run`, if there is one.
    pub given: Option<Given>,
}

impl Words {
    /// Whether a machine reads the answer: known even if the rest cannot be parsed.
    pub fn want_json(&self) -> bool {
        let until_command = self.ours.iter().take_while(|word| *word != "--");
        until_command.into_iter().any(|word| word == "--json")
    }
}

/// Divides a command line, its first word the program's own name.
pub fn divide(words: Vec<OsString>, cli: &Command) -> Words {
    let mut at = 1;
    while let Some(word) = words.get(at)
        && is_option(word)
    {
        at += 1 + usize::from(takes_next(cli, word));
    }
    let is_run = words.get(at).is_some_and(|verb| verb == RUN);
    let run = cli.find_subcommand(RUN).filter(|_| is_run);
    let Some(run) = run else {
        return Words {
            ours: words,
            given: None,
        };
    };
    at += 1;
    loop {
        let rest = words.get(at..).unwrap_or_default();
        let given = match rest {
            [] => None,
            [end, command @ ..] if end == "--" => Some(Given::Command(command.to_vec())),
            [option, code, arguments @ ..] if option == "-c" => {
                Some(Given::Code(code.clone(), arguments.to_vec()))
            }
            [word, arguments @ ..] if is_code(word) => {
                let code = OsString::from_vec(word.as_bytes()[2..].to_vec());
                Some(Given::Code(code, arguments.to_vec()))
            }
            [option, ..] if is_option(option) => {
                at += 1 + usize::from(takes_next(run, option) || takes_next(cli, option));
                continue;
            }
            [file, arguments @ ..] => Some(Given::File(file.clone(), arguments.to_vec())),
        };
        let mut ours = words;
        ours.truncate(at);
        return Words { ours, given };
    }
}

/// `-cCODE`.
fn is_code(word: &OsString) -> bool {
    word.as_bytes().len() > 2 && word.as_bytes().starts_with(b"-c")
}

fn is_option(word: &OsString) -> bool {
    word.as_bytes().len() > 1 && word.as_bytes()[0] == b'-' && word != "--"
}

/// Whether an option's value is the next word.
fn takes_next(command: &Command, word: &OsString) -> bool {
    let bytes = word.as_bytes();
    let is_named = |arg: &&Arg| match bytes {
        [b'-', b'-', name @ ..] => arg.get_long().is_some_and(|long| long.as_bytes() == name),
        [b'-', letter] => arg.get_short() == Some(char::from(*letter)),
        _ => false,
    };
    let found = command.get_arguments().find(is_named);
    found.is_some_and(|arg| arg.get_action().takes_values())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::CommandFactory;

    fn divided(line: &str) -> (String, Option<Given>) {
        let words = line.split(' ').map(OsString::from).collect();
        let words = divide(words, &Cli::command());
        let ours: Vec<_> = words
            .ours
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        (ours.join(" "), words.given)
    }

    fn list(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn what_comes_after_the_code_is_the_programs_whatever_it_looks_like() {
        let (ours, given) = divided("zygote run --timeout 2s -c print(1) --timeout 9s --json a");
        assert_eq!(ours, "zygote run --timeout 2s");
        let arguments = list(&["--timeout", "9s", "--json", "a"]);
        assert_eq!(given, Some(Given::Code("print(1)".into(), arguments)));
        let (ours, given) = divided("zygote --host lab run -t x job.py --env A=b -- -c");
        assert_eq!(ours, "zygote --host lab run -t x");
        let arguments = list(&["--env", "A=b", "--", "-c"]);
        assert_eq!(given, Some(Given::File("job.py".into(), arguments)));
        let (ours, given) = divided("zygote run --json --env=A=b -- ls --json");
        assert_eq!(ours, "zygote run --json --env=A=b");
        assert_eq!(given, Some(Given::Command(list(&["ls", "--json"]))));
        assert_eq!(
            divided("zygote run - -x").1,
            Some(Given::File("-".into(), list(&["-x"])))
        );
        assert_eq!(
            divided("zygote run -cpass").1,
            Some(Given::Code("pass".into(), vec![]))
        );
        assert_eq!(
            divided("zygote run -c -1").1,
            Some(Given::Code("-1".into(), vec![]))
        );
    }

    #[test]
    fn what_is_no_option_of_ours_is_left_for_the_parser_to_refuse() {
        for line in ["zygote run --tiemout 2s -c 1", "zygote run -x"] {
            let (ours, _) = divided(line);
            assert!(ours.contains("--tiemout") || ours.contains("-x"), "{ours}");
        }
        assert_eq!(divided("zygote run -c"), ("zygote run -c".into(), None));
        assert_eq!(divided("zygote lab -- run -c x").1, None);
        assert_eq!(divided("zygote").1, None);
    }

    /// The words of a command as a shell would take them, as far as examples need that.
    fn shell_words(line: &str) -> Vec<OsString> {
        let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
        for letter in line.chars() {
            match (letter, quote) {
                ('\'' | '"', None) => quote = Some(letter),
                (letter, Some(open)) if letter == open => quote = None,
                (' ', None) => words.push(std::mem::take(&mut word)),
                (letter, _) => word.push(letter),
            }
        }
        words.push(word);
        words.retain(|word| !word.is_empty());
        words.into_iter().map(OsString::from).collect()
    }

    #[test]
    fn every_command_that_is_printed_is_one() {
        let mut texts = vec![
            include_str!("../../../README.md").to_owned(),
            include_str!("../../../docs/recipes.md").to_owned(),
            include_str!("../../../docs/install.md").to_owned(),
            include_str!("../../../docs/running.md").to_owned(),
            include_str!("../../../docs/performance.md").to_owned(),
        ];
        let mut verbs: Vec<Command> = Cli::command().get_subcommands().cloned().collect();
        let inner = verbs
            .iter()
            .flat_map(|verb| verb.get_subcommands().cloned());
        verbs.extend(inner.collect::<Vec<_>>());
        verbs.push(Cli::command());
        for verb in &verbs {
            texts.extend(verb.get_after_help().map(ToString::to_string));
        }
        let mut count = 0;
        for line in texts.iter().flat_map(|text| text.lines()) {
            let bare = line.split(" #").next().unwrap().trim();
            let bare = bare.split("     ").next().unwrap();
            for command in bare
                .split("; ")
                .map(|part| part.split(" | ").next().unwrap())
            {
                // Names in capitals stand for something, and brackets for a choice.
                if !command.starts_with("zygote ") || command.contains(['[', '<', '…', '|']) {
                    continue;
                }
                let command = command
                    .split(" > ")
                    .next()
                    .unwrap()
                    .split("  ")
                    .next()
                    .unwrap();
                if let Err(error) = Cli::read(shell_words(command)).cli {
                    assert!(!error.use_stderr(), "{command}: {error}");
                }
                count += 1;
            }
        }
        assert!(count >= 40, "{count}");
    }

    #[test]
    fn who_wants_json_is_known_before_anything_is_parsed() {
        let want = |line: &str| {
            let words = line.split(' ').map(OsString::from).collect();
            divide(words, &Cli::command()).want_json()
        };
        assert!(want("zygote run --json --nonsense") && want("zygote template ls --json"));
        assert!(!want("zygote run -c 1 --json") && !want("zygote lab -- x --json"));
    }
}
