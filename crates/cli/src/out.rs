//! Standard output that may be closed (`head` has seen enough) or full: an error like any
//! other, where `println!` would panic.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a text as it is.
pub fn print(text: impl Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}")?;
    out.flush()
}

/// Writes a line.
pub fn line(text: impl Display) -> io::Result<()> {
    print(format_args!("{text}\n"))
}

/// Writes a line of progress: work goes on where nobody reads it.
pub fn progress(text: impl Display) {
    let _unread = line(text);
}

/// Writes a line to standard error, where nobody may be listening either.
pub fn warn(text: impl Display) {
    let _unread = writeln!(io::stderr().lock(), "{text}");
}
