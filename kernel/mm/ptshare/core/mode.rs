// SPDX-License-Identifier: GPL-2.0

//! Who shares, and what `mmap` with `MAP_SHARED_PT` accepts.

use super::granule::{GRANULE, PAGE_SHIFT};

/// The values of `vm.ptshare`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No mapping shares tables.
    Off,
    /// Those that asked.
    OptIn,
    /// Every eligible mapping.
    Always,
}

impl Mode {
    /// From the number that the administrator writes.
    pub const fn from_number(number: i32) -> Option<Self> {
        match number {
            0 => Some(Mode::Off),
            1 => Some(Mode::OptIn),
            2 => Some(Mode::Always),
            _ => None,
        }
    }

    /// Does a mapping share that was made with `MAP_SHARED_PT` (`explicit`), or whose process
    /// asked (`asked`)?
    pub const fn applies(self, explicit: bool, asked: bool) -> bool {
        match self {
            Mode::Off => false,
            Mode::OptIn => explicit || asked,
            Mode::Always => true,
        }
    }
}

/// A call of `mmap` with `MAP_SHARED_PT`.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// `MAP_SHARED` or `MAP_SHARED_VALIDATE`.
    pub shared: bool,
    /// `MAP_HUGETLB`.
    pub hugetlb: bool,
    /// `MAP_FIXED` or `MAP_FIXED_NOREPLACE`.
    pub fixed: bool,
    /// The address that was asked for.
    pub addr: u64,
    /// The length that was asked for, in bytes, not rounded.
    pub len: u64,
    /// The file's offset in pages; `None` for `MAP_ANONYMOUS`.
    pub pgoff: Option<u64>,
    /// Whether the file is a regular one that is neither hugetlb nor DAX.
    pub plain_file: bool,
}

/// Why a [`Request`] is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// EINVAL.
    Invalid,
    /// EOPNOTSUPP: `vm.ptshare` is 0.
    Off,
}

impl Request {
    /// Checks everything that can be told before the file system is asked.
    pub const fn check(&self, mode: Mode) -> Result<(), Refusal> {
        if !self.shared || self.hugetlb || self.len % GRANULE != 0 {
            return Err(Refusal::Invalid);
        }
        if let Some(pgoff) = self.pgoff {
            if pgoff % (GRANULE >> PAGE_SHIFT) != 0 || !self.plain_file {
                return Err(Refusal::Invalid);
            }
        }
        if self.fixed && self.addr % GRANULE != 0 {
            return Err(Refusal::Invalid);
        }
        match mode {
            Mode::Off => Err(Refusal::Off),
            _ => Ok(()),
        }
    }
}
