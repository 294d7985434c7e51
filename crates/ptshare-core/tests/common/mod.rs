// SPDX-License-Identifier: GPL-2.0-only

//! What the tests of arithmetic have in common: mappings made up at random, and what is true of
//! them, told page by page.

#![allow(dead_code, reason = "each test uses its part")]

use proptest::prelude::*;
use proptest::test_runner::Config;
use ptshare_core::granule::{Span, ENTRIES, GRANULE, PAGE_SHIFT};

/// Bytes in a page.
pub const PAGE: u64 = 1 << PAGE_SHIFT;
/// Pages in a granule.
pub const PAGES: u64 = ENTRIES as u64;
/// The largest offset that a file can have.
pub const MAX_OFFSET: u64 = i64::MAX as u64;
/// The largest number of a page that lies in a file.
pub const MAX_PAGE: u64 = MAX_OFFSET >> PAGE_SHIFT;
/// The number of the last granule of a file of any size.
pub const MAX_INDEX: u64 = MAX_OFFSET / GRANULE;

/// Many cases; few under an interpreter. No file of past failures: they become tests.
pub fn config() -> Config {
    Config {
        cases: if cfg!(miri) { 4 } else { 2048 },
        failure_persistence: None,
        ..Config::default()
    }
}

/// Pages of user address space: with four levels of page tables, and with five.
pub fn space() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(1u64 << (47 - PAGE_SHIFT)),
        Just(1 << (57 - PAGE_SHIFT))
    ]
}

/// A number up to `max`: small, just below `max`, around a multiple of 512, or any.
pub fn number(max: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        0..=max.min(3 * PAGES),
        max - max.min(3 * PAGES)..=max,
        (0..=max / PAGES, 0u64..5)
            .prop_map(move |(granule, near)| (granule * PAGES + near).saturating_sub(2).min(max)),
        0..=max,
    ]
}

/// A length in pages: less than a granule, around a few granules, or up to three upper tables.
fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        1..PAGES,
        (1u64..6, 0u64..5).prop_map(|(granules, near)| granules * PAGES + near - 2),
        1..8 * PAGES,
        1..3 * PAGES * PAGES,
    ]
}

/// A mapping that the kernel could have: page aligned, in user space, of pages that a file can have;
/// at a congruent address in most cases.
pub fn span() -> impl Strategy<Value = Span> {
    (space(), length(), any::<u8>()).prop_flat_map(|(space, len, dice)| {
        let start = number(space - len);
        let pgoff = number(MAX_PAGE + 1 - len);
        (start, pgoff).prop_map(move |(start, pgoff)| {
            let pgoff = match dice {
                0..=31 => pgoff,
                32..=63 => start.min(MAX_PAGE + 1 - len),
                // The nearest that is congruent, unless that is beyond the end of a file.
                _ => match pgoff - pgoff % PAGES + start % PAGES {
                    near if near <= MAX_PAGE + 1 - len => near,
                    near => near.saturating_sub(PAGES),
                },
            };
            Span {
                start: start * PAGE,
                end: (start + len) * PAGE,
                pgoff,
            }
        })
    })
}

/// An address in a mapping, or near it, or anywhere.
pub fn address(span: Span) -> impl Strategy<Value = u64> {
    let around = span.start.saturating_sub(2 * GRANULE)..span.end + 2 * GRANULE;
    prop_oneof![
        4 => span.start..span.end,
        1 => Just(span.start),
        1 => Just(span.end - 1),
        1 => Just(span.end),
        2 => around,
        1 => 0..1u64 << 57,
    ]
}

/// The page of the file that a mapping shows at a page of the address space, if it is mapped.
pub fn shown(span: &Span, page: u64) -> Option<u64> {
    (span.start / PAGE..span.end / PAGE)
        .contains(&page)
        .then(|| span.pgoff + (page - span.start / PAGE))
}

/// The pages of the granule that starts at an address.
pub fn pages_of(start: u64) -> std::ops::Range<u64> {
    start / PAGE..start / PAGE + PAGES
}
