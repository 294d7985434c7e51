// SPDX-License-Identifier: MIT OR Apache-2.0
//! `./x demo`: PostgreSQL as Debian ships it, on the stock kernel and on ours.
//!
//! A table that fills the shared buffers, a hundred connected backends that
//! have each scanned all of it, and what the kernel spent on page tables for
//! that. The server is not changed and not told: on our kernel
//! `vm.ptshare=2` shares the tables of every mapping that can share.

mod database;
mod picture;
mod report;

use crate::bench;
use crate::kernel::{self, Flavor};
use crate::vm::Vm;
use crate::{guest, paths};
use anyhow::{bail, Context, Result};
use clap::Parser;
use database::Database;
use report::{Comparison, Run};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// PostgreSQL on the stock kernel and on ours, side by side
///
/// Exit status 0 only when our page tables are at most 1/20 of the stock
/// kernel's and all scans returned the same.
#[derive(Parser)]
#[command(name = "./x demo", verbatim_doc_comment)]
struct Args {
    /// Where the JSON, the picture and the tables go
    #[arg(long)]
    out: Option<PathBuf>,
    /// How many backends connect and scan
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    backends: u32,
    /// pgbench's scale factor: the table takes 0.8 GB for each
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    scale: u32,
    /// Processors of the VM, and backends that scan at a time
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Run on this kernel only; nothing is judged then
    #[arg(long)]
    flavor: Option<Flavor>,
    /// Leave the figures of `./x bench share` out
    #[arg(long)]
    no_bench: bool,
    /// Kill a VM after so many seconds
    #[arg(long, default_value_t = 1200)]
    timeout: u64,
}

/// Runs `./x demo` with the command line's words after it.
pub fn run(args: Vec<String>) -> Result<()> {
    let args = Args::parse_from(std::iter::once("demo".to_owned()).chain(args));
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| paths::in_root("target/demo"));
    fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let start = Instant::now();
    let flavors = args.flavor.map_or(bench::FLAVORS.to_vec(), |f| vec![f]);
    for &flavor in &flavors {
        kernel::ensure(flavor)?;
    }
    let program = guest::binary("guest-bench")?;
    let database = Database::prepare(&program, args.scale)?;

    let mut runs = Vec::new();
    for &flavor in &flavors {
        runs.push(scan(&args, flavor, &program, &database)?);
    }
    let mut comparison = Comparison::new(runs, &database.checksum);
    comparison.write(&out)?;
    if !args.no_bench {
        let share = bench::SHARE.measure(&flavors, &[])?;
        share.write(&out)?;
        comparison.add_bench(&share);
        comparison.write(&out)?;
        println!("{share}");
    }
    print!("{comparison}");
    println!("written to {}: demo.json, demo.svg", out.display());
    eprintln!("x: demo: {} s in all", start.elapsed().as_secs());
    comparison.verdict()
}

/// Boots a kernel, and has the backends scan.
fn scan(args: &Args, flavor: Flavor, program: &Path, database: &Database) -> Result<Run> {
    let mem = memory(args.backends, database)?;
    eprintln!(
        "x: demo: {} backends scan {} MiB on the {} kernel, {mem} MiB of memory, emulated",
        args.backends,
        database.table_mib(),
        flavor.name()
    );
    let mut command = vec![bench::text(program)?, "pgdemo".into()];
    let mut option = |name: &str, value: String| command.extend([name.to_owned(), value]);
    option("--bin", bench::text(&database.bin)?);
    option("--disk", "/dev/vda".into());
    option("--data", database::DATA.into());
    option(
        "--shared-buffers-mb",
        database.shared_buffers_mib().to_string(),
    );
    option("--backends", args.backends.to_string());
    option("--workers", args.smp.to_string());
    option("--every", (args.backends / 20).max(1).to_string());
    if flavor.patched() {
        option("--ptshare", "2".into());
    }
    let vm = Vm::new(flavor)
        .mem(&format!("{mem}M"))
        .smp(args.smp)
        .drive(&database.image)
        .timeout(Duration::from_secs(args.timeout));
    let lines = database.lend(|| bench::lines_of(vm, &command))?;
    Run::parse(flavor, &lines)
}

/// Memory for the VM in MiB: such that the stock kernel's page tables fit too.
fn memory(backends: u32, database: &Database) -> Result<u64> {
    let shared = database.shared_buffers_mib();
    let per_backend = shared / 512 + 6;
    let need = shared + shared / 20 + u64::from(backends) * per_backend + 1024;
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let available = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:")?.split_whitespace().next())
        .and_then(|kb| kb.parse::<u64>().ok())
        .context("/proc/meminfo has no MemAvailable")?
        / 1024;
    if need + 512 > available {
        bail!(
            "the VM needs {need} MiB of memory and {available} are available; try a lower --scale"
        );
    }
    Ok(need)
}
