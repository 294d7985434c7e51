//! References and pins, taken before the fork and after it, by either: what goes through one belongs to
//! the process that took it, then and later.

use super::{verify_all, Disk, Kin};
use crate::gup::{register, READ_FIXED};
use crate::harness::{own, Ctx, Res};
use crate::oracle::pages;
use crate::peer::{flat, Remote};
use crate::sys::{self, Errno, GRANULE_PAGES, PAGE};
use crate::uring::{Ring, Transfer};
use crate::{ensure, ensure_eq, group, skip};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;

group!("odf";
    direct_reads,
    direct_writes,
    fixed_buffer_from_before_the_fork,
    fixed_buffer_from_after_the_fork,
    fixed_buffer_and_another_fork,
    io_uring_reads_and_writes,
    vmsplice_by_a_child_that_stays,
    vmsplice_by_a_child_that_goes,
    vmsplice_by_the_parent,
    vmsplice_before_the_fork,
    vmsplice_by_a_grandchild,
    vmsplice_then_a_part_is_unmapped,
    pin_before_the_fork,
    pin_after_the_fork,
    pin_then_child_goes,
    gup_of_every_kind,
);

/// In a peer: pread or pwrite of one page. Arguments: system call, fd, address, page of the file.
const TRANSFER: Remote = |a, _| {
    let r = sys::syscall(a[0] as i64, &[a[1], a[2], PAGE, a[3] * PAGE]);
    (flat(r), vec![])
};

/// O_DIRECT reads into memory that is shared.
fn direct_reads(ctx: &Ctx) -> Res {
    let disk = Disk::new()?;
    for round in 0..3 {
        let mut k = Kin::new(ctx, 3)?;
        let mut child = k.child(ctx, 3)?;
        let page = GRANULE_PAGES + 9 * round;
        let read = |k: &mut Kin, page: u64| -> Res {
            let bytes = k.incoming(page);
            disk.put(page, &bytes)?;
            let a = [libc::SYS_pread64 as u64, disk.raw(), k.at(page), page];
            ensure_eq!(
                k.peer.call(TRANSFER, &a, &[])?.0,
                PAGE as i64,
                "direct read"
            );
            Ok(())
        };
        // By the one, by the other, by both into one page.
        match round {
            0 => read(&mut k, page)?,
            1 => read(&mut child, page)?,
            _ => {
                read(&mut k, page)?;
                read(&mut child, page)?;
                read(&mut k, page)?;
            }
        }
        verify_all(&[&k, &child])?;
        read(&mut child, 0)?;
        verify_all(&[&k, &child])?;
        child.peer.exit()?;
        read(&mut k, pages(2) + 1)?;
        k.verify()?;
    }
    Ok(())
}

/// O_DIRECT writes from memory that is shared: the disk gets each one's own.
fn direct_writes(ctx: &Ctx) -> Res {
    let disk = Disk::new()?;
    disk.put(7, &[0; PAGE as usize])?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let write = |k: &Kin, page: u64| -> Res {
        let a = [libc::SYS_pwrite64 as u64, disk.raw(), k.at(page), 7];
        ensure_eq!(
            k.peer.call(TRANSFER, &a, &[])?.0,
            PAGE as i64,
            "direct write"
        );
        ensure!(disk.get(7)? == k.bytes(page), "the disk has something else");
        Ok(())
    };
    for page in [3, GRANULE_PAGES] {
        write(&k, page)?;
        write(&child, page)?;
        k.store(page)?;
        write(&child, page)?;
        write(&k, page)?;
        child.store(page)?;
        write(&k, page)?;
        write(&child, page)?;
    }
    verify_all(&[&k, &child])
}

/// Something arrives in the fixed buffer of `k`.
fn arrives(disk: &Disk, k: &mut Kin, page: u64) -> Res {
    let bytes = k.incoming(page);
    disk.put(page, &bytes)?;
    let a = [disk.raw(), page * PAGE, k.at(page)];
    let (r, _) = k.peer.call(READ_FIXED, &a, &[])?;
    ensure_eq!(r, PAGE as i64, "reading into the fixed buffer");
    Ok(())
}

/// A process that has pins shares nothing; its buffer stays its own.
fn fixed_buffer_from_before_the_fork(ctx: &Ctx) -> Res {
    let disk = Disk::new()?;
    let mut k = Kin::new(ctx, 2)?;
    let page = GRANULE_PAGES + 5;
    register(&k.peer, k.at(page))?;
    let mut child = k.child(ctx, 0)?;
    arrives(&disk, &mut k, page)?;
    verify_all(&[&k, &child])?;
    child.store(page)?;
    k.store(page + 1)?;
    arrives(&disk, &mut k, page)?;
    verify_all(&[&k, &child])?;
    let grandchild = child.fork()?;
    child.peer.exit()?;
    k.store(page)?;
    arrives(&disk, &mut k, page)?;
    verify_all(&[&k, &grandchild])
}

/// A buffer that is pinned while its table is shared, by either, with writes by either afterwards.
fn fixed_buffer_from_after_the_fork(ctx: &Ctx) -> Res {
    let disk = Disk::new()?;
    for round in 0..4 {
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        let page = GRANULE_PAGES + 5;
        let (by_child, write_first) = (round % 2 == 1, round / 2 == 1);
        let (pinner, other) = match by_child {
            true => (&mut child, &mut k),
            false => (&mut k, &mut child),
        };
        register(&pinner.peer, pinner.at(page))?;
        if write_first {
            pinner.store(page)?;
            other.store(page)?;
        }
        arrives(&disk, pinner, page)?;
        verify_all(&[pinner, other])?;
        other.store(page)?;
        arrives(&disk, pinner, page)?;
        verify_all(&[pinner, other])?;
        pinner.store(page)?;
        verify_all(&[pinner, other])?;
        // Without the one that has no pin.
        match by_child {
            true => {
                k.peer.exit()?;
                arrives(&disk, &mut child, page)?;
                child.verify()?;
            }
            false => {
                child.peer.exit()?;
                arrives(&disk, &mut k, page)?;
                k.store(page)?;
                arrives(&disk, &mut k, page)?;
                k.verify()?;
            }
        }
    }
    Ok(())
}

/// Who has pinned since shares nothing more, while what it shared before goes on.
fn fixed_buffer_and_another_fork(ctx: &Ctx) -> Res {
    let disk = Disk::new()?;
    let mut k = Kin::new(ctx, 3)?;
    let mut first = k.child(ctx, 3)?;
    register(&k.peer, k.at(5))?;
    let mut second = k.child(ctx, 0)?;
    arrives(&disk, &mut k, 5)?;
    verify_all(&[&k, &first, &second])?;
    super::diverge(&mut [&mut first, &mut k, &mut second])?;
    arrives(&disk, &mut k, 5)?;
    verify_all(&[&k, &first, &second])?;
    // The child has pinned nothing.
    let mut third = first.child(ctx, 3)?;
    super::diverge(&mut [&mut third, &mut first])?;
    first.peer.exit()?;
    arrives(&disk, &mut k, 5)?;
    verify_all(&[&k, &second, &third])
}

/// In a peer: io_uring reads a page of the file, or writes one. Arguments: fd, page of the file, address,
/// write?, in a worker?
const URING: Remote = |a, _| {
    let t = Transfer {
        fd: a[0] as i32,
        at: a[1] * PAGE,
        addr: a[2],
        len: PAGE,
    };
    let r = Ring::new().and_then(|mut ring| match a[3] {
        0 => ring.read(t, a[4] != 0),
        _ => ring.write(t, a[4] != 0),
    });
    (flat(r), vec![])
};

/// io_uring without fixed buffers, done at once or by one of the kernel's threads.
fn io_uring_reads_and_writes(ctx: &Ctx) -> Res {
    let disk = Disk::new()?;
    for worker in [0, 1] {
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        for page in [4, GRANULE_PAGES + 4] {
            for who in [&mut k, &mut child] {
                let bytes = who.incoming(page);
                disk.put(page, &bytes)?;
                let a = [disk.raw(), page, who.at(page), 0, worker];
                match who.peer.call(URING, &a, &[])?.0 {
                    r if r == -i64::from(libc::ENOSYS) => skip!("this kernel has no io_uring"),
                    r => ensure_eq!(r, PAGE as i64, "reading by io_uring"),
                }
            }
            verify_all(&[&k, &child])?;
            for who in [&k, &child] {
                let a = [disk.raw(), 1, who.at(page), 1, worker];
                ensure_eq!(who.peer.call(URING, &a, &[])?.0, PAGE as i64, "writing");
                ensure!(
                    disk.get(1)? == who.bytes(page),
                    "the disk has something else"
                );
            }
        }
    }
    Ok(())
}

// ---- vmsplice: a reference without a pin ----

struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
}

impl Pipe {
    fn new() -> Res<Pipe> {
        let mut ends = [0i32; 2];
        sys::syscall(libc::SYS_pipe2, &[ends.as_mut_ptr() as u64, 0])?;
        let [from, to] = ends.map(|fd| own(fd as u64));
        Ok(Pipe { from, to })
    }

    /// `k` puts the page itself into the pipe.
    fn take(&self, k: &Kin, page: u64) -> Res {
        let send: Remote = |a, _| {
            let iov = [a[1], PAGE];
            let a = [a[0], iov.as_ptr() as u64, 1, 0];
            (flat(sys::syscall(libc::SYS_vmsplice, &a)), vec![])
        };
        let a = [self.to.as_raw_fd() as u64, k.at(page)];
        ensure_eq!(k.peer.call(send, &a, &[])?.0, PAGE as i64, "vmsplice");
        Ok(())
    }

    /// What comes out of it next.
    fn gives(&self, want: &[u8], what: &str) -> Res {
        let mut bytes = vec![0; PAGE as usize];
        let a = [
            self.from.as_raw_fd() as u64,
            bytes.as_mut_ptr() as u64,
            PAGE,
        ];
        ensure_eq!(sys::syscall(libc::SYS_read, &a)?, PAGE, "read");
        ensure!(bytes == want, "the pipe gives something else: {what}");
        Ok(())
    }
}

/// The parent writes while the child's page is in the pipe.
fn vmsplice_by_a_child_that_stays(ctx: &Ctx) -> Res {
    let pipe = Pipe::new()?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    for page in [5, GRANULE_PAGES + 5] {
        let old = child.bytes(page);
        pipe.take(&child, page)?;
        k.store(page)?;
        pipe.gives(&old, "the parent's write shows")?;
        verify_all(&[&k, &child])?;
        pipe.take(&child, page)?;
        k.store(page)?;
        k.store(page)?;
        pipe.gives(&old, "the parent's later write shows")?;
    }
    super::diverge(&mut [&mut k, &mut child])
}

/// The child is gone when the parent writes, which takes the table back.
fn vmsplice_by_a_child_that_goes(ctx: &Ctx) -> Res {
    for touched in [false, true] {
        let pipe = Pipe::new()?;
        let mut k = Kin::new(ctx, 2)?;
        let mut child = k.child(ctx, 2)?;
        if touched {
            // A table of the child's own, or of both.
            child.store(9)?;
        }
        for page in [5, GRANULE_PAGES + 5] {
            pipe.take(&child, page)?;
        }
        let old = [k.bytes(5), k.bytes(GRANULE_PAGES + 5)];
        child.peer.exit()?;
        for page in [5, GRANULE_PAGES + 5, 5] {
            k.store(page)?;
        }
        k.verify()?;
        for page in old {
            pipe.gives(&page, "the parent's write shows")?;
        }
        k.fill(0..pages(2))?;
        k.verify()?;
    }
    Ok(())
}

/// The parent's page is in the pipe when the child writes; and when the child has gone and the parent
/// writes itself, which is still not what it put there.
fn vmsplice_by_the_parent(ctx: &Ctx) -> Res {
    let pipe = Pipe::new()?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let old = k.bytes(5);
    pipe.take(&k, 5)?;
    child.store(5)?;
    child.store(5)?;
    pipe.gives(&old, "the child's write shows")?;
    let page = GRANULE_PAGES + 5;
    let old = k.bytes(page);
    pipe.take(&k, page)?;
    child.verify()?;
    child.peer.exit()?;
    k.store(page)?;
    pipe.gives(
        &old,
        "a page that was the child's, too, is written in place",
    )?;
    k.verify()
}

/// A reference from before the fork.
fn vmsplice_before_the_fork(ctx: &Ctx) -> Res {
    for order in 0..3 {
        let pipe = Pipe::new()?;
        let mut k = Kin::new(ctx, 2)?;
        let old = k.bytes(5);
        pipe.take(&k, 5)?;
        let mut child = k.child(ctx, 2)?;
        match order {
            0 => {
                child.store(5)?;
                child.store(5)?;
                child.verify()?;
            }
            1 => {
                k.store(5)?;
                k.store(5)?;
            }
            _ => {
                child.peer.exit()?;
                k.store(5)?;
                k.store(5)?;
                k.verify()?;
                pipe.gives(&old, "the parent's write shows")?;
                continue;
            }
        }
        pipe.gives(&old, "a write after the fork shows")?;
        verify_all(&[&k, &child])?;
    }
    Ok(())
}

/// Through three generations, of which only the eldest is left.
fn vmsplice_by_a_grandchild(ctx: &Ctx) -> Res {
    let pipe = Pipe::new()?;
    let mut k = Kin::new(ctx, 2)?;
    let mut child = k.child(ctx, 2)?;
    let grandchild = child.child(ctx, 2)?;
    let page = GRANULE_PAGES;
    let old = k.bytes(page);
    pipe.take(&grandchild, page)?;
    child.store(3)?;
    grandchild.peer.exit()?;
    child.store(page)?;
    pipe.gives(&old, "the child's write shows")?;
    let sister = child.child(ctx, 2)?;
    pipe.take(&sister, page)?;
    let old = child.bytes(page);
    sister.peer.exit()?;
    verify_all(&[&k, &child])?;
    child.store(page)?;
    pipe.gives(&old, "the middle one's write shows")?;
    child.peer.exit()?;
    pipe.take(&k, 3)?;
    let old = k.bytes(3);
    let last = k.child(ctx, 2)?;
    drop(last);
    k.store(3)?;
    pipe.gives(&old, "the eldest one's write shows")?;
    k.verify()
}

/// The one that has the reference drops its mapping, not its life.
fn vmsplice_then_a_part_is_unmapped(ctx: &Ctx) -> Res {
    for (first, n) in [(0, GRANULE_PAGES), (GRANULE_PAGES, 9), (3, 4)] {
        let pipe = Pipe::new()?;
        let mut k = Kin::new(ctx, 2)?;
        let child = k.child(ctx, 2)?;
        let page = first + 2;
        let old = k.bytes(page);
        pipe.take(&child, page)?;
        child.peer.munmap(child.at(first), n * PAGE)?;
        k.store(page)?;
        pipe.gives(&old, "the parent's write shows")?;
        k.verify()?;
        child.faults(page, libc::SIGSEGV, sys::SEGV_MAPERR)?;
    }
    Ok(())
}

// ---- GUP_TEST: pins whose content can be read ----

const GUP_TEST: &str = "/sys/kernel/debug/gup_test";
static PIN: Mutex<Option<std::fs::File>> = Mutex::new(None);

/// In a peer: pins a page until the peer ends. Arguments: address, flags (1 to write, 2 by GUP-fast).
const PIN_PAGE: Remote = |a, _| {
    let r = (|| {
        let f = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(GUP_TEST)
            .map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)))?;
        // _IOW('g', 7, struct pin_longterm_test): addr, size, flags.
        let cmd = (1 << 30) | (24 << 16) | (u64::from(b'g') << 8) | 7;
        let arg = [a[0], PAGE, a[1]];
        sys::syscall(
            libc::SYS_ioctl,
            &[f.as_raw_fd() as u64, cmd, arg.as_ptr() as u64],
        )?;
        if let Ok(mut place) = PIN.lock() {
            *place = Some(f);
        }
        Ok(0)
    })();
    (flat(r), vec![])
};

/// In a peer: what the pinned page holds.
const READ_PIN: Remote = |_, _| {
    let mut bytes = vec![0; PAGE as usize];
    let fd = match PIN.lock() {
        Ok(place) => place.as_ref().map(|f| f.as_raw_fd() as u64),
        Err(_) => None,
    };
    // _IOW('g', 9, __u64): where to.
    let cmd = (1 << 30) | (8 << 16) | (u64::from(b'g') << 8) | 9;
    let to = bytes.as_mut_ptr() as u64;
    let r = match fd {
        Some(fd) => sys::syscall(libc::SYS_ioctl, &[fd, cmd, &raw const to as u64]),
        None => Err(Errno(libc::ENODEV)),
    };
    (flat(r), bytes)
};

fn pin(k: &Kin, page: u64, flags: u64) -> Res {
    match k.peer.call(PIN_PAGE, &[k.at(page), flags], &[])?.0 {
        0 => Ok(()),
        r if r == -i64::from(libc::ENOENT) => skip!("no {GUP_TEST}"),
        r => crate::fail!("pinning: {}", Errno(-r as i32)),
    }
}

/// The pin is of the page that the process has mapped.
fn pinned(k: &Kin, page: u64) -> Res {
    let (r, bytes) = k.peer.call(READ_PIN, &[], &[])?;
    ensure_eq!(r, 0, "reading the pinned page");
    let g = k.model.pages[page as usize];
    let why = crate::oracle::diagnose(k.model.seed, page, g, &bytes);
    ensure!(why.is_none(), "in the pin of {}: {why:?}", k.peer.pid);
    Ok(())
}

/// Long-term pins for reading and for writing, fast and slow, from before the fork.
fn pin_before_the_fork(ctx: &Ctx) -> Res {
    for flags in 0..4 {
        let mut k = Kin::new(ctx, 2)?;
        pin(&k, 5, flags)?;
        let mut child = k.child(ctx, 0)?;
        child.store(5)?;
        pinned(&k, 5)?;
        k.store(5)?;
        pinned(&k, 5)?;
        verify_all(&[&k, &child])?;
        child.peer.exit()?;
        k.store(5)?;
        pinned(&k, 5)?;
    }
    Ok(())
}

/// The same while the table is shared, by the parent and by the child, whoever writes first.
fn pin_after_the_fork(ctx: &Ctx) -> Res {
    for flags in 0..4 {
        for round in 0..4 {
            let mut k = Kin::new(ctx, 2)?;
            let mut child = k.child(ctx, 2)?;
            let page = GRANULE_PAGES + 5;
            let (pinner, other) = match round % 2 {
                0 => (&mut k, &mut child),
                _ => (&mut child, &mut k),
            };
            pin(pinner, page, flags)?;
            pinned(pinner, page)?;
            for who in 0..2 {
                match (who + round / 2) % 2 {
                    0 => other.store(page)?,
                    _ => pinner.store(page)?,
                }
                pinned(pinner, page)?;
                verify_all(&[pinner, other])?;
            }
        }
    }
    Ok(())
}

/// A pin of the parent's, taken while shared; then the child goes, and the parent writes and forks again.
fn pin_then_child_goes(ctx: &Ctx) -> Res {
    for flags in 0..4 {
        let mut k = Kin::new(ctx, 2)?;
        let child = k.child(ctx, 2)?;
        pin(&k, 5, flags)?;
        child.verify()?;
        child.peer.exit()?;
        k.store(5)?;
        pinned(&k, 5)?;
        let mut child = k.child(ctx, 0)?;
        k.store(5)?;
        child.store(5)?;
        pinned(&k, 5)?;
        verify_all(&[&k, &child])?;
    }
    Ok(())
}

/// Every walk that GUP_TEST can do gets the pages, and changes nobody's content.
fn gup_of_every_kind(ctx: &Ctx) -> Res {
    if !std::path::Path::new(GUP_TEST).exists() {
        skip!("no {GUP_TEST}");
    }
    const GUP: Remote = |a, _| {
        let Ok(f) = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(GUP_TEST)
        else {
            return (-i64::from(libc::ENOENT), vec![]);
        };
        // struct gup_test: get_delta, put_delta, addr, size, nr_pages_per_call, gup_flags,
        // test_flags, which_pages[8].
        let mut arg = [0u64, 0, a[0], 8 * PAGE, 8 | (a[2] << 32), 0, 0, 0, 0, 0];
        let fd = f.as_raw_fd() as u64;
        match sys::syscall(libc::SYS_ioctl, &[fd, a[1], arg.as_mut_ptr() as u64]) {
            Ok(_) => ((arg[3] / PAGE) as i64, vec![]),
            Err(e) => (flat(Err(e)), vec![]),
        }
    };
    for nr in 1..=5u64 {
        let size = 4 * 8 + 3 * 4 + 8 * 4 + 4;
        let cmd = (3 << 30) | (size << 16) | (u64::from(b'g') << 8) | nr;
        for write in [0, 1] {
            let mut k = Kin::new(ctx, 2)?;
            let mut child = k.child(ctx, 2)?;
            // The first four of each granule's border on both sides.
            let first = GRANULE_PAGES - 4;
            for who in [&k, &child] {
                let (got, _) = who.peer.call(GUP, &[who.at(first), cmd, write], &[])?;
                ensure_eq!(got, 8, "pages got by gup_test {nr}, write {write}");
            }
            verify_all(&[&k, &child])?;
            super::diverge(&mut [&mut k, &mut child])?;
        }
    }
    Ok(())
}
