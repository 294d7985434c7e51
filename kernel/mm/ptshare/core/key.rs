// SPDX-License-Identifier: GPL-2.0

//! What two mappings of a file must have in common to use one table.
//!
//! The key is one word, because it is kept in the table's own descriptor: publishing a table then
//! needs no memory but the table.

use super::granule::{Granule, GRANULE_SHIFT};

/// Bits of a key that tell the protection.
const CLASS_BITS: u32 = 22;

/// The largest file offset is below 2^63, so a granule's number fits the rest of the word.
const _: () = assert!(63 - GRANULE_SHIFT <= 64 - CLASS_BITS);

/// Bits of a page protection that lie together at the bottom: present, writable, user, caching.
const PROT_LOW: u64 = 0x1ff;
/// Its protection key and no-execute bits, which lie together at the top.
const PROT_HIGH_SHIFT: u32 = 59;
/// `VM_READ`, `VM_WRITE`, `VM_EXEC`.
const ACCESS: u64 = 0x7;

/// What may be done through a table: equal for all who use it.
///
/// A reader must not gain write access through a writer, so the hardware protection is part of it,
/// with the protection key; so is the access that the mapping was given, because a mapping whose
/// first write has yet to be noted has the hardware protection of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class(u32);

impl Class {
    /// From `vm_page_prot`, the mapping's `VM_READ | VM_WRITE | VM_EXEC`, and whether it was made
    /// with `MAP_SHARED_PT`.
    pub const fn new(page_prot: u64, access: u64, explicit: bool) -> Self {
        let low = page_prot & PROT_LOW;
        let high = page_prot >> PROT_HIGH_SHIFT;
        Class((low | high << 9 | (access & ACCESS) << 14 | (explicit as u64) << 17) as u32)
    }
}

/// A granule of a file and a [`Class`], in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// The key of `granule` for mappings of this class.
    pub const fn new(granule: Granule, class: Class) -> Self {
        Key(granule.index << CLASS_BITS | class.0 as u64)
    }

    /// The word that is stored.
    pub const fn to_word(self) -> u64 {
        self.0
    }

    /// From a word that [`Key::to_word`] gave.
    pub const fn from_word(word: u64) -> Self {
        Key(word)
    }

    /// The granule's number in its file.
    pub const fn index(self) -> u64 {
        self.0 >> CLASS_BITS
    }
}

/// Which of `buckets` chains the tables of a granule are on, whatever their class.
///
/// `file` is any number that tells files apart. `buckets` is a power of two.
pub const fn bucket(file: u64, index: u64, buckets: usize) -> usize {
    // The file is mixed before the granule is added, for inodes lie a few hundred bytes apart; the
    // highest bits of the last product depend on all of its input.
    let mut mixed = file.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ index;
    mixed ^= mixed >> 32;
    mixed = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 1 >> (63 - buckets.trailing_zeros())) as usize
}
