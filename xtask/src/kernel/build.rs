//! Configures and builds one flavor in its output directory, with a progress
//! line, the whole log in a file and the first error shown.

use super::{config, source::Source, Flavor};
use crate::{paths, tools::Toolchain};
use anyhow::{bail, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// How many finished images of one flavor the cache keeps.
const KEEP_IMAGES: usize = 6;
/// How often a line is printed where there is no terminal to rewrite one on.
const REPORT_EVERY: Duration = Duration::from_secs(20);
/// Outputs this much older than the newest may have been cut short by a kill.
const SUSPECT: Duration = Duration::from_secs(10);

/// Builds `flavor` from `tree` and leaves it as the directory `image`. The
/// caller holds the lock.
pub fn build(
    flavor: Flavor,
    source: &Source,
    tree: &Path,
    tools: &Toolchain,
    image: &Path,
) -> Result<()> {
    let out = source.dir.join(format!("out-{}", flavor.name()));
    let log_path = source.dir.join(format!("build-{}.log", flavor.name()));
    fs::create_dir_all(&out)?;
    let unfinished = out.join(".ptshare-building");
    if unfinished.exists() {
        discard_recent(&out)?;
    }
    fs::write(&unfinished, "")?;
    let mut log = File::create(&log_path)?;
    eprintln!(
        "x: building the {} kernel; log: {}",
        flavor.name(),
        log_path.display()
    );

    let requested = config::requested(flavor)?;
    let preset = out.join("ptshare.allconfig");
    fs::write(&preset, &requested)?;
    let mut make = make(tree, &out, tools);
    make.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &preset);
    let logged = make.output().context("running make")?;
    log.write_all(&logged.stdout)?;
    log.write_all(&logged.stderr)?;
    if !logged.status.success() {
        bail!("make allnoconfig failed: {}", first_error(&log_path)?);
    }
    config::verify(&requested, &fs::read_to_string(out.join(".config"))?)?;

    let jobs = std::thread::available_parallelism().map_or(2, |n| n.get());
    let mut make = self::make(tree, &out, tools);
    make.arg(format!("-j{jobs}")).arg("bzImage");
    let total = source.dir.join(format!("objects-{}", flavor.name()));
    let expected = fs::read_to_string(&total)
        .ok()
        .and_then(|t| t.trim().parse().ok());
    let (ok, objects, elapsed) = watch(make, log, flavor, expected)?;
    if !ok {
        // make has stopped its jobs and removed what they left half done.
        fs::remove_file(&unfinished)?;
        bail!(
            "building the {} kernel failed; log: {}\n{}",
            flavor.name(),
            log_path.display(),
            first_error(&log_path)?
        );
    }
    if expected.is_none_or(|e| objects > e) {
        fs::write(&total, objects.to_string())?;
    }
    store(&out, image)?;
    fs::remove_file(&unfinished)?;
    prune(flavor, image)?;
    eprintln!(
        "x: built the {} kernel: {objects} objects in {}",
        flavor.name(),
        clock(elapsed)
    );
    Ok(())
}

fn make(tree: &Path, out: &Path, tools: &Toolchain) -> Command {
    // Low priority: a build is long, and something else may be measured.
    let mut make = Command::new("nice");
    make.arg("make")
        .arg("-C")
        .arg(tree)
        .arg(format!("O={}", out.display()))
        // Nothing of the place or time of a build in its outcome.
        .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
        .env("KBUILD_BUILD_USER", "ptshare")
        .env("KBUILD_BUILD_HOST", "lab")
        .env("KBUILD_BUILD_VERSION", "1")
        .stdin(Stdio::null());
    tools.apply(&mut make);
    paths::die_with_parent(&mut make, Signal::SIGTERM);
    make
}

/// Runs make, copies what it says to the log, shows progress. Returns whether
/// it succeeded, the number of objects made, and the time it took.
fn watch(
    mut make: Command,
    mut log: File,
    flavor: Flavor,
    expected: Option<u64>,
) -> Result<(bool, u64, Duration)> {
    let start = Instant::now();
    let mut child: Child = make
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("running make")?;
    let stdout = child.stdout.take().context("make's output")?;
    let terminal = std::io::stderr().is_terminal();
    let bar = if terminal {
        let style = ProgressStyle::with_template("x: {msg}: {pos} objects, {elapsed}")?;
        ProgressBar::new_spinner()
            .with_style(style)
            .with_message(flavor.name())
    } else {
        ProgressBar::hidden()
    };
    let mut last = start;
    let mut objects = 0;
    for line in BufReader::new(stdout).split(b'\n') {
        let mut line = line?;
        objects += u64::from(is_object(&line));
        line.push(b'\n');
        log.write_all(&line)?;
        bar.set_position(objects);
        bar.tick();
        if !terminal && last.elapsed() >= REPORT_EVERY {
            last = Instant::now();
            let of = expected.map_or(String::new(), |e| format!(" of at most {e}"));
            eprintln!(
                "x: {}: {objects}{of} objects, {}",
                flavor.name(),
                clock(start.elapsed())
            );
        }
    }
    bar.finish_and_clear();
    let ok = child.wait()?.success();
    Ok((ok, objects, start.elapsed()))
}

/// Whether a line of make's output reports an object, such as `  CC      mm/mmap.o`.
fn is_object(line: &[u8]) -> bool {
    let Ok(line) = std::str::from_utf8(line) else {
        return false;
    };
    let mut words = line.split_whitespace();
    line.starts_with("  ")
        && matches!(
            words.next(),
            Some(
                "CC" | "AS" | "LD" | "AR" | "HOSTCC" | "HOSTLD" | "RUSTC" | "BINDGEN" | "HOSTRUSTC"
            )
        )
}

/// The first thing in a build's log that reads like an error, with what
/// surrounds it.
fn first_error(log: &Path) -> Result<String> {
    let text = String::from_utf8_lossy(&super::read(log)?).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let is_error = |l: &&str| {
        l.starts_with("error")
            || l.contains(": error")
            || l.contains("fatal error")
            || l.contains("undefined reference")
            || l.contains("*** ")
    };
    let Some(at) = lines.iter().position(is_error) else {
        let tail = &lines[lines.len().saturating_sub(15)..];
        return Ok(tail.join("\n"));
    };
    let end = (at + 25).min(lines.len());
    Ok(lines[at.saturating_sub(2)..end].join("\n"))
}

/// Puts the finished kernel in its place by rename.
fn store(out: &Path, image: &Path) -> Result<()> {
    let images = image.parent().context("no parent")?;
    fs::create_dir_all(images)?;
    let partial = tempfile::tempdir_in(images)?;
    for (from, to) in [
        ("arch/x86/boot/bzImage", "bzImage"),
        (".config", "config"),
        ("System.map", "System.map"),
    ] {
        fs::copy(out.join(from), partial.path().join(to))
            .with_context(|| format!("copying {from}"))?;
    }
    let partial = partial.keep();
    fs::rename(&partial, image).with_context(|| format!("making {}", image.display()))?;
    Ok(())
}

/// Removes the oldest images of a flavor.
fn prune(flavor: Flavor, newest: &Path) -> Result<()> {
    let images = newest.parent().context("no parent")?;
    let prefix = format!("{}-", flavor.name());
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(images)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    found.sort();
    found.reverse();
    for (_, old) in found.iter().skip(KEEP_IMAGES).filter(|(_, p)| p != newest) {
        fs::remove_dir_all(old)?;
    }
    Ok(())
}

/// After a build that was killed: removes the outputs it may have cut short,
/// which are among the newest. make takes any file for whole.
fn discard_recent(out: &Path) -> Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in walkdir::WalkDir::new(out).into_iter().flatten() {
        let path = entry.path();
        let output = path.extension().is_some_and(|e| {
            ["o", "a", "rmeta", "rs", "so", "bin"]
                .iter()
                .any(|x| e == *x)
        });
        if output && entry.file_type().is_file() {
            files.push((entry.metadata()?.modified()?, entry.into_path()));
        }
    }
    let Some(newest) = files.iter().map(|(t, _)| *t).max() else {
        return Ok(());
    };
    for (_, path) in files
        .iter()
        .filter(|(t, _)| newest.duration_since(*t).is_ok_and(|d| d <= SUSPECT))
    {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_told_from_other_lines() {
        assert!(is_object(b"  CC      mm/mmap.o"));
        assert!(is_object(b"  RUSTC L rust/kernel.o"));
        assert!(!is_object(b"  SYNC    include/config/auto.conf.cmd"));
        assert!(!is_object(b"make[1]: Entering directory 'CC'"));
    }

    #[test]
    fn the_first_error_is_shown_with_its_surroundings() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(
            &log,
            "  CC a.o\na.c: In function 'f':\na.c:3:1: error: boom\n  CC b.o\nb.c:1: error: later\n",
        )
        .unwrap();
        let shown = first_error(&log).unwrap();
        assert!(shown.starts_with("  CC a.o\na.c: In function"));
        assert!(shown.contains("boom"));
    }

    #[test]
    fn a_killed_build_loses_its_newest_outputs_only() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new, text) = (
            dir.path().join("old.o"),
            dir.path().join("new.o"),
            dir.path().join(".config"),
        );
        for path in [&old, &new, &text] {
            fs::write(path, "x").unwrap();
        }
        let past = SystemTime::now() - Duration::from_secs(60);
        File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .set_modified(past)
            .unwrap();
        discard_recent(dir.path()).unwrap();
        assert!(old.exists() && text.exists() && !new.exists());
    }
}
