//! DAMON, the kernel's monitor of accesses, over shared tables: by the addresses of one sharer, and by
//! the frames. What it watches and what it pages out is right for every sharer.

use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::machine::{Damon, Swap};
use crate::oracle::pages;
use crate::peer::Remote;
use crate::sys::{self, GRANULE, PAGE};
use crate::team::Team;
use crate::{ensure, ensure_eq, group};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

group!("damon";
    addresses_show_accesses_of_any_sharer(120),
    frames_show_accesses_of_any_sharer(120),
    addresses_paged_out_while_shared(120),
    addresses_paged_out_when_alone(120),
    frames_paged_out_under_all_sharers(180),
    frames_made_hot_and_cold(120),
);

/// What DAMON is to watch: a process's addresses, or frames.
struct Target {
    pid: Option<i32>,
    ranges: Vec<Range<u64>>,
}

impl Target {
    /// With one scheme, for what was accessed at least and at most so often; on.
    fn watch(&self, action: &str, least: u64, most: u64) -> Res<Damon> {
        let operations = if self.pid.is_some() {
            "fvaddr"
        } else {
            "paddr"
        };
        let d = Damon::new(operations, self.pid, &self.ranges)?;
        d.scheme(action, least, most)?;
        d.on()?;
        Ok(d)
    }

    fn size(&self) -> u64 {
        self.ranges.iter().map(|r| r.end - r.start).sum()
    }
}

const ANY: u64 = u32::MAX as u64;

/// What member `i` maps.
fn addresses(t: &Team, i: usize) -> Target {
    let all = t.at(i, 0)..t.at(i, 0) + t.granules * GRANULE;
    Target {
        pid: Some(t.peer(i).pid),
        ranges: [all].into(),
    }
}

/// The frames of the team's file, as ranges of physical addresses: the largest of them.
fn frames(t: &Team) -> Res<Target> {
    // Pages that were just allocated may not be on the LRU lists yet, where DAMON looks for them.
    std::fs::write("/proc/sys/vm/drop_caches", "1")?;
    let mut all: Vec<u64> = kernel::pagemap(t.peer(0).pid, t.at(0, 0), pages(t.granules))?
        .iter()
        .filter(|e| *e & pagemap::PRESENT != 0)
        .map(|e| (e & ((1 << 55) - 1)) * PAGE)
        .collect();
    all.sort_unstable();
    let mut runs: Vec<Range<u64>> = vec![];
    for frame in all {
        match runs.last_mut() {
            Some(run) if run.end == frame => run.end += PAGE,
            _ => runs.push(frame..frame + PAGE),
        }
    }
    runs.sort_unstable_by_key(|r| r.start.wrapping_sub(r.end));
    runs.truncate(Damon::REGIONS);
    runs.sort_unstable_by_key(|r| r.start);
    Ok(Target {
        pid: None,
        ranges: runs,
    })
}

/// Waits until one of DAMON's counters of bytes is so high.
fn until(what: &str, counter: impl Fn() -> Res<u64>, bytes: u64) -> Res {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = counter()?;
        if now >= bytes {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "DAMON's scheme was {what} {now} bytes, {bytes} were to be"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// In a peer: loads from every page of a range until the word at `a[2]` is set, on changing CPUs, so
/// that it does not go by old translations.
const WANDERER: Remote = |a, _| {
    // SAFETY: the test passes the address of a page of zeros, which stays mapped.
    let stop = unsafe { &*(a[2] as *const AtomicU64) };
    for cpu in 0.. {
        if stop.load(SeqCst) != 0 {
            break;
        }
        sys::pin_to_cpu(cpu);
        for page in 0..a[1] {
            if sys::load64(a[0] + page * PAGE).is_err() {
                return (1, vec![]);
            }
        }
    }
    (0, vec![])
};

/// While nobody touches the file what DAMON watches is seen as not accessed; while only member 1 does,
/// as accessed.
fn shows_accesses(ctx: &Ctx, target: fn(&Team) -> Res<Target>) -> Res {
    let stop = sys::mmap(0, PAGE, sys::RW, sys::SHARED | sys::ANON, -1, 0)?;
    let t = Team::new(ctx, 3, 4)?;
    let target = target(&t)?;
    let d = target.watch("stat", 0, 0)?;
    until("tried on", || d.tried(), target.size() / 2)?;
    drop(d);
    t.peer(1)
        .start(WANDERER, &[t.at(1, 0), pages(4), stop], &[])?;
    let d = target.watch("stat", 1, ANY)?;
    let seen = until("tried on", || d.tried(), target.size() / 2);
    sys::store64(stop, 1)?;
    ensure_eq!(t.peer(1).finish()?.0, 0, "the process that touches");
    seen?;
    t.verify_all()?;
    t.expect_all(4)
}

/// Watching one sharer's addresses shows what another sharer touches.
fn addresses_show_accesses_of_any_sharer(ctx: &Ctx) -> Res {
    if !ctx.sharing {
        crate::skip!("without shared tables another process's accesses are not seen");
    }
    shows_accesses(ctx, |t| Ok(addresses(t, 0)))
}

/// Watching the file's frames shows what any sharer touches.
fn frames_show_accesses_of_any_sharer(ctx: &Ctx) -> Res {
    shows_accesses(ctx, frames)
}

/// Paging out one sharer's addresses takes nothing from anybody: others map it.
fn addresses_paged_out_while_shared(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let mut t = Team::new(ctx, 3, 3)?;
    let d = addresses(&t, 0).watch("pageout", 0, ANY)?;
    until("tried on", || d.tried(), 1)?;
    for _ in 0..if ctx.long { 40 } else { 4 } {
        std::thread::sleep(Duration::from_millis(200));
        t.coherent()?;
    }
    ensure_eq!(swap.used_pages(), 0, "pages swapped out under sharers");
    t.expect_all(3)
}

/// Paging out the addresses of a process that is the only one to map them does, and who comes later
/// finds the content.
fn addresses_paged_out_when_alone(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let mut t = Team::new(ctx, 2, 3)?;
    t.members.truncate(1);
    let d = addresses(&t, 0).watch("pageout", 0, ANY)?;
    until("applied to", || d.applied(), GRANULE)?;
    drop(d);
    ensure!(swap.used_pages() > 0, "nothing was swapped out");
    t.join()?;
    t.coherent()
}

/// Paging out frames takes them from every sharer; what is written meanwhile is not lost.
fn frames_paged_out_under_all_sharers(ctx: &Ctx) -> Res {
    let swap = Swap::on(256)?;
    let mut t = Team::new(ctx, 3, 3)?;
    for round in 0..if ctx.long { 20 } else { 3 } {
        let target = frames(&t)?;
        let d = target.watch("pageout", 0, ANY)?;
        for n in 0..20 {
            t.store(n as usize % 3, (round * 401 + n * 37) % pages(3))?;
        }
        until("applied to", || d.applied(), target.size() / 4)?;
        drop(d);
        ensure!(swap.used_pages() > 0, "nothing was swapped out");
        for i in 0..3 {
            let seen = kernel::pagemap(t.peer(i).pid, t.at(i, 0), pages(3))?;
            let present = seen.iter().filter(|e| *e & pagemap::PRESENT != 0).count() as u64;
            ensure!(
                present <= pages(3) * 7 / 8,
                "member {i} still maps {present} of {} pages",
                pages(3)
            );
        }
        t.verify_all()?;
    }
    t.coherent()?;
    t.expect_all(3)
}

/// Moving frames to the ends of the LRU lists changes nothing that can be seen.
fn frames_made_hot_and_cold(ctx: &Ctx) -> Res {
    let mut t = Team::new(ctx, 3, 2)?;
    for action in ["lru_prio", "lru_deprio"] {
        let d = frames(&t)?.watch(action, 0, ANY)?;
        until("applied to", || d.applied(), PAGE)?;
        drop(d);
        t.coherent()?;
    }
    t.expect_all(2)
}
