//! kmemleak: scans for memory that nothing points at, and puts what stays
//! found into the kernel's log, where the host looks for complaints.

use anyhow::{Context, Result};
use std::fs;
use std::thread::sleep;
use std::time::Duration;

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// kmemleak reports only what is older than five seconds.
const MIN_AGE: Duration = Duration::from_millis(5500);

/// Looks for leaks; `None` on a kernel without kmemleak, else whether the
/// scan was done.
pub fn scan(log: impl Fn(&str)) -> Result<Option<bool>> {
    if fs::metadata(KMEMLEAK).is_err() {
        return Ok(None);
    }
    // One scan may take an object on its way from one list to another for
    // lost. A leak is what three of them find.
    let mut found = String::new();
    for _ in 0..3 {
        sleep(MIN_AGE);
        fs::write(KMEMLEAK, "scan").context("asking kmemleak for a scan")?;
        found = fs::read_to_string(KMEMLEAK).context("reading kmemleak's findings")?;
        if found.is_empty() {
            break;
        }
    }
    for line in found.lines().filter(|l| !l.trim().is_empty()).take(200) {
        log(&format!("ptshare-lab: kmemleak: {line}"));
    }
    Ok(Some(true))
}
