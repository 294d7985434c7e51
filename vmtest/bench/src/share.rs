// SPDX-License-Identifier: MIT OR Apache-2.0
//! The figures of sharing, in parts that each run in a machine of their own kind.
//!
//! Times are counts of executed instructions and need a machine under `-icount shift=0`; `memory` does not.
//! With `--ask` the processes ask for shared page tables, which only a kernel with the feature grants.

mod attach;
mod memory;
mod reclaim;
mod unused;

use crate::{machine, sys};
use anyhow::{bail, Context, Result};

/// Runs one part.
pub fn run(args: &[String]) -> Result<()> {
    let (part, ask) = match args {
        [part] => (part.as_str(), false),
        [part, flag] if flag == "--ask" => (part.as_str(), true),
        _ => bail!("usage: guest-bench share memory|attach|compare|unused|reclaim [--ask]"),
    };
    machine::fix_addresses()?;
    if part != "memory" {
        machine::quiet()?;
    }
    if ask {
        sys::ask_for_sharing().context("asking for shared page tables")?;
    }
    match part {
        "memory" => memory::run(),
        "attach" => attach::run(),
        "compare" => attach::compare(),
        "unused" => unused::run(),
        "reclaim" => reclaim::run(),
        _ => bail!("no part {part}"),
    }
}
