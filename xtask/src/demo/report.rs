// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the runs reported, next to each other.

use super::picture;
use crate::bench::{self, grouped};
use crate::kernel::Flavor;
use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::fmt;
use std::fs;
use std::path::Path;

/// Our page tables may take this part of the stock kernel's.
const LIMIT: f64 = 1.0 / 20.0;

/// A moment of a run: so many backends had scanned.
#[derive(Clone, Deserialize, Serialize)]
pub struct Sample {
    /// Backends that are connected and have scanned everything
    pub backends: u32,
    /// PageTables of /proc/meminfo, in kB
    pub page_tables_kb: u64,
    shmem_kb: u64,
    seconds: f64,
}

#[derive(Deserialize, Serialize)]
struct Setting {
    kernel: String,
    ptshare: Option<String>,
    server_version: String,
    shared_buffers: String,
    huge_pages: String,
    table_bytes: u64,
}

#[derive(Deserialize, Serialize)]
struct Backend {
    minor_faults: u64,
    vm_pte_kb: Option<u64>,
    pt_shared_kb: Option<u64>,
    checksum: String,
}

#[derive(Deserialize, Serialize)]
struct Done {
    backends: u32,
    seconds: f64,
    checksum: String,
    page_tables_kb: u64,
    shmem_kb: u64,
}

/// A line of `guest-bench pgdemo`.
#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Event {
    Setting(Setting),
    Sample(Sample),
    Backend(Backend),
    Done(Done),
}

/// One kernel's run.
#[derive(Serialize)]
pub struct Run {
    flavor: &'static str,
    #[serde(skip)]
    patched: bool,
    setting: Setting,
    /// The curve
    pub samples: Vec<Sample>,
    backends: Vec<Backend>,
    done: Done,
}

impl Run {
    /// Reads what `guest-bench pgdemo` printed; the end must be there.
    pub fn parse(flavor: Flavor, lines: &str) -> Result<Self> {
        let (mut setting, mut done) = (None, None);
        let (mut samples, mut backends) = (Vec::new(), Vec::new());
        for line in lines.lines() {
            match serde_json::from_str(line).with_context(|| format!("guest-bench said {line}"))? {
                Event::Setting(s) => setting = Some(s),
                Event::Sample(s) => samples.push(s),
                Event::Backend(b) => backends.push(b),
                Event::Done(d) => done = Some(d),
            }
        }
        let run = Self {
            flavor: flavor.name(),
            patched: flavor.patched(),
            setting: setting.context("the run reports no setting")?,
            samples,
            backends,
            done: done.context("the run reports no end")?,
        };
        if run.backends.len() != run.done.backends as usize || run.samples.is_empty() {
            bail!("the run of the {} kernel is not whole", run.flavor);
        }
        Ok(run)
    }

    /// The kernel, for a legend.
    pub fn title(&self) -> &'static str {
        if self.patched {
            "ours, vm.ptshare=2"
        } else {
            "stock"
        }
    }

    fn faults(&self) -> (u64, u64, u64) {
        let mut faults: Vec<u64> = self.backends.iter().map(|b| b.minor_faults).collect();
        faults.sort_unstable();
        (
            faults[0],
            faults[faults.len() / 2],
            faults[faults.len() - 1],
        )
    }
}

/// The runs, and what is to be said of them together.
pub struct Comparison {
    runs: Vec<Run>,
    expected: String,
    bench: Value,
}

impl Comparison {
    /// `expected` is what a scan on this machine returned.
    pub fn new(runs: Vec<Run>, expected: &str) -> Self {
        Self {
            runs,
            expected: expected.into(),
            bench: Value::Null,
        }
    }

    /// Adds the figures of `./x bench share` to the JSON.
    pub fn add_bench(&mut self, report: &bench::Report) {
        self.bench = report.json();
    }

    /// Our page tables as a part of the stock kernel's.
    fn ratio(&self) -> Option<f64> {
        let kb = |patched| {
            let run = self.runs.iter().find(|r| r.patched == patched)?;
            Some(run.done.page_tables_kb as f64)
        };
        Some(kb(true)? / kb(false)?)
    }

    /// Every backend of every run returned what this machine did.
    fn agree(&self) -> bool {
        let mut backends = self.runs.iter().flat_map(|r| &r.backends);
        backends.all(|b| b.checksum == self.expected)
    }

    /// An error unless the runs agree and the limit is kept.
    pub fn verdict(&self) -> Result<()> {
        if !self.agree() {
            bail!("the scans did not all return {}", self.expected);
        }
        match self.ratio() {
            Some(ratio) if ratio > LIMIT => {
                bail!("page tables are {ratio:.3} of the stock kernel's, not {LIMIT}")
            }
            _ => Ok(()),
        }
    }

    /// Writes demo.json and demo.svg.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let json = json!({
            "schema": 1, "runs": self.runs, "expected_checksum": self.expected,
            "checksums_agree": self.agree(), "page_tables_ratio": self.ratio(), "limit": LIMIT,
            "pass": self.ratio().map(|_| self.verdict().is_ok()), "bench": self.bench,
        });
        let path = dir.join("demo.json");
        fs::write(&path, serde_json::to_string_pretty(&json)? + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
        picture::draw(&dir.join("demo.svg"), &self.runs)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.runs.first() else {
            return Ok(());
        };
        writeln!(
            f,
            "PostgreSQL {}, shared_buffers {}, huge_pages {}, table of {} MiB, {} backends that each scanned it",
            first.setting.server_version,
            first.setting.shared_buffers,
            first.setting.huge_pages,
            first.setting.table_bytes >> 20,
            first.done.backends,
        )?;
        let line = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn Fn(&Run) -> String| {
            write!(f, "{name:<44}")?;
            for run in &self.runs {
                write!(f, " {:>34}", value(run))?;
            }
            writeln!(f)
        };
        line(f, "", &|r| format!("{} ({})", r.title(), r.setting.kernel))?;
        line(f, "PageTables before the first backend, kB", &|r| {
            grouped(r.samples[0].page_tables_kb as f64)
        })?;
        line(f, "PageTables when all have scanned, kB", &|r| {
            grouped(r.done.page_tables_kb as f64)
        })?;
        line(f, "Shmem, kB", &|r| grouped(r.done.shmem_kb as f64))?;
        line(f, "minor faults per backend: median (min, max)", &|r| {
            let (min, median, max) = r.faults();
            format!("{median} ({min}, {max})")
        })?;
        line(f, "tables a backend links, does not own, kB", &|r| {
            let last = r.backends.last().and_then(|b| b.pt_shared_kb);
            last.map_or("-".into(), |kb| grouped(kb as f64))
        })?;
        line(f, "seconds until all have scanned (emulation)", &|r| {
            format!("{:.0}", r.done.seconds)
        })?;
        line(f, "result of the scans: rows/balances/hash", &|r| {
            r.done.checksum.clone()
        })?;
        writeln!(
            f,
            "The results {}. The seconds are those of an emulated CPU: they tell how long this took, not how fast a machine is.",
            if self.agree() { "agree" } else { "DISAGREE" }
        )?;
        match self.ratio() {
            Some(ratio) => writeln!(
                f,
                "Page tables: 1/{:.1} of the stock kernel's, limit 1/{:.0}: {}",
                1.0 / ratio,
                1.0 / LIMIT,
                if ratio <= LIMIT { "pass" } else { "FAIL" }
            ),
            None => writeln!(f, "One kernel only: nothing is compared."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(flavor: Flavor, kb: u64, checksum: &str) -> Run {
        let lines = [
            json!({ "event": "setting", "kernel": "6.12", "ptshare": null, "server_version": "15",
                    "shared_buffers": "1GB", "huge_pages": "off", "table_bytes": 1 << 30 }),
            json!({ "event": "sample", "backends": 0, "page_tables_kb": 1, "shmem_kb": 2, "seconds": 0.0 }),
            json!({ "event": "backend", "pid": 7, "minor_faults": 3, "checksum": checksum,
                    "vm_pte_kb": 5, "pt_shared_kb": null }),
            json!({ "event": "done", "backends": 1, "seconds": 1.5, "checksum": checksum,
                    "page_tables_kb": kb, "shmem_kb": 2 }),
        ];
        let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
        Run::parse(flavor, &lines.join("\n")).unwrap()
    }

    fn verdict(stock: u64, ours: u64, checksum: &str) -> Result<()> {
        let runs = vec![
            run(Flavor::Stock, stock, "a"),
            run(Flavor::Release, ours, checksum),
        ];
        Comparison::new(runs, "a").verdict()
    }

    #[test]
    fn the_limit_and_the_results_are_judged() {
        assert!(verdict(2000, 100, "a").is_ok());
        assert!(verdict(2000, 101, "a").is_err());
        assert!(verdict(2000, 100, "b").is_err());
    }

    #[test]
    fn a_run_without_an_end_is_none() {
        assert!(Run::parse(Flavor::Stock, "").is_err());
    }
}
