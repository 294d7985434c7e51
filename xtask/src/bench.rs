//! `./x bench`: not built yet.

use anyhow::{bail, Result};

/// Runs `./x bench` with the command line's words after it.
pub fn run(_args: Vec<String>) -> Result<()> {
    bail!("bench: not built yet")
}
