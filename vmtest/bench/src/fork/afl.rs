// SPDX-License-Identifier: MIT OR Apache-2.0
//! AFL++ on a program with half a gigabyte of initialised heap: how often a second it runs it.

use super::{own_program, sharing};
use crate::figure::emit;
use crate::progress;
use anyhow::{ensure, Context, Result};
use std::fs;
use std::process::Stdio;

const HOME: &str = "/run/guest-bench-afl";
/// Seconds of the machine's clock, which counts instructions.
const SECONDS: &str = "4";

/// Prints the figures. `target` is the program, built by AFL++'s compiler.
pub fn run(ask: bool, target: &str) -> Result<()> {
    let seeds = format!("{HOME}/in");
    fs::create_dir_all(&seeds)?;
    fs::write(format!("{seeds}/seed"), "w1r1")?;
    let results = format!("{HOME}/out");
    let mut command = own_program(ask, "/usr/bin/afl-fuzz");
    command
        .args(["-i", &seeds, "-o", &results, "-V", SECONDS, "-s", "1"])
        // No limit of memory; the stock kernel's forks need time.
        .args(["-m", "none", "-t", "5000", "--", target])
        .env("AFL_NO_UI", "1")
        .env("AFL_NO_AFFINITY", "1")
        .env("AFL_SKIP_CPUFREQ", "1")
        .env("AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES", "1")
        .env("AFL_FORKSRV_INIT_TMOUT", "100000")
        .stdin(Stdio::null())
        .stdout(fs::File::create(format!("{HOME}/log"))?);
    let done = sharing(ask, 200, || command.status().context("afl-fuzz"));
    let log = || fs::read_to_string(format!("{HOME}/log")).unwrap_or_default();
    if !done.as_ref().is_ok_and(|status| status.success()) {
        progress!("{}", log());
    }
    let status = done?;
    ensure!(status.success(), "afl-fuzz: {status}");
    let stats = fs::read_to_string(format!("{results}/default/fuzzer_stats"))?;
    let stat = |name| stat(&stats, name).with_context(|| format!("no {name} in {stats}"));
    progress!(
        "{} executions, {} inputs kept",
        stat("execs_done")?,
        stat("corpus_count")?
    );
    // The program aborts when the heap has not what was put there before the forks.
    ensure!(
        stat("saved_crashes")? == 0.0 && stat("saved_hangs")? == 0.0,
        "a child found its heap changed, or did not end: {stats}"
    );
    ensure!(stat("corpus_count")? > 1.0, "nothing was found: {stats}");
    emit("afl_executions", "per second", stat("execs_per_sec")?);
    Ok(())
}

/// The number of the line `name : number`.
fn stat(text: &str, name: &str) -> Option<f64> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)?
        .1
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::stat;

    #[test]
    fn numbers_of_the_statistics_are_found() {
        let text =
            "execs_done        : 1234\nexecs_per_sec     : 56.78\nafl_version       : ++4.04c\n";
        assert_eq!(stat(text, "execs_done"), Some(1234.0));
        assert_eq!(stat(text, "execs_per_sec"), Some(56.78));
        assert_eq!(stat(text, "afl_version"), None);
        assert_eq!(stat(text, "execs"), None);
    }
}
