// SPDX-License-Identifier: MIT OR Apache-2.0
//! `./x bench`: the figures that the project promises, measured on the stock
//! kernel and on ours, and judged.
//!
//! Each part of the measurement has a VM of its own, so that no part finds
//! what another left. Times are instructions, counted by the VM's clock; they
//! say nothing about caches, and everything about work done.

mod clients;
mod report;
mod tables;

use crate::kernel::{self, Flavor};
use crate::vm::Vm;
use crate::{guest, paths};
use anyhow::{bail, Context, Result};
use clap::{Args, Parser, Subcommand};
pub use report::{grouped, Report};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tables::Table;

#[derive(Parser)]
#[command(name = "./x bench", about = "Measure on the stock kernel and on ours")]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Sharing of page tables: memory, faults, instructions, and what it costs those who do not use it
    Share(Options),
    /// fork on demand: instructions of fork, exit and the first writes, and real programs that fork
    Fork(Options),
}

#[derive(Args)]
struct Options {
    /// Print JSON instead of the table
    #[arg(long)]
    json: bool,
    /// Write the table and the JSON into this directory, too
    #[arg(long)]
    out: Option<PathBuf>,
    /// Measure only this kernel; nothing is compared then, limits of our own figures are judged
    #[arg(long)]
    flavor: Option<Flavor>,
    /// Measure only these parts
    #[arg(long, visible_alias = "only", value_delimiter = ',')]
    parts: Vec<String>,
}

/// Runs `./x bench` with the command line's words after it.
pub fn run(args: Vec<String>) -> Result<()> {
    let words = std::iter::once("bench".to_owned()).chain(args);
    let (suite, options) = match Cli::parse_from(words).what {
        What::Share(options) => (&SHARE, options),
        What::Fork(options) => (&FORK, options),
    };
    let flavors = options.flavor.map_or(FLAVORS.to_vec(), |f| vec![f]);
    let report = suite.measure(&flavors, &options.parts)?;
    if let Some(out) = &options.out {
        report.write(out)?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report.json())?);
    } else {
        print!("{report}");
    }
    report.verdict()
}

/// What a figure is compared with, and what is judged.
pub const FLAVORS: [Flavor; 2] = [Flavor::Stock, Flavor::Release];

/// The figures of one report.
pub struct Suite {
    table: &'static Table,
    parts: &'static [Part],
}

/// One run of `guest-bench`.
struct Part {
    name: &'static str,
    /// Whether its clock counts instructions
    icount: bool,
    /// Whether the processes ask for the feature where the kernel has it
    asks: bool,
    /// Whether only the stock kernel is of interest
    stock_only: bool,
    mem: &'static str,
    timeout: Duration,
    /// Makes ready what the part needs, and gives further words for its command line
    prepare: fn() -> Result<Vec<String>>,
}

/// `./x bench share`.
pub const SHARE: Suite = Suite {
    table: &tables::SHARE,
    parts: &[
        Part::new("memory", "4G").without_icount().asking(),
        Part::new("attach", "2G").asking(),
        Part::new("compare", "2G").stock_only(),
        Part::new("unused", "2G"),
        Part::new("reclaim", "2G").asking(),
    ],
};

/// `./x bench fork`.
const FORK: Suite = Suite {
    table: &tables::FORK,
    parts: &[
        Part::new("1gib", "2G").asking(),
        Part::new("4gib", "7G").asking(),
        Part::new("again", "2G").asking(),
        Part::new("nothing", "2G").asking(),
        Part::new("unused", "2G"),
        Part::new("redis", "4G").asking().prepared(clients::redis),
        Part::new("afl", "2G").asking().prepared(clients::afl),
        Part::new("python", "2G").asking(),
    ],
};

impl Part {
    /// Under the instruction clock; nobody asks for anything.
    const fn new(name: &'static str, mem: &'static str) -> Self {
        Self {
            name,
            icount: true,
            asks: false,
            stock_only: false,
            mem,
            timeout: Duration::from_secs(900),
            prepare: || Ok(Vec::new()),
        }
    }

    const fn without_icount(mut self) -> Self {
        self.icount = false;
        self
    }

    const fn asking(mut self) -> Self {
        self.asks = true;
        self
    }

    const fn prepared(mut self, prepare: fn() -> Result<Vec<String>>) -> Self {
        self.prepare = prepare;
        self
    }

    const fn stock_only(mut self) -> Self {
        self.stock_only = true;
        self
    }
}

impl Suite {
    /// Measures on these kernels. With `parts` empty, all parts.
    pub fn measure(&self, flavors: &[Flavor], parts: &[String]) -> Result<Report> {
        if let Some(unknown) = parts
            .iter()
            .find(|p| !self.parts.iter().any(|q| q.name == **p))
        {
            let names: Vec<&str> = self.parts.iter().map(|p| p.name).collect();
            bail!("there is no part {unknown}, only {}", names.join(", "));
        }
        let bench = guest::binary("guest-bench")?;
        let mut report = Report::new(self.table, flavors);
        if parts.is_empty() {
            report.expect_all();
        }
        for &flavor in flavors {
            // A kernel that must be built first says so itself.
            kernel::ensure(flavor)?;
        }
        for part in self.parts {
            for &flavor in flavors {
                let wanted = parts.is_empty() || parts.iter().any(|p| p == part.name);
                if !wanted || (part.stock_only && flavor != Flavor::Stock) {
                    continue;
                }
                let start = Instant::now();
                let what = format!("{} on the {} kernel", part.name, flavor.name());
                eprintln!("x: bench: {what}");
                match self.run(part, &bench, flavor) {
                    Ok(lines) => report.add(flavor, &lines)?,
                    Err(e) => {
                        eprintln!("x: bench: {e:#}");
                        report.failed(flavor, part.name);
                    }
                }
                eprintln!("x: bench: {what} took {} s", start.elapsed().as_secs());
            }
        }
        Ok(report)
    }

    fn run(&self, part: &Part, bench: &Path, flavor: Flavor) -> Result<String> {
        let mut command = vec![text(bench)?, self.table.name.into(), part.name.into()];
        if part.asks && flavor.patched() {
            command.push("--ask".into());
        }
        command.extend((part.prepare)()?);
        let vm = Vm::new(flavor)
            .mem(part.mem)
            .icount(part.icount)
            .timeout(part.timeout);
        lines_of(vm, &command)
    }
}

/// Runs a program of ours that prints JSON lines, and returns them. What it
/// says on stderr is shown as it comes.
pub fn lines_of(vm: Vm, command: &[String]) -> Result<String> {
    let results = tempfile::Builder::new()
        .prefix("results-")
        .tempdir_in(paths::cache()?)?;
    // The lab forwards both streams or none: the lines go to a file of ours, so that they do not get between
    // what this program prints. Not to the host's at once: 9p pins what is written to it, and fork treats a
    // process that has ever pinned memory in a way of its own.
    let script =
        "\"$0\" \"$@\" >/run/lines; status=$?; cp /run/lines /run/share/results/; exit $status";
    let mut words = vec!["sh".to_owned(), "-c".into(), script.into()];
    words.extend_from_slice(command);
    vm.share(results.path(), "results")
        .forward(true)
        .run(&words)?
        .expect_success()?;
    let path = results.path().join("lines");
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// A path as a word of a command line.
pub fn text(path: &Path) -> Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.with_context(|| format!("{} is not UTF-8", path.display()))
}
