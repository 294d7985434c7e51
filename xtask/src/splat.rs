//! Finds complaints of the kernel in a console log.
//!
//! What counts is listed in `vmtest/splats.txt`, what is excused, with the
//! reason, in `vmtest/allow.txt`. The reading fails closed: a list that does
//! not parse is an error and a line is excused only by a pattern of its own.
//! `vmtest/samples.txt` holds what each class looks like.

use anyhow::{bail, Context, Result};
use regex::Regex;

const SPLATS: &str = include_str!("../../vmtest/splats.txt");
const ALLOW: &str = include_str!("../../vmtest/allow.txt");
const SAMPLES: &str = include_str!("../../vmtest/samples.txt");

/// A line of the console that must not be there.
#[derive(Clone, Debug)]
pub struct Splat {
    /// The class of `vmtest/splats.txt` that caught it
    pub class: String,
    /// Its number in the log, from 1
    pub number: usize,
    /// The line
    pub line: String,
}

/// The two lists, compiled.
pub struct Matcher {
    splats: Vec<(String, Regex)>,
    allow: Vec<Regex>,
}

impl Matcher {
    /// The project's lists.
    pub fn new() -> Result<Self> {
        Self::parse(SPLATS, ALLOW)
    }

    fn parse(splats: &str, allow: &str) -> Result<Self> {
        let compile = |p: &str| Regex::new(p).with_context(|| format!("bad pattern: {p}"));
        let matcher = Self {
            splats: table("splats.txt", splats)?
                .into_iter()
                .map(|(class, p)| Ok((class, compile(&p)?)))
                .collect::<Result<_>>()?,
            // The second column is the reason; a pattern without one is refused.
            allow: table("allow.txt", allow)?
                .into_iter()
                .map(|(p, _)| compile(&p))
                .collect::<Result<_>>()?,
        };
        if matcher.splats.is_empty() {
            bail!("splats.txt is empty");
        }
        Ok(matcher)
    }

    /// Everything in a console log that must not be there.
    pub fn find(&self, log: &str) -> Vec<Splat> {
        let mut found = Vec::new();
        for (number, line) in log.lines().enumerate() {
            if self.allow.iter().any(|a| a.is_match(line)) {
                continue;
            }
            if let Some((class, _)) = self.splats.iter().find(|(_, p)| p.is_match(line)) {
                found.push(Splat {
                    class: class.clone(),
                    number: number + 1,
                    line: line.trim_end().to_owned(),
                });
            }
        }
        found
    }
}

/// Complaints as kernels print them, each with its class, to try the lists on.
pub fn samples() -> Result<Vec<(String, String)>> {
    table("samples.txt", SAMPLES)
}

/// The rows of a list: two columns with a tab between them.
fn table(name: &str, text: &str) -> Result<Vec<(String, String)>> {
    text.lines()
        .filter(|l| !l.trim().is_empty() && !l.starts_with('#'))
        .map(|l| {
            l.split_once('\t')
                // A pattern may begin or end with a blank; a line does not.
                .map(|(a, b)| (a.trim().to_owned(), b.trim_start_matches('\t').to_owned()))
                .filter(|(a, b)| !a.is_empty() && !b.is_empty())
                .with_context(|| format!("{name}: not two columns: {l}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_sample_is_caught_in_its_class() {
        let matcher = Matcher::parse(SPLATS, "").unwrap();
        for (class, line) in samples().unwrap() {
            let found = matcher.find(&format!("[   12.345678] {line}\r\n"));
            assert_eq!(found.len(), 1, "not caught: {line}");
            assert_eq!(found[0].class, class, "{line}");
        }
    }

    #[test]
    fn each_class_has_a_sample() {
        let column = |rows: Vec<(String, String)>| -> BTreeSet<String> {
            rows.into_iter().map(|(class, _)| class).collect()
        };
        assert_eq!(
            column(table("splats.txt", SPLATS).unwrap()),
            column(samples().unwrap())
        );
    }

    #[test]
    fn an_ordinary_boot_is_clean() {
        let log = "\
[    0.000000] Linux version 6.12.117 (ptshare@lab) #1 SMP PREEMPT
[    0.000000] Command line: console=ttyS0 debug oops=x panic=-1 nokaslr
[    0.041234] rcu: Preemptible hierarchical RCU implementation.
[    0.041240] rcu: RCU lockdep checking is enabled.
[    0.100000] Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar
[    0.200000] kfence: initialized - using 2097152 bytes for 255 objects
[    0.300000] kmemleak: Kernel memory leak detector initialized (mem pool available: 31868)
[    0.400000] PCI: Using configuration type 1 for base access
[    0.500000] lkdtm: No crash points registered, enable through debugfs
[    1.100000] ptshare-lab: begin run-abc
";
        let matcher = Matcher::new().unwrap();
        let found = matcher.find(log);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn only_the_allowed_line_is_excused() {
        let matcher =
            Matcher::parse("warning\t\\bWARNING\\b\n", "known thing\tit is known\n").unwrap();
        let found = matcher.find("WARNING: known thing\nWARNING: other thing\n");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].number, 2);
    }

    #[test]
    fn a_pattern_without_a_reason_is_refused() {
        assert!(Matcher::parse("a\tb\n", "pattern\n").is_err());
        assert!(Matcher::parse("a\tb\n", "pattern\t\n").is_err());
        assert!(Matcher::parse("a\t(\n", "").is_err());
        assert!(Matcher::parse("# nothing\n", "").is_err());
    }
}
