// SPDX-License-Identifier: MIT OR Apache-2.0
//! What it costs a second process to map a populated file, read all of it, and unmap it again.

use crate::figure::Samples;
use crate::sys::{self, Kind, Map, GRANULE, PAGE};
use crate::{proc, progress};
use anyhow::{ensure, Result};
use std::fs::File;
use std::io::{Read, Write};

const FILE: usize = 128 << 20;
const REPEATS: usize = 11;
const SHMEM_THP: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Prints the figures with base pages.
pub fn run() -> Result<()> {
    let file = sys::memfd("attach", FILE, 0)?;
    let creator = Map::aligned(Some(&file), FILE, Kind::Shared)?;
    creator.write_every(PAGE);
    measure("", &file)?;
    creator.unmap()?;
    Ok(())
}

/// Prints the same with huge pages, which share nothing but need no page tables either.
pub fn compare() -> Result<()> {
    proc::write(SHMEM_THP, "advise")?;
    let file = sys::memfd("attach-thp", FILE, 0)?;
    let creator = Map::aligned(Some(&file), FILE, Kind::Shared)?;
    creator.advise(libc::MADV_HUGEPAGE)?;
    creator.write_every(PAGE);
    let [huge] = proc::meminfo(["ShmemHugePages"])?;
    ensure!(
        huge as usize * 1024 >= FILE,
        "only {huge} kB of {} kB are in huge pages",
        FILE / 1024
    );
    measure("_thp", &file)?;
    creator.unmap()?;
    drop(file);

    let pages = FILE / GRANULE;
    proc::write(HUGE_PAGES, &pages.to_string())?;
    let file = sys::memfd("attach-hugetlb", FILE, libc::MFD_HUGETLB)?;
    let creator = Map::aligned(Some(&file), FILE, Kind::Shared)?;
    creator.write_every(PAGE);
    measure("_hugetlb", &file)?;
    creator.unmap()?;
    drop(file);
    proc::write(HUGE_PAGES, "0")
}

fn measure(suffix: &str, file: &File) -> Result<()> {
    let (mut results, tell) = sys::pipe()?;
    let (mut attach, mut detach) = (Samples::default(), Samples::default());
    for round in 0..=REPEATS {
        sys::settle();
        sys::fork(|| {
            let start = sys::now();
            let map = Map::new(Some(file), FILE, Kind::Shared)?;
            map.read_every(PAGE);
            let attached = sys::now();
            map.unmap()?;
            let detached = sys::now();
            (&tell).write_all(&(attached - start).to_ne_bytes())?;
            (&tell).write_all(&(detached - attached).to_ne_bytes())?;
            Ok(())
        })?
        .wait()?;
        let mut word = [[0; 8]; 2];
        for w in &mut word {
            results.read_exact(w)?;
        }
        // The first round warms caches of the kernel's allocators up.
        if round > 0 {
            attach.push(u64::from_ne_bytes(word[0]) as f64);
            detach.push(u64::from_ne_bytes(word[1]) as f64);
        }
    }
    progress!("attached and detached 128 MiB {REPEATS} times{suffix}");
    attach.emit(&format!("attach{suffix}"), "instructions");
    detach.emit(&format!("detach{suffix}"), "instructions");
    Ok(())
}
