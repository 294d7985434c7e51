//! stress-ng's stressors of memory mappings with both kinds of sharing on for
//! everything, for a bounded time each: they must find nothing wrong and the
//! kernel must have nothing to complain of.
//!
//! `vmtest/selftests/stress.txt` says which, `stress.sh` speaks the protocol
//! of the guest's tests.

use super::{guest, Tally};
use crate::kernel::Flavor;
use crate::paths;
use crate::vm::Vm;
use anyhow::{bail, ensure, Context, Result};
use std::time::Duration;

const LIST: &str = include_str!("../../../vmtest/selftests/stress.txt");

/// Seconds for each stressor, and time for all of them.
const SHORT: (u64, Duration) = (2, Duration::from_secs(15 * 60));
/// The same in the long form.
const LONG: (u64, Duration) = (15, Duration::from_secs(60 * 60));

/// Runs the stressors on one kernel.
pub fn run(tally: &mut Tally, flavor: Flavor, filter: Option<&str>, long: bool) {
    let name = format!("{} stress", flavor.name());
    if let Err(e) = stress(tally, &name, flavor, filter, long) {
        tally.fail(&name, &format!("{e:#}"));
    }
}

fn stress(
    tally: &mut Tally,
    title: &str,
    flavor: Flavor,
    filter: Option<&str>,
    long: bool,
) -> Result<()> {
    let plan: Vec<&str> = entries(LIST)?
        .into_iter()
        .filter(|e| long || e.short)
        .filter(|e| super::wanted(filter, &format!("{title} {}", e.name)))
        .map(|e| e.line)
        .collect();
    if plan.is_empty() && filter.is_some() {
        return Ok(());
    }
    ensure!(!plan.is_empty(), "no stressors");
    let (seconds, timeout) = if long { LONG } else { SHORT };
    let script = paths::in_root("vmtest/selftests/stress.sh");
    let script = script.to_string_lossy();
    let (lines, seconds) = (plan.join("\n"), seconds.to_string());
    let outcome = Vm::new(flavor)
        .mem("4G")
        .smp(2)
        .append("numa=fake=2 ptshare=2 odf=1")
        .cwd("/")
        .timeout(timeout)
        .tee(guest::Progress::boxed)
        .run(&[&*script, &*lines, &*seconds, "ptshare=2", "odf_default=1"])?;
    guest::judge(tally, title, &outcome, plan.len());
    Ok(())
}

/// A line of the list.
struct Entry<'a> {
    name: &'a str,
    short: bool,
    line: &'a str,
}

fn entries(list: &str) -> Result<Vec<Entry<'_>>> {
    let entries = super::table(list).map(|line| {
        let columns: Vec<&str> = line.split('\t').collect();
        let [name, when, links, forks, _, _] = columns[..] else {
            bail!("stress.txt: not a line of six columns: {line}");
        };
        ensure!(
            ["short", "long"].contains(&when),
            "stress.txt: {line}: short or long?"
        );
        for count in [links, forks] {
            let parsed = count.parse::<u32>();
            parsed.with_context(|| format!("stress.txt: {line}: {count}?"))?;
        }
        let short = when == "short";
        Ok(Entry { name, short, line })
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_well_formed() {
        let list = entries(LIST).unwrap();
        let short: Vec<Vec<&str>> = list
            .iter()
            .filter(|e| e.short)
            .map(|e| e.line.split('\t').collect())
            .collect();
        for least in [2, 3] {
            assert!(short.iter().any(|columns| columns[least] != "0"));
        }
        for bad in [
            "mmap\tnow\t0\t0\t-\t--mmap 1",
            "mmap\tshort\t-\t0\t-\t--mmap 1",
            "mmap\tshort\t0\t-\t--mmap 1",
        ] {
            assert!(entries(bad).is_err(), "{bad}");
        }
    }
}
