// SPDX-License-Identifier: GPL-2.0

//! Arithmetic on granules, the 2 MiB of address space that one last-level page table maps.

/// log2 of the page size in bytes.
pub const PAGE_SHIFT: u32 = 12;
/// log2 of the granule in bytes.
pub const GRANULE_SHIFT: u32 = 21;
/// Bytes that one last-level table maps.
pub const GRANULE: u64 = 1 << GRANULE_SHIFT;
/// Entries of a last-level table.
pub const ENTRIES: usize = 1 << (GRANULE_SHIFT - PAGE_SHIFT);
/// Bytes that one table of the level above maps: neighbours are linked within it.
pub const NEIGHBOURHOOD: u64 = GRANULE << (GRANULE_SHIFT - PAGE_SHIFT);
/// How many granules one fault looks at when it links a table, itself included.
pub const WINDOW: u64 = 32;

/// A mapping of a file: bytes `start..end` of the address space show the file from page `pgoff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte, page aligned.
    pub start: u64,
    /// One past the last byte, page aligned.
    pub end: u64,
    /// Page of the file that is at `start`.
    pub pgoff: u64,
}

/// A granule that one mapping covers whole and at a congruent address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granule {
    /// First byte in the address space, a multiple of [`GRANULE`].
    pub start: u64,
    /// Its number in the file: offset divided by [`GRANULE`].
    pub index: u64,
}

/// The granule of the address space that `addr` is in.
pub const fn down(addr: u64) -> u64 {
    addr & !(GRANULE - 1)
}

/// The first address that is below another table of the level above than `addr`.
pub const fn next_neighbourhood(addr: u64) -> u64 {
    (addr & !(NEIGHBOURHOOD - 1)) + NEIGHBOURHOOD
}

impl Span {
    /// Is address ≡ file offset modulo the granule?
    pub const fn congruent(&self) -> bool {
        (self.start >> PAGE_SHIFT) % ENTRIES as u64 == self.pgoff % ENTRIES as u64
    }

    /// Does the mapping cover the whole granule at `start`, a multiple of [`GRANULE`]?
    pub const fn covers(&self, start: u64) -> bool {
        start >= self.start && start < self.end && self.end - start >= GRANULE
    }

    /// The granule around `addr`, if its table can be shared.
    pub fn granule(&self, addr: u64) -> Option<Granule> {
        let start = down(addr);
        if !self.congruent() || !self.covers(start) {
            return None;
        }
        let page = self.pgoff + ((start - self.start) >> PAGE_SHIFT);
        // mremap lets a mapping grow past what any file can have, and the key has no room for it.
        if page > (i64::MAX as u64) >> PAGE_SHIFT {
            return None;
        }
        Some(Granule {
            start,
            index: page >> (GRANULE_SHIFT - PAGE_SHIFT),
        })
    }

    /// The addresses of the granules that a fault at `addr` may link along with its own: those of
    /// an aligned window that are whole in this mapping and below the same upper table.
    pub fn window(&self, addr: u64) -> impl Iterator<Item = u64> {
        let size = WINDOW * GRANULE;
        let upper = addr & !(NEIGHBOURHOOD - 1);
        let low = addr & !(size - 1);
        let first = if low > upper { low } else { upper };
        let span = *self;
        (0..WINDOW)
            .map(move |i| first + i * GRANULE)
            .filter(move |&start| start - upper < NEIGHBOURHOOD && span.covers(start))
    }

    /// The granules that share a byte with both this mapping and `from..to`.
    pub fn touched(&self, from: u64, to: u64) -> impl Iterator<Item = u64> {
        let from = if from > self.start { from } else { self.start };
        let to = if to < self.end { to } else { self.end };
        let first = down(from);
        let count = if from < to {
            (to - 1 - first) / GRANULE + 1
        } else {
            0
        };
        (0..count).map(move |i| first + i * GRANULE)
    }
}

/// How much room to ask for so that `len` bytes fit at an address congruent to any file offset.
///
/// `None` if that overflows.
pub const fn padded(len: u64) -> Option<u64> {
    len.checked_add(GRANULE - (1 << PAGE_SHIFT))
}

/// The first address from `room` on that is congruent to page `pgoff` of the file.
pub const fn congruent_from(room: u64, pgoff: u64) -> u64 {
    let wanted = pgoff << PAGE_SHIFT;
    room + (wanted.wrapping_sub(room) & (GRANULE - 1))
}
