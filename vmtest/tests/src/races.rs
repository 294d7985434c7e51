//! Races that somebody wins only by looking again: who was about to go into a table that its process has left
//! meanwhile, and who looks for all tables of a file while they move from one process to the next.
//!
//! A thread that the race is about runs on CPU 1, and is called `window-` and a place in the kernel. The kernel of
//! the mutation run has it stand still there until it is called something else, so that all the rest happens in
//! between, for sure; other kernels know nothing of that, and what must hold afterwards is the same.

use crate::allocfail::{with_failures, Injection};
use crate::harness::{Ctx, Res};
use crate::inplace::expect_on_disk;
use crate::leave::{Uffd, MODE_MISSING};
use crate::machine::{Ext4, Swap};
use crate::peer::{access, flat, unpack, Peer, Remote};
use crate::sys::{self, GRANULE, NONE, PAGE, RO, SEGV_ACCERR};
use crate::team::Team;
use crate::{ensure, ensure_eq, group};
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

group!("races";
    fault_while_another_protects,
    fault_while_another_forbids,
    fault_while_another_poisons,
    fault_while_another_exits,
    fault_while_another_exits_without_memory,
    reclaim_while_its_process_leaves,
    writeback_while_a_table_moves(120),
    punch_while_a_table_moves,
);

/// The page that all of it is about, and one beyond what a fault maps around it.
const ONE: u64 = 3;
const FAR: u64 = 300;

/// Of a machine too busy to have the thread where it is to be in time.
const ROUNDS: usize = 3;

// ---- a thread in a peer ----

type Answer = (i64, Vec<u8>);

static THREAD: Mutex<Option<JoinHandle<Answer>>> = Mutex::new(None);
static TID: AtomicU64 = AtomicU64::new(0);

/// Stands for a system call's number: store instead.
const STORE: u64 = u64::MAX;

/// In a peer: starts the thread. Arguments: a system call and what it takes; its name.
const START: Remote = |a, name| {
    let (a, name) = (a.to_vec(), String::from_utf8_lossy(name).into_owned());
    TID.store(0, SeqCst);
    let run = move || {
        sys::pin_to_cpu(1);
        TID.store(sys::syscall(libc::SYS_gettid, &[]).unwrap_or(1), SeqCst);
        match a[0] {
            STORE => access(sys::store64(a[1], a[2]).map(|()| 0)),
            nr => (flat(sys::syscall(nr as i64, &a[1..])), vec![]),
        }
    };
    match std::thread::Builder::new().name(name).spawn(run) {
        Ok(thread) => {
            while TID.load(SeqCst) == 0 {
                std::thread::yield_now();
            }
            if let Ok(mut slot) = THREAD.lock() {
                *slot = Some(thread);
            }
            (TID.load(SeqCst) as i64, vec![])
        }
        Err(e) => (-1, e.to_string().into_bytes()),
    }
};

/// In a peer: gives the thread another name, if it is still there.
const RENAME: Remote = |_, name| {
    fs::write(format!("/proc/self/task/{}/comm", TID.load(SeqCst)), name).ok();
    (0, vec![])
};

/// In a peer: waits for the thread, and passes on what it answers.
const JOIN: Remote = |_, _| {
    let thread = THREAD.lock().ok().and_then(|mut slot| slot.take());
    match thread.map(JoinHandle::join) {
        Some(Ok(answer)) => answer,
        _ => (-2, vec![]),
    }
};

/// A thread of a peer in a system call, or a store.
struct Window<'a> {
    peer: &'a Peer,
    tid: i64,
}

impl<'a> Window<'a> {
    /// Starts it, and waits until it stands still there; or has gone through, where nothing holds it.
    fn open(peer: &'a Peer, name: &str, call: &[u64]) -> Res<Window<'a>> {
        let (tid, why) = peer.call(START, call, name.as_bytes())?;
        ensure!(tid > 0, "a thread: {}", String::from_utf8_lossy(&why));
        let w = Window { peer, tid };
        w.wait();
        Ok(w)
    }

    fn wait(&self) {
        let task = format!("/proc/{}/task/{}/stat", self.peer.pid, self.tid);
        let deadline = Instant::now() + Duration::from_millis(200);
        while Instant::now() < deadline && fs::metadata(&task).is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets it go on, to the next place where it stands still.
    fn next(&self, name: &str) -> Res {
        self.peer.call(RENAME, &[], name.as_bytes())?;
        self.wait();
        Ok(())
    }

    /// Lets it go on to its end.
    fn close(self) -> Res<Answer> {
        self.peer.call(RENAME, &[], b"over")?;
        self.peer.call(JOIN, &[], &[])
    }
}

// ---- faults ----

/// Two processes share a table. The first stores to a page that is not in it; before the fault has looked into the
/// table the process leaves it, and `then` happens to the other one, whose own the table is now. The store must
/// succeed; `check` is what else must hold.
fn fault_while(ctx: &Ctx, then: impl Fn(&mut Team) -> Res, check: impl Fn(&Team) -> Res) -> Res {
    sys::pin_to_cpu(0);
    for round in 0..ROUNDS {
        ctx.opt_in()?;
        let mut t = Team::untouched(ctx, sys::memfd(0)?, 2, 1)?;
        // On the node of the CPU whose fault it may be, so that nothing wants to move it.
        sys::pin_to_cpu(1);
        t.model.pwrite(&t.fd, ONE)?;
        sys::pin_to_cpu(0);
        t.model.pwrite(&t.fd, FAR)?;
        for i in 0..2 {
            t.peer(i).touch(t.at(i, FAR), 1)?;
        }
        t.expect_all(1)?;
        let first = t.members.remove(0);
        let at = first.addr + ONE * PAGE;
        let word = 0x1000 + round as u64;
        let w = Window::open(&first.peer, "window-fault", &[STORE, at, word])?;
        first
            .peer
            .madvise(first.addr, GRANULE, libc::MADV_DONTNEED)??;
        then(&mut t)?;
        let (r, d) = w.close()?;
        ensure_eq!(unpack(r, &d), Ok(0), "the store");
        check(&t)?;
        ensure_eq!(first.peer.load(at)?, Ok(word), "what was stored");
        let mut bytes = [0; 8];
        sys::pread(&t.fd, &mut bytes, ONE * PAGE)?;
        ensure_eq!(u64::from_ne_bytes(bytes), word, "what is in the file");
    }
    Ok(())
}

/// The other makes the page read-only: it stays so.
fn fault_while_another_protects(ctx: &Ctx) -> Res {
    fault_while(
        ctx,
        |t| {
            t.peer(0).mprotect(t.at(0, ONE), PAGE, RO)??;
            t.peer(0).touch(t.at(0, ONE), 1)
        },
        |t| {
            let got = t.peer(0).store(t.at(0, ONE), 1)?;
            let right = matches!(got, Err(f) if f.code == SEGV_ACCERR);
            ensure!(right, "a store to a page that is read-only: {got:?}");
            Ok(())
        },
    )
}

/// The other forbids every access to the page, which the kernel marks like one that is to give a NUMA hint: it
/// stays so.
fn fault_while_another_forbids(ctx: &Ctx) -> Res {
    fault_while(
        ctx,
        |t| {
            t.peer(0).touch(t.at(0, ONE), 1)?;
            t.peer(0).mprotect(t.at(0, ONE), PAGE, NONE)??;
            Ok(())
        },
        |t| {
            let got = t.peer(0).load(t.at(0, ONE))?;
            let right = matches!(got, Err(f) if f.code == SEGV_ACCERR);
            ensure!(right, "a load from a page without access: {got:?}");
            Ok(())
        },
    )
}

/// The other poisons the page for itself, with userfaultfd: nobody else gets SIGBUS.
fn fault_while_another_poisons(ctx: &Ctx) -> Res {
    const UFFDIO_POISON: u64 = 0xc020_aa08;
    const FEATURE_POISON: u64 = 1 << 14;
    // Until the end: closing it would end the registration.
    let descriptors = RefCell::new(vec![]);
    fault_while(
        ctx,
        |t| {
            let u = Uffd::of(t.peer(0), FEATURE_POISON)?;
            u.register(t.at(0, 0), GRANULE, MODE_MISSING)?;
            t.peer(0)
                .madvise(t.at(0, ONE), PAGE, libc::MADV_DONTNEED)??;
            u.ioctl(UFFDIO_POISON, &mut [t.at(0, ONE), PAGE, 0, 0])?;
            descriptors.borrow_mut().push(u);
            Ok(())
        },
        |t| {
            let got = t.peer(0).load(t.at(0, ONE))?;
            let right = matches!(got, Err(f) if f.signal == libc::SIGBUS);
            ensure!(right, "a load from a poisoned page: {got:?}");
            Ok(())
        },
    )
}

/// The other exits, and frees the table.
fn fault_while_another_exits(ctx: &Ctx) -> Res {
    fault_while(ctx, |t| t.members.remove(0).peer.exit(), |_| Ok(()))
}

/// The same when there is no memory for a list of tables to be freed.
fn fault_while_another_exits_without_memory(ctx: &Ctx) -> Res {
    let _i = Injection::on("fail_page_alloc", 100)?;
    fault_while(
        ctx,
        |t| {
            let exit: Remote = |_, _| with_failures(|| sys::exit_now(0));
            let peer = t.members.remove(0).peer;
            ensure!(peer.call(exit, &[], &[]).is_err(), "who exits answers");
            Ok(())
        },
        |_| Ok(()),
    )
}

// ---- walks over the mappings of a page ----

/// A page is paged out. The walk has found the table in the first mapping, and not locked it yet, when that
/// process leaves it to another, whose own it becomes: the page goes from there, and from that process's count.
/// The kernel checks the counts at exit.
fn reclaim_while_its_process_leaves(ctx: &Ctx) -> Res {
    sys::pin_to_cpu(0);
    let _swap = Swap::on(64)?;
    for _ in 0..ROUNDS {
        ctx.opt_in()?;
        let mut t = Team::untouched(ctx, sys::memfd(0)?, 2, 1)?;
        for page in [ONE, FAR] {
            t.model.pwrite(&t.fd, page)?;
            t.peer(0).touch(t.at(0, page), 1)?;
        }
        // Pages that were just allocated may not be on the LRU lists yet, where paging out finds them.
        fs::write("/proc/sys/vm/drop_caches", "1")?;
        let call = [
            libc::SYS_madvise as u64,
            t.at(0, ONE),
            PAGE,
            libc::MADV_PAGEOUT as u64,
        ];
        let w = Window::open(t.peer(0), "window-pte", &call)?;
        t.peer(1).touch(t.at(1, ONE), 1)?;
        t.peer(0)
            .madvise(t.at(0, 0), GRANULE, libc::MADV_DONTNEED)??;
        // Not by mprotect, which would wait for the walk.
        t.peer(1)
            .madvise(t.at(1, FAR), PAGE, libc::MADV_DONTNEED)??;
        let (r, _) = w.close()?;
        ensure_eq!(r, 0, "MADV_PAGEOUT");
        t.verify_all()?;
    }
    Ok(())
}

/// A page is written back. While the mappings are visited in order to write-protect it, the table with the page in
/// it moves from one that is yet to be visited to one that has been. A store after that must reach the disk.
fn writeback_while_a_table_moves(ctx: &Ctx) -> Res {
    sys::pin_to_cpu(0);
    let ext4 = Ext4::mount(64)?;
    for round in 0..ROUNDS {
        ctx.opt_in()?;
        let name = round.to_string();
        let mut t = Team::untouched(ctx, ext4.file(&name)?.into(), 2, 1)?;
        let direct = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(ext4.dir.join(&name))?;
        t.model.fill(&t.fd, 0..8)?;
        sys::syscall(libc::SYS_fsync, &[t.raw() as u64])?;
        t.store(1, ONE)?;
        let syncer = Peer::spawn()?;
        let call = [libc::SYS_fsync as u64, t.raw() as u64];
        let w = Window::open(&syncer, "window-rmap", &call)?;
        t.peer(0).touch(t.at(0, ONE), 1)?;
        t.peer(1)
            .madvise(t.at(1, 0), GRANULE, libc::MADV_DONTNEED)??;
        let (r, _) = w.close()?;
        ensure_eq!(r, 0, "fsync");
        expect_on_disk(&t, &direct, ONE)?;
        t.store(0, ONE)?;
        sys::syscall(libc::SYS_fsync, &[t.raw() as u64])?;
        expect_on_disk(&t, &direct, ONE)?;
        t.verify_all()?;
    }
    Ok(())
}

/// A hole is punched: first the range is unmapped, then each page that is still mapped. Each time the table moves
/// from a mapping that is yet to be visited to one that has been. Nobody may see the page afterwards.
fn punch_while_a_table_moves(ctx: &Ctx) -> Res {
    sys::pin_to_cpu(0);
    for _ in 0..ROUNDS {
        ctx.opt_in()?;
        let mut t = Team::untouched(ctx, sys::memfd(0)?, 3, 1)?;
        t.model.pwrite(&t.fd, ONE)?;
        t.peer(2).touch(t.at(2, ONE), 1)?;
        let puncher = Peer::spawn()?;
        let call = [
            libc::SYS_fallocate as u64,
            t.raw() as u64,
            (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64,
            ONE * PAGE,
            PAGE,
        ];
        let w = Window::open(&puncher, "window-unmap", &call)?;
        let move_on = |from: usize| -> Res {
            t.peer(from - 1).touch(t.at(from - 1, ONE), 1)?;
            t.peer(from)
                .madvise(t.at(from, 0), GRANULE, libc::MADV_DONTNEED)??;
            Ok(())
        };
        move_on(2)?;
        w.next("window-unmap2")?;
        move_on(1)?;
        let (r, _) = w.close()?;
        ensure_eq!(r, 0, "fallocate");
        t.model.pages[ONE as usize] = 0;
        t.verify_all()?;
    }
    Ok(())
}
