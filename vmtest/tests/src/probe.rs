//! Breakpoints that the kernel puts into a process's text: uprobes.

use crate::harness::{own, Res};
use crate::peer::{Peer, Remote};
use crate::sys::{self, PAGE};
use crate::{ensure, ensure_eq, skip};
use std::os::fd::{AsRawFd, OwnedFd};

/// Machine code, one word of it: `mov eax, 42; ret; nop; nop`.
pub const CODE: u64 = 0x9090_c300_0000_2ab8;
/// The same with a breakpoint instead of its first byte.
pub const BROKEN: u64 = CODE & !0xff | 0xcc;

/// A page full of the code.
pub fn code_page() -> Vec<u8> {
    CODE.to_ne_bytes().repeat(PAGE as usize / 8)
}

/// Has the process call the code there.
pub fn runs(peer: &Peer, addr: u64) -> Res {
    let run: Remote = |a, _| {
        // SAFETY: the caller put `CODE` there, executable: a function without arguments.
        let f = unsafe { std::mem::transmute::<usize, extern "C" fn() -> i32>(a[0] as usize) };
        (i64::from(f()), vec![])
    };
    ensure_eq!(peer.call(run, &[addr], &[])?.0, 42, "what the code answers");
    Ok(())
}

/// The process has a page of the code there whose first word is this one.
pub fn holds(peer: &Peer, addr: u64, first: u64) -> Res {
    let read: Remote = |a, _| {
        let mut page = vec![0u8; PAGE as usize];
        let r = sys::copy(page.as_mut_ptr() as u64, a[0], PAGE);
        (i64::from(r.is_err()), page)
    };
    let (r, page) = peer.call(read, &[addr], &[])?;
    ensure_eq!(r, 0, "reading the code of process {}", peer.pid);
    let mut expected = code_page();
    expected[..8].copy_from_slice(&first.to_ne_bytes());
    let bad = page.iter().zip(&expected).position(|(a, b)| a != b);
    if let Some(at) = bad {
        crate::fail!(
            "process {}: byte {at} of its code is {:#x}, not {:#x}",
            peer.pid,
            page[at],
            expected[at]
        );
    }
    Ok(())
}

/// A breakpoint in one process, until dropped, that counts how often the process comes there.
pub struct Probe(OwnedFd);

impl Probe {
    /// At an offset of a file, wherever the process maps it privately and executable.
    pub fn new(fd: &impl AsRawFd, offset: u64, pid: i32) -> Res<Probe> {
        let pmu = "/sys/bus/event_source/devices/uprobe/type";
        let Some(kind) = std::fs::read_to_string(pmu)
            .ok()
            .and_then(|t| t.trim().parse::<u64>().ok())
        else {
            skip!("this kernel has no uprobes")
        };
        let path = format!("/proc/self/fd/{}\0", fd.as_raw_fd());
        // struct perf_event_attr, as long as it was when it first had config2.
        let attr: [u64; 9] = [
            kind | 72 << 32,
            0,
            0,
            0,
            0,
            0,
            0,
            path.as_ptr() as u64,
            offset,
        ];
        const PERF_FLAG_FD_CLOEXEC: u64 = 8;
        let any_cpu = -1i64 as u64;
        let a = [
            attr.as_ptr() as u64,
            pid as u64,
            any_cpu,
            any_cpu,
            PERF_FLAG_FD_CLOEXEC,
        ];
        Ok(Probe(own(sys::syscall(libc::SYS_perf_event_open, &a)?)))
    }

    /// The process has come there so many times.
    pub fn hit(&self, times: u64) -> Res {
        let mut count = 0u64;
        let a = [self.0.as_raw_fd() as u64, &raw mut count as u64, 8];
        ensure!(sys::syscall(libc::SYS_read, &a)? == 8, "reading a counter");
        ensure_eq!(count, times, "hits of the probe");
        Ok(())
    }
}
