//! The VM's self-test: that a run which went well is told from every kind of
//! run that did not.
//!
//! A check that does not work looks just like a kernel without defects, so
//! each kind of failure is brought about on purpose, the real thing where one
//! can be had (sysrq, the kernel's crash tests), its text through the real
//! console where not.

use super::Tally;
use crate::kernel::Flavor;
use crate::splat;
use crate::vm::{Outcome, Verdict, Vm};
use anyhow::{bail, ensure, Result};
use std::collections::BTreeSet;
use std::time::Duration;

const CRASH: &str = "/sys/kernel/debug/provoke-crash/DIRECT";

/// What is tried, in words and in code.
type Case = (&'static str, fn() -> Result<()>);

/// Runs all of it.
pub fn run(tally: &mut Tally, filter: Option<&str>) {
    let cases: &[Case] = &[
        ("status and output of the command", passes_on),
        ("a missing command is 127", missing_command),
        ("a signal is 128 + its number", signal),
        ("writes go to the scratch overlay", scratch),
        ("orphans do not hold the run up", orphans),
        ("a panic is caught", panic),
        ("a hang is caught", hang),
        ("an end without a result is caught", no_result),
        ("a log that is not captured is caught", no_console),
        ("every class of complaint is caught", classes),
        ("debug: a run that does well", debug_clean),
        ("debug: WARN", || provoke("WARNING", "warning")),
        ("debug: BUG", || provoke("BUG", "kernel-bug")),
        ("debug: bad access", || provoke("EXCEPTION", "oops")),
        ("debug: use after free", || {
            provoke("WRITE_AFTER_FREE", "slab")
        }),
        ("debug: list corruption", || {
            provoke("CORRUPT_LIST_ADD", "list")
        }),
        ("debug: refcount", || {
            provoke("REFCOUNT_DEC_NEGATIVE", "refcount")
        }),
        ("debug: soft lockup", || {
            provoke("SOFTLOCKUP", "soft-lockup")
        }),
        ("debug: hung task", || provoke("HUNG_TASK", "hung-task")),
    ];
    for (name, case) in cases {
        let name = format!("lab {name}");
        if super::wanted(filter, &name) {
            tally.try_one(&name, case);
        }
    }
}

fn vm(flavor: Flavor) -> Vm {
    Vm::new(flavor)
        .mem("1G")
        .smp(1)
        .cwd("/")
        // Seconds on an idle machine; on a busy one, none of these is to fail.
        .timeout(Duration::from_secs(300))
}

fn shell(script: &str) -> Result<Outcome> {
    vm(Flavor::Release).run(&["sh", "-c", script])
}

fn expect(outcome: &Outcome, verdict: Verdict) -> Result<()> {
    ensure!(
        outcome.verdict() == verdict,
        "expected {verdict:?}, got {:?}\n{}",
        outcome.verdict(),
        outcome.complaint()
    );
    Ok(())
}

fn expect_status(outcome: &Outcome, status: u8) -> Result<()> {
    ensure!(
        outcome.status() == status,
        "expected status {status}, got {}\n{}",
        outcome.status(),
        outcome.complaint()
    );
    Ok(())
}

fn passes_on() -> Result<()> {
    let outcome = shell("echo out; echo err >&2; head -c 300000 /dev/zero; exit 7")?;
    expect_status(&outcome, 7)?;
    ensure!(outcome.stdout.starts_with(b"out\n"), "stdout is lost");
    ensure!(outcome.stdout.len() == 300_004, "stdout is not whole");
    ensure!(outcome.stderr == b"err\n", "stderr is lost");
    Ok(())
}

fn missing_command() -> Result<()> {
    let outcome = vm(Flavor::Release).run(&["/no/such/command"])?;
    expect_status(&outcome, 127)
}

fn signal() -> Result<()> {
    expect_status(&shell("kill -9 $$")?, 128 + 9)
}

fn scratch() -> Result<()> {
    let name = format!("/usr/ptshare-lab-{}", std::process::id());
    let outcome = shell(&format!("echo x > {name} && grep -q x {name} && mount"))?;
    let written = std::path::Path::new(&name).exists();
    ensure!(!written, "the guest wrote into this machine");
    outcome.expect_success().map(drop)
}

fn orphans() -> Result<()> {
    let outcome = shell("sleep 1000 & setsid sleep 1000 & echo done")?.expect_success()?;
    ensure!(outcome.stdout == b"done\n", "output is lost");
    Ok(())
}

fn panic() -> Result<()> {
    let outcome = shell("echo c > /proc/sysrq-trigger; sleep 100")?;
    expect(&outcome, Verdict::Splat)?;
    expect_class(&outcome, "panic")
}

fn hang() -> Result<()> {
    let outcome = vm(Flavor::Release)
        .timeout(Duration::from_secs(12))
        .run(&["sleep", "1000"])?;
    expect(&outcome, Verdict::Timeout)
}

fn no_result() -> Result<()> {
    // Power off, and reset: neither leaves a word on the console.
    for key in ["o", "b"] {
        let outcome = shell(&format!("echo {key} > /proc/sysrq-trigger; sleep 100"))?;
        expect(&outcome, Verdict::NoResult)?;
    }
    Ok(())
}

fn no_console() -> Result<()> {
    let outcome = shell(
        "echo N > /sys/module/printk/parameters/ignore_loglevel; echo 1 > /proc/sys/kernel/printk",
    )?;
    expect(&outcome, Verdict::NoConsole)
}

fn classes() -> Result<()> {
    let samples = splat::samples()?;
    let script: String = samples
        .iter()
        .map(|(_, line)| format!("echo '{}' > /dev/kmsg\n", line.replace('\'', "'\\''")))
        .collect();
    let outcome = shell(&script)?;
    expect(&outcome, Verdict::Splat)?;
    let want: BTreeSet<_> = samples.iter().map(|(class, _)| class.clone()).collect();
    let got: BTreeSet<_> = outcome.splats.iter().map(|s| s.class.clone()).collect();
    let lost: Vec<_> = want.difference(&got).collect();
    ensure!(lost.is_empty(), "classes not caught: {lost:?}");
    ensure!(
        outcome.splats.len() == samples.len(),
        "{} lines written, {} caught",
        samples.len(),
        outcome.splats.len()
    );
    Ok(())
}

fn debug_clean() -> Result<()> {
    let outcome = vm(Flavor::Debug).run(&["true"])?.expect_success()?;
    let scanned = outcome.record.and_then(|r| r.leak_scan);
    ensure!(scanned == Some(true), "kmemleak was not asked");
    Ok(())
}

/// Brings about a failure inside the kernel.
fn provoke(crash: &str, class: &str) -> Result<()> {
    let mut vm = vm(Flavor::Debug).append("hung_task_panic=1 softlockup_panic=1");
    if class == "soft-lockup" {
        vm = vm.append("watchdog_thresh=3");
    }
    let script = format!(
        "echo 4 > /proc/sys/kernel/hung_task_timeout_secs; echo {crash} > {CRASH}; sleep 1"
    );
    let outcome = vm.run(&["sh", "-c", &script])?;
    expect_class(&outcome, class)?;
    ensure!(outcome.status() != 0, "the run counts as good");
    Ok(())
}

fn expect_class(outcome: &Outcome, class: &str) -> Result<()> {
    if !outcome.splats.iter().any(|s| s.class == class) {
        bail!("no {class} among the complaints\n{}", outcome.complaint());
    }
    Ok(())
}
