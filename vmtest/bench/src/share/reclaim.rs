// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reclaim of shared memory that many processes map: a control group is told to give it up, to compressed swap.

use super::memory::Crowd;
use crate::figure::Samples;
use crate::sys::{self, Kind, Map, PAGE};
use crate::{proc, progress};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

const PROCESSES: usize = 200;
const FILE: usize = 16 << 20;
const SWAP: usize = 256 << 20;
const REPEATS: usize = 3;
const CGROUPS: &str = "/sys/fs/cgroup";

/// Prints the figures.
pub fn run() -> Result<()> {
    swap_to_zram().context("setting compressed swap up")?;
    let group = control_group().context("making a control group")?;
    measure(&group, "", PROCESSES, Content::Number)?;
    // What is left when the page tables cost next to nothing: compression, above all.
    measure(&group, "_one", 1, Content::Number)?;
    measure(&group, "_dense", PROCESSES, Content::Records)
}

/// What is in the pages.
#[derive(Clone, Copy)]
enum Content {
    /// A number, and zeros. It goes through the compressor, and cheaply, so that the page tables show.
    Number,
    /// Records of a table's kind, half numbers and half padding. The compressor needs as long for one of
    /// these pages as the unpatched kernel for 65 page-table entries.
    Records,
}

fn measure(group: &str, suffix: &str, processes: usize, content: Content) -> Result<()> {
    let (mut whole, mut per_page) = (Samples::default(), Samples::default());
    for round in 0..REPEATS {
        let (instructions, pages) = reclaim(group, processes, content)?;
        progress!(
            "reclaim {round} of memory that {processes} map: {pages} pages in {instructions} instructions"
        );
        whole.push(instructions);
        per_page.push(instructions / pages);
    }
    whole.emit(&format!("reclaim_call{suffix}"), "instructions");
    per_page.emit(&format!("reclaim{suffix}"), "instructions/page");
    Ok(())
}

fn swap_to_zram() -> Result<()> {
    proc::write("/sys/block/zram0/disksize", &SWAP.to_string())?;
    let mut device = fs::OpenOptions::new()
        .write(true)
        .open("/dev/zram0")
        .context("/dev/zram0")?;
    // What mkswap writes: version and last page behind the boot block, the signature at the page's end.
    let mut header = [0; PAGE];
    header[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
    header[1028..1032].copy_from_slice(&((SWAP / PAGE - 1) as u32).to_ne_bytes());
    header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    device.write_all(&header)?;
    drop(device);
    sys::swap_on("/dev/zram0").context("swapon")
}

/// A group for the file's pages and the processes that map them.
fn control_group() -> Result<String> {
    if !Path::new(CGROUPS).join("cgroup.controllers").exists() {
        sys::mount("none", CGROUPS, "cgroup2", "").context("mounting cgroup2")?;
    }
    proc::write(&format!("{CGROUPS}/cgroup.subtree_control"), "+memory")?;
    let group = format!("{CGROUPS}/guest-bench");
    fs::create_dir(&group)?;
    Ok(group)
}

/// Moves the calling process. What it allocated before stays charged where it was: the memory that a fork left
/// to all the processes in common is not shared memory, and must not be in the way of the figure.
fn enter(group: &str) -> Result<()> {
    proc::write(&format!("{group}/cgroup.procs"), "0")
}

/// Instructions of the call, and the pages that went to swap by it.
fn reclaim(group: &str, processes: usize, content: Content) -> Result<(f64, f64)> {
    let mut file = sys::memfd("reclaim", FILE, 0)?;
    enter(group)?;
    fill(&mut file, content)?;
    enter(CGROUPS)?;
    let crowd = Crowd::gather(processes, || {
        enter(group)?;
        let map = Map::aligned(Some(&file), FILE, Kind::Shared)?;
        map.read_every(PAGE);
        Ok(map)
    })?;
    let path = format!("{group}/memory.reclaim");
    let swapped = proc::field("/proc/vmstat", "pswpout")?;
    let request = FILE.to_string();
    let mut control = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .context(path)?;
    let start = sys::now();
    let outcome = control.write(request.as_bytes());
    let took = sys::now() - start;
    let pages = proc::field("/proc/vmstat", "pswpout")? - swapped;
    // The kernel may stop a little short of the request and says so with EAGAIN; the rest must be gone.
    ensure!(
        pages as usize * PAGE >= FILE / 10 * 9,
        "only {pages} pages of {} were reclaimed, and the call answered {outcome:?}",
        FILE / PAGE
    );
    crowd.dismiss()?;
    Ok((took as f64, pages as f64))
}

fn fill(file: &mut fs::File, content: Content) -> Result<()> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    file.seek(SeekFrom::Start(0))?;
    for number in 1..=(FILE / PAGE) as u64 {
        let mut page = [0; PAGE];
        match content {
            Content::Number => page[..8].copy_from_slice(&number.to_ne_bytes()),
            Content::Records => {
                page.fill(b' ');
                for record in page.chunks_exact_mut(16) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    record[..8].copy_from_slice(&random.to_ne_bytes());
                }
            }
        }
        file.write_all(&page)?;
    }
    Ok(())
}
