//! Reads what the kernel tells about sharing: vmstat, /proc/PID, the sysctl.

use crate::harness::{Res, Stop};
use std::fs;
use std::time::{Duration, Instant};

const SYSCTL: &str = "/proc/sys/vm/ptshare";

/// The two gauges of /proc/vmstat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauges {
    /// `ptshare_tables`.
    pub tables: u64,
    /// `ptshare_links`.
    pub links: u64,
}

/// One line of /proc/vmstat; none when the kernel has no such line.
pub fn vmstat(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/vmstat").ok()?;
    let line = text.lines().find(|l| l.split(' ').next() == Some(name))?;
    line.split(' ').nth(1)?.parse().ok()
}

/// Both gauges; none on a kernel without them.
pub fn gauges() -> Option<Gauges> {
    Some(Gauges {
        tables: vmstat("ptshare_tables")?,
        links: vmstat("ptshare_links")?,
    })
}

/// `vm.ptshare`; none on a kernel without it.
pub fn mode() -> Option<u32> {
    fs::read_to_string(SYSCTL).ok()?.trim().parse().ok()
}

/// Writes `vm.ptshare`.
pub fn set_mode(v: u32) -> std::io::Result<()> {
    fs::write(SYSCTL, v.to_string())
}

/// Writes any text to `vm.ptshare`.
pub fn write_mode(text: &str) -> std::io::Result<()> {
    fs::write(SYSCTL, text)
}

/// A `Name:  N kB` line of a file in that form.
pub fn kb_field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    kb_in(&text, name)
}

/// The same within text already read.
pub fn kb_in(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find(|l| l.strip_prefix(name).is_some_and(|r| r.starts_with(':')))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// `PageTables` of /proc/meminfo in kB. CPUs count by themselves first, for each node, which together may
/// be some 100 kB that a mere reader does not see.
pub fn page_tables_kb() -> Res<u64> {
    fs::write("/proc/sys/vm/stat_refresh", "1")?;
    match kb_field("/proc/meminfo", "PageTables") {
        Some(kb) => Ok(kb),
        None => Err(Stop::Fail("/proc/meminfo has no PageTables".into())),
    }
}

/// The same when it no longer changes: tables that others have just given up are freed a grace period later.
pub fn settled_page_tables_kb() -> Res<u64> {
    let end = Instant::now() + Duration::from_secs(10);
    let (mut last, mut same) = (page_tables_kb()?, 0);
    while same < 4 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
        let now = page_tables_kb()?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// `PtShared` of a process in tables.
pub fn tables_of(pid: i32) -> Res<u64> {
    match kb_field(&format!("/proc/{pid}/status"), "PtShared") {
        Some(kb) => Ok(kb / 4),
        None => Err(Stop::Fail(format!(
            "/proc/{pid}/status has no PtShared line"
        ))),
    }
}

/// The smaps paragraph of the mapping that contains `addr`.
pub fn smaps_of(pid: i32, addr: u64) -> Res<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut found: Option<String> = None;
    for line in text.lines() {
        if let Some((lo, hi)) = header_range(line) {
            if found.is_some() {
                break;
            }
            if (lo..hi).contains(&addr) {
                found = Some(String::new());
            }
        }
        if let Some(f) = &mut found {
            f.push_str(line);
            f.push('\n');
        }
    }
    found.ok_or_else(|| Stop::Fail(format!("/proc/{pid}/smaps: nothing mapped at {addr:#x}")))
}

fn header_range(line: &str) -> Option<(u64, u64)> {
    let (lo, hi) = line.split(' ').next()?.split_once('-')?;
    Some((
        u64::from_str_radix(lo, 16).ok()?,
        u64::from_str_radix(hi, 16).ok()?,
    ))
}

/// A bit of /proc/PID/pagemap.
pub mod pagemap {
    /// Soft-dirty.
    pub const SOFT_DIRTY: u64 = 1 << 55;
    /// Mapped exactly once.
    pub const EXCLUSIVE: u64 = 1 << 56;
    /// Write-protected through userfaultfd.
    pub const UFFD_WP: u64 = 1 << 57;
    /// Page-cache or shared anonymous page.
    pub const FILE: u64 = 1 << 61;
    /// Swapped.
    pub const SWAPPED: u64 = 1 << 62;
    /// Present.
    pub const PRESENT: u64 = 1 << 63;
}

/// `count` pagemap entries of a process from `addr` on.
pub fn pagemap(pid: i32, addr: u64, count: u64) -> Res<Vec<u64>> {
    let f = fs::File::open(format!("/proc/{pid}/pagemap"))?;
    let mut buf = vec![0u8; count as usize * 8];
    crate::sys::pread(&f, &mut buf, addr / crate::sys::PAGE * 8)?;
    Ok(buf
        .chunks_exact(8)
        .map(|c| u64::from_ne_bytes(c.try_into().unwrap_or_default()))
        .collect())
}
