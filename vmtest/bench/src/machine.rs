// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes the machine one in which instructions can be counted.

use crate::{proc, progress, sys};
use anyhow::{ensure, Context, Result};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Turns address randomisation off for this program, which starts anew for it.
pub fn fix_addresses() -> Result<()> {
    if sys::fix_addresses().context("personality")? {
        // Only programs started from now on have fixed addresses: start this one again.
        return Err(Command::new("/proc/self/exe")
            .args(std::env::args_os().skip(1))
            .exec()
            .into());
    }
    Ok(())
}

/// Makes sure that the clock counts instructions.
pub fn counts_instructions() -> Result<()> {
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
    Ok(())
}

/// Makes sure that the clock counts instructions, and that nothing interrupts but the timer.
pub fn quiet() -> Result<()> {
    counts_instructions()?;
    undisturbed()
}

/// Makes sure that nothing interrupts but the timer.
pub fn undisturbed() -> Result<()> {
    proc::write("/proc/sys/kernel/sched_rt_runtime_us", "-1")?;
    if let Err(e) = proc::write("/proc/sys/kernel/numa_balancing", "0") {
        progress!("{e:#}");
    }
    sys::run_undisturbed().context("sched_setscheduler")
}

/// Has the kernel map anonymous memory in base pages, whoever asks for something else.
pub fn no_huge_pages() -> Result<()> {
    proc::write("/sys/kernel/mm/transparent_hugepage/enabled", "never")
}
