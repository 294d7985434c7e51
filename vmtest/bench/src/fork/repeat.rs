// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a fuzzer's fork server does: one fork after the other while an early child lives on.

use super::sharing;
use crate::figure::{emit, Samples};
use crate::sys::{self, Child, Kind, Map, GRANULE, PAGE};
use crate::{proc, progress};
use anyhow::Result;
use std::io::{Read, Write};

const MEMORY: usize = 256 << 20;
const ROUNDS: usize = 100;
/// Rounds at the begin and at the end that are compared.
const COMPARED: usize = 10;

/// Prints the figures.
pub fn run(ask: bool) -> Result<()> {
    let map = Map::aligned(None, MEMORY, Kind::Private)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    map.write_every(PAGE);
    let granules = (MEMORY / GRANULE) as u64;
    for (suffix, others) in [("", Others::End), ("_crowd", Others::Stay)] {
        sharing(ask, granules * ROUNDS as u64, || {
            measure(&map, suffix, others)
        })?;
    }
    map.unmap()?;
    Ok(())
}

/// What the children after the first do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Others {
    /// Write to a few pages and end, before the next is forked
    End,
    /// Live on, too
    Stay,
}

fn measure(map: &Map, suffix: &str, others: Others) -> Result<()> {
    let (wait_here, mut gate) = sys::pipe()?;
    let stay = || -> Result<Child> { Ok(sys::fork(|| Ok((&wait_here).read_exact(&mut [0])?))?) };
    map.write_every(PAGE);
    let mut staying = vec![stay()?];
    let mut fork = Samples::default();
    let mut tables = Vec::with_capacity(ROUNDS);
    let mut took = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS {
        sys::settle();
        let start = sys::now();
        let child = match others {
            Others::Stay => stay()?,
            Others::End => sys::fork(|| {
                for n in 0..4 {
                    map.write_at((round * 7 + n * 31) * GRANULE % MEMORY + PAGE);
                }
                Ok(())
            })?,
        };
        let instructions = (sys::now() - start) as f64;
        match others {
            Others::Stay => staying.push(child),
            Others::End => child.wait()?,
        }
        took.push(instructions);
        fork.push(instructions);
        sys::settle();
        tables.push(proc::meminfo(["PageTables"])?[0] as f64);
    }
    gate.write_all(&vec![b'g'; staying.len()])?;
    for child in staying {
        child.wait()?;
    }
    progress!("{ROUNDS} forks while the first child lives measured{suffix}");
    fork.emit(&format!("again{suffix}"), "instructions");
    let per_fork = |begin: f64, end: f64| (end - begin) / (ROUNDS - COMPARED) as f64;
    let growth = per_fork(mean(&took[..COMPARED]), mean(&took[ROUNDS - COMPARED..]));
    emit(&format!("again{suffix}_growth"), "/fork", growth);
    let growth = per_fork(tables[COMPARED - 1], tables[ROUNDS - 1]);
    emit(&format!("again{suffix}_tables"), "kB/fork", growth);
    Ok(())
}

/// The mean of the middle half: without the rounds that the timer interrupted.
fn mean(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let quarter = sorted.len() / 4;
    let middle = &sorted[quarter..sorted.len() - quarter];
    middle.iter().sum::<f64>() / middle.len() as f64
}
