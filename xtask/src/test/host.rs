//! The part of `./x test` that needs no VM: unit and model tests of the
//! workspace, formatting, lints, and the kernel's own check of the series.

use super::Tally;
use crate::kernel::{self, Flavor};
use crate::paths;
use anyhow::{bail, Context, Result};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// rustfmt's output changed before this one; an older one judges wrongly.
const RUSTFMT_MIN: (u32, u32) = (1, 8);

/// Runs all of it.
pub fn run(tally: &mut Tally, filter: Option<&str>) {
    cargo_test(tally, filter);
    if filter.is_some() {
        return;
    }
    match rustfmt_version() {
        Some(v) if v >= RUSTFMT_MIN => {
            tally.try_one("cargo fmt", || quiet(cargo(&["fmt", "--all", "--check"])));
        }
        Some((a, b)) => tally.skip("cargo fmt", &format!("rustfmt {a}.{b} is too old")),
        None => tally.skip("cargo fmt", "no rustfmt"),
    }
    if quiet(cargo(&["clippy", "--version"])).is_ok() {
        tally.try_one("cargo clippy", || {
            quiet(cargo(&[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]))
        });
    } else {
        tally.skip("cargo clippy", "no clippy");
    }
    checkpatch(tally);
    tally.try_one("mutant.patch applies", kernel::check_mutations);
}

fn cargo(arguments: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(paths::root()).args(arguments);
    command.stdin(Stdio::null());
    command
}

/// Runs a command; its output is the error when it fails.
fn quiet(mut command: Command) -> Result<()> {
    let out = command.output().context("running cargo")?;
    if !out.status.success() {
        bail!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(())
}

/// Runs `cargo test` and counts its tests one by one.
fn cargo_test(tally: &mut Tally, filter: Option<&str>) {
    let mut command = cargo(&["test", "--workspace", "--no-fail-fast"]);
    if let Some(filter) = filter {
        command.arg("--").args(filter.split(','));
    }
    let ran = (|| -> Result<(bool, String)> {
        let errors = tempfile::tempfile()?;
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(errors.try_clone()?)
            .spawn()
            .context("running cargo test")?;
        let mut all = String::new();
        let mut failures = 0;
        for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
            let line = line?;
            match verdict(&line) {
                Some((name, Verdict::Ok)) => tally.pass(&format!("host {name}")),
                Some((name, Verdict::Failed)) => {
                    failures += 1;
                    tally.fail(&format!("host {name}"), "see below");
                }
                Some((name, Verdict::Ignored)) => tally.skip(&format!("host {name}"), "ignored"),
                None => {}
            }
            all.push_str(&line);
            all.push('\n');
        }
        let good = child.wait()?.success();
        if !good {
            use std::io::{Read, Seek};
            let mut errors = errors;
            errors.rewind()?;
            errors.read_to_string(&mut all)?;
        }
        // A failed test explains the status; anything else is its own failure.
        Ok((good || failures > 0, all))
    })();
    match ran {
        Ok((true, all)) => {
            for block in all.split("\nfailures:\n").skip(1).step_by(2) {
                eprintln!("{block}");
            }
        }
        Ok((false, all)) => tally.fail("cargo test", &all),
        Err(e) => tally.fail("cargo test", &format!("{e:#}")),
    }
}

enum Verdict {
    Ok,
    Failed,
    Ignored,
}

/// A line of libtest's: `test NAME ... ok`, perhaps with a time.
fn verdict(line: &str) -> Option<(&str, Verdict)> {
    let (name, rest) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let verdict = match rest.split_whitespace().next()?.trim_end_matches(',') {
        "ok" => Verdict::Ok,
        "FAILED" => Verdict::Failed,
        "ignored" => Verdict::Ignored,
        _ => return None,
    };
    Some((name, verdict))
}

fn rustfmt_version() -> Option<(u32, u32)> {
    let out = cargo(&["fmt", "--version"]).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut numbers = text.split_whitespace().nth(1)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The kernel's judgement of each patch of the series.
fn checkpatch(tally: &mut Tally) {
    let series = match kernel::series() {
        Ok(series) if series.is_empty() => return tally.skip("checkpatch", "the series is empty"),
        Ok(series) => series,
        Err(e) => return tally.fail("checkpatch", &format!("{e:#}")),
    };
    let script = match kernel::source_tree(Flavor::Stock) {
        Ok(tree) => tree.join("scripts/checkpatch.pl"),
        Err(e) => return tally.fail("checkpatch", &format!("{e:#}")),
    };
    for (name, path) in series {
        tally.try_one(&format!("checkpatch {name}"), || {
            let out = Command::new("perl")
                .arg(&script)
                .args(["--strict", "--no-tree", "--quiet", "--no-summary"])
                // New files go into the overlay, whose files MAINTAINERS
                // does not name.
                .args(["--ignore", "FILE_PATH_CHANGES"])
                .arg(&path)
                .output()
                .context("running checkpatch.pl")?;
            let text = String::from_utf8_lossy(&out.stdout);
            let bad = |l: &str| {
                ["ERROR:", "WARNING:", "CHECK:"]
                    .iter()
                    .any(|p| l.starts_with(p))
            };
            if !out.status.success() || text.lines().any(bad) {
                bail!("{text}{}", String::from_utf8_lossy(&out.stderr));
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_lines() {
        assert!(matches!(
            verdict("test a::b ... ok"),
            Some(("a::b", Verdict::Ok))
        ));
        assert!(matches!(
            verdict("test a - should panic ... FAILED"),
            Some(("a - should panic", Verdict::Failed))
        ));
        assert!(matches!(
            verdict("test slow ... ignored, takes minutes"),
            Some(("slow", Verdict::Ignored))
        ));
        assert!(verdict("test result: ok. 3 passed").is_none());
    }
}
