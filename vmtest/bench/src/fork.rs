// SPDX-License-Identifier: MIT OR Apache-2.0
//! The figures of fork on demand, in parts that each run in a machine of their own.
//!
//! Times are counts of executed instructions and need a machine under `-icount shift=0`. With `--ask` the
//! processes ask for forks on demand, which only a kernel with the feature grants.

mod afl;
mod idle;
mod memory;
mod python;
mod redis;
mod repeat;

use crate::{machine, proc, progress, sys};
use anyhow::{bail, ensure, Context, Result};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Runs one part.
pub fn run(args: &[String]) -> Result<()> {
    let (part, options) = args
        .split_first()
        .context("usage: guest-bench fork PART [--ask] [--target PROGRAM]")?;
    let (mut ask, mut target) = (false, None);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--ask" => ask = true,
            "--target" => target = options.next(),
            _ => bail!("no option {option}"),
        }
    }
    machine::fix_addresses()?;
    machine::counts_instructions()?;
    match part.as_str() {
        "redis" | "afl" | "python" => client(part, ask, target),
        _ => instructions(part, ask),
    }
}

/// The figures of this program's own forks.
fn instructions(part: &str, ask: bool) -> Result<()> {
    machine::undisturbed()?;
    if ask {
        sys::ask_for_odf().context("asking for forks on demand")?;
    }
    match part {
        "1gib" => memory::one_gib(ask),
        "4gib" => memory::four_gib(ask),
        "again" => repeat::run(ask),
        "nothing" => idle::nothing_to_share(),
        "unused" => idle::unused(),
        _ => bail!("no part {part}"),
    }
}

/// The figures of programs of others, which ask each for themselves.
fn client(part: &str, ask: bool, target: Option<&String>) -> Result<()> {
    machine::no_huge_pages()?;
    sys::never_idle().context("the process for idle times")?;
    // As where a CPU is free for the child: the parent, which measures its fork, goes on. There is one CPU here,
    // and otherwise it would as often as not be the child's before the call returns.
    sys::run_in_batch().context("sched_setscheduler")?;
    match part {
        "redis" => redis::run(ask),
        "afl" => afl::run(ask, target.context("no --target")?),
        _ => python::run(ask),
    }
}

/// Starts a program whose forks, and those of what it starts, are on demand.
pub fn launch(command: &[String]) -> Result<()> {
    let (name, arguments) = command
        .split_first()
        .context("usage: guest-bench odf CMD")?;
    sys::ask_for_odf().context("asking for forks on demand")?;
    let error = Command::new(name).args(arguments).exec();
    Err(error).with_context(|| name.clone())
}

/// A program of this machine, started through [`launch`] if its forks are to be on demand.
fn own_program(ask: bool, program: &str) -> Command {
    if !ask {
        return Command::new(program);
    }
    let mut command = Command::new("/proc/self/exe");
    command.args(["odf", program]);
    command
}

/// Counts the tables that forks share while `work` runs, and fails when fewer than `least` are: a figure of
/// forks that copied would be one of something else. The other way round where none may be.
fn sharing<T>(ask: bool, least: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let shared = || proc::field("/proc/vmstat", "odf_table_shared").unwrap_or(0);
    let before = shared();
    let done = work()?;
    let tables = shared() - before;
    if ask {
        ensure!(
            tables >= least,
            "forks shared {tables} tables, {least} at least were to be"
        );
    } else {
        ensure!(
            tables == 0,
            "forks shared {tables} tables and nobody had asked"
        );
    }
    progress!("forks shared {tables} tables");
    Ok(done)
}
