// SPDX-License-Identifier: MIT OR Apache-2.0
//! Figures of two kernels next to each other, and the limits they must keep.

use super::tables::{Limit, Table};
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

/// A line of the table: the figure's name, what it is, its limit.
struct Row {
    figure: String,
    label: String,
    limit: Limit,
}

/// All figures of some kernels.
pub struct Report {
    table: &'static Table,
    flavors: Vec<Flavor>,
    figures: BTreeMap<(bool, String), Figure>,
    /// Names of the figures in the order of measurement
    order: Vec<String>,
    failures: Vec<String>,
    /// Whether every line with a limit must have been measured
    whole: bool,
}

impl Report {
    /// A report on these kernels, still empty.
    pub fn new(table: &'static Table, flavors: &[Flavor]) -> Self {
        Self {
            table,
            flavors: flavors.to_vec(),
            figures: BTreeMap::new(),
            order: Vec::new(),
            failures: Vec::new(),
            whole: false,
        }
    }

    /// From now on a line that has a limit and no figures is a failure.
    pub fn expect_all(&mut self) {
        self.whole = true;
    }

    /// Takes in the JSON lines of a run.
    pub fn add(&mut self, flavor: Flavor, lines: &str) -> Result<()> {
        for line in lines.lines() {
            let figure: Figure =
                serde_json::from_str(line).with_context(|| format!("guest-bench said {line}"))?;
            let name = figure.figure.clone();
            if !self.order.contains(&name) {
                self.order.push(name.clone());
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
        let fixed = self.table.lines.iter().map(|&(figure, label, limit)| Row {
            figure: figure.into(),
            label: label.into(),
            limit,
        });
        let families = self
            .table
            .families
            .iter()
            .flat_map(|&(begin, label, limit)| {
                let members = self.order.iter().filter(move |f| f.starts_with(begin));
                members.map(move |figure| Row {
                    figure: figure.clone(),
                    label: format!("{label}{}", figure[begin.len()..].replace('_', " ")),
                    limit,
                })
            });
        fixed
            .chain(families)
            .filter(|r| {
                let expected = self.whole && !matches!(r.limit, Limit::None);
                expected || self.get(false, r).is_some() || self.get(true, r).is_some()
            })
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
            Limit::TimesLess(limit) => self.ratio(row).map(|r| r * limit <= 1.0),
            Limit::TimesMore(limit) => self.ratio(row).map(|r| r >= limit),
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
                    Limit::TimesLess(v) => json!({ "times_less": v }),
                    Limit::TimesMore(v) => json!({ "ratio_at_least": v }),
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
        let name = self.table.name;
        let json = dir.join(format!("{name}.json"));
        fs::write(&json, serde_json::to_string_pretty(&self.json())? + "\n")
            .with_context(|| format!("writing {}", json.display()))?;
        fs::write(dir.join(format!("{name}.txt")), self.to_string())?;
        eprintln!("x: bench: wrote {} and {name}.txt", json.display());
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
                Limit::TimesLess(v) => format!("<= stock / {v}"),
                Limit::TimesMore(v) => format!(">= {v} x stock"),
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
                self.ratio(&row)
                    .map_or("-".into(), |r| in_words(r, row.limit)),
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

/// A ratio for people: the way round in which its limit is given.
fn in_words(ratio: f64, limit: Limit) -> String {
    match limit {
        Limit::TimesLess(_) => format!("1/{:.1}", 1.0 / ratio),
        _ => format!("{ratio:.4}"),
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
    use super::super::tables::{FORK, SHARE};
    use super::*;

    fn line(figure: &str, value: f64) -> String {
        json!({ "figure": figure, "unit": "instructions", "value": value, "min": value, "max": value,
                "spread": 0.0, "samples": 1 })
        .to_string()
    }

    fn report(figure: &str, stock: f64, ours: f64) -> Report {
        of(&SHARE, figure, stock, ours)
    }

    fn of(table: &'static Table, figure: &str, stock: f64, ours: f64) -> Report {
        let mut report = Report::new(table, &[Flavor::Stock, Flavor::Release]);
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
    fn limits_of_fork_are_judged() {
        let verdict = |figure, stock, ours| of(&FORK, figure, stock, ours).verdict().is_ok();
        assert!(verdict("fork_1gib", 22_000.0, 100.0));
        assert!(!verdict("fork_1gib", 21_999.0, 100.0));
        assert!(verdict("first_write_child", 100.0, 125.0));
        assert!(!verdict("first_write_child", 100.0, 126.0));
        assert!(verdict("again_growth", 0.0, 10.0));
        assert!(!verdict("again_crowd_growth", 0.0, 65.0));
        assert!(!verdict("again_growth", 0.0, 10.1));
        assert!(!verdict("again_tables", 4.0, 0.1));
        assert!(!verdict("nothing_to_share_at_all", 1000.0, 1011.0));
        assert!(!verdict("unused_fork", 1000.0, 1011.0));
    }

    #[test]
    fn families_follow_in_the_order_of_measurement() {
        let mut report = of(&FORK, "unused_b", 1.0, 1.0);
        for name in ["unused_a", "nothing_to_share_at_all", "fork_1gib"] {
            report.add(Flavor::Release, &line(name, 1.0)).unwrap();
        }
        let names: Vec<String> = report.rows().into_iter().map(|r| r.figure).collect();
        assert_eq!(
            names,
            [
                "fork_1gib",
                "nothing_to_share_at_all",
                "unused_b",
                "unused_a"
            ]
        );
        // What only one kernel has been measured for is not a pass.
        assert!(report.verdict().is_err());
    }

    #[test]
    fn ratios_are_shown_the_way_round_of_their_limit() {
        assert_eq!(in_words(0.004, Limit::TimesLess(220.0)), "1/250.0");
        assert_eq!(in_words(1.1, Limit::RatioAtMost(1.25)), "1.1000");
    }

    #[test]
    fn what_was_not_measured_fails() {
        let mut report = report("faults", 16385.0, 40.0);
        report.failed(Flavor::Release, "attach");
        assert!(report.verdict().is_err());
    }

    #[test]
    fn a_line_without_figures_fails_when_all_are_expected() {
        let mut report = of(&FORK, "fork_1gib", 1000.0, 1.0);
        assert!(report.verdict().is_ok());
        report.expect_all();
        let missed = report.verdict().unwrap_err().to_string();
        assert!(missed.contains("afl_executions"), "{missed}");
        assert!(!missed.contains("fork_1gib"), "{missed}");
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(1_234_567.0), "1 234 567");
        assert_eq!(grouped(516.0), "516");
        assert_eq!(grouped(6.62), "6.6");
    }
}
