// SPDX-License-Identifier: MIT OR Apache-2.0
//! Measures page-table sharing from inside a virtual machine.
//!
//! `guest-bench share PART [--ask]` and `guest-bench fork PART [--ask]` print the figures of one part,
//! `guest-bench pgdemo …` drives PostgreSQL, `guest-bench odf CMD…` starts a program whose forks are on demand.
//! Standard output carries one JSON object a line, standard error says what goes on; any failure ends the
//! program with status 1, so that a figure is either measured or absent.

mod figure;
mod fork;
mod machine;
mod pgdemo;
mod proc;
mod share;
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.split_first() {
        Some((verb, rest)) if verb == "share" => share::run(rest),
        Some((verb, rest)) if verb == "fork" => fork::run(rest),
        Some((verb, rest)) if verb == "odf" => fork::launch(rest),
        Some((verb, rest)) if verb == "pgdemo" => pgdemo::run(rest),
        Some((verb, [])) if verb == "scan-query" => {
            println!("{}", pgdemo::SCAN);
            Ok(())
        }
        _ => Err(anyhow::anyhow!(
            "usage: guest-bench share PART [--ask] | fork PART [--ask] | odf CMD | pgdemo OPTIONS"
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("guest-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}
