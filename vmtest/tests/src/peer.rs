//! Child processes that a test scripts step by step.
//!
//! A [`Peer`] is a fork of the test process that obeys commands from a socket. Because it is the
//! same program image at the same addresses, a command may be a plain function pointer.

use crate::harness::{Res, Stop};
use crate::sys::{self, Errno, Fault, Sys, GRANULE, PAGE};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A function to run in a peer: numbers and bytes in, a number and bytes out.
pub type Remote = fn(&[u64], &[u8]) -> (i64, Vec<u8>);

const HEADER: usize = 9;

/// A scripted process.
pub struct Peer {
    /// Its process id.
    pub pid: i32,
    pipe: File,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let process = sys::pidfd(self.pid);
        sys::kill(self.pid, libc::SIGKILL).ok();
        // Fails at once for the child of another peer, which the test process does not own (yet).
        if let (Err(_), Ok(process)) = (sys::wait(self.pid), process) {
            // Readable when its memory is gone.
            crate::harness::wait_readable(&process, Duration::from_secs(20));
        }
    }
}

impl Peer {
    /// Forks the calling process into a new peer.
    pub fn spawn() -> Res<Peer> {
        let (ours, theirs) = sys::socketpair()?;
        let pid = sys::fork()?;
        if pid == 0 {
            drop(ours);
            serve(theirs);
        }
        Ok(Peer {
            pid,
            pipe: File::from(ours),
        })
    }

    /// Makes the peer fork; the child is a peer too.
    pub fn fork(&self) -> Res<Peer> {
        let (pid, fd) = self.call(fork_here, &[], &[])?;
        if pid < 0 {
            crate::fail!("fork in a peer: {}", Errno(-pid as i32));
        }
        let fd = RawFd::from_ne_bytes(fd[..4].try_into().unwrap_or_default());
        let pipe = sys::steal_fd(self.pid, fd)?;
        self.syscall(libc::SYS_close, &[fd as u64])??;
        Ok(Peer {
            pid: pid as i32,
            pipe: File::from(pipe),
        })
    }

    /// Sends a command without waiting for its answer.
    pub fn start(&self, f: Remote, args: &[u64], data: &[u8]) -> Res {
        let mut head = [0u64; HEADER];
        head[0] = f as *const () as u64;
        head[1..=args.len()].copy_from_slice(args);
        head[HEADER - 1] = data.len() as u64;
        let mut bytes: Vec<u8> = head.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend_from_slice(data);
        (&self.pipe).write_all(&bytes).map_err(|e| self.lost(e))
    }

    /// Waits for the answer to a started command.
    pub fn finish(&self) -> Res<(i64, Vec<u8>)> {
        let mut head = [0u8; 16];
        (&self.pipe)
            .read_exact(&mut head)
            .map_err(|e| self.lost(e))?;
        let word = |i: usize| u64::from_ne_bytes(head[i..i + 8].try_into().unwrap_or_default());
        let mut data = vec![0; word(8) as usize];
        (&self.pipe)
            .read_exact(&mut data)
            .map_err(|e| self.lost(e))?;
        Ok((word(0) as i64, data))
    }

    /// Whether an answer arrives within `ms` milliseconds.
    pub fn answers_within(&self, ms: u64) -> bool {
        crate::harness::wait_readable(&self.pipe, std::time::Duration::from_millis(ms))
    }

    /// Runs a function in the peer.
    pub fn call(&self, f: Remote, args: &[u64], data: &[u8]) -> Res<(i64, Vec<u8>)> {
        self.start(f, args, data)?;
        self.finish()
    }

    fn lost(&self, e: std::io::Error) -> Stop {
        Stop::Fail(format!("peer {} is gone: {e}", self.pid))
    }

    /// Any system call in the peer.
    pub fn syscall(&self, nr: i64, args: &[u64]) -> Res<Sys<u64>> {
        let mut a = [0u64; 7];
        a[0] = nr as u64;
        a[1..=args.len()].copy_from_slice(args);
        let (r, _) = self.call(
            |a, _| (flat(sys::syscall(a[0] as i64, &a[1..])), vec![]),
            &a,
            &[],
        )?;
        Ok(if (-4095..0).contains(&r) {
            Err(Errno(-r as i32))
        } else {
            Ok(r as u64)
        })
    }

    /// `mmap` in the peer.
    pub fn mmap(
        &self,
        addr: u64,
        len: u64,
        prot: u64,
        flags: u64,
        fd: RawFd,
        off: u64,
    ) -> Res<Sys<u64>> {
        self.syscall(
            libc::SYS_mmap,
            &[addr, len, prot, flags, fd as i64 as u64, off],
        )
    }

    /// `mmap` of a file, wherever the kernel likes, which must succeed.
    pub fn map(&self, fd: &impl AsRawFd, off: u64, len: u64, prot: u64) -> Res<u64> {
        Ok(self.mmap(0, len, prot, sys::SHARED, fd.as_raw_fd(), off)??)
    }

    /// Reserves address space and returns an address congruent to `off` modulo the granule within it.
    pub fn place(&self, off: u64, len: u64) -> Res<u64> {
        let flags = sys::PRIVATE | sys::ANON | libc::MAP_NORESERVE as u64;
        let base = self.mmap(0, len + 2 * GRANULE, sys::NONE, flags, -1, 0)??;
        self.munmap(base, len + 2 * GRANULE)?;
        Ok(base.next_multiple_of(GRANULE) + off % GRANULE)
    }

    /// `munmap` that must succeed.
    pub fn munmap(&self, addr: u64, len: u64) -> Res {
        self.syscall(libc::SYS_munmap, &[addr, len])??;
        Ok(())
    }

    /// `mprotect`.
    pub fn mprotect(&self, addr: u64, len: u64, prot: u64) -> Res<Sys<u64>> {
        self.syscall(libc::SYS_mprotect, &[addr, len, prot])
    }

    /// `madvise`.
    pub fn madvise(&self, addr: u64, len: u64, advice: i32) -> Res<Sys<u64>> {
        self.syscall(libc::SYS_madvise, &[addr, len, advice as u64])
    }

    /// One 8-byte load, as an access that may fault.
    pub fn load(&self, addr: u64) -> Res<Result<u64, Fault>> {
        let (r, d) = self.call(|a, _| access(sys::load64(a[0])), &[addr], &[])?;
        Ok(unpack(r, &d))
    }

    /// One 8-byte store, as an access that may fault.
    pub fn store(&self, addr: u64, value: u64) -> Res<Result<(), Fault>> {
        let (r, d) = self.call(
            |a, _| access(sys::store64(a[0], a[1]).map(|()| 0)),
            &[addr, value],
            &[],
        )?;
        Ok(unpack(r, &d).map(drop))
    }

    /// Loads the first word of each page from `addr` on; the first fault ends it.
    pub fn touch(&self, addr: u64, pages: u64) -> Res {
        let touch: Remote =
            |a, _| access((0..a[1]).try_fold(0, |_, i| sys::load64(a[0] + i * PAGE)));
        let (r, d) = self.call(touch, &[addr, pages], &[])?;
        unpack(r, &d)?;
        Ok(())
    }

    /// Minor and major faults of the peer so far.
    pub fn faults(&self) -> Res<(u64, u64)> {
        let (minor, d) = self.call(
            |_, _| {
                let (minor, major) = sys::fault_counts();
                (minor as i64, major.to_ne_bytes().to_vec())
            },
            &[],
            &[],
        )?;
        Ok((minor as u64, word(&d)))
    }

    /// Asks the peer to leave with `exit_group`, and waits for it.
    pub fn exit(self) -> Res {
        self.start(|_, _| sys::exit_now(0), &[], &[])?;
        let mut end = [0u8; 1];
        let gone = matches!((&self.pipe).read(&mut end), Ok(0) | Err(_));
        crate::ensure!(gone, "a peer answered after exit");
        Ok(())
    }
}

/// The first word of an answer's bytes.
pub fn word(d: &[u8]) -> u64 {
    d.get(..8)
        .map_or(0, |b| u64::from_ne_bytes(b.try_into().unwrap_or_default()))
}

/// A system call's result as the kernel encodes it.
pub fn flat(r: Sys<u64>) -> i64 {
    match r {
        Ok(v) => v as i64,
        Err(e) => -(e.0 as i64),
    }
}

/// Encodes an access for the way back.
pub fn access(r: Result<u64, Fault>) -> (i64, Vec<u8>) {
    match r {
        Ok(v) => (0, v.to_ne_bytes().to_vec()),
        Err(f) => (
            ((f.signal as i64) << 32) | f.code as u32 as i64,
            f.addr.to_ne_bytes().to_vec(),
        ),
    }
}

/// Decodes what [`access`] encoded.
pub fn unpack(r: i64, d: &[u8]) -> Result<u64, Fault> {
    if r == 0 {
        Ok(word(d))
    } else {
        Err(Fault {
            signal: (r >> 32) as i32,
            code: r as u32 as i32,
            addr: word(d),
        })
    }
}

fn fork_here(_: &[u64], _: &[u8]) -> (i64, Vec<u8>) {
    let (a, b) = match sys::socketpair() {
        Ok(p) => p,
        Err(e) => return (flat(Err(e)), vec![]),
    };
    match sys::fork() {
        Ok(0) => {
            drop(a);
            // The parent's end must close when the parent goes, so no copy of it stays here.
            sys::syscall(libc::SYS_close, &[SERVING.load(Ordering::Relaxed)]).ok();
            serve(b)
        }
        Ok(pid) => {
            let fd = std::os::fd::IntoRawFd::into_raw_fd(a);
            (pid as i64, fd.to_ne_bytes().to_vec())
        }
        Err(e) => (flat(Err(e)), vec![]),
    }
}

/// The descriptor this peer takes its commands from.
static SERVING: AtomicU64 = AtomicU64::new(0);

/// The life of a peer: obey until the other end closes.
fn serve(pipe: OwnedFd) -> ! {
    SERVING.store(pipe.as_raw_fd() as u64, Ordering::Relaxed);
    let mut pipe = File::from(pipe);
    loop {
        let mut head = [0u8; HEADER * 8];
        if pipe.read_exact(&mut head).is_err() {
            sys::exit_now(0);
        }
        let words: Vec<u64> = head.chunks_exact(8).map(word).collect();
        let mut data = vec![0; words[HEADER - 1] as usize];
        if pipe.read_exact(&mut data).is_err() {
            sys::exit_now(0);
        }
        // SAFETY: the other end is our own test process, which sent the address of a `Remote`
        // function of this very image; fork keeps addresses.
        let f: Remote = unsafe { std::mem::transmute::<usize, Remote>(words[0] as usize) };
        let (status, out) = f(&words[1..HEADER - 1], &data);
        let mut reply = Vec::with_capacity(16 + out.len());
        reply.extend_from_slice(&status.to_ne_bytes());
        reply.extend_from_slice(&(out.len() as u64).to_ne_bytes());
        reply.extend_from_slice(&out);
        if pipe.write_all(&reply).is_err() {
            sys::exit_now(0);
        }
    }
}
