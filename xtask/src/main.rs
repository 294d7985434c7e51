//! The lab behind `./x`: builds the kernels, runs programs on them in a VM,
//! tests and measures.
//!
//! Every subcommand writes data to stdout and everything else to stderr, so
//! that `$(./x kernel path --flavor release)` and `./x vm -- cat FILE` compose.

mod bench;
mod demo;
mod guest;
mod kernel;
mod paths;
mod splat;
mod test;
mod tools;
mod vm;
mod vmcmd;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "x", about = "Build, try, test and measure the ptshare kernel")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build a kernel or say where it is
    #[command(subcommand)]
    Kernel(kernel::Command),
    /// Run a command in a VM over this machine's files
    Vm(vmcmd::Args),
    /// Run every test; the closing line says how many passed
    Test(test::Args),
    /// Measure (see `./x bench --help`)
    #[command(disable_help_flag = true)]
    Bench {
        /// What to measure
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// The demonstration: PostgreSQL on the stock kernel and on ours
    #[command(disable_help_flag = true)]
    Demo {
        /// Options of the demonstration
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done: Result<u8> = match Cli::parse().command {
        Command::Kernel(c) => kernel::command(c).map(|()| 0),
        Command::Vm(args) => vmcmd::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench { args } => bench::run(args).map(|()| 0),
        Command::Demo { args } => demo::run(args).map(|()| 0),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("x: {e:#}");
            ExitCode::from(vm::EXIT_LAB)
        }
    }
}
