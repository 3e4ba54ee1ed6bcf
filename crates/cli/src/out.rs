//! Standard output and error of this program itself: a reader that has gone ends it quietly, as
//! SIGPIPE would; anything else that cannot be written is told.

use crate::report::FAILED;
use std::fmt::Arguments;
use std::io::{self, Write};

/// As a shell tells a program that SIGPIPE has ended.
pub const READER_GONE: u8 = 141;

/// Prints a line on standard output.
macro_rules! say {
    ($($words:tt)*) => { $crate::out::print_line(format_args!($($words)*)) };
}

/// Prints a line on standard error.
macro_rules! complain {
    ($($words:tt)*) => { $crate::out::complain_line(format_args!($($words)*)) };
}

pub(crate) use {complain, say};

/// Prints a line on standard output; ends this program if that cannot be.
pub fn print_line(line: Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    if let Err(error) = written {
        std::process::exit(code(&error).into());
    }
}

/// Prints a line on standard error, if somebody listens.
pub fn complain_line(line: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// The exit code of a program whose output cannot be written; tells why.
pub fn code(error: &io::Error) -> u8 {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return READER_GONE;
    }
    complain!("zygote: cannot write the output: {error}");
    FAILED
}
