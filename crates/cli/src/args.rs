//! The command line, as clap sees it.

mod key;
mod live;
mod serve;

pub use key::*;
pub use live::*;
pub use serve::*;

use crate::complete::{names, recipes};
use crate::copy::Pair;
use crate::words::{Given, divide};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most forks of one `run`.
pub const COUNT_MAX: u32 = 1000;

#[derive(Parser)]
#[command(
    name = "zygote",
    version,
    about = "Fork real virtual machines the way fork(2) forks processes",
    after_help = "Examples:\n  \
        zygote doctor                                 what this host can do\n  \
        zygote run -c 'import numpy; print(numpy.pi)'  Python in a fresh virtual machine\n  \
        zygote run script.py --its --own --arguments\n  \
        zygote run --count 20 --json -c 'import os; print(os.urandom(8).hex())'\n  \
        zygote run -- uname -a                        any program\n  \
        zygote create --name box                      a sandbox that lives\n  \
        zygote exec box -- uname -a                   a program in it\n  \
        zygote python box -c 'x = 6*7; x'             Python in it, whose state stays\n  \
        zygote rm box\n\n\
        Exit codes: the program's own; 128+n if signal n ended it; 124 at the time limit; 126, 127 if\n\
        it cannot be run, or is not there; 125 for every failure of Zygote's own, with a sentence on\n\
        stderr, and with --json an object on stdout as well."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Args, Clone)]
pub struct Global {
    /// Where machines run: `kvm` on this host, `lab` on an emulated one (slow; works anywhere),
    /// `auto` on this host if its KVM can run a kernel
    #[arg(
        long,
        global = true,
        env = "ZYGOTE_HOST",
        default_value = "auto",
        value_name = "HOST",
        help_heading = GLOBAL
    )]
    pub host: HostChoice,
    /// Where the engine listens [default: zygote.sock in /run/zygote for root, else in
    /// $XDG_RUNTIME_DIR/zygote; one of its own for each --state-dir]
    #[arg(long, global = true, env = "ZYGOTE_SOCKET", value_name = "PATH", help_heading = GLOBAL,
          value_parser = OsStringValueParser::new())]
    pub socket: Option<OsString>,
    /// Where templates are kept [default: /var/lib/zygote for root, else ~/.local/share/zygote]
    #[arg(long, global = true, env = "ZYGOTE_STATE_DIR", value_name = "DIR", help_heading = GLOBAL,
          value_parser = OsStringValueParser::new())]
    pub state_dir: Option<OsString>,
    /// Another store, whose templates can be run too [default for users: root's, /var/lib/zygote]
    #[arg(long, global = true, env = "ZYGOTE_SHARED_DIR", value_name = "DIR", help_heading = GLOBAL,
          value_parser = OsStringValueParser::new())]
    pub shared_dir: Option<OsString>,
}

/// Options that every verb takes, at the end of its help.
const GLOBAL: &str = "Global options";

impl Global {
    /// Where the engine listens, if the user says so; a variable that is empty says nothing.
    pub fn socket(&self) -> Option<&Path> {
        given(self.socket.as_ref())
    }

    /// Another store, if the user says so.
    pub fn shared_dir(&self) -> Option<&Path> {
        given(self.shared_dir.as_ref())
    }

    /// Where templates are kept, if the user says so.
    pub fn state_dir(&self) -> Option<&Path> {
        given(self.state_dir.as_ref())
    }
}

fn given(value: Option<&OsString>) -> Option<&Path> {
    value.filter(|path| !path.is_empty()).map(Path::new)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HostChoice {
    // A variable that is empty says nothing.
    #[value(alias = "")]
    Auto,
    Kvm,
    Lab,
}

impl HostChoice {
    /// As it is typed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Lab => "lab",
        }
    }
}

#[derive(Subcommand)]
pub enum Verb {
    /// Run Python code, or any program, in a fresh fork of a template
    Run(RunArgs),
    /// Make a sandbox that lives until it is removed
    Create(CreateArgs),
    /// Make children of a sandbox that go on where it is
    Branch(BranchArgs),
    /// Keep this moment of a sandbox, to go back to it
    Snapshot(SnapshotArgs),
    /// Show what differs between two moments of sandboxes: files and memory
    Diff(DiffArgs),
    /// Take a sandbox back to a moment that is kept
    Rollback(RollbackArgs),
    /// Put a sandbox on disk, where it costs no memory
    Pause(PauseArgs),
    /// Have a paused sandbox go on
    #[command(after_help = "Example:\n  zygote pause box\n  zygote resume box")]
    Resume(NamedArgs),
    /// Show which moments of a sandbox are kept
    Moments(MomentsArgs),
    /// Show which sandbox is a branch of which
    Tree(TreeArgs),
    /// Run a program in a sandbox
    Exec(ExecArgs),
    /// Run Python in an interpreter of a sandbox, whose state stays from call to call
    Python(PythonArgs),
    /// Read on what a process of a sandbox says, and write to it
    Attach(AttachArgs),
    /// Show what a process of a sandbox has said
    Logs(LogsArgs),
    /// Copy files and folders into a sandbox, or out of it
    Cp(CpArgs),
    /// List sandboxes, or the processes of one
    Ps(PsArgs),
    /// Show what a sandbox is and does
    #[command(after_help = "Example:\n  zygote inspect box")]
    Inspect(NamedArgs),
    /// Show what sandboxes take of this host
    Stats(StatsArgs),
    /// Show that over and over, the greediest first
    #[command(after_help = "Example:\n  zygote top     until Ctrl-C")]
    Top,
    /// Send a signal to processes of a sandbox
    Kill(KillArgs),
    /// End sandboxes
    Rm(RmArgs),
    /// Wait until a sandbox, or a process of it, has ended
    Wait(WaitArgs),
    /// Show what has happened to sandboxes
    Events(EventsArgs),
    /// Build, list, inspect, verify and remove templates
    #[command(subcommand)]
    Template(TemplateVerb),
    /// Show what this host can do, measured, and how to fix what it can't
    #[command(after_help = "Examples:\n  zygote doctor\n  zygote doctor --json | jq .host")]
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Run the engine in the foreground; other commands start one in the background when they need it
    #[command(
        after_help = "Without a configuration the engine listens on its Unix socket alone. Each setting is also a \
            line of --config's file, and a variable: ZYGOTE_LISTEN for --listen.\n\nExamples:\n  \
            zygote serve --idle-exit 0                    stays until it is stopped\n  \
            zygote serve --listen 127.0.0.1:7070\n  \
            zygote serve --print-config > zygote.toml; zygote serve --config zygote.toml\n  \
            curl --unix-socket /run/zygote/zygote.sock http://localhost/v1/exec -d '{\"code\": \"print(1)\"}'"
    )]
    Serve(Box<ServeArgs>),
    /// Make, list and revoke the keys by which others than the engine's owner use it over TCP
    #[command(subcommand)]
    Key(KeyVerb),
    /// Show the engine: is it there, since when, what it holds, where machines run
    #[command(
        after_help = "Examples:\n  zygote status\n  zygote status --json | jq .runs\n\n\
            Exit codes: 0 if there is an engine, 3 if there is none."
    )]
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Start the engine in the background, if it is not there, and print its socket
    #[command(
        after_help = "Commands that need the engine start it by themselves; this is for other programs.\n\n\
            Examples:\n  zygote start\n  curl --unix-socket $(zygote start) http://localhost/v1/health"
    )]
    Start {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Stop the engine, once what runs has ended
    #[command(after_help = "Examples:\n  zygote stop\n  zygote stop --now     kills what runs")]
    Stop {
        /// Kill what runs
        #[arg(long)]
        now: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show what is on disk, and what `prune` gets back
    #[command(after_help = "Examples:\n  zygote df\n  zygote df --json | jq .bytes")]
    Df {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove what nothing needs any more: root images without a template, old kernels, old logs
    #[command(
        after_help = "Templates stay: zygote template rm NAME.\n\nExamples:\n  zygote prune --dry-run\n  \
            zygote prune\n  zygote prune --all       also what the next build or lab makes again by itself"
    )]
    Prune(PruneArgs),
    /// Fork the `python` template twice and show what differs and what it cost
    Demo {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show the version
    Version {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Measure what forks cost on this host: time, memory, pages
    #[command(
        args_conflicts_with_subcommands = true,
        override_usage = "zygote bench [OPTIONS]\n       zygote bench pages [OPTIONS] …",
        after_help = "Times are shown beside those of python3 and of fork(2) on the same host. In the lab \
            they are an emulator's, and only their ratios are shown.\n\nExamples:\n  zygote bench\n  \
            zygote bench --runs 1000 --held 100 --plots plots\n  zygote bench --json | jq .pooled.run\n  \
            zygote bench --url http://127.0.0.1:7070 --clients 64 --duration 30s --plots plots\n  \
            zygote bench --url http://127.0.0.1:7070 --rate 200\n  \
            zygote bench pages -c 'import json; print(json.dumps([1]))'"
    )]
    Bench(BenchArgs),
    /// Run a command on an emulated host with working KVM, or keep such a host
    #[command(
        args_conflicts_with_subcommands = true,
        override_usage = "zygote lab [OPTIONS] -- <CMD> [ARGS]...\n       \
            zygote lab up | down | status",
        after_help = "The command runs in the lab that is up (zygote lab up), or in a fresh one. The \
            host's files are there; changes are thrown away with the lab, except in the state \
            directory and in --share folders.\n\nExamples:\n  zygote lab -- uname -a\n  \
            zygote lab up; zygote lab -- uname -a; zygote lab down\n  \
            zygote lab --icount -- zygote run -c 'print(1)'"
    )]
    Lab(LabArgs),
    /// Print a script that completes zygote's commands, and the names of templates, in a shell
    #[command(after_help = "Example:\n  zygote completions bash > /etc/bash_completion.d/zygote")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual's pages into a folder
    #[command(hide = true)]
    Manual {
        /// Where to
        folder: PathBuf,
    },
}

#[derive(Args)]
#[command(
    override_usage = "zygote run [OPTIONS] <-c CODE | FILE | -> [ARGS]...\n       \
        zygote run [OPTIONS] -- <CMD> [ARGS]...",
    after_help = "Options come before the code (-c CODE, FILE, - or --); all that follows it belongs \
        to the program. Standard input is passed on, as ssh does it, unless --json or --count is given \
        without --stdin; there is no terminal in a sandbox. Files: --copy puts them in, --get gets them \
        out.\n\n\
        Examples:\n  \
        zygote run -c 'import sys; print(sys.argv)' a b\n  \
        zygote run --timeout 2s -c 'while True: pass'; echo $?     (124)\n  \
        echo 'print(6*7)' | zygote run -\n  \
        zygote run --copy input.csv --get output.csv job.py\n  \
        zygote run --env TOKEN=abc -c 'import os; print(os.environ[\"TOKEN\"])'\n  \
        zygote run --count 3 --json -c 'import random; print(random.random())'\n  \
        zygote run -- sh -c 'cat /proc/meminfo | head -1'"
)]
pub struct RunArgs {
    /// The template to fork
    #[arg(short, long, default_value = "python", value_name = "NAME", add = names())]
    pub template: String,
    /// Python code
    #[arg(short = 'c', value_name = "CODE", allow_hyphen_values = true)]
    code: Option<OsString>,
    /// How long the program may run, such as 500ms, 30s, 5m; 0 for no limit
    #[arg(long, default_value = "5m", value_parser = parse_duration, value_name = "TIME")]
    pub timeout: Timeout,
    /// Set a variable of the program's environment (repeatable)
    #[arg(long, value_parser = parse_variable, value_name = "K=V")]
    pub env: Vec<(String, String)>,
    /// Directory in the guest [default: /root]
    #[arg(
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true
    )]
    pub cwd: String,
    /// Without an engine that stays: all in this process, and nothing is left behind (for CI,
    /// containers)
    #[arg(long, env = "ZYGOTE_NO_DAEMON", value_parser = clap::builder::FalseyValueParser::new())]
    pub no_daemon: bool,
    /// Run although this host does not allow all walls between it and untrusted code; says so
    #[arg(long, env = "ZYGOTE_ALLOW_MISSING_WALLS", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_missing_walls: bool,
    /// Copy a file or folder into the sandbox, its permissions kept: to its own name in the program's
    /// directory (where a FILE finds it to import it, too), or to DST; at most 1 GiB (repeatable)
    #[arg(long, value_name = "SRC[:DST]",
          value_parser = clap::builder::OsStringValueParser::new().try_map(|text| Pair::parse(&text)))]
    pub copy: Vec<Pair>,
    /// Get a file or folder out once the program has ended, whether well or not: from a path in the
    /// program's directory, to its own name here, or to DST; with --count into a folder for each run;
    /// at most 1 GiB (repeatable)
    #[arg(long, value_name = "SRC[:DST]",
          value_parser = clap::builder::OsStringValueParser::new().try_map(|text| Pair::parse(&text)))]
    pub get: Vec<Pair>,
    /// Memory that all forks of this run may take from this host together, such as 4G, where it has
    /// cgroups; goes without the engine that stays, which has a limit of its own
    /// [default: nine tenths of what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory_max: Option<u64>,
    /// Fork this many at once
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = number(1, COUNT_MAX))]
    pub count: u32,
    /// Print one JSON object a run instead of its output
    #[arg(long)]
    pub json: bool,
    /// Pass standard input on also with --json or --count (each fork gets all of it)
    #[arg(long)]
    pub stdin: bool,
    /// Python's output is passed on as it is written, as by python3 -u, so that what a program has said
    /// before it is killed is there; with --json without being asked
    #[arg(long)]
    pub unbuffered: bool,
    /// FILE (or `-` for standard input) and the program's arguments; with -c, its arguments
    #[arg(value_name = "ARGS")]
    words: Vec<OsString>,
    /// What to run: divided from the rest before that is parsed
    #[arg(skip)]
    pub given: Option<Given>,
}

/// What a command line says.
pub struct Line {
    /// Parsed, or why that cannot be.
    pub cli: Result<Cli, clap::Error>,
    /// Whether a machine reads the answer.
    pub wants_json: bool,
}

impl Cli {
    /// Reads a command line: clap parses what is ours of it.
    pub fn read(words: Vec<OsString>) -> Line {
        let words = divide(words, &Self::command());
        let wants_json = words.want_json();
        let cli = Self::try_parse_from(words.ours).map(|mut cli| {
            if let Verb::Run(run) = &mut cli.verb {
                run.given = words.given;
            }
            cli
        });
        Line { cli, wants_json }
    }
}

#[derive(Args)]
pub struct PruneArgs {
    /// Also what the next build, run or lab makes again by itself: all but templates
    #[arg(long)]
    pub all: bool,
    /// Only show what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand)]
pub enum TemplateVerb {
    /// Write a recipe to begin with, every field explained
    #[command(
        after_help = "Example:\n  zygote template init mine\n  zygote template build mine.toml"
    )]
    Init {
        /// The template's name; the file is NAME.toml
        #[arg(default_value = "mine")]
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Build a template, if it is not there as its recipe says
    #[command(
        after_help = "A recipe is a TOML file: zygote template init writes one to begin with, \
            docs/recipes.md has every field.\n\nExamples:\n  zygote template build python\n  \
            zygote template build python --memory 1G --vcpus 2 --replicas 4\n  \
            zygote template init mine; zygote template build mine.toml\n  \
            zygote template build mine --force       again, from the recipe it was built from"
    )]
    Build(BuildArgs),
    /// Derive a template from another one: files, packages and commands on top of it, in seconds
    #[command(
        after_help = "What is put in, installed and run is on top of BASE, whose files and memory are shared. \
            Files come first, then packages, then the commands in their order, then --warm. The result's \
            recipe is kept: zygote template build NAME --force does it again.\n\nExamples:\n  \
            zygote template derive python tables --pip tabulate --warm 'import tabulate'\n  \
            zygote template derive python app --copy app:/opt/app --run 'python3 /opt/app/prepare.py'\n  \
            zygote run -t tables -c 'import tabulate; print(tabulate.__version__)'"
    )]
    Derive(DeriveArgs),
    /// List the templates
    #[command(visible_alias = "list")]
    Ls {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show what a template is and contains
    Inspect {
        /// Its name
        #[arg(add = names())]
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove a template; sandboxes that run from it go on
    Rm {
        /// Its name
        #[arg(add = names())]
        name: String,
        /// Also those that are derived from it
        #[arg(long)]
        derived: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Compare every byte of a template with its digests
    Verify {
        /// Its name
        #[arg(add = names())]
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
pub struct BenchArgs {
    /// What to measure, if not time and memory
    #[command(subcommand)]
    pub verb: Option<BenchVerb>,
    /// The template to fork
    #[arg(short, long, default_value = "python", value_name = "NAME", add = names())]
    pub template: String,
    /// Runs of each kind [default: 200; 15 in the lab]
    #[arg(long, value_name = "N", value_parser = number(1, 100_000))]
    pub runs: Option<u32>,
    /// Sandboxes that are held at once, to see what each costs; 0: none [default: 100; 20 in the lab]
    #[arg(long, value_name = "N", value_parser = number(0, 1000))]
    pub held: Option<u32>,
    /// Draw pictures of it (SVG) into this folder
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Ask an engine instead, as its users do: http://HOST:PORT, https://HOST:PORT, or unix:PATH
    #[arg(long, value_name = "URL", conflicts_with_all = ["runs", "held"])]
    pub url: Option<String>,
    /// With --url: a key of that engine (better: the variable)
    #[arg(
        long,
        env = "ZYGOTE_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
        requires = "url"
    )]
    pub key: Option<String>,
    /// With --url: clients, each of which asks again as soon as it is answered [default: 8]
    #[arg(long, value_name = "N", value_parser = number(1, 10_000), requires = "url", conflicts_with = "rate")]
    pub clients: Option<u32>,
    /// With --url, instead: requests a second, whether those before are answered or not; their times count from when
    /// each was due
    #[arg(long, value_name = "N", value_parser = number(1, 1_000_000), requires = "url")]
    pub rate: Option<u32>,
    /// With --url: for how long [default: 10s]
    #[arg(long, value_parser = parse_duration, value_name = "TIME", requires = "url")]
    pub duration: Option<Timeout>,
    /// With --url: what is run [default: print(1+1)]
    #[arg(
        short = 'c',
        value_name = "CODE",
        allow_hyphen_values = true,
        requires = "url"
    )]
    pub code: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand)]
pub enum BenchVerb {
    /// Count the pages that a run writes and the faults that it takes, by owner and by phase
    #[command(
        override_usage = "zygote bench pages [OPTIONS] [-c CODE]\n       \
            zygote bench pages [OPTIONS] -- <CMD> [ARGS]...",
        after_help = "Examples:\n  zygote bench pages\n  \
            zygote bench pages -c 'import json; print(json.dumps([1]))'\n  \
            zygote bench pages -t mine --json -- true"
    )]
    Pages(PagesArgs),
}

#[derive(Args)]
pub struct PagesArgs {
    /// The template to fork
    #[arg(short, long, default_value = "python", value_name = "NAME", add = names())]
    pub template: String,
    /// Python code
    #[arg(
        short = 'c',
        value_name = "CODE",
        allow_hyphen_values = true,
        default_value = "print(1+1)",
        conflicts_with = "command"
    )]
    pub code: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// A program of the guest, with its arguments
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

#[derive(Args, Clone)]
pub struct BuildArgs {
    /// A recipe's path that ends in .toml; a built-in recipe (python); or a template, to build it again
    #[arg(add = recipes())]
    pub recipe: String,
    /// Guest memory, such as 512M or 4G [default: the recipe's]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub memory: Option<u64>,
    /// Number of vCPUs [default: the recipe's]
    #[arg(long, value_name = "N", value_parser = number(1, 32))]
    pub vcpus: Option<u32>,
    /// Boot it this many times, so that forks do not all share one address-space layout
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = number(1, 64))]
    pub replicas: u32,
    /// Build it even if it is there
    #[arg(long)]
    pub force: bool,
    /// Without an engine that stays
    #[arg(long, env = "ZYGOTE_NO_DAEMON", value_parser = clap::builder::FalseyValueParser::new())]
    pub no_daemon: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct DeriveArgs {
    /// The template that it is derived from
    #[arg(add = names())]
    pub base: String,
    /// What it is to be called
    pub name: String,
    /// Put a file or folder into it: to /root, or to DST
    #[arg(long, value_name = "SRC[:DST]",
          value_parser = clap::builder::OsStringValueParser::new().try_map(|text| Pair::parse(&text)))]
    pub copy: Vec<Pair>,
    /// Install a package of the Python Package Index, as pip takes it: it is fetched here
    #[arg(long, value_name = "PACKAGE")]
    pub pip: Vec<String>,
    /// Install those of a file, as pip takes it
    #[arg(long, value_name = "FILE")]
    pub requirements: Option<PathBuf>,
    /// Run a command in it, by a shell, as root, in /root
    #[arg(long, value_name = "COMMAND")]
    pub run: Vec<String>,
    /// Run Python in its warm interpreter, as the last thing: what it imports is there in every sandbox
    #[arg(long, value_name = "CODE")]
    pub warm: Option<String>,
    /// Derive it even if it is there as it would become
    #[arg(long)]
    pub force: bool,
    /// Without an engine that stays
    #[arg(long, env = "ZYGOTE_NO_DAEMON", value_parser = clap::builder::FalseyValueParser::new())]
    pub no_daemon: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct LabArgs {
    /// What to do with the lab that is kept
    #[command(subcommand)]
    pub verb: Option<LabVerb>,
    /// A fresh lab for this command alone, even if one is up
    #[arg(long)]
    pub fresh: bool,
    /// One processor whose clock counts instructions: the same run takes the same time
    #[arg(long)]
    pub icount: bool,
    /// Share a folder for writing (repeatable)
    #[arg(long, value_name = "DIR")]
    pub share: Vec<PathBuf>,
    /// Throw changes to the state directory away as well
    #[arg(long)]
    pub throw_away: bool,
    /// How long the command may run, such as 30s or 5m; then the lab ends, with exit code 124
    /// [default: no limit]
    #[arg(long, default_value = "0", value_parser = parse_duration, value_name = "TIME",
          hide_default_value = true)]
    pub timeout: Timeout,
    /// The command
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum LabVerb {
    /// Start a lab and keep it, for as long as the engine stays
    Up {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// End it, and what runs in it
    Down {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show it
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// A limit that may be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout(pub Option<Duration>);

pub fn parse_duration(text: &str) -> Result<Timeout, String> {
    let split = text.find(|letter: char| letter.is_ascii_alphabetic());
    let (number, unit) = text.split_at(split.unwrap_or(text.len()));
    let scale = match unit {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}; use ms, s, m or h")),
    };
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let seconds = number
        .parse::<f64>()
        .ok()
        .filter(|_| plain)
        .map(|n| n * scale);
    let seconds = seconds.ok_or("write a number with ms, s, m or h, such as 30s")?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| "too long".to_owned())?;
    Ok(Timeout((!duration.is_zero()).then_some(duration)))
}

/// A whole number within limits.
fn number(min: u32, max: u32) -> impl Fn(&str) -> Result<u32, String> + Clone {
    move |text| {
        let good = text.parse().ok().filter(|n| (min..=max).contains(n));
        good.ok_or_else(|| format!("write a whole number from {min} to {max}"))
    }
}

pub fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !text.contains('\0') => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("write it as NAME=VALUE".to_owned()),
    }
}

pub fn parse_size(text: &str) -> Result<u64, String> {
    zygote_template::parse_size(text).map_err(|error| error.to_string())
}

fn parse_memory(text: &str) -> Result<u64, String> {
    match zygote_template::memory_problem(text) {
        Some(problem) => Err(problem),
        None => zygote_template::parse_size(text).map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        let good = [
            ("500ms", 500),
            ("2s", 2000),
            ("1.5s", 1500),
            ("5m", 300_000),
            ("7", 7000),
        ];
        for (text, ms) in good {
            let expected = Timeout(Some(Duration::from_millis(ms)));
            assert_eq!(parse_duration(text), Ok(expected), "{text}");
        }
        assert_eq!(parse_duration("0"), Ok(Timeout(None)));
        for text in [
            "",
            "s",
            "-1s",
            "1d",
            "inf",
            "nan",
            "1e99",
            "1.2.3s",
            "99999999999999999999h",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_variable_needs_a_name() {
        assert_eq!(parse_variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_variable("A="), Ok(("A".into(), String::new())));
        assert!(parse_variable("=x").is_err() && parse_variable("A").is_err());
    }
}
