//! `zygote version`.

use crate::out::say;
use serde_json::json;

/// Shows it; gives back the exit code.
pub fn show(as_json: bool) -> u8 {
    let version = env!("CARGO_PKG_VERSION");
    if as_json {
        say!("{}", json!({ "version": version }));
    } else {
        say!("zygote {version}");
    }
    0
}
