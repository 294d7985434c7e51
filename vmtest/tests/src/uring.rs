//! One io_uring operation at a time, for the tests that want its way to memory.

use crate::sys::{Errno, Sys};
use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types::Fd, IoUring};
use std::os::fd::RawFd;

/// A ring of this process.
pub struct Ring(IoUring);

/// A file, an offset in it, and memory.
#[derive(Clone, Copy)]
pub struct Transfer {
    /// The file.
    pub fd: RawFd,
    /// Where in it.
    pub at: u64,
    /// Where in memory.
    pub addr: u64,
    /// How many bytes.
    pub len: u64,
}

impl Ring {
    /// A ring; none in kernels without io_uring.
    pub fn new() -> Sys<Ring> {
        IoUring::new(2).map(Ring).map_err(errno)
    }

    /// Registers memory as fixed buffer 0, which pins its pages for writing.
    pub fn register(&self, addr: u64, len: u64) -> Sys<()> {
        let buffer = libc::iovec {
            iov_base: addr as *mut _,
            iov_len: len as usize,
        };
        // SAFETY: the tests register mappings of theirs that hold no value of Rust's.
        unsafe { self.0.submitter().register_buffers(&[buffer]) }.map_err(errno)
    }

    /// Reads the file into memory, in the submitting thread or in one of the kernel's.
    pub fn read(&mut self, t: Transfer, worker: bool) -> Sys<u64> {
        let sqe = opcode::Read::new(Fd(t.fd), t.addr as *mut u8, t.len as u32).offset(t.at);
        self.run(sqe.build(), worker)
    }

    /// Writes memory to the file.
    pub fn write(&mut self, t: Transfer, worker: bool) -> Sys<u64> {
        let sqe = opcode::Write::new(Fd(t.fd), t.addr as *const u8, t.len as u32).offset(t.at);
        self.run(sqe.build(), worker)
    }

    /// Reads the file into fixed buffer 0.
    pub fn read_fixed(&mut self, t: Transfer) -> Sys<u64> {
        let sqe = opcode::ReadFixed::new(Fd(t.fd), t.addr as *mut u8, t.len as u32, 0).offset(t.at);
        self.run(sqe.build(), false)
    }

    fn run(&mut self, sqe: Entry, worker: bool) -> Sys<u64> {
        let flags = if worker { Flags::ASYNC } else { Flags::empty() };
        // SAFETY: what is read into or written from is tested memory, see `register`, and the
        // operation is over when this returns.
        unsafe { self.0.submission().push(&sqe.flags(flags)) }.map_err(|_| Errno(libc::EBUSY))?;
        self.0.submit_and_wait(1).map_err(errno)?;
        let done = self.0.completion().next();
        match done.map(|c| c.result()) {
            Some(n) if n >= 0 => Ok(n as u64),
            Some(e) => Err(Errno(-e)),
            None => Err(Errno(libc::ENODATA)),
        }
    }
}

fn errno(e: std::io::Error) -> Errno {
    Errno(e.raw_os_error().unwrap_or(libc::EIO))
}
