//! Finds complaints of the kernel in a console log.
//!
//! What counts is listed in `vmtest/splats.txt`, what is excused, with the
//! reason, in `vmtest/allow.txt`. The reading fails closed: a list that does
//! not parse is an error and a line is excused only by a pattern of its own.

use anyhow::{bail, Context, Result};
use regex::Regex;

const SPLATS: &str = include_str!("../../vmtest/splats.txt");
const ALLOW: &str = include_str!("../../vmtest/allow.txt");

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
        let entries = |text: &'static str, list: &str| -> Result<Vec<(String, String)>> {
            list.lines()
                .filter(|l| !l.trim().is_empty() && !l.starts_with('#'))
                .map(|l| {
                    l.split_once('\t')
                        .map(|(a, b)| (a.trim().to_owned(), b.trim().to_owned()))
                        .filter(|(a, b)| !a.is_empty() && !b.is_empty())
                        .with_context(|| format!("{text}: no tab in: {l}"))
                })
                .collect()
        };
        let compile = |p: &str| Regex::new(p).with_context(|| format!("bad pattern: {p}"));
        let matcher = Self {
            splats: entries("splats.txt", splats)?
                .into_iter()
                .map(|(class, p)| Ok((class, compile(&p)?)))
                .collect::<Result<_>>()?,
            // The second column is the reason; a pattern without one is refused.
            allow: entries("allow.txt", allow)?
                .into_iter()
                .map(|(p, _)| compile(&p))
                .collect::<Result<_>>()?,
        };
        if matcher.splats.is_empty() {
            bail!("splats.txt is empty");
        }
        Ok(matcher)
    }

    /// The classes, each once, in the order of the list.
    pub fn classes(&self) -> Vec<&str> {
        let mut classes: Vec<&str> = Vec::new();
        for (class, _) in &self.splats {
            if !classes.contains(&class.as_str()) {
                classes.push(class);
            }
        }
        classes
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
