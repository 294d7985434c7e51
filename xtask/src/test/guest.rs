//! The tests inside the VM: `guest-tests run`, one VM a flavor, each test
//! counted by the line that it prints.
//!
//! The protocol, on stdout: `ok NAME`, `FAIL NAME: why`, `skip NAME: why`, and
//! at the very end `end N` with the number of those lines. What ends without
//! the closing line, or with another number, has failed, whatever it printed.

use super::Tally;
use crate::kernel::Flavor;
use crate::vm::{Outcome, Vm};
use crate::{guest, vm};
use anyhow::Result;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Time for the tests of one VM, against a VM that hangs: each test has its own. Those of debug take 15
/// minutes beside the others on two cores, and more on slower ones.
const SHORT: Duration = Duration::from_secs(60 * 60);
/// Time for the long forms.
const LONG: Duration = Duration::from_secs(90 * 60);

/// What is run again where every fork is on demand, unless all is: processes that share files and fork, that
/// are looked at, and that have references to pages. In less than a minute.
const ODF: &str = "modes::,transparent::,mapspt::,observe::,fork::,gup::,odf::switch,odf::boot,\
                   odf::clone3,odf::vfork,odf::children";

/// What is run on stock unless all is: the model that random operations are compared with, and what must not
/// differ when tables are shared. In about a minute.
const STOCK: &str =
    "transparent::,leave::,observe::,faults::,fork::,ops::one_process,odf::both_write,odf::fuzz_a";

/// Runs the tests on one kernel: all of them, but on stock some unless `long`. On release then some, or with
/// `long` all, where every fork is on demand.
pub fn run(tally: &mut Tally, flavor: Flavor, filter: Option<&str>, long: bool) {
    let least = usize::from(filter.is_none());
    // What a minute of random operations finds is not to be found where nothing is shared, nor anew where less is.
    let whole = long;
    let long = long && !matches!(flavor, Flavor::Stock | Flavor::Bare | Flavor::Files);
    let mut pass = |title: &str, append: &str, filter: Option<&str>| match boot(
        flavor, append, filter, long,
    ) {
        Ok(outcome) => judge(tally, title, &outcome, least),
        Err(e) => tally.fail(&format!("{title} VM"), &format!("{e:#}")),
    };
    match (flavor, filter, whole) {
        (Flavor::Stock, None, false) => pass("stock", "", Some(STOCK)),
        _ => pass(flavor.name(), "", filter),
    }
    match (flavor, filter, long) {
        (Flavor::Release, None, false) => pass("release odf=1", "odf=1", Some(ODF)),
        (Flavor::Release, filter, true) => pass("release odf=1", "odf=1", filter),
        _ => {}
    }
}

fn boot(flavor: Flavor, append: &str, filter: Option<&str>, long: bool) -> Result<Outcome> {
    vm(flavor)
        .append(append)
        .timeout(if long { LONG } else { SHORT })
        .run(&command(filter, long, !flavor.shares())?)
}

/// The VM that the tests want.
pub fn vm(flavor: Flavor) -> Vm {
    // What is beyond 4 GiB of memory, so that nodes are as they are without it, is for files without a page cache.
    let (mem, pmem) = match flavor {
        Flavor::Debug | Flavor::Mutant => ("4192M", "memmap=96M!6G"),
        _ => ("4G", ""),
    };
    Vm::new(flavor)
        .mem(mem)
        .smp(2)
        // Two nodes, so that migration and NUMA balancing have where to go.
        .append("numa=fake=2")
        .append(pmem)
        .cwd("/")
        .tee(Progress::boxed)
}

/// The command that runs the tests in it.
pub fn command(filter: Option<&str>, long: bool, stock: bool) -> Result<Vec<String>> {
    let program = guest::binary("guest-tests")?;
    let mut command = vec![program.to_string_lossy().into_owned(), "run".into()];
    if let Some(filter) = filter {
        command.extend(["--filter".into(), filter.into()]);
    }
    if long {
        command.push("--long".into());
    }
    if stock {
        command.push("--stock".into());
    }
    Ok(command)
}

/// Counts what a run that speaks the protocol reported, and the run itself,
/// which has to report `least` tests.
pub fn judge(tally: &mut Tally, name: &str, outcome: &Outcome, least: usize) {
    let text = outcome.stdout_text();
    let report = Report::parse(&text);
    for line in &report.lines {
        match line {
            Line::Ok(test) => tally.pass(&format!("{name} {test}")),
            Line::Fail(test, why) => tally.fail(&format!("{name} {test}"), why),
            Line::Skip(test, why) => tally.skip(&format!("{name} {test}"), why),
        }
    }
    let status = outcome.status();
    let run = format!("{name} VM");
    if outcome.verdict() != vm::Verdict::Ended {
        tally.fail(&run, &outcome.complaint());
    } else if report.end != Some(report.lines.len()) {
        let stderr = String::from_utf8_lossy(&outcome.stderr);
        tally.fail(
            &run,
            &format!(
                "{} tests reported but the closing line says {:?} (status {status})\n{stderr}",
                report.lines.len(),
                report.end
            ),
        );
    } else if (status == 0) == report.failed() {
        tally.fail(
            &run,
            &format!("the exit status {status} contradicts the tests' lines"),
        );
    } else if report.lines.len() < least {
        let seen = report.lines.len();
        tally.fail(&run, &format!("{seen} of at least {least} tests"));
    } else {
        tally.pass(&format!(
            "{run}: no complaint of the kernel ({:.1} s)",
            outcome.elapsed.as_secs_f64()
        ));
    }
}

/// What a program said of one test.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// It passed
    Ok(String),
    /// It failed, and why
    Fail(String, String),
    /// It could not be tried, and why
    Skip(String, String),
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ')?;
        let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
        let (name, why) = (name.trim().to_owned(), why.trim().to_owned());
        match word {
            "ok" => Some(Line::Ok(rest.trim().to_owned())),
            "FAIL" => Some(Line::Fail(name, why)),
            "skip" => Some(Line::Skip(name, why)),
            _ => None,
        }
    }
}

/// What a program said of all its tests.
pub struct Report {
    /// Each test's line
    pub lines: Vec<Line>,
    end: Option<usize>,
}

impl Report {
    /// Reads its stdout.
    pub fn parse(text: &str) -> Self {
        let last = text.lines().rfind(|l| !l.trim().is_empty());
        Self {
            lines: text.lines().filter_map(Line::parse).collect(),
            end: last.and_then(|l| l.strip_prefix("end ")?.trim().parse().ok()),
        }
    }

    fn failed(&self) -> bool {
        self.lines.iter().any(|l| matches!(l, Line::Fail(..)))
    }
}

/// Shows on stderr, while the VM runs, which tests are done, and when.
pub struct Progress {
    flavor: Flavor,
    shows: fn(&str) -> bool,
    partial: Vec<u8>,
    done: usize,
    start: Instant,
}

impl Progress {
    /// Shows the lines that the protocol has.
    pub fn boxed(flavor: Flavor) -> Box<dyn Write + Send> {
        Self::of(flavor, |line| Line::parse(line).is_some())
    }

    /// Shows the lines that another one picks.
    pub fn of(flavor: Flavor, shows: fn(&str) -> bool) -> Box<dyn Write + Send> {
        Box::new(Self {
            flavor,
            shows,
            partial: Vec::new(),
            done: 0,
            start: Instant::now(),
        })
    }
}

impl Write for Progress {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).into_owned();
            self.partial.clear();
            if (self.shows)(&line) {
                self.done += 1;
                let seconds = self.start.elapsed().as_secs();
                let (name, done) = (self.flavor.name(), self.done);
                eprintln!(
                    "x: {name} {:02}:{:02} {done}: {line}",
                    seconds / 60,
                    seconds % 60
                );
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart() {
        let report = Report::parse("ok a\nnoise\nFAIL b: x: y\nskip c: none here\nend 3\n");
        assert_eq!(
            report.lines,
            [
                Line::Ok("a".into()),
                Line::Fail("b".into(), "x: y".into()),
                Line::Skip("c".into(), "none here".into())
            ]
        );
        assert_eq!(report.end, Some(3));
        assert!(report.failed());
    }

    #[test]
    fn a_run_cut_short_has_no_end() {
        assert_eq!(Report::parse("ok a\nok b\n").end, None);
        assert_eq!(Report::parse("end 1\nok a\n").end, None);
    }
}
