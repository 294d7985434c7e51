//! The kernel's own tests of memory management, tools/testing/selftests/mm, on
//! `stock` and on ours, there once with every eligible mapping sharing its
//! tables and once with every fork leaving its tables in common.
//!
//! What passes on stock must pass on ours: each case of each test is compared
//! by its name. `vmtest/selftests/list.txt` says which tests are run, and what
//! is expected of stock, so that neither side passes by doing nothing.

mod build;
mod cases;
mod list;

use super::guest::Progress;
use super::Tally;
use crate::kernel::{self, Flavor};
use crate::paths;
use crate::vm::{Outcome, Vm};
use anyhow::{bail, ensure, Context, Result};
use build::Programs;
use cases::{Case, Test, EXIT};
use list::{Entry, List};
use sha2::{Digest, Sha256};
use std::fs;
use std::time::Duration;

/// What runs the tests in the guest.
const SCRIPTS: [&str; 4] = [
    include_str!("../../../vmtest/selftests/common.sh"),
    include_str!("../../../vmtest/selftests/run.sh"),
    include_str!("../../../vmtest/selftests/gup-matrix.sh"),
    include_str!("../../../vmtest/selftests/uffd-units.sh"),
];

/// Time for the tests on one kernel.
const SHORT: Duration = Duration::from_secs(15 * 60);
/// Time for all of them.
const LONG: Duration = Duration::from_secs(60 * 60);

/// How many failed cases of one test are named.
const NAMED: usize = 8;

/// A way to run the tests on ours.
pub struct Way {
    /// Its name in the list and in what run.sh counts
    name: &'static str,
    /// The boot parameter
    boot: &'static str,
    /// What that makes of the sysctl
    sysctl: &'static str,
}

impl Way {
    /// All of them.
    const ALL: [Self; 2] = [
        Self {
            name: "ptshare",
            boot: "ptshare=2",
            sysctl: "ptshare=2",
        },
        Self {
            name: "odf",
            boot: "odf=1",
            sysctl: "odf_default=1",
        },
    ];

    fn title(&self, flavor: Flavor, test: &str) -> String {
        format!("{} {} selftests {test}", flavor.name(), self.boot)
    }
}

/// Runs the tests on stock and on one of ours, and compares.
pub fn run(tally: &mut Tally, flavor: Flavor, filter: Option<&str>, long: bool) {
    if let Err(e) = compare(tally, flavor, filter, long) {
        let name = format!("{} selftests", flavor.name());
        tally.fail(&name, &format!("{e:#}"));
    }
}

fn compare(tally: &mut Tally, flavor: Flavor, filter: Option<&str>, long: bool) -> Result<()> {
    let list = List::read()?;
    let wanted = |e: &Entry, way: &Way| {
        (long || e.short(way)) && super::wanted(filter, &way.title(flavor, e.name))
    };
    let plan = |ways: &[Way]| -> Vec<Entry> {
        let tests = list.tests.iter();
        let planned = tests.filter(|e| ways.iter().any(|way| wanted(e, way)));
        planned.cloned().collect()
    };
    let all = plan(&Way::ALL);
    if all.is_empty() && filter.is_some() {
        return Ok(());
    }
    let programs = build::programs()?;
    for program in programs.names()? {
        ensure!(
            list.knows(&program),
            "list.txt does not say whether {program} is run"
        );
    }
    let stock = stock(tally, &programs, &all, long)?;
    for way in &Way::ALL {
        let plan = plan(std::slice::from_ref(way));
        if plan.is_empty() && filter.is_some() {
            continue;
        }
        ensure!(!plan.is_empty(), "no tests for {}", way.boot);
        let outcome = boot(flavor, Some(way), &programs, &plan, long)?;
        let ours = cases::tests(&outcome.stdout_text());
        machine(tally, &way.title(flavor, "VM"), &outcome, &plan, &ours);
        for entry in &plan {
            let name = way.title(flavor, entry.name);
            match judge(entry, way, find(&stock, entry), find(&ours, entry)) {
                Ok(how) => tally.pass(&format!("{name}: {how}")),
                Err(why) => tally.fail(&name, &format!("{why:#}")),
            }
        }
    }
    Ok(())
}

fn find<'a>(tests: &'a [Test], entry: &Entry) -> Option<&'a Test> {
    tests.iter().find(|t| t.name == entry.name)
}

/// What stock makes of the tests. Kept in the cache when it is as expected:
/// only a change of that kernel or of the tests can change it.
fn stock(tally: &mut Tally, programs: &Programs, plan: &[Entry], long: bool) -> Result<Vec<Test>> {
    let mut key = Sha256::new();
    let image = kernel::ensure(Flavor::Stock)?.bz_image();
    let (image, plan_words) = (image.to_string_lossy(), words(plan, 1));
    let parts = [&*image, &programs.key, &plan_words];
    for part in parts.into_iter().chain(SCRIPTS) {
        key.update((part.len() as u64).to_le_bytes());
        key.update(part);
    }
    let name = format!("stock-{}", build::hex(&key.finalize()));
    let kept = paths::cache_dir("selftests")?.join(name);
    if let Ok(text) = fs::read_to_string(&kept) {
        eprintln!("x: selftests: stock as in {}", kept.display());
        return Ok(cases::tests(&text));
    }
    let mut again = false;
    loop {
        let outcome = boot(Flavor::Stock, None, programs, plan, long)?;
        let text = outcome.stdout_text();
        let tests = cases::tests(&text);
        let less = |e: &&Entry| find(&tests, e).is_none_or(|t| t.passed().count() < e.cases);
        let less = plan.iter().find(less);
        if outcome.status() == 0 && less.is_none() {
            fs::write(&kept, &text).with_context(|| format!("writing {}", kept.display()))?;
        } else if let (false, Some(entry)) = (again, less) {
            // It is not stock that is tested: a case that is skipped or fails there by chance has a second one.
            eprintln!("x: selftests: stock again, because of {}", entry.name);
            again = true;
            continue;
        }
        machine(tally, "stock selftests VM", &outcome, plan, &tests);
        return Ok(tests);
    }
}

fn boot(
    flavor: Flavor,
    way: Option<&Way>,
    programs: &Programs,
    plan: &[Entry],
    long: bool,
) -> Result<Outcome> {
    let script = paths::in_root("vmtest/selftests/run.sh");
    let (script, dir) = (script.to_string_lossy(), programs.dir.to_string_lossy());
    // Seconds in the list are for kernels without checkers: soft-dirty, which looks 10 000 times at all its pages,
    // takes 30 times as long with them.
    let plan = words(plan, if flavor == Flavor::Debug { 5 } else { 1 });
    let mut command = vec![&*script, &*dir, &*plan];
    command.extend(way.map(|way| way.sysctl));
    Vm::new(flavor)
        .mem("4G")
        // The migration test moves pages below at least two threads.
        .smp(3)
        .append("numa=fake=2")
        .append(way.map_or("", |way| way.boot))
        .cwd("/")
        .timeout(if long { LONG } else { SHORT })
        .tee(|flavor| Progress::of(flavor, |line| line.starts_with("@@ end ")))
        .run(&command)
}

/// Judges the VM apart from the tests in it.
fn machine(tally: &mut Tally, name: &str, outcome: &Outcome, plan: &[Entry], tests: &[Test]) {
    let (status, seen) = (outcome.status(), tests.len());
    if status != 0 || seen != plan.len() {
        let complaint = outcome.complaint();
        let stderr = String::from_utf8_lossy(&outcome.stderr);
        let planned = plan.len();
        tally.fail(
            name,
            &format!("status {status}, {seen} of {planned} tests ended\n{complaint}{stderr}"),
        );
    } else {
        let seconds = outcome.elapsed.as_secs_f64();
        tally.pass(&format!(
            "{name}: no complaint of the kernel ({seconds:.1} s)"
        ));
    }
}

/// Compares one test on the two kernels; says how it passed.
fn judge(entry: &Entry, way: &Way, stock: Option<&Test>, ours: Option<&Test>) -> Result<String> {
    let stock = stock.context("it did not end on stock")?;
    let ours = ours.context("it did not end on ours")?;
    let required: Vec<&str> = stock.passed().collect();
    let failing = stock.cases.iter().filter_map(|(name, case)| match case {
        Case::Fail(why) => Some(format!("{name}: {why}")),
        _ => None,
    });
    let failing: Vec<String> = failing.collect();
    if required.len() < entry.cases {
        bail!(
            "on stock only {} of {} cases pass{}",
            required.len(),
            entry.cases,
            some(&failing)
        );
    }
    let worse = required
        .iter()
        .filter_map(|case| match ours.cases.get(*case) {
            Some(Case::Pass) => None,
            Some(Case::Skip) => Some(format!("{case}: skipped")),
            Some(Case::Fail(why)) => Some(format!("{case}: {why}")),
            None => Some(format!("{case}: not reported")),
        });
    let worse: Vec<String> = worse.collect();
    if !worse.is_empty() {
        // Where it ends early on stock, too, this says why it has ended before that.
        let end = match ours.cases.get(EXIT) {
            Some(Case::Fail(why)) if !required.contains(&EXIT) => format!("\n  {EXIT}: {why}"),
            _ => String::new(),
        };
        bail!(
            "{} of {} cases that pass on stock do not pass{}{end}",
            worse.len(),
            required.len(),
            some(&worse)
        );
    }
    let shared = ours.shared.get(way.name).copied().unwrap_or_default();
    ensure!(shared > 0 || !entry.shares(way), "no table was shared");
    let mut how = format!("{} cases as on stock", required.len());
    let skipped = stock.cases.len() - required.len() - failing.len();
    for (count, what) in [
        (failing.len(), "fail there"),
        (skipped, "are skipped there"),
        (ours.again, "tried again"),
    ] {
        if count > 0 {
            how += &format!(", {count} {what}");
        }
    }
    Ok(format!(
        "{how}; {shared} tables shared ({:.1} s)",
        ours.seconds
    ))
}

/// The first of these lines, each indented on a line of its own.
fn some(lines: &[String]) -> String {
    lines
        .iter()
        .take(NAMED)
        .map(|l| format!("\n  {l}"))
        .collect()
}

fn words(plan: &[Entry], patience: u32) -> String {
    let lines: Vec<String> = plan.iter().map(|e| e.line(patience)).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "t\tptshare,odf\t-\t1\t9\tt\n";

    fn test(cases: &[(&str, Case)]) -> Test {
        let cases = cases.iter().map(|(n, c)| ((*n).to_owned(), c.clone()));
        Test {
            name: "t".into(),
            cases: cases.collect(),
            seconds: 1.0,
            shared: [("odf".to_owned(), 1)].into(),
            again: 0,
        }
    }

    fn passes(line: &str, way: &Way, stock: Option<&Test>, ours: Option<&Test>) -> bool {
        let entry = &List::parse(line).unwrap().tests[0];
        judge(entry, way, stock, ours).is_ok()
    }

    fn fail() -> Case {
        Case::Fail("why".into())
    }

    #[test]
    fn what_passes_on_stock_must_pass() {
        let stock = test(&[("a", Case::Pass), ("b", fail()), ("c", Case::Skip)]);
        let good = |ours: Option<&Test>| passes(LINE, &Way::ALL[0], Some(&stock), ours);
        assert!(good(Some(&test(&[("a", Case::Pass)]))));
        for worse in [
            test(&[("a", Case::Skip)]),
            test(&[("a", fail())]),
            test(&[("b", Case::Pass)]),
        ] {
            assert!(!good(Some(&worse)));
        }
        assert!(!good(None));
        assert!(!passes(LINE, &Way::ALL[0], None, Some(&stock)));
    }

    #[test]
    fn an_early_end_says_why() {
        let stock = test(&[("a", Case::Pass), (EXIT, fail())]);
        let ours = test(&[(EXIT, Case::Fail("1 after: b".into()))]);
        let entry = &List::parse(LINE).unwrap().tests[0];
        let why = judge(entry, &Way::ALL[0], Some(&stock), Some(&ours)).unwrap_err();
        assert!(why.to_string().ends_with("exit status: 1 after: b"));
    }

    #[test]
    fn less_than_expected_of_stock_proves_nothing() {
        let one = test(&[("a", Case::Pass), ("b", fail())]);
        let good = |line: &str| passes(line, &Way::ALL[0], Some(&one), Some(&one));
        assert!(good(LINE));
        assert!(!good(&LINE.replace("\t1\t", "\t2\t")));
    }

    #[test]
    fn a_test_that_shares_must_share() {
        let line = LINE.replace("\t-\t", "\tptshare,odf\t");
        let odf = test(&[("a", Case::Pass)]);
        let [ptshare, odf_way] = &Way::ALL;
        assert!(passes(&line, odf_way, Some(&odf), Some(&odf)));
        assert!(!passes(&line, ptshare, Some(&odf), Some(&odf)));
        assert!(passes(LINE, ptshare, Some(&odf), Some(&odf)));
    }
}
