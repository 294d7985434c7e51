// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel says about itself in /proc.

use anyhow::{Context, Result};
use std::fs;

/// A file's text, with its name in the error.
pub fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.to_owned())
}

/// Writes a setting.
pub fn write(path: &str, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("writing {value:?} to {path}"))
}

/// The number after `name` in the lines of `path`, which read `name number` or `name: number kB`.
pub fn field(path: &str, name: &str) -> Result<u64> {
    find(&read(path)?, name).with_context(|| format!("{path} has no {name}"))
}

/// The number after `name` in `text`.
pub fn find(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let key = words.next()?;
        (key.strip_suffix(':').unwrap_or(key) == name).then(|| words.next()?.parse().ok())?
    })
}

/// kB of `names` in /proc/meminfo, after the kernel has folded its per-CPU counters.
pub fn meminfo<const N: usize>(names: [&str; N]) -> Result<[u64; N]> {
    // The counters are kept per CPU and summed lazily: without this they are off by up to 0.5 MB a CPU.
    let _ = fs::read("/proc/sys/vm/stat_refresh");
    let text = read("/proc/meminfo")?;
    let mut out = [0; N];
    for (value, name) in out.iter_mut().zip(names) {
        *value = find(&text, name).with_context(|| format!("/proc/meminfo has no {name}"))?;
    }
    Ok(out)
}

/// Minor faults of another process (field 10 of its stat file).
pub fn minor_faults_of(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = read(&path)?;
    // The command's name may hold anything, so count from the last parenthesis.
    let rest = text
        .rsplit_once(')')
        .map(|(_, rest)| rest)
        .unwrap_or_default();
    rest.split_whitespace()
        .nth(7)
        .and_then(|n| n.parse().ok())
        .with_context(|| format!("{path}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn both_forms_of_a_line_are_read() {
        let text = "PageTables:      1234 kB\nSecPageTables:      7 kB\npswpout 42\n";
        assert_eq!(find(text, "PageTables"), Some(1234));
        assert_eq!(find(text, "pswpout"), Some(42));
        assert_eq!(find(text, "Page"), None);
    }
}
