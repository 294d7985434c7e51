// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page-table memory of many processes over one file, and the faults of one that reads it.

use crate::figure::emit;
use crate::sys::{self, Kind, Map, PAGE};
use crate::{proc, progress};
use anyhow::{bail, Context, Result};
use std::io::{Read, Write};
use std::time::Duration;

const PROCESSES: usize = 200;
const CROWD_FILE: usize = 256 << 20;
const FAULT_FILE: usize = 1 << 30;

/// Processes that have done something and now wait to be let go.
pub struct Crowd {
    children: Vec<sys::Child>,
    gate: std::fs::File,
}

impl Crowd {
    /// Forks `size` processes, one after the other; each does `work` and keeps what it returns until the end.
    pub fn gather<T>(size: usize, work: impl Fn() -> Result<T>) -> Result<Crowd> {
        let (wait_here, gate) = sys::pipe()?;
        let (mut ready, tell) = sys::pipe()?;
        let mut children = Vec::with_capacity(size);
        for _ in 0..size {
            let child = sys::fork(|| {
                let kept = work()?;
                (&tell).write_all(b"r")?;
                // The parent lets everybody go by writing one byte each.
                (&wait_here).read_exact(&mut [0])?;
                drop(kept);
                Ok(())
            })?;
            children.push(child);
            // One at a time, so that the order of arrival is the same in every run.
            ready
                .read_exact(&mut [0])
                .context("a process of the crowd failed")?;
        }
        Ok(Crowd { children, gate })
    }

    /// Lets everybody go, and waits for them.
    pub fn dismiss(mut self) -> Result<()> {
        self.gate.write_all(&vec![b'g'; self.children.len()])?;
        for child in self.children {
            child.wait()?;
        }
        Ok(())
    }
}

/// Prints the figures.
pub fn run() -> Result<()> {
    table_memory()?;
    faults()
}

/// PageTables once it no longer changes: what processes have given up is freed a grace period later.
fn page_tables() -> Result<f64> {
    let (mut last, mut same) = (None, 0);
    for _ in 0..100 {
        sys::settle();
        let [kb] = proc::meminfo(["PageTables"])?;
        same = if last == Some(kb) { same + 1 } else { 0 };
        if same == 3 {
            return Ok(kb as f64);
        }
        last = Some(kb);
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("PageTables does not come to rest")
}

/// Page tables that `PROCESSES` processes need more than the machine did before, in kB.
fn growth<T>(what: &str, work: impl Fn() -> Result<T>) -> Result<f64> {
    let before = page_tables()?;
    let crowd = Crowd::gather(PROCESSES, work)?;
    let grown = page_tables()? - before;
    crowd.dismiss()?;
    progress!("{PROCESSES} processes {what}: PageTables + {grown} kB");
    Ok(grown)
}

fn table_memory() -> Result<()> {
    let file = sys::memfd("crowd", CROWD_FILE, 0)?;
    sys::allocate(&file, CROWD_FILE)?;
    let empty = growth("that map nothing", || Ok(()))?;
    let mapped = growth("that read 256 MiB", || {
        let map = Map::new(Some(&file), CROWD_FILE, Kind::Shared)?;
        map.read_every(PAGE);
        Ok(map)
    })?;
    emit(
        "table_memory",
        "kB/process",
        (mapped - empty) / PROCESSES as f64,
    );
    emit("table_memory_empty", "kB/process", empty / PROCESSES as f64);
    Ok(())
}

fn faults() -> Result<()> {
    let file = sys::memfd("faults", FAULT_FILE, 0)?;
    let creator = Map::new(Some(&file), FAULT_FILE, Kind::Shared)?;
    creator.write_every(PAGE);
    progress!("1 GiB populated");
    sys::fork(|| {
        let before = sys::minor_faults()?;
        let map = Map::new(Some(&file), FAULT_FILE, Kind::Shared)?;
        map.read_every(PAGE);
        let faults = sys::minor_faults()? - before;
        emit("faults", "faults", faults as f64);
        Ok(())
    })?
    .wait()?;
    creator.unmap()?;
    Ok(())
}
