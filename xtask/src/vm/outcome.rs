//! What became of a run of the VM, and how it is to be judged.

use crate::kernel::Flavor;
use crate::splat::Splat;
use anyhow::{bail, Result};
use serde::Deserialize;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Exit status when the kernel complained.
pub const EXIT_SPLAT: u8 = 70;
/// Exit status when the VM ended without a result record.
pub const EXIT_NO_RESULT: u8 = 71;
/// Exit status when the console log lacks PID 1's marks.
pub const EXIT_NO_CONSOLE: u8 = 72;
/// Exit status when time ran out.
pub const EXIT_TIMEOUT: u8 = 124;
/// Exit status when the lab itself failed.
pub const EXIT_LAB: u8 = 125;

/// What the guest's PID 1 reports.
#[derive(Clone, Debug, Deserialize)]
pub struct Record {
    /// The command's exit status
    pub exit: Option<u8>,
    /// The signal that killed it
    pub signal: Option<u8>,
    /// Why it could not be run
    pub error: Option<String>,
    /// Whether kmemleak was asked; `None` without kmemleak
    pub leak_scan: Option<bool>,
}

/// How a run is to be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The command ran to its end on a kernel that had nothing to complain of
    Ended,
    /// The kernel complained
    Splat,
    /// The VM ended, or PID 1 failed, without a result
    NoResult,
    /// The console log is not whole, so its silence says nothing
    NoConsole,
    /// Time ran out
    Timeout,
}

/// A run of the VM.
#[derive(Debug)]
pub struct Outcome {
    /// The kernel it ran on
    pub flavor: Flavor,
    /// Whether it was killed because time ran out
    pub timed_out: bool,
    /// PID 1's report
    pub record: Option<Record>,
    /// Whether the console log holds PID 1's marks
    pub console_captured: bool,
    /// The kernel's complaints
    pub splats: Vec<Splat>,
    /// What the command wrote to stdout
    pub stdout: Vec<u8>,
    /// What the command wrote to stderr
    pub stderr: Vec<u8>,
    /// The kernel's log
    pub console_log: PathBuf,
    /// Host time of the whole run
    pub elapsed: Duration,
}

impl Outcome {
    /// The judgement, worst first.
    pub fn verdict(&self) -> Verdict {
        let scan_due = self.flavor == Flavor::Debug;
        match &self.record {
            _ if self.timed_out => Verdict::Timeout,
            _ if !self.splats.is_empty() => Verdict::Splat,
            Some(r) if r.exit.is_none() && r.signal.is_none() => Verdict::NoResult,
            Some(r) if scan_due && r.leak_scan != Some(true) => Verdict::NoResult,
            None => Verdict::NoResult,
            Some(_) if !self.console_captured => Verdict::NoConsole,
            Some(_) => Verdict::Ended,
        }
    }

    /// The exit status for a shell: the command's, 128 + N after signal N, or
    /// one of the `EXIT_` constants.
    pub fn status(&self) -> u8 {
        match self.verdict() {
            Verdict::Ended => {
                let record = self.record.as_ref();
                record
                    .and_then(|r| r.exit.or(r.signal.map(|s| 128 + (s & 127))))
                    .unwrap_or(EXIT_NO_RESULT)
            }
            Verdict::Splat => EXIT_SPLAT,
            Verdict::NoResult => EXIT_NO_RESULT,
            Verdict::NoConsole => EXIT_NO_CONSOLE,
            Verdict::Timeout => EXIT_TIMEOUT,
        }
    }

    /// The command's stdout as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Self, unless anything at all went wrong, the command's exit status
    /// included.
    pub fn expect_success(self) -> Result<Self> {
        if self.status() != 0 {
            let stderr = String::from_utf8_lossy(&self.stderr);
            bail!(
                "the run in the {} VM failed with status {}\n{}{}",
                self.flavor.name(),
                self.status(),
                self.complaint(),
                stderr
            );
        }
        Ok(self)
    }

    /// What went wrong, for a person: lines that end in a newline, or nothing.
    pub fn complaint(&self) -> String {
        let mut text = match self.verdict() {
            Verdict::Ended => return String::new(),
            Verdict::Splat => String::from("x: vm: the kernel complained:\n"),
            Verdict::NoResult => {
                let why = self.record.as_ref().and_then(|r| r.error.clone());
                let why = why.map_or(String::new(), |w| format!(": {w}"));
                format!("x: vm: ended without a result{why}\n")
            }
            Verdict::NoConsole => {
                "x: vm: the console log is not whole, so nothing is known of complaints\n".into()
            }
            Verdict::Timeout => format!("x: vm: killed after {} s\n", self.elapsed.as_secs()),
        };
        for splat in self.splats.iter().take(12) {
            text.push_str(&format!(
                "  [{}] {}: {}\n",
                splat.class, splat.number, splat.line
            ));
        }
        if self.splats.len() > 12 {
            text.push_str(&format!("  and {} more\n", self.splats.len() - 12));
        }
        if self.splats.is_empty() {
            let log = fs::read(&self.console_log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(5)..] {
                text.push_str(&format!("  {line}\n"));
            }
        }
        text.push_str(&format!(
            "x: vm: console log: {}\n",
            self.console_log.display()
        ));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good(flavor: Flavor) -> Outcome {
        Outcome {
            flavor,
            timed_out: false,
            record: Some(Record {
                exit: Some(3),
                signal: None,
                error: None,
                leak_scan: (flavor == Flavor::Debug).then_some(true),
            }),
            console_captured: true,
            splats: Vec::new(),
            stdout: Vec::new(),
            stderr: Vec::new(),
            console_log: PathBuf::from("/nonexistent"),
            elapsed: Duration::ZERO,
        }
    }

    #[test]
    fn only_a_whole_and_quiet_run_has_the_commands_status() {
        for flavor in Flavor::ALL {
            assert_eq!(good(flavor).status(), 3);
        }
        let mut run = good(Flavor::Release);
        run.record = None;
        assert_eq!(run.status(), EXIT_NO_RESULT);

        let mut run = good(Flavor::Release);
        run.console_captured = false;
        assert_eq!(run.status(), EXIT_NO_CONSOLE);

        let mut run = good(Flavor::Release);
        run.timed_out = true;
        assert_eq!(run.status(), EXIT_TIMEOUT);

        let mut run = good(Flavor::Release);
        run.splats.push(Splat {
            class: "bug".into(),
            number: 1,
            line: "BUG".into(),
        });
        assert_eq!(run.status(), EXIT_SPLAT);

        let mut run = good(Flavor::Debug);
        run.record.as_mut().unwrap().leak_scan = None;
        assert_eq!(run.status(), EXIT_NO_RESULT);
    }

    #[test]
    fn a_signal_and_a_failed_start_are_told_apart() {
        let mut run = good(Flavor::Release);
        let record = run.record.as_mut().unwrap();
        record.exit = None;
        record.signal = Some(9);
        assert_eq!(run.status(), 137);
        let record = run.record.as_mut().unwrap();
        record.signal = None;
        record.error = Some("no root".into());
        assert_eq!(run.status(), EXIT_NO_RESULT);
        assert!(run.complaint().contains("no root"));
    }
}
