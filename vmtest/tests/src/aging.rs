//! Who looks at accessed bits in order to tell hot pages from cold ones: what is in a table counts once, through
//! whichever of its sharers, and nobody else is forgotten over that.

use crate::harness::{Ctx, Res};
use crate::kernel::{self, pagemap};
use crate::machine::{Cgroup, Setting, Swap};
use crate::oracle::pages;
use crate::peer::{access, flat, Peer, Remote};
use crate::sys::{self, ANON, GRANULE, PAGE, PRIVATE, RO, RW};
use crate::team::{expect_tables, Team};
use crate::{ensure, ensure_eq, group, skip};
use std::fs;
use std::time::{Duration, Instant};

group!("aging";
    what_readers_use_stays(120),
    a_shared_table_is_aged_once,
);

/// Two processes share tables and do not use them; a third one, a reader, has other tables with the same pages in
/// them, and uses every second page again and again. Those are not the pages that reclaim takes.
fn what_readers_use_stays(ctx: &Ctx) -> Res {
    // So many that reclaim comes to none of them twice: it forgets that a page was used when it looks.
    const GRANULES: u64 = 8;
    need_generations()?;
    let swap = Swap::on(64)?;
    let group = Cgroup::enter()?;
    let t = Team::new(ctx, 2, GRANULES)?;
    let reader = Peer::spawn()?;
    let addr = reader.map(&t.fd, 0, GRANULES * GRANULE, RO)?;
    reader.touch(addr, pages(GRANULES))?;
    expect_tables(ctx, &reader, GRANULES)?;
    t.expect_all(GRANULES)?;
    // Pages that were just allocated may not be on the LRU lists yet.
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let gone = |first: usize| -> Res<usize> {
        let seen = kernel::pagemap(reader.pid, addr, pages(GRANULES))?;
        let mine = seen.iter().skip(first).step_by(2);
        Ok(mine.filter(|e| *e & pagemap::PRESENT == 0).count())
    };
    // So that all pages are old, on whichever node, and no table says that they were used.
    for _ in 0..4 {
        for node in Aging::of(&group)? {
            node.age()?;
        }
    }
    // Generations are told by looking at tables, and not only at pages that are about to go. The plain lists are not.
    let _plain = Setting::set(ENABLED, "n")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut used, mut unused) = (0, 0);
    while unused < 128 {
        ensure!(Instant::now() < deadline, "too little is reclaimed");
        let (r, d) = reader.call(USE, &[addr, pages(GRANULES)], &[])?;
        crate::peer::unpack(r, &d)?;
        group.reclaim(32 * PAGE);
        used += gone(0)?;
        unused = gone(1)?;
    }
    ensure!(
        used * 4 <= unused,
        "{used} times a page was reclaimed that the reader uses, {unused} times one that nobody uses"
    );
    t.expect_all(GRANULES)?;
    t.verify_all()?;
    drop(reader);
    drop(t);
    swap.off()
}

/// In a peer: loads from every second page, as it would with nothing of it cached. Arguments: address, pages.
const USE: Remote = |a, _| {
    // So much that all of the process's translations are flushed rather than those of each page.
    let len = 64 * PAGE;
    let flush = sys::mmap(0, len, RW, PRIVATE | ANON, -1, 0).and_then(|scratch| {
        for page in 0..64 {
            sys::store64(scratch + page * PAGE, 1).ok();
        }
        sys::munmap(scratch, len)
    });
    if let Err(e) = flush {
        return (flat(Err(e)), vec![]);
    }
    let mut pages = (0..a[1]).step_by(2);
    access(pages.try_fold(0, |_, page| sys::load64(a[0] + page * PAGE)))
};

/// One aging of the multi-generational LRU goes through a table once, however many share it.
fn a_shared_table_is_aged_once(ctx: &Ctx) -> Res {
    ctx.need_feature()?;
    const GRANULES: u64 = 64;
    const SHARERS: usize = 6;
    need_generations()?;
    ctx.opt_in()?;
    let group = Cgroup::enter()?;
    let t = Team::untouched(ctx, sys::memfd(0)?, SHARERS, GRANULES)?;
    for i in 0..SHARERS {
        for granule in 0..GRANULES {
            t.peer(i).touch(t.granule(i, granule), 1)?;
        }
    }
    t.expect_all(GRANULES)?;
    let first = || -> Res<Aging> {
        match Aging::of(&group)?.into_iter().next() {
            Some(node) => Ok(node),
            None => crate::fail!("lru_gen_full has no node of the group"),
        }
    };
    let before = first()?;
    before.age()?;
    let after = first()?;
    ensure_eq!(
        after.generation,
        before.generation + 1,
        "the generation after an aging"
    );
    let (looked, all) = (after.looked_at - before.looked_at, pages(GRANULES));
    ensure!(
        (all..2 * all).contains(&looked),
        "an aging looked at {looked} PTEs, where {SHARERS} processes share tables of {all}"
    );
    Ok(())
}

const ENABLED: &str = "/sys/kernel/mm/lru_gen/enabled";

fn need_generations() -> Res {
    let enabled = fs::read_to_string(ENABLED).unwrap_or_default();
    if enabled.trim().is_empty() || enabled.trim() == "0x0000" {
        skip!("no multi-generational LRU in this kernel");
    }
    Ok(())
}

/// What debugfs tells of a cgroup on one node.
struct Aging {
    group: u64,
    node: u64,
    generation: u64,
    /// PTEs that agings have looked at so far.
    looked_at: u64,
}

impl Aging {
    /// On each node.
    fn of(group: &Cgroup) -> Res<Vec<Aging>> {
        let text = fs::read_to_string("/sys/kernel/debug/lru_gen_full")?;
        let path = group.path("");
        let name = path
            .trim_start_matches("/sys/fs/cgroup")
            .trim_end_matches('/');
        let number = |word: Option<&str>| word.and_then(|w| w.parse().ok()).unwrap_or(0);
        let mut nodes: Vec<Aging> = vec![];
        let mut id = None;
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if line.starts_with("memcg") {
                id = line.ends_with(name).then(|| number(words.nth(1)));
                continue;
            }
            let Some(group) = id else { continue };
            if line.starts_with(" node") {
                nodes.push(Aging {
                    group,
                    node: number(words.nth(1)),
                    generation: 0,
                    looked_at: 0,
                });
                continue;
            }
            // Generations, oldest first, each followed by lines that are indented further.
            let Some(node) = nodes.last_mut() else {
                continue;
            };
            if !line.starts_with("            ") {
                node.generation = number(words.next());
            } else if let Some(total) = words.next().and_then(|w| w.strip_suffix('T')) {
                node.looked_at = number(Some(total));
            }
        }
        Ok(nodes)
    }

    /// Has everything aged, whatever was found before.
    fn age(&self) -> Res {
        let command = format!("+ {} {} {} 1 1", self.group, self.node, self.generation);
        Ok(fs::write("/sys/kernel/debug/lru_gen", command)?)
    }
}
