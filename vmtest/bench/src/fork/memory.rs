// SPDX-License-Identifier: MIT OR Apache-2.0
//! fork of much memory, all of it written, in base pages: the call, the end of the child, and the writes after it.

use super::sharing;
use crate::figure::Samples;
use crate::progress;
use crate::sys::{self, Kind, Map, GRANULE, PAGE};
use anyhow::Result;
use std::io::{Read, Write};

const GIB: usize = 1 << 30;
/// Granules in which a first write is measured, each after the same fork.
const WRITES: usize = 100;

/// The figures of 1 GiB, and those of single writes.
pub fn one_gib(ask: bool) -> Result<()> {
    const ROUNDS: usize = 5;
    let small = small_fork()?;
    let map = populate(GIB)?;
    let granules = (GIB / GRANULE) as u64;
    let fork = sharing(ask, granules * ROUNDS as u64, || {
        fork_and_exit(&map, "1gib", ROUNDS)
    })?;
    // What fork takes for one granule. On the stock kernel that, and the fault that copies a page, is what
    // a first write may cost where fork has put its work off.
    let granule = (fork - small) / granules as f64;
    for (figure, who) in [("parent", Who::Parent), ("child", Who::Child)] {
        let writes = sharing(ask, granules, || writes_after_fork(&map, who))?;
        let mut first = Samples::default();
        let mut second = Samples::default();
        for (a, b) in writes {
            first.push(if ask { a } else { granule + a });
            second.push(b);
        }
        first.emit(&format!("first_write_{figure}"), "instructions");
        second.emit(&format!("second_write_{figure}"), "instructions");
    }
    map.unmap()?;
    Ok(())
}

/// The figures of 4 GiB.
pub fn four_gib(ask: bool) -> Result<()> {
    const ROUNDS: usize = 3;
    // These take long, and differ by a few interrupts of the timer.
    const TOTALS: usize = 1;
    let map = populate(4 * GIB)?;
    let granules = (4 * GIB / GRANULE) as u64;
    sharing(ask, granules * ROUNDS as u64, || {
        fork_and_exit(&map, "4gib", ROUNDS)
    })?;
    for (figure, who) in [("parent", Who::Parent), ("child", Who::Child)] {
        let mut total = Samples::default();
        sharing(ask, granules * TOTALS as u64, || {
            for _ in 0..TOTALS {
                total.push(fork_and_write_each(&map, who)?);
            }
            Ok(())
        })?;
        progress!("fork and one write in every granule, by the {figure}");
        total.emit(&format!("write_each_{figure}"), "instructions");
    }
    map.unmap()?;
    Ok(())
}

/// Private memory with a page in every place.
fn populate(len: usize) -> Result<Map> {
    let map = Map::aligned(None, len, Kind::Private)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    map.write_every(PAGE);
    progress!("{} MiB written", len >> 20);
    Ok(map)
}

/// Instructions of a fork with next to no memory: the part of a fork that does not grow with it.
fn small_fork() -> Result<f64> {
    let mut samples = Samples::default();
    for _ in 0..21 {
        sys::settle();
        let start = sys::now();
        let child = sys::fork(|| Ok(()))?;
        samples.push((sys::now() - start) as f64);
        child.wait()?;
    }
    Ok(samples.median())
}

/// Measures fork, and the end of a child that touches nothing; returns the former.
fn fork_and_exit(map: &Map, what: &str, rounds: usize) -> Result<f64> {
    let clock = Map::new(None, PAGE, Kind::Shared)?;
    let (mut fork, mut exit) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        take_back(map);
        sys::settle();
        let start = sys::now();
        let child = sys::fork(|| {
            clock.set_word(sys::now());
            sys::leave(0)
        })?;
        fork.push((sys::now() - start) as f64);
        child.wait()?;
        exit.push((sys::now() - clock.word()) as f64);
    }
    progress!("fork of {what} measured {rounds} times");
    let median = fork.median();
    fork.emit(&format!("fork_{what}"), "instructions");
    exit.emit(&format!("exit_{what}"), "instructions");
    Ok(median)
}

/// Writes to every page, so that the next fork finds what the first one does: tables and pages that are the
/// parent's own, and writable.
fn take_back(map: &Map) {
    map.write_every(PAGE);
}

/// Who of the two writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Parent,
    Child,
}

/// The first and the second write after a fork in each of many granules, to a page each, while the other one
/// lives and does nothing.
fn writes_after_fork(map: &Map, who: Who) -> Result<Vec<(f64, f64)>> {
    let results = Map::new(None, PAGE, Kind::Shared)?;
    // It takes a fault to write there for the first time, and one more in a child.
    let write = || {
        results.set_word(0);
        for n in 0..WRITES {
            let at = n * GRANULE;
            let start = sys::now();
            map.write_at(at + 2 * PAGE);
            let first = sys::now();
            map.write_at(at + 5 * PAGE);
            let second = sys::now();
            results.set_word_at(16 * n, first - start);
            results.set_word_at(16 * n + 8, second - first);
        }
    };
    fork_and_write(map, who, write)?;
    let word = |at| results.word_at(at) as f64;
    Ok((0..WRITES)
        .map(|n| (word(16 * n), word(16 * n + 8)))
        .collect())
}

/// Instructions from the fork's begin to the last write.
fn fork_and_write_each(map: &Map, who: Who) -> Result<f64> {
    let end = Map::new(None, PAGE, Kind::Shared)?;
    end.set_word(0);
    let start = fork_and_write(map, who, || {
        map.write_every(GRANULE);
        end.set_word(sys::now());
    })?;
    Ok((end.word() - start) as f64)
}

/// Forks and has one of the two `write` while the other one waits. Returns when the fork began.
fn fork_and_write(map: &Map, who: Who, write: impl Fn()) -> Result<u64> {
    let (mut wait_here, mut gate) = sys::pipe()?;
    take_back(map);
    sys::settle();
    let start = sys::now();
    let child = sys::fork(|| {
        if who == Who::Child {
            write();
        } else {
            wait_here.read_exact(&mut [0])?;
        }
        Ok(())
    })?;
    if who == Who::Parent {
        write();
        gate.write_all(b"g")?;
    }
    child.wait()?;
    Ok(start)
}
