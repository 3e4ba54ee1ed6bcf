//! The words of the verbs for sandboxes that live.

use super::{Timeout, parse_duration, parse_variable};
use crate::complete::{names, sandboxes};
use crate::copy::Pair;
use clap::Args;
use clap::builder::TypedValueParser;
use std::ffi::OsString;

#[derive(Args)]
#[command(
    after_help = "Prints the sandbox's id. It lives until it is removed, or its time is over.\n\nExamples:\n  \
        zygote create --name box\n  \
        zygote create --name web --ttl 10m --idle 5m --env TOKEN=abc\n  \
        zygote create --json | jq -r .id"
)]
pub struct CreateArgs {
    /// The template to fork
    #[arg(short, long, default_value = "python", value_name = "NAME", add = names())]
    pub template: String,
    /// A name of its own: letters, digits, -, _ and .
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// How long it lives, such as 30s, 10m, 2h; 0: until it is removed
    #[arg(long, default_value = "0", value_parser = parse_duration, value_name = "TIME")]
    pub ttl: Timeout,
    /// How long it lives without being used; 0: for any time
    #[arg(long, default_value = "0", value_parser = parse_duration, value_name = "TIME")]
    pub idle: Timeout,
    /// What becomes of it when its time is over
    #[arg(long, default_value = "kill", value_parser = ["kill"], value_name = "WHAT")]
    pub on_timeout: String,
    /// Set a variable for all of its processes (repeatable)
    #[arg(long, value_parser = parse_variable, value_name = "K=V")]
    pub env: Vec<(String, String)>,
    /// Copy a file or folder into it: to its own name in /root, or to DST (repeatable)
    #[arg(long, value_name = "SRC[:DST]",
          value_parser = clap::builder::OsStringValueParser::new().try_map(|text| Pair::parse(&text)))]
    pub copy: Vec<Pair>,
    /// Keep a moment each time, such as 1s, to go back to
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub moment_every: Option<Timeout>,
    /// Keep a moment before each program, and before each cell of code
    #[arg(long)]
    pub moment_on_exec: bool,
    /// How many of those are kept, the newest
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=64),
          value_name = "N")]
    pub moments: u32,
    /// Run although this host does not allow all walls between it and untrusted code; says so
    #[arg(long, env = "ZYGOTE_ALLOW_MISSING_WALLS", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_missing_walls: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Prints the ids of the children. Each has the sandbox's memory, files and processes as they are \
        at this moment, and goes on from there, as somebody else: with its own host name, ids and random \
        numbers of its kernel. The sandbox goes on as well.\n\nExamples:\n  \
        zygote branch box\n  \
        zygote branch box --count 3 --name try\n  \
        zygote branch box --json | jq .pause_us"
)]
pub struct BranchArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// How many children
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000),
          value_name = "N")]
    pub count: u32,
    /// A moment that is kept, by its name, its number (@7), or counted from the newest (@-1) [default: now]
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
    pub at: Option<String>,
    /// A name; of several children, what theirs begin with: NAME-1, NAME-2 …
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// How long each lives, such as 30s, 10m, 2h; 0: until it is removed [default: as the sandbox]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub ttl: Option<Timeout>,
    /// How long each lives without being used; 0: for any time [default: as the sandbox]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub idle: Option<Timeout>,
    /// Have its interpreters draw random numbers that the sandbox will not draw
    #[arg(long)]
    pub reseed: bool,
    /// How long its processes may take to stop
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "TIME")]
    pub freeze_timeout: Timeout,
    /// Go on although some have not stopped by then: they wait in the guest's kernel, and stop before they
    /// come out of it
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "The moment is kept as long as the sandbox lives, and costs what differs from it. One without a \
        name gives way to newer ones. With --template it is written to disk, as a template: sandboxes of it \
        begin where this one is, with its files and its processes.\n\nExamples:\n  \
        zygote snapshot box before\n  \
        zygote python box -c 'x = 1'\n  \
        zygote rollback box before\n  \
        zygote branch box --at before --name again\n  \
        zygote snapshot box warm --template; zygote create -t warm"
)]
pub struct SnapshotArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// What the moment is called: letters, digits, -, _ and .
    pub name: Option<String>,
    /// Make a template of that name
    #[arg(long, requires = "name")]
    pub template: bool,
    /// Of a moment that is kept, not of now: its name, its number (@7), or counted from the newest (@-1)
    #[arg(long, value_name = "MOMENT", requires = "template")]
    pub at: Option<String>,
    /// How long its processes may take to stop
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "TIME")]
    pub freeze_timeout: Timeout,
    /// Go on although some have not stopped by then
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "With one sandbox: what has changed since it was made. A (added), C (changed) and D (removed) \
        are files, folders and links, by their permissions, owners, lengths and times. Names that a sandbox gets \
        (/etc/hostname, /etc/hosts, /etc/machine-id) are left out.\n\nExamples:\n  \
        zygote diff box\n  \
        zygote diff box@before box\n  \
        zygote diff box@-2 box@-1\n  \
        zygote diff box other --json"
)]
pub struct DiffArgs {
    /// A sandbox, or a moment that it keeps: box@before, box@7, box@-1
    #[arg(add = sandboxes(), value_name = "A")]
    pub first: String,
    /// What it is compared with; without, A is, with its beginning
    #[arg(add = sandboxes(), value_name = "B")]
    pub second: Option<String>,
    /// How long processes may take to stop
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "TIME")]
    pub freeze_timeout: Timeout,
    /// Go on although some have not stopped by then
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "The sandbox keeps its id, its name and its time to live. What has run since that moment is gone, \
        and whoever waits for it is told. Later moments without a name are gone, too.\n\nExamples:\n  \
        zygote snapshot box before\n  \
        zygote rollback box before\n  \
        zygote rollback box     the newest"
)]
pub struct RollbackArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// A moment: its name, its number (@7), or counted from the newest (@-1)
    #[arg(default_value = "@-1", value_name = "MOMENT")]
    pub moment: String,
    /// Have its interpreters draw other random numbers than they have drawn from there
    #[arg(long)]
    pub reseed: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "It keeps its id, its name and its time to live, and goes on where it was, with its files and \
        processes: zygote resume. It outlives the engine and the host. What differs from its template is \
        written, compressed; its moments are let go.\n\nExamples:\n  \
        zygote pause box\n  \
        zygote ps\n  \
        zygote resume box"
)]
pub struct PauseArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// How long its processes may take to stop
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "TIME")]
    pub freeze_timeout: Timeout,
    /// Go on although some have not stopped by then
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  zygote snapshot box before\n  zygote moments box\n  zygote moments box --forget before"
)]
pub struct MomentsArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// Keep one no longer
    #[arg(long, value_name = "MOMENT")]
    pub forget: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  zygote tree\n  zygote tree box --json | jq .")]
pub struct TreeArgs {
    /// A sandbox, to see what has come of it [default: all of them]
    #[arg(add = sandboxes())]
    pub sandbox: Option<String>,
    /// Those that have ended as well; without, only those from which a living one has come
    #[arg(short, long)]
    pub all: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    override_usage = "zygote exec [OPTIONS] <SANDBOX> [--] <CMD> [ARGS]...",
    after_help = "A sandbox is named by its name, its id, or the beginning or end of that. Files and \
        processes of one call are there for the next. A program on a terminal (-t) is left with Ctrl-P \
        Ctrl-Q, and goes on.\n\nExamples:\n  \
        zygote exec box -- ls -l\n  \
        echo hello | zygote exec -i box -- tr a-z A-Z\n  \
        zygote exec -it box -- bash\n  \
        zygote exec -d box -- python3 -m http.server\n  \
        zygote exec --user nobody --cwd /tmp --timeout 10s box -- id"
)]
pub struct ExecArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Let it run in the background; print its number
    #[arg(short, long)]
    pub detach: bool,
    /// Set a variable of its environment (repeatable)
    #[arg(short, long, value_parser = parse_variable, value_name = "K=V")]
    pub env: Vec<(String, String)>,
    /// Directory in the guest [default: the user's home]
    #[arg(
        short = 'w',
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true
    )]
    pub cwd: String,
    /// Who it runs as: USER or USER:GROUP, by name or number [default: root]
    #[arg(
        short,
        long,
        value_name = "USER",
        default_value = "",
        hide_default_value = true
    )]
    pub user: String,
    /// How long it may run, such as 500ms, 30s, 5m; 0: as long as it likes
    #[arg(long, default_value = "0", value_parser = parse_duration, value_name = "TIME")]
    pub timeout: Timeout,
    /// Print one JSON object instead of its output
    #[arg(long)]
    pub json: bool,
    /// The program, and its arguments
    #[arg(
        value_name = "CMD",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required = true
    )]
    pub command: Vec<OsString>,
}

#[derive(Args)]
#[command(
    override_usage = "zygote python [OPTIONS] <SANDBOX> <-c CODE | FILE | ->",
    after_help = "The value of the last expression is printed, as in a notebook; a semicolon behind it \
        keeps it. What else a cell shows (figures, tables) goes into files with --save. Ctrl-C interrupts \
        the code. The exit code is 1 if it raises an exception.\n\nExamples:\n  \
        zygote python box -c 'x = 20'\n  \
        zygote python box -c 'x + 22'\n  \
        zygote python box script.py --context other\n  \
        echo 'print(6*7)' | zygote python box -\n  \
        zygote python box --restart"
)]
pub struct PythonArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// Python code
    #[arg(
        short = 'c',
        value_name = "CODE",
        allow_hyphen_values = true,
        conflicts_with = "file"
    )]
    pub code: Option<OsString>,
    /// A file of this host, or - for standard input
    #[arg(value_name = "FILE")]
    pub file: Option<OsString>,
    /// Which interpreter; it is made if it is not there
    #[arg(long, default_value = "default", value_name = "NAME")]
    pub context: String,
    /// How long it may run, such as 500ms, 30s, 5m; then it is interrupted. 0: as long as it likes
    #[arg(long, default_value = "0", value_parser = parse_duration, value_name = "TIME")]
    pub timeout: Timeout,
    /// Write what it shows (PNG, SVG, HTML …) into this folder, as 1.png, 2.html …
    #[arg(long, value_name = "DIR")]
    pub save: Option<std::path::PathBuf>,
    /// Begin with a new interpreter
    #[arg(long)]
    pub restart: bool,
    /// Print one JSON object instead of its output
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Signals go to the process; a second one ends this command alone. A process on a \
        terminal is left with Ctrl-P Ctrl-Q.\n\nExample:\n  zygote exec -d box -- sleep 1\n  \
        zygote attach box 1"
)]
pub struct AttachArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// The process's number, as zygote ps SANDBOX shows it
    pub process: u32,
    /// Pass no input on
    #[arg(long)]
    pub no_stdin: bool,
}

#[derive(Args)]
#[command(
    after_help = "The newest output of each process is kept; what was dropped is told.\n\nExamples:\n  \
        zygote logs box\n  zygote logs box 1"
)]
pub struct LogsArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// The process's number [default: the one that was started last]
    pub process: Option<u32>,
    /// Wait for more, to the process's end
    #[arg(short, long)]
    pub follow: bool,
    /// Begin at this offset of its output
    #[arg(long, value_name = "BYTES")]
    pub from: Option<u64>,
    /// Print one JSON object
    #[arg(long, conflicts_with = "follow")]
    pub json: bool,
}

#[derive(Args)]
#[command(
    override_usage = "zygote cp [OPTIONS] <SRC> <SANDBOX>:<DST>\n       \
        zygote cp [OPTIONS] <SANDBOX>:<SRC> <DST>",
    after_help = "As cp(1) does it: into a folder that is there, else by that name. Links in a folder \
        stay links; what goes in belongs to root. With - for a path of this host, a tar archive is read \
        from standard input, or written to standard output. Relative paths in a sandbox start at \
        /root.\n\nExamples:\n  \
        zygote cp data.csv box:/srv/\n  \
        zygote cp box:/srv/data.csv copy.csv\n  \
        tar c data.csv | zygote cp - box:/srv\n  \
        zygote cp box:/srv - | tar t"
)]
pub struct CpArgs {
    /// SANDBOX:PATH, a path of this host, or -
    #[arg(value_name = "SRC")]
    pub source: OsString,
    /// The same, where the other is not
    #[arg(value_name = "DST")]
    pub target: OsString,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  zygote ps\n  zygote ps box\n  zygote ps --json | jq -r .sandboxes[].id"
)]
pub struct PsArgs {
    /// A sandbox, to see its processes
    #[arg(add = sandboxes())]
    pub sandbox: Option<String>,
    /// Those that have ended as well
    #[arg(short, long)]
    pub all: bool,
    /// Print ids alone
    #[arg(short, long)]
    pub quiet: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct NamedArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  zygote stats\n  zygote stats box --json | jq .memory_private_kib"
)]
pub struct StatsArgs {
    /// The sandbox [default: all of them]
    #[arg(add = sandboxes())]
    pub sandbox: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  zygote exec -d box -- sleep 1000\n  zygote kill --signal TERM box 1\n  zygote kill box"
)]
pub struct KillArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// The process's number [default: each that runs because somebody asked for it]
    pub process: Option<u32>,
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = parse_signal, value_name = "SIGNAL")]
    pub signal: u8,
    /// To the process alone, and not to what it has started
    #[arg(long)]
    pub only_process: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  zygote rm box\n  zygote rm --tree box\n  zygote rm --all")]
pub struct RmArgs {
    /// The sandboxes
    #[arg(add = sandboxes(), required_unless_present = "all")]
    pub sandboxes: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "sandboxes")]
    pub all: bool,
    /// Their branches, and those of them, as well
    #[arg(long, conflicts_with = "all")]
    pub tree: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "With a process, the exit code is that process's.\n\nExample:\n  \
        zygote exec -d box -- sleep 1\n  zygote wait box 1"
)]
pub struct WaitArgs {
    /// The sandbox
    #[arg(add = sandboxes())]
    pub sandbox: String,
    /// The process's number
    pub process: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  zygote events\n  zygote events --json | jq -c .")]
pub struct EventsArgs {
    /// Wait for more
    #[arg(short, long)]
    pub follow: bool,
    /// Only of this sandbox
    #[arg(add = sandboxes())]
    pub sandbox: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// A signal by its name (with or without SIG), or its number.
fn parse_signal(text: &str) -> Result<u8, String> {
    const NAMES: [(&str, u8); 31] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("STKFLT", 16),
        ("CHLD", 17),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("TTIN", 21),
        ("TTOU", 22),
        ("URG", 23),
        ("XCPU", 24),
        ("XFSZ", 25),
        ("VTALRM", 26),
        ("PROF", 27),
        ("WINCH", 28),
        ("IO", 29),
        ("PWR", 30),
        ("SYS", 31),
    ];
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let named = NAMES.iter().find(|(known, _)| *known == name);
    let number = text.parse().ok().filter(|number| (1..=64).contains(number));
    named
        .map(|(_, number)| *number)
        .or(number)
        .ok_or_else(|| "write a name, such as TERM, or a number from 1 to 64".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("TERM", 15), ("sigint", 2), ("9", 9), ("64", 64)] {
            assert_eq!(parse_signal(text), Ok(number), "{text}");
        }
        for text in ["", "0", "65", "SIGNOPE", "-9"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }
}
