//! `./x test`: everything that says whether the project works, with one line
//! for each thing tried and a closing count.
//!
//! ```text
//! host       cargo test, fmt, clippy, checkpatch
//! kernel     the three flavors build
//! lab        a VM shows what it should, and fails when it should
//! guest      vmtest/tests on release and debug, some of what holds there on
//!            stock; with --long all of it, also with the series built out
//! selftests  the kernel's own mm tests: what passes on stock passes on release
//! stress     stress-ng's mapping stressors on release
//! mutations  a test fails when a handling is taken out (only with --long)
//! ```

#[cfg(test)]
mod docs;
mod guest;
mod host;
mod lab;
mod mutations;
mod selftests;
mod stress;

use crate::kernel::{self, Flavor};
use anyhow::Result;
use clap::ValueEnum;
use std::time::{Duration, Instant};

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// What needs no VM
    Host,
    /// Building the kernels
    Kernel,
    /// The self-test of the VM
    Lab,
    /// The tests inside the VM
    Guest,
    /// The kernel's own tests of memory management, on stock and on ours
    Selftests,
    /// stress-ng's stressors of memory mappings
    Stress,
    /// What the tests inside the VM notice; by itself only with --long
    Mutations,
}

/// Options of `./x test`.
#[derive(clap::Args)]
pub struct Args {
    /// Run the long forms too: minutes instead of seconds each
    #[arg(long)]
    long: bool,
    /// Only tests (or mutations) whose name contains this, or one of several with commas between
    #[arg(long)]
    filter: Option<String>,
    /// Only this part
    #[arg(long)]
    only: Option<Part>,
    /// Guest tests, selftests and stressors only on this kernel
    #[arg(long)]
    flavor: Option<Flavor>,
}

/// Runs the tests, prints the closing line, and returns the exit status.
pub fn run(args: &Args) -> Result<u8> {
    let start = Instant::now();
    let mut tally = Tally::default();
    let wants = |part| args.only.is_none_or(|only| only == part);
    let filter = args.filter.as_deref();
    if wants(Part::Host) {
        host::run(&mut tally, filter);
    }
    if wants(Part::Kernel) && filter.is_none() {
        for flavor in Flavor::ALL {
            tally.try_one(&format!("kernel {}", flavor.name()), || {
                kernel::ensure(flavor).map(drop)
            });
        }
    }
    // The VM of the debug kernel takes as long as all the others, and much of that it waits: it runs beside them.
    std::thread::scope(|scope| {
        let beside = wants(Part::Guest).then(|| scope.spawn(|| guests(args, &[Flavor::Debug])));
        if wants(Part::Lab) {
            lab::run(&mut tally, filter);
        }
        if wants(Part::Guest) {
            tally.add(guests(args, &[Flavor::Release, Flavor::Stock]));
            let apart = [Flavor::Bare, Flavor::Files];
            if args.long || args.flavor.is_some_and(|only| apart.contains(&only)) {
                tally.add(guests(args, &apart));
            }
        }
        // Debug's checkers take several times as long.
        for (flavor, default) in [(Flavor::Release, true), (Flavor::Debug, args.long)] {
            if !args.flavor.map_or(default, |only| only == flavor) {
                continue;
            }
            if wants(Part::Selftests) {
                selftests::run(&mut tally, flavor, filter, args.long);
            }
            if wants(Part::Stress) {
                stress::run(&mut tally, flavor, filter, args.long);
            }
        }
        match beside.map(|thread| thread.join()) {
            Some(Ok(debug)) => tally.add(debug),
            Some(Err(_)) => tally.fail("debug", "its thread panicked"),
            None => {}
        }
    });
    if args.only == Some(Part::Mutations) || (args.only.is_none() && args.long) {
        mutations::run(&mut tally, filter);
    }
    Ok(tally.close(start.elapsed()))
}

/// Runs the tests inside the VM on those of `flavors` that are asked for.
fn guests(args: &Args, flavors: &[Flavor]) -> Tally {
    let mut tally = Tally::default();
    for &flavor in flavors {
        if args.flavor.is_none_or(|only| only == flavor) {
            guest::run(&mut tally, flavor, args.filter.as_deref(), args.long);
        }
    }
    tally
}

/// Whether a filter, if there is one, lets a name through.
fn wanted(filter: Option<&str>, name: &str) -> bool {
    filter.is_none_or(|f| f.split(',').any(|part| name.contains(part)))
}

/// The lines of a table of ours: without comments and empty ones.
fn table(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
}

/// Counts what passed and what failed, and says so as it comes.
#[derive(Default)]
pub struct Tally {
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
}

impl Tally {
    /// Something passed.
    pub fn pass(&mut self, name: &str) {
        self.passed += 1;
        println!("ok {name}");
    }

    /// Something failed.
    pub fn fail(&mut self, name: &str, why: &str) {
        println!("FAIL {name}: {}", why.trim_end());
        self.failed.push(name.to_owned());
    }

    /// Something could not be tried.
    pub fn skip(&mut self, name: &str, why: &str) {
        self.skipped += 1;
        println!("skip {name}: {why}");
    }

    /// Adds what another one counted.
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped += other.skipped;
    }

    /// Tries something that passes when it returns no error.
    pub fn try_one(&mut self, name: &str, test: impl FnOnce() -> Result<()>) {
        let start = Instant::now();
        match test() {
            Ok(()) => self.pass(&format!("{name} ({:.1} s)", start.elapsed().as_secs_f64())),
            Err(e) => self.fail(name, &format!("{e:#}")),
        }
    }

    fn close(&self, elapsed: Duration) -> u8 {
        for name in &self.failed {
            println!("failed: {name}");
        }
        if self.skipped > 0 {
            println!("{} skipped", self.skipped);
        }
        let seconds = elapsed.as_secs();
        println!("took {}:{:02}", seconds / 60, seconds % 60);
        println!("{} passed, {} failed", self.passed, self.failed.len());
        // A run in which nothing ran is no success.
        u8::from(!self.failed.is_empty() || self.passed == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_run_is_no_success() {
        let mut tally = Tally::default();
        assert_eq!(tally.close(Duration::ZERO), 1);
        tally.pass("a");
        assert_eq!(tally.close(Duration::ZERO), 0);
        tally.fail("b", "why");
        assert_eq!(tally.close(Duration::ZERO), 1);
    }
}
