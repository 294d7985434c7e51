//! The mutation run: does a test fail when a handling is taken out?
//!
//! The flavor `mutant` is `release` with `vmtest/mutations/mutant.patch`, by
//! which `ptshare_mutation=NAME` on its command line takes one handling out.
//! `vmtest/mutations/list.txt` has each name, and tests that notice. First all
//! these tests run on it without a name, and must pass; then it boots once for
//! each name. A mutation is caught when one of its tests fails, or the VM does
//! not end well. The kernel says so when it meets the mutation; one that it did
//! not meet is not caught, whatever happened.

use super::guest::{self, Line, Report};
use super::{wanted, Tally};
use crate::kernel::Flavor;
use crate::vm::{Outcome, Verdict};
use anyhow::{bail, ensure, Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

/// Every mutation, and which tests must notice it.
pub(super) const LIST: &str = include_str!("../../../vmtest/mutations/list.txt");

/// Time for all tests without a mutation.
const ALL: Duration = Duration::from_secs(20 * 60);
/// Time for the tests of one mutation, beyond what all of them took without.
const ONE: Duration = Duration::from_secs(60);

/// A row of the list.
#[derive(Debug)]
pub(super) struct Mutation {
    /// What the boot parameter says
    pub name: String,
    /// Tests of which one must fail
    pub tests: Vec<String>,
}

/// Runs the mutations that the filter lets through.
pub fn run(tally: &mut Tally, filter: Option<&str>) {
    let mutations = match list(LIST) {
        Ok(list) => list,
        Err(e) => return tally.fail("mutations", &format!("{e:#}")),
    };
    let mutations: Vec<Mutation> = mutations
        .into_iter()
        .filter(|m| wanted(filter, &m.name))
        .collect();
    if mutations.is_empty() {
        return;
    }
    let tests: BTreeSet<&String> = mutations.iter().flat_map(|m| &m.tests).collect();
    let tests: Vec<&str> = tests.into_iter().map(String::as_str).collect();
    let (usable, limit) = match boot(None, &tests, ALL) {
        Ok(outcome) => {
            guest::judge(tally, "mutant", &outcome, tests.len());
            (Usable::of(&outcome), outcome.elapsed + ONE)
        }
        Err(e) => return tally.fail("mutant VM", &format!("{e:#}")),
    };
    for test in tests.iter().filter(|t| !usable.known(t)) {
        tally.fail(&format!("mutant {test}"), "there is no such test");
    }
    for mutation in &mutations {
        let name = format!("mutation {}", mutation.name);
        let tests: Vec<&str> = mutation.tests.iter().map(String::as_str).collect();
        if tests.iter().all(|t| usable.skipped.contains(*t)) {
            tally.skip(&name, "its tests are");
            continue;
        }
        let judged = boot(Some(&mutation.name), &tests, limit).and_then(|outcome| {
            let by = caught(&mutation.name, &usable.passed, &outcome)?;
            Ok((by, outcome.elapsed))
        });
        match judged {
            Ok((by, elapsed)) => {
                let seconds = elapsed.as_secs_f64();
                tally.pass(&format!("{name}: {by} ({seconds:.1} s)"));
            }
            Err(e) => tally.fail(&name, &format!("{e:#}")),
        }
    }
}

fn boot(mutation: Option<&str>, tests: &[&str], timeout: Duration) -> Result<Outcome> {
    let name = mutation.map(|name| format!("ptshare_mutation={name}"));
    eprintln!("x: {}", mutation.unwrap_or("no mutation"));
    let vm = guest::vm(Flavor::Mutant)
        .append(name.as_deref().unwrap_or(""))
        .timeout(timeout);
    let command = guest::command(Some(&tests.join(",")), false, false)?;
    let outcome = vm.run(&command)?;
    // No mutation takes effect before there are programs: what ends a boot is
    // emulation on a busy machine, which makes timers late.
    if !console(&outcome)?.contains("ptshare-lab: begin") {
        eprintln!("x: it did not come up; once more");
        return vm.run(&command);
    }
    Ok(outcome)
}

/// How the tests ended without a mutation.
struct Usable {
    passed: BTreeSet<String>,
    skipped: BTreeSet<String>,
    failed: BTreeSet<String>,
}

impl Usable {
    fn of(outcome: &Outcome) -> Self {
        let mut usable = Self {
            passed: BTreeSet::new(),
            skipped: BTreeSet::new(),
            failed: BTreeSet::new(),
        };
        for line in Report::parse(&outcome.stdout_text()).lines {
            match line {
                Line::Ok(test) => usable.passed.insert(test),
                Line::Skip(test, _) => usable.skipped.insert(test),
                Line::Fail(test, _) => usable.failed.insert(test),
            };
        }
        usable
    }

    fn known(&self, test: &str) -> bool {
        [&self.passed, &self.skipped, &self.failed]
            .iter()
            .any(|set| set.contains(test))
    }
}

/// What has caught the mutation. An error when nothing has.
fn caught(mutation: &str, usable: &BTreeSet<String>, outcome: &Outcome) -> Result<String> {
    let met = console(outcome)?.contains(&format!("ptshare: mutation {mutation} met"));
    let report = Report::parse(&outcome.stdout_text());
    verdict(met, usable, &report, outcome.verdict())
        .map(|mut by| {
            if let Some(splat) = outcome.splats.first() {
                by.push_str(&format!(", {}", splat.class));
            }
            by
        })
        .with_context(|| {
            let text = outcome.stdout_text();
            format!("{text}console log: {}", outcome.console_log.display())
        })
}

fn console(outcome: &Outcome) -> Result<String> {
    let log = fs::read(&outcome.console_log).context("reading the console log")?;
    Ok(String::from_utf8_lossy(&log).into_owned())
}

fn verdict(met: bool, usable: &BTreeSet<String>, report: &Report, vm: Verdict) -> Result<String> {
    ensure!(met, "no test came to where the handling is");
    let failed: Vec<&str> = report
        .lines
        .iter()
        .filter_map(|line| match line {
            Line::Fail(test, _) if usable.contains(test) => Some(test.as_str()),
            _ => None,
        })
        .collect();
    let vm = match vm {
        Verdict::Ended => None,
        Verdict::Splat => Some("the kernel's complaint"),
        Verdict::Timeout => Some("a VM that hangs"),
        Verdict::NoResult | Verdict::NoConsole => Some("a VM that died"),
    };
    match (failed.is_empty(), vm) {
        (false, None) => Ok(format!("caught by {}", failed.join(", "))),
        (false, Some(vm)) => Ok(format!("caught by {} and {vm}", failed.join(", "))),
        (true, Some(vm)) => Ok(format!("caught by {vm}")),
        (true, None) => bail!("its tests pass all the same"),
    }
}

/// The list's rows: name, tests with commas between, what is taken out.
pub(super) fn list(text: &str) -> Result<Vec<Mutation>> {
    let mut names = BTreeSet::new();
    text.lines()
        .filter(|l| !l.trim().is_empty() && !l.starts_with('#'))
        .map(|line| {
            let columns: Vec<&str> = line.split('\t').map(str::trim).collect();
            let [name, tests, what] = columns[..] else {
                bail!("list.txt: not three columns: {line}");
            };
            let tests: Vec<String> = tests.split(',').map(|t| t.trim().to_owned()).collect();
            ensure!(
                !name.is_empty() && !what.is_empty() && tests.iter().all(|t| t.contains("::")),
                "list.txt: {line}"
            );
            ensure!(names.insert(name), "list.txt: {name} stands there twice");
            Ok(Mutation {
                name: name.to_owned(),
                tests,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: &str = include_str!("../../../vmtest/mutations/mutant.patch");
    const PATHS: &str = include_str!("../../../docs/kernel-paths.md");

    fn names() -> BTreeSet<String> {
        list(LIST).unwrap().into_iter().map(|m| m.name).collect()
    }

    #[test]
    fn the_list_names_what_the_patch_takes_out() {
        let name = regex::Regex::new(r#""([a-z]+(_[a-z]+)+)""#).unwrap();
        let sites: BTreeSet<String> = PATCH
            .lines()
            .filter(|l| l.starts_with('+'))
            .flat_map(|l| name.captures_iter(l).map(|c| c[1].to_owned()))
            .filter(|name| name != "ptshare_mutation")
            .collect();
        assert_eq!(names(), sites);
    }

    #[test]
    fn each_mutation_stands_with_its_path() {
        for name in names() {
            let word = format!("`{name}`");
            assert!(PATHS.contains(&word), "{word} is not in kernel-paths.md");
        }
    }

    #[test]
    fn rows_are_read_strictly() {
        let one = list("# c\n\na\tg::x, g::y\twhat\n").unwrap();
        assert_eq!(one[0].name, "a");
        assert_eq!(one[0].tests, ["g::x", "g::y"]);
        for bad in [
            "a\tg::x\n",
            "a\t\twhat\n",
            "a\tx\tw\n",
            "a\tg::x\tw\na\tg::x\tw\n",
        ] {
            assert!(list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_a_failure_that_the_mutation_makes_counts() {
        let usable = BTreeSet::from(["a".to_owned()]);
        let green = Report::parse("ok a\nend 1\n");
        let red = Report::parse("FAIL a: why\nend 1\n");
        let other = Report::parse("FAIL b: why\nend 1\n");
        let judge = |met, report, vm| verdict(met, &usable, report, vm);
        assert!(judge(true, &green, Verdict::Ended).is_err());
        assert!(judge(true, &other, Verdict::Ended).is_err());
        assert!(judge(false, &red, Verdict::Splat).is_err());
        assert!(judge(true, &red, Verdict::Ended).is_ok());
        assert!(judge(true, &green, Verdict::Splat).is_ok());
        assert!(judge(true, &green, Verdict::Timeout).is_ok());
        assert!(judge(true, &green, Verdict::NoResult).is_ok());
    }
}
