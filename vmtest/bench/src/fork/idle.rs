// SPDX-License-Identifier: MIT OR Apache-2.0
//! fork where the feature has nothing to do: nobody has asked for it, or there is nothing to share.

use super::sharing;
use crate::figure::Samples;
use crate::sys::{self, Kind, Map, PAGE};
use anyhow::Result;

const WARM_UP: usize = 5;
const SAMPLES: usize = 51;
const MIB: usize = 1 << 20;

/// Nobody asks.
pub fn unused() -> Result<()> {
    measure("unused_fork", || {})?;
    with_memory(16 * MIB, |map| {
        measure("unused_fork_of_16_MiB", || map.write_every(PAGE))?;
        measure("unused_fork_of_16_MiB_read-only_since_the_last", || {})
    })?;
    with_memory(256 * MIB, |_| {
        measure("unused_fork_of_256_MiB_read-only_since_the_last", || {})
    })
}

/// Somebody asks in vain: what the process has is too small, or shared memory, or must be copied.
pub fn nothing_to_share() -> Result<()> {
    measure("nothing_to_share_in_a_small_process", || {})?;
    let shared = Map::aligned(None, 16 * MIB, Kind::Shared)?;
    shared.write_every(PAGE);
    measure("nothing_to_share_but_shared_memory_of_16_MiB", || {})?;
    shared.unmap()?;
    with_memory(16 * MIB, |map| {
        map.lock()?;
        measure("nothing_to_share_but_locked_16_MiB", || {
            map.write_every(PAGE);
        })
    })?;
    // The last, as the process counts as one with pins from now on.
    with_memory(16 * MIB, |map| {
        map.pin_for_a_moment()?;
        measure("nothing_to_share_but_16_MiB_with_pins", || {
            map.write_every(PAGE);
        })
    })
}

fn with_memory(len: usize, work: impl FnOnce(&Map) -> Result<()>) -> Result<()> {
    let map = Map::aligned(None, len, Kind::Private)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    map.write_every(PAGE);
    work(&map)?;
    map.unmap()?;
    Ok(())
}

/// Instructions of a fork; before each, `prepare` does its part.
fn measure(figure: &str, prepare: impl Fn()) -> Result<()> {
    let mut samples = Samples::default();
    // Neither here nor there may a table be shared.
    sharing(false, 0, || {
        for round in 0..WARM_UP + SAMPLES {
            prepare();
            sys::settle();
            let start = sys::now();
            let child = sys::fork(|| Ok(()))?;
            let took = sys::now() - start;
            child.wait()?;
            if round >= WARM_UP {
                samples.push(took as f64);
            }
        }
        Ok(())
    })?;
    samples.emit(figure, "instructions");
    Ok(())
}
