//! Parent and child after the fork: each sees its own writes and nobody else's, by whatever way they
//! come, and reading costs no table.

use super::{diverge, verify_all, Events, Kin};
use crate::harness::{own, Ctx, Res};
use crate::machine::Ext4;
use crate::oracle::pages;
use crate::sys::{self, FIXED, GRANULE, GRANULE_PAGES, PAGE, PRIVATE, RO, RW};
use crate::{ensure_eq, group, skip};
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};

group!("odf";
    reading_shares,
    parent_writes,
    child_writes,
    both_write,
    first_and_last_byte_of_a_granule,
    holes_are_filled_for_oneself,
    heads_and_tails_are_copied,
    last_one_takes_it_back,
    last_one_takes_it_back_in_every_order,
    every_page_by_either,
    read_only_mapping,
    ptrace_writes,
    proc_mem_writes,
    process_vm_writes,
    reads_from_outside,
    uprobe_in_one,
);

/// Whoever only reads, however often, copies nothing and keeps sharing.
fn reading_shares(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 3)?;
    let before = Events::now();
    let child = k.child(ctx, 3)?;
    let grandchild = child.child(ctx, 3)?;
    for _ in 0..3 {
        verify_all(&[&k, &child, &grandchild])?;
    }
    before.expect(ctx, 0, 0)?;
    child.borrows(ctx, 3)?;
    k.borrows(ctx, 0)
}

fn parent_writes(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 3)?;
    let child = k.child(ctx, 3)?;
    let before = Events::now();
    k.store(GRANULE_PAGES + 7)?;
    before.expect(ctx, 1, 0)?;
    k.store(GRANULE_PAGES + 8)?;
    before.expect(ctx, 1, 0)?;
    verify_all(&[&k, &child])?;
    k.fill(0..pages(3))?;
    verify_all(&[&k, &child])?;
    before.expect(ctx, 3, 0)
}

fn child_writes(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 3)?;
    let mut child = k.child(ctx, 3)?;
    let before = Events::now();
    child.store(GRANULE_PAGES + 7)?;
    before.expect(ctx, 1, 0)?;
    child.borrows(ctx, 2)?;
    verify_all(&[&k, &child])?;
    child.fill(0..pages(3))?;
    verify_all(&[&k, &child])?;
    child.borrows(ctx, 0)?;
    before.expect(ctx, 3, 0)
}

/// The same page by both, in both orders: the second finds nobody to copy for but itself.
fn both_write(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let before = Events::now();
    k.store(9)?;
    child.store(9)?;
    child.store(GRANULE_PAGES + 9)?;
    k.store(GRANULE_PAGES + 9)?;
    verify_all(&[&k, &child])?;
    before.expect(ctx, 2, 2)?;
    child.borrows(ctx, 0)?;
    diverge(&mut [&mut k, &mut child])?;
    before.expect(ctx, 2, 2)
}

/// One byte at each end of the granule, by each; a neighbour's table is not concerned.
fn first_and_last_byte_of_a_granule(ctx: &Ctx) -> Res {
    let k = Kin::new(ctx, 3)?;
    let mut copies = 0;
    for who in 0..2 {
        for offset in [0, GRANULE - 1] {
            let child = k.child(ctx, 3)?;
            let before = Events::now();
            let (writer, other) = if who == 0 { (&k, &child) } else { (&child, &k) };
            let at = k.base + GRANULE + offset;
            let page = at / PAGE - k.base / PAGE;
            let old = k.bytes(page)[(at % PAGE) as usize];
            let flip: crate::peer::Remote = |a, _| {
                let byte = a[1] as u8;
                crate::peer::access(sys::copy(a[0], &raw const byte as u64, 1).map(|()| 0))
            };
            let byte = u64::from(old ^ 0xff);
            ensure_eq!(writer.peer.call(flip, &[at, byte], &[])?.0, 0, "the store");
            other.verify()?;
            writer.sees(0..page)?;
            writer.sees(page + 1..pages(3))?;
            let word = at & !7;
            let mut want = k.bytes(page);
            want[(at % PAGE) as usize] ^= 0xff;
            let n = (word % PAGE) as usize;
            let want = u64::from_ne_bytes(want[n..n + 8].try_into().unwrap_or_default());
            ensure_eq!(
                writer.peer.load(word)?,
                Ok(want),
                "the word that was written"
            );
            before.expect(ctx, 1, 0)?;
            copies += 1;
            // As it was, for the next round.
            ensure_eq!(
                writer.peer.call(flip, &[at, u64::from(old)], &[])?.0,
                0,
                "the store back"
            );
            verify_all(&[&k, &child])?;
        }
    }
    ensure_eq!(copies, 4, "rounds");
    Ok(())
}

/// A page that nobody has touched before the fork: what either puts there is its own, and so are the
/// zeros that either reads.
fn holes_are_filled_for_oneself(ctx: &Ctx) -> Res {
    let mut k = Kin::untouched(ctx, 2)?;
    k.fill(0..5)?;
    k.fill(GRANULE_PAGES..GRANULE_PAGES + 5)?;
    let mut child = k.child(ctx, 2)?;
    let mut grandchild = child.child(ctx, 2)?;
    k.store(100)?;
    child.store(100)?;
    grandchild.sees(90..110)?;
    child.sees(GRANULE_PAGES..pages(2))?;
    k.store(GRANULE_PAGES + 100)?;
    grandchild.store(GRANULE_PAGES + 101)?;
    verify_all(&[&k, &child, &grandchild])?;
    diverge(&mut [&mut grandchild, &mut child, &mut k])
}

/// Only whole granules share; what a mapping has before and after them is copied.
fn heads_and_tails_are_copied(ctx: &Ctx) -> Res {
    let mut k = Kin::bare(ctx, 4)?;
    let (lo, hi) = (GRANULE_PAGES - 3, pages(3) + 9);
    k.map(k.at(lo), (hi - lo) * PAGE)?;
    k.advise(lo..hi, libc::MADV_NOHUGEPAGE)?;
    k.fill(lo..hi)?;
    let mut child = k.child(ctx, 2)?;
    let before = Events::now();
    for page in [lo, lo + 2, hi - 1, pages(3)] {
        k.store(page)?;
        child.store(page + u64::from(page == lo))?;
        child.sees(lo..hi)?;
        k.sees(lo..hi)?;
    }
    before.expect(ctx, 0, 0)?;
    child.borrows(ctx, 2)?;
    child.store(GRANULE_PAGES)?;
    k.store(pages(3) - 1)?;
    child.sees(lo..hi)?;
    k.sees(lo..hi)?;
    before.expect(ctx, 2, 0)
}

/// When the child is gone the parent writes without a copy, in place where it was alone before.
fn last_one_takes_it_back(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 4)?;
    let frames = |k: &Kin| -> Res<Vec<u64>> {
        let seen = crate::kernel::pagemap(k.peer.pid, k.base, pages(4))?;
        Ok(seen.iter().map(|e| e & ((1 << 55) - 1)).collect())
    };
    // A page that waits in another CPU's list for the LRU has one reference more and is copied, as after any fork: this
    // empties the lists.
    std::fs::write("/proc/sys/vm/drop_caches", "1")?;
    let old = frames(&k)?;
    let before = Events::now();
    for round in 1..4 {
        let child = k.child(ctx, 4)?;
        child.verify()?;
        child.peer.exit()?;
        k.fill(0..pages(4))?;
        k.verify()?;
        before.expect(ctx, 0, 4 * round)?;
    }
    if ctx.sharing {
        let same = frames(&k)?.iter().zip(&old).filter(|(a, b)| a == b).count();
        ensure_eq!(same as u64, pages(4), "pages that stayed where they were");
    }
    Ok(())
}

/// Parent, child and grandchild leave in each order; who stays sees its own and writes.
fn last_one_takes_it_back_in_every_order(ctx: &Ctx) -> Res {
    for order in 0..6 {
        let mut k = Kin::new(ctx, 2)?;
        let child = k.child(ctx, 2)?;
        let grandchild = child.child(ctx, 2)?;
        k.store(1)?;
        let before = Events::now();
        let mut all = vec![k, child, grandchild];
        for who in [order % 3, order / 3] {
            all.remove(who % all.len()).peer.exit()?;
            all.iter().try_for_each(Kin::verify)?;
        }
        let mut last = all.remove(0);
        last.store(2)?;
        last.store(GRANULE_PAGES + 2)?;
        last.verify()?;
        last.borrows(ctx, 0)?;
        if ctx.sharing {
            ensure_eq!(Events::now().since(&before).copied, 0, "tables copied");
        }
    }
    Ok(())
}

/// In random order, each page by one or by both.
fn every_page_by_either(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let mut dice = rand_chacha::ChaCha8Rng::seed_from_u64(ctx.seed);
    for round in 0..600 {
        let page = dice.next_u64() % pages(2);
        match dice.next_u64() % 3 {
            0 => k.store(page)?,
            1 => child.store(page)?,
            _ => {
                k.store(page)?;
                child.store(page)?;
            }
        }
        if round % 100 == 99 {
            verify_all(&[&k, &child])?;
        }
    }
    verify_all(&[&k, &child])
}

/// What was made read-only is shared as well, refuses stores, and is one's own when it is writable again.
fn read_only_mapping(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    k.must(libc::SYS_mprotect, &[k.at(0), 2 * GRANULE, RO])?;
    let mut child = k.child(ctx, 2)?;
    for who in [&k, &child] {
        let got = who.peer.store(who.at(5), 1)?;
        let refused =
            matches!(got, Err(f) if f.signal == libc::SIGSEGV && f.code == sys::SEGV_ACCERR);
        crate::ensure!(refused, "a store to read-only memory: {got:?}");
    }
    verify_all(&[&k, &child])?;
    child.borrows(ctx, 2)?;
    child.must(libc::SYS_mprotect, &[k.at(0), 2 * GRANULE, RW])?;
    child.store(5)?;
    child.store(GRANULE_PAGES + 5)?;
    verify_all(&[&k, &child])?;
    k.must(libc::SYS_mprotect, &[k.at(0), 2 * GRANULE, RW])?;
    diverge(&mut [&mut k, &mut child])
}

/// Writes a page of `k` from outside in some way, first with its relatives sharing it.
fn outside(ctx: &Ctx, write: fn(pid: i32, at: u64, bytes: &mut [u8]) -> Res) -> Res {
    for round in 0..3 {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        if round == 1 {
            // Memory that the process itself may not write.
            for p in [&k, &child] {
                p.must(libc::SYS_mprotect, &[p.at(0), GRANULE, RO])?;
            }
        }
        for page in [5, GRANULE_PAGES, pages(2) - 1] {
            if round == 1 && page == GRANULE_PAGES {
                break;
            }
            let mut bytes = child.incoming(page);
            write(child.peer.pid, child.at(page), &mut bytes)?;
            verify_all(&[&k, &child])?;
            let mut bytes = k.incoming(page + 1);
            write(k.peer.pid, k.at(page + 1), &mut bytes)?;
            verify_all(&[&k, &child])?;
        }
        if round == 2 {
            child.peer.exit()?;
            let mut bytes = k.incoming(pages(2) + 9);
            write(k.peer.pid, k.at(pages(2) + 9), &mut bytes)?;
            k.verify()?;
        }
    }
    Ok(())
}

/// PTRACE_POKEDATA, word by word.
fn ptrace_writes(ctx: &Ctx) -> Res {
    outside(ctx, |pid, at, bytes| {
        let call = |request: u32, at: u64, data: u64| {
            sys::syscall(
                libc::SYS_ptrace,
                &[u64::from(request), pid as u64, at, data],
            )
        };
        call(libc::PTRACE_ATTACH, 0, 0)?;
        sys::wait(pid)?;
        let mut r = Ok(0);
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let word = u64::from_ne_bytes(word.try_into().unwrap_or_default());
            r = r.and(call(libc::PTRACE_POKEDATA, at + 8 * i as u64, word));
        }
        call(libc::PTRACE_DETACH, 0, 0)?;
        r?;
        Ok(())
    })
}

/// /proc/PID/mem.
fn proc_mem_writes(ctx: &Ctx) -> Res {
    outside(ctx, |pid, at, bytes| {
        let mem = OpenOptions::new()
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        Ok(sys::pwrite(&mem, bytes, at)?)
    })
}

/// process_vm_writev, where the process may write.
fn process_vm_writes(ctx: &Ctx) -> Res {
    outside(ctx, |pid, at, bytes| {
        let local = [bytes.as_mut_ptr() as u64, bytes.len() as u64];
        let remote = [at, bytes.len() as u64];
        let [l, r] = [&local, &remote].map(|v| v.as_ptr() as u64);
        let writev = || sys::syscall(libc::SYS_process_vm_writev, &[pid as u64, l, 1, r, 1, 0]);
        match writev() {
            // Read-only: refused, and nothing is to change; then /proc/PID/mem does it.
            Err(sys::Errno(libc::EFAULT)) => {
                let mem = OpenOptions::new()
                    .write(true)
                    .open(format!("/proc/{pid}/mem"))?;
                sys::pwrite(&mem, bytes, at)?;
            }
            got => ensure_eq!(got, Ok(PAGE), "process_vm_writev"),
        }
        Ok(())
    })
}

/// Reads from outside see each process's own.
fn reads_from_outside(ctx: &Ctx) -> Res {
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let look = |k: &Kin, page: u64| -> Res {
        let mem = std::fs::File::open(format!("/proc/{}/mem", k.peer.pid))?;
        let mut buf = vec![0; PAGE as usize];
        sys::pread(&mem, &mut buf, k.at(page))?;
        ensure_eq!(buf == k.bytes(page), true, "/proc/PID/mem of page {page}");
        let local = [buf.as_mut_ptr() as u64, PAGE];
        let remote = [k.at(page), PAGE];
        let [l, r] = [&local, &remote].map(|v| v.as_ptr() as u64);
        buf.fill(0);
        let a = [k.peer.pid as u64, l, 1, r, 1, 0];
        ensure_eq!(
            sys::syscall(libc::SYS_process_vm_readv, &a),
            Ok(PAGE),
            "its result"
        );
        ensure_eq!(
            buf == k.bytes(page),
            true,
            "process_vm_readv of page {page}"
        );
        Ok(())
    };
    for page in [0, 9, GRANULE_PAGES - 1, GRANULE_PAGES] {
        look(&k, page)?;
        look(&child, page)?;
    }
    k.store(9)?;
    child.store(GRANULE_PAGES)?;
    for page in [0, 9, GRANULE_PAGES - 1, GRANULE_PAGES] {
        look(&k, page)?;
        look(&child, page)?;
    }
    verify_all(&[&k, &child])
}

/// A uprobe on a file that one process alone is traced for: the breakpoint is in its copy of the page.
fn uprobe_in_one(ctx: &Ctx) -> Res {
    let kind = std::fs::read_to_string("/sys/bus/event_source/devices/uprobe/type");
    let Some(kind) = kind.ok().and_then(|t| t.trim().parse::<u64>().ok()) else {
        skip!("no uprobes by perf_event_open");
    };
    const NOP: u64 = 0x90;
    let (fs, at) = (Ext4::mount(16)?, 7 * PAGE);
    let file: OwnedFd = fs.file("code")?.into();
    sys::pwrite(&file, &vec![NOP as u8; GRANULE as usize], 0)?;
    let mut path = fs.dir.join("code").into_os_string().into_encoded_bytes();
    path.push(0);
    for by_child in [true, false] {
        let k = Kin::bare(ctx, 1)?;
        k.peer
            .mmap(k.base, GRANULE, RW, PRIVATE | FIXED, file.as_raw_fd(), 0)??;
        k.peer.touch(k.base, GRANULE_PAGES)?;
        // A page of its own, without which there is nothing that a fork would copy.
        k.peer.store(k.base, NOP)??;
        // What can be written is not probed.
        k.must(libc::SYS_mprotect, &[k.base, GRANULE, RO])?;
        let child = k.child(ctx, 1)?;
        let (one, other) = if by_child { (&child, &k) } else { (&k, &child) };
        // perf_event_attr: type and size, then config, of which bit 0 means a return; 64 and 72
        // bytes in, config1 and config2, the path and the offset.
        let mut attr = [0u64; 14];
        (attr[0], attr[7], attr[8]) = (kind | (14 * 8) << 32, path.as_ptr() as u64, at);
        let (pid, none) = (one.peer.pid as u64, u64::MAX);
        let a = [attr.as_ptr() as u64, pid, none, none, 0];
        let probe = own(sys::syscall(libc::SYS_perf_event_open, &a)?);
        let byte = |k: &Kin| -> Res<u64> { Ok(k.peer.load(k.base + at)?? & 0xff) };
        ensure_eq!(byte(one)?, 0xcc, "where the breakpoint is");
        ensure_eq!(byte(other)?, NOP, "there, in the other process");
        drop(probe);
        ensure_eq!(byte(one)?, NOP, "there, without it");
        ensure_eq!(byte(other)?, NOP, "there, in the other process, without it");
    }
    Ok(())
}
