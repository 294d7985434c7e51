// SPDX-License-Identifier: MIT OR Apache-2.0
//! The figures of sharing, in parts that each run in a machine of their own kind.
//!
//! Times are counts of executed instructions and need a machine under `-icount shift=0`; `memory` does not.
//! With `--ask` the processes ask for shared page tables, which only a kernel with the feature grants.

mod attach;
mod memory;
mod reclaim;
mod unused;

use crate::{proc, progress, sys};
use anyhow::{bail, ensure, Context, Result};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Runs one part.
pub fn run(args: &[String]) -> Result<()> {
    let (part, ask) = match args {
        [part] => (part.as_str(), false),
        [part, flag] if flag == "--ask" => (part.as_str(), true),
        _ => bail!("usage: guest-bench share memory|attach|compare|unused|reclaim [--ask]"),
    };
    if sys::fix_addresses().context("personality")? {
        // Only programs started from now on have fixed addresses: start this one again.
        return Err(Command::new("/proc/self/exe")
            .args(std::env::args_os().skip(1))
            .exec()
            .into());
    }
    if part != "memory" {
        quiet_machine()?;
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

/// Makes sure that the clock counts instructions, and that nothing interrupts but the timer.
fn quiet_machine() -> Result<()> {
    const ROUNDS: u64 = 1_000_000;
    let before = sys::now();
    sys::spin(ROUNDS);
    let took = sys::now() - before;
    // The loop, and at most a few timer interrupts.
    ensure!(
        (2 * ROUNDS..2 * ROUNDS + ROUNDS / 10).contains(&took),
        "the clock does not count instructions: {} of them took {took} ticks; start the machine with --icount",
        2 * ROUNDS
    );
    progress!("{} instructions took {took} ticks", 2 * ROUNDS);
    proc::write("/proc/sys/kernel/sched_rt_runtime_us", "-1")?;
    if let Err(e) = proc::write("/proc/sys/kernel/numa_balancing", "0") {
        progress!("{e:#}");
    }
    sys::run_undisturbed().context("sched_setscheduler")
}
