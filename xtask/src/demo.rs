//! `./x demo`: not built yet.

use anyhow::{bail, Result};

/// Runs `./x demo` with the command line's words after it.
pub fn run(_args: Vec<String>) -> Result<()> {
    bail!("demo: not built yet")
}
