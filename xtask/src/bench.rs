// SPDX-License-Identifier: MIT OR Apache-2.0
//! `./x bench`: the figures that the project promises, measured on the stock
//! kernel and on ours, and judged.
//!
//! Each part of the measurement has a VM of its own, so that no part finds
//! what another left. Times are instructions, counted by the VM's clock; they
//! say nothing about caches, and everything about work done.

mod report;

use crate::kernel::{self, Flavor};
use crate::vm::Vm;
use crate::{guest, paths};
use anyhow::{bail, Context, Result};
use clap::{Args, Parser, Subcommand};
pub use report::{grouped, Report};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Parser)]
#[command(name = "./x bench", about = "Measure on the stock kernel and on ours")]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Sharing of page tables: memory, faults, instructions, and what it costs those who do not use it
    Share(Share),
}

#[derive(Args)]
struct Share {
    /// Print JSON instead of the table
    #[arg(long)]
    json: bool,
    /// Write the same to share.json and share.txt in this directory
    #[arg(long)]
    out: Option<PathBuf>,
    /// Measure only this kernel; nothing is judged then
    #[arg(long)]
    flavor: Option<Flavor>,
    /// Measure only these parts
    #[arg(long, value_delimiter = ',')]
    parts: Vec<String>,
}

/// Runs `./x bench` with the command line's words after it.
pub fn run(args: Vec<String>) -> Result<()> {
    let words = std::iter::once("bench".to_owned()).chain(args);
    let What::Share(args) = Cli::parse_from(words).what;
    let flavors = args.flavor.map_or(FLAVORS.to_vec(), |f| vec![f]);
    if let Some(unknown) = args
        .parts
        .iter()
        .find(|p| !PARTS.iter().any(|q| q.name == **p))
    {
        bail!("there is no part {unknown}");
    }
    let report = share(&flavors, &args.parts)?;
    if let Some(out) = &args.out {
        report.write(out)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.json())?);
    } else {
        print!("{report}");
    }
    report.verdict()
}

/// What a figure is compared with, and what is judged.
pub const FLAVORS: [Flavor; 2] = [Flavor::Stock, Flavor::Release];

/// One run of `guest-bench share`.
struct Part {
    name: &'static str,
    /// Whether its clock counts instructions
    icount: bool,
    /// Whether the processes ask for sharing where the kernel has it
    asks: bool,
    /// Whether only the stock kernel is of interest
    stock_only: bool,
    mem: &'static str,
    timeout: Duration,
}

const PARTS: [Part; 5] = [
    part("memory", false, true, false, "4G"),
    part("attach", true, true, false, "2G"),
    part("compare", true, false, true, "2G"),
    part("unused", true, false, false, "2G"),
    part("reclaim", true, true, false, "2G"),
];

const fn part(
    name: &'static str,
    icount: bool,
    asks: bool,
    stock_only: bool,
    mem: &'static str,
) -> Part {
    Part {
        name,
        icount,
        asks,
        stock_only,
        mem,
        timeout: Duration::from_secs(900),
    }
}

/// Measures on these kernels. With `parts` empty, all parts.
pub fn share(flavors: &[Flavor], parts: &[String]) -> Result<Report> {
    let bench = guest::binary("guest-bench")?;
    let mut report = Report::new(flavors);
    for &flavor in flavors {
        // A kernel that must be built first says so itself.
        kernel::ensure(flavor)?;
        for part in &PARTS {
            let wanted = parts.is_empty() || parts.iter().any(|p| p == part.name);
            if !wanted || (part.stock_only && flavor != Flavor::Stock) {
                continue;
            }
            let start = Instant::now();
            eprintln!("x: bench: {} on the {} kernel", part.name, flavor.name());
            match measure(&bench, flavor, part) {
                Ok(lines) => report.add(flavor, &lines)?,
                Err(e) => {
                    eprintln!("x: bench: {e:#}");
                    report.failed(flavor, part.name);
                }
            }
            eprintln!(
                "x: bench: {} on the {} kernel took {} s",
                part.name,
                flavor.name(),
                start.elapsed().as_secs()
            );
        }
    }
    Ok(report)
}

fn measure(bench: &Path, flavor: Flavor, part: &Part) -> Result<String> {
    let mut command = vec![text(bench)?, "share".into(), part.name.into()];
    if part.asks && flavor.patched() {
        command.push("--ask".into());
    }
    let vm = Vm::new(flavor)
        .mem(part.mem)
        .icount(part.icount)
        .timeout(part.timeout);
    lines_of(vm, &command)
}

/// Runs a program of ours that prints JSON lines, and returns them. What it
/// says on stderr is shown as it comes.
pub fn lines_of(vm: Vm, command: &[String]) -> Result<String> {
    let results = tempfile::Builder::new()
        .prefix("results-")
        .tempdir_in(paths::cache()?)?;
    // The lab forwards both streams or none: the lines go to a file of ours,
    // so that they do not get between what this program prints.
    let script = "exec \"$0\" \"$@\" >/run/share/results/lines";
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
