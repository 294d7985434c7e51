// SPDX-License-Identifier: MIT OR Apache-2.0
//! Figures of two kernels next to each other, and the limits they must keep.

use crate::kernel::Flavor;
use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

/// One figure as `guest-bench` prints it.
#[derive(Clone, Deserialize, Serialize)]
struct Figure {
    figure: String,
    unit: String,
    /// The median
    value: f64,
    min: f64,
    max: f64,
    /// Distance of the quartiles as a part of the median
    spread: f64,
    samples: u64,
}

/// What our kernel must reach.
#[derive(Clone, Copy)]
enum Limit {
    /// The value itself
    AtMost(f64),
    /// The value as a part of the stock kernel's
    RatioAtMost(f64),
    /// Shown, not judged
    None,
}

/// A line of the table: the figure's name, what it is, its limit.
struct Row {
    figure: String,
    label: String,
    limit: Limit,
}

const FIXED: &[(&str, &str, Limit)] = &[
    (
        "table_memory",
        "page tables per extra process, 256 MiB memfd, 200 processes",
        Limit::AtMost(12.0),
    ),
    (
        "faults",
        "faults of a process that reads 1 GiB page by page",
        Limit::AtMost(40.0),
    ),
    (
        "attach",
        "attach 128 MiB: mmap, one byte of each page",
        Limit::AtMost(600_000.0),
    ),
    (
        "attach_thp",
        "  the same in transparent huge pages",
        Limit::None,
    ),
    ("attach_hugetlb", "  the same in hugetlb pages", Limit::None),
    ("detach", "munmap of the same", Limit::AtMost(100_000.0)),
    (
        "detach_thp",
        "  the same in transparent huge pages",
        Limit::None,
    ),
    ("detach_hugetlb", "  the same in hugetlb pages", Limit::None),
    (
        "reclaim",
        "reclaim of memory that 200 processes map, to zram",
        Limit::RatioAtMost(0.1),
    ),
    (
        "reclaim_one",
        "  the same when one process maps it",
        Limit::None,
    ),
    (
        "reclaim_dense",
        "  the same with 200, pages that are hard to compress",
        Limit::None,
    ),
];

/// Figures whose names begin so are of those who do not use the feature.
const UNUSED: &str = "unused_";
const UNUSED_LIMIT: Limit = Limit::RatioAtMost(1.01);

/// All figures of some kernels.
pub struct Report {
    flavors: Vec<Flavor>,
    figures: BTreeMap<(bool, String), Figure>,
    /// Names of the `UNUSED` figures in the order of measurement
    unused: Vec<String>,
    failures: Vec<String>,
}

impl Report {
    /// A report on these kernels, still empty.
    pub fn new(flavors: &[Flavor]) -> Self {
        Self {
            flavors: flavors.to_vec(),
            figures: BTreeMap::new(),
            unused: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Takes in the JSON lines of a run.
    pub fn add(&mut self, flavor: Flavor, lines: &str) -> Result<()> {
        for line in lines.lines() {
            let figure: Figure =
                serde_json::from_str(line).with_context(|| format!("guest-bench said {line}"))?;
            let name = figure.figure.clone();
            if name.starts_with(UNUSED) && !self.unused.contains(&name) {
                self.unused.push(name.clone());
            }
            self.figures.insert((flavor.patched(), name), figure);
        }
        Ok(())
    }

    /// Notes that a part could not be measured.
    pub fn failed(&mut self, flavor: Flavor, part: &str) {
        self.failures
            .push(format!("{part} on the {} kernel", flavor.name()));
    }

    fn rows(&self) -> Vec<Row> {
        let fixed = FIXED.iter().map(|&(figure, label, limit)| Row {
            figure: figure.into(),
            label: label.into(),
            limit,
        });
        let unused = self.unused.iter().map(|figure| Row {
            figure: figure.clone(),
            label: format!("not used: {}", figure[UNUSED.len()..].replace('_', " ")),
            limit: UNUSED_LIMIT,
        });
        fixed
            .chain(unused)
            .filter(|r| self.get(false, r).is_some() || self.get(true, r).is_some())
            .collect()
    }

    fn get(&self, patched: bool, row: &Row) -> Option<&Figure> {
        self.figures.get(&(patched, row.figure.clone()))
    }

    /// Ours as a part of stock's.
    fn ratio(&self, row: &Row) -> Option<f64> {
        Some(self.get(true, row)?.value / self.get(false, row)?.value)
    }

    /// Whether the limit is kept; `None` when there is none, or nothing to judge.
    fn pass(&self, row: &Row) -> Option<bool> {
        match row.limit {
            Limit::None => None,
            Limit::AtMost(limit) => self.get(true, row).map(|f| f.value <= limit),
            Limit::RatioAtMost(limit) => self.ratio(row).map(|r| r <= limit),
        }
    }

    /// Both kernels measured, so that absence of a figure is a failure.
    fn complete(&self) -> bool {
        self.flavors.iter().any(|f| f.patched()) && self.flavors.iter().any(|f| !f.patched())
    }

    /// An error that says what was missed, if anything was.
    pub fn verdict(&self) -> Result<()> {
        let mut missed: Vec<String> = self
            .rows()
            .iter()
            .filter(|r| match self.pass(r) {
                Some(pass) => !pass,
                // Half a comparison is none.
                None => self.complete() && !matches!(r.limit, Limit::None),
            })
            .map(|r| r.figure.clone())
            .collect();
        missed.extend(self.failures.iter().map(|f| format!("{f} (not measured)")));
        if missed.is_empty() {
            Ok(())
        } else {
            bail!("{} missed: {}", missed.len(), missed.join(", "))
        }
    }

    /// The report for programs.
    pub fn json(&self) -> Value {
        let figures: Vec<Value> = self
            .rows()
            .iter()
            .map(|row| {
                let limit = match row.limit {
                    Limit::AtMost(v) => json!({ "at_most": v }),
                    Limit::RatioAtMost(v) => json!({ "ratio_at_most": v }),
                    Limit::None => Value::Null,
                };
                json!({
                    "figure": row.figure, "label": row.label.trim(),
                    "stock": self.get(false, row), "ours": self.get(true, row),
                    "ratio": self.ratio(row), "limit": limit, "pass": self.pass(row),
                })
            })
            .collect();
        json!({ "schema": 1, "figures": figures, "not_measured": self.failures })
    }

    /// Writes the report into a directory, for programs and for people.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let json = dir.join("share.json");
        fs::write(&json, serde_json::to_string_pretty(&self.json())? + "\n")
            .with_context(|| format!("writing {}", json.display()))?;
        fs::write(dir.join("share.txt"), self.to_string())?;
        eprintln!("x: bench: wrote {} and share.txt", json.display());
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<66} {:<17} {:>12} {:>12} {:>7} {:>7}  {:<14}",
            "figure", "unit", "stock", "ours", "ratio", "spread", "limit"
        )?;
        for row in self.rows() {
            let (stock, ours) = (self.get(false, &row), self.get(true, &row));
            let number = |figure: Option<&Figure>| figure.map_or("-".into(), |x| grouped(x.value));
            let spread = stock
                .iter()
                .chain(&ours)
                .map(|x| x.spread)
                .fold(0.0, f64::max);
            let limit = match row.limit {
                Limit::AtMost(v) => format!("<= {}", grouped(v)),
                Limit::RatioAtMost(v) => format!("<= {v} x stock"),
                Limit::None => String::new(),
            };
            let verdict = match (self.pass(&row), row.limit) {
                (Some(true), _) => "pass",
                (Some(false), _) => "FAIL",
                (None, Limit::None) => "",
                (None, _) => "not judged",
            };
            writeln!(
                f,
                "{:<66} {:<17} {:>12} {:>12} {:>7} {:>7}  {:<14} {verdict}",
                row.label,
                stock.or(ours).map_or("", |x| x.unit.as_str()),
                number(stock),
                number(ours),
                self.ratio(&row).map_or("-".into(), |r| format!("{r:.4}")),
                format!("{:.2} %", spread * 100.0),
                limit,
            )?;
        }
        for failure in &self.failures {
            writeln!(f, "not measured: {failure}")?;
        }
        if !self.complete() {
            writeln!(f, "One kernel only: nothing is compared.")?;
        }
        Ok(())
    }
}

/// A number for people: digits in groups of three, a decimal where it matters.
pub fn grouped(value: f64) -> String {
    if value.abs() < 100.0 {
        return format!("{}", (value * 10.0).round() / 10.0);
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(figure: &str, value: f64) -> String {
        json!({ "figure": figure, "unit": "instructions", "value": value, "min": value, "max": value,
                "spread": 0.0, "samples": 1 })
        .to_string()
    }

    fn report(figure: &str, stock: f64, ours: f64) -> Report {
        let mut report = Report::new(&[Flavor::Stock, Flavor::Release]);
        report.add(Flavor::Stock, &line(figure, stock)).unwrap();
        report.add(Flavor::Release, &line(figure, ours)).unwrap();
        report
    }

    #[test]
    fn limits_are_judged() {
        assert!(report("faults", 16385.0, 40.0).verdict().is_ok());
        assert!(report("faults", 16385.0, 41.0).verdict().is_err());
        assert!(report("unused_fork", 1000.0, 1010.0).verdict().is_ok());
        assert!(report("unused_fork", 1000.0, 1011.0).verdict().is_err());
        assert!(report("reclaim", 1000.0, 101.0).verdict().is_err());
        assert!(report("attach_thp", 1.0, 1e9).verdict().is_ok());
    }

    #[test]
    fn what_was_not_measured_fails() {
        let mut report = report("faults", 16385.0, 40.0);
        report.failed(Flavor::Release, "attach");
        assert!(report.verdict().is_err());
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(1_234_567.0), "1 234 567");
        assert_eq!(grouped(516.0), "516");
        assert_eq!(grouped(6.62), "6.6");
    }
}
