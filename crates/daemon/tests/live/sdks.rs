//! The SDKs, against a daemon whose guests are the real agent. `cargo xtask sdk` runs this with what they need.

use super::*;
use std::path::Path;
use std::process::Command;

/// Where what the SDKs need is: set by whoever has put it there.
const PYTHON: &str = "ZYGOTE_SDK_PYTHON";
const NODE: &str = "ZYGOTE_SDK_NODE";

/// Whether they can be tried.
pub fn has_tools() -> bool {
    [PYTHON, NODE]
        .iter()
        .any(|name| std::env::var_os(name).is_some())
}

fn tool(variable: &str) -> Command {
    Command::new(std::env::var_os(variable).expect("run it with: cargo xtask sdk"))
}

fn against_a_daemon(mut command: Command) {
    let home = Home::new();
    let _client = runtime().block_on(started(&home, &[]));
    command.env("ZYGOTE_SOCKET", home.socket());
    command.env("ZYGOTE_TEST_TEMPLATE", HERE);
    command
        .env_remove("ZYGOTE_URL")
        .env_remove("ZYGOTE_API_KEY");
    let done = command.output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        done.status.success(),
        "{}\n{}",
        said(&done.stdout),
        said(&done.stderr)
    );
}

fn sdk(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../sdk")
        .join(name)
}

pub fn the_python_sdk_does_what_it_says() {
    let mut command = tool(PYTHON);
    command.args(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]);
    command.current_dir(sdk("python"));
    against_a_daemon(command);
}

pub fn the_typescript_sdk_does_what_it_says() {
    let mut command = tool(NODE);
    command.args(["--test", "--test-concurrency=1", "test/"]);
    command.current_dir(sdk("typescript"));
    against_a_daemon(command);
}
