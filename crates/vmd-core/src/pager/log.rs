//! The pager's words: one line each, on stderr, which is a file.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Write one line. A log that cannot be written is no reason to stop serving.
pub fn line(text: &str) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = text.escape_debug();
    let _ = writeln!(std::io::stderr(), "{}.{:03} [{}] {text}", now.as_secs(), now.subsec_millis(), std::process::id());
}
