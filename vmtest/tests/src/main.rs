//! Tests of page-table sharing that run as root inside a test VM, or on any kernel with `--stock`.
//!
//! Every test runs in a process group of its own, is held to a time limit, and is followed by a
//! check that no shared table and no link is left. With `--stock` the same operations run without
//! asking for sharing, which shows that the expectations are those of an ordinary kernel.

mod aging;
mod allocfail;
mod concurrent;
mod damon;
mod faults;
mod fork;
mod gup;
mod harness;
mod inplace;
mod kernel;
mod kvm;
mod leave;
mod machine;
mod mapspt;
mod modes;
mod observe;
mod odf;
mod ops;
mod oracle;
mod peer;
mod probe;
mod races;
mod sys;
mod team;
mod tlb;
mod transparent;
mod uring;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Tests of page-table sharing")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the tests' names.
    List {
        /// Only names that contain this.
        #[arg(long, default_value = "")]
        filter: String,
    },
    /// Run them; exit status 0 if none fails.
    Run {
        /// Only names that contain this; several may be given, separated by commas.
        #[arg(long, default_value = "")]
        filter: String,
        /// Minutes rather than seconds for the random and stress tests, and larger sizes.
        #[arg(long)]
        long: bool,
        /// Do not ask for sharing and do not require it.
        #[arg(long)]
        stock: bool,
        /// Seed of the random tests.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Say on stderr how long each test took.
        #[arg(long)]
        times: bool,
    },
    /// What the tests execute themselves as.
    #[command(hide = true)]
    Helper {
        /// Which helper.
        name: String,
        /// Its arguments.
        args: Vec<String>,
    },
}

fn selected(filter: &str) -> Vec<harness::Test> {
    let all = [
        modes::tests(),
        transparent::tests(),
        leave::tests(),
        mapspt::tests(),
        inplace::tests(),
        tlb::tests(),
        kvm::tests(),
        damon::tests(),
        ops::tests(),
        observe::tests(),
        faults::tests(),
        fork::tests(),
        concurrent::tests(),
        races::tests(),
        aging::tests(),
        gup::tests(),
        allocfail::tests(),
        odf::tests(),
    ];
    let wanted = |t: &harness::Test| filter.split(',').any(|f| t.name.contains(f));
    all.into_iter().flatten().filter(wanted).collect()
}

fn main() -> ExitCode {
    // A thread's stack of Rust's 2 MiB may be a granule just so, and is then one that forks share.
    std::env::set_var("RUST_MIN_STACK", "262144");
    match Cli::parse().command {
        Command::List { filter } => {
            selected(&filter)
                .iter()
                .for_each(|t| println!("{}", t.name));
            ExitCode::SUCCESS
        }
        Command::Run {
            filter,
            long,
            stock,
            seed,
            times,
        } => {
            let ctx = harness::Ctx {
                sharing: !stock,
                long,
                seed,
                times,
            };
            let tests = selected(&filter);
            if tests.is_empty() {
                eprintln!("guest-tests: no test matches {filter:?}");
                return ExitCode::FAILURE;
            }
            if harness::run(&tests, ctx) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Command::Helper { name, args } => modes::helper(&name, &args),
    }
}
