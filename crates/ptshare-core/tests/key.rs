// SPDX-License-Identifier: GPL-2.0-only

//! What two mappings must have in common, and how tables spread over the index.

mod common;

use common::{config, number, span, MAX_INDEX, PAGE};
use proptest::prelude::*;
use ptshare_core::granule::{congruent_from, Granule, Span, GRANULE};
use ptshare_core::key::{bucket, Class, Key};

/// The bits of a page protection that say what the hardware lets through, by their names.
const PROTECTION: [(u32, &str); 14] = [
    (0, "present"),
    (1, "writable"),
    (2, "user"),
    (3, "write-through"),
    (4, "cache disabled"),
    (5, "accessed"),
    (6, "dirty"),
    (7, "PAT"),
    (8, "global"),
    (59, "protection key, bit 0"),
    (60, "protection key, bit 1"),
    (61, "protection key, bit 2"),
    (62, "protection key, bit 3"),
    (63, "no execution"),
];
/// The bits of `vm_flags` that say what the mapping may do.
const ACCESS: [(u32, &str); 3] = [(0, "VM_READ"), (1, "VM_WRITE"), (2, "VM_EXEC")];

/// What a class must tell apart.
type Facts = (u64, u64, bool);

/// The part of a mapping's facts that counts.
fn relevant((prot, access, explicit): Facts) -> Facts {
    let mask = |bits: &[(u32, &str)]| bits.iter().fold(0u64, |mask, (bit, _)| mask | 1 << bit);
    (prot & mask(&PROTECTION), access & mask(&ACCESS), explicit)
}

fn class((prot, access, explicit): Facts) -> Class {
    Class::new(prot, access, explicit)
}

/// Two mappings' facts that differ in few bits, if in any.
fn two_facts() -> impl Strategy<Value = (Facts, Facts)> {
    let flips = || {
        prop_oneof![
            2 => Just(0u64),
            2 => (0u32..64).prop_map(|bit| 1 << bit),
            1 => prop::sample::select(&PROTECTION[..]).prop_map(|(bit, _)| 1 << bit),
            1 => any::<u64>(),
        ]
    };
    (any::<Facts>(), flips(), flips(), any::<bool>())
        .prop_map(|(a, prot, access, explicit)| (a, (a.0 ^ prot, a.1 ^ access, a.2 ^ explicit)))
}

fn granule(index: u64) -> Granule {
    Granule { start: 0, index }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn classes_are_equal_exactly_when_what_matters_is((a, b) in two_facts()) {
        prop_assert_eq!(class(a) == class(b), relevant(a) == relevant(b));
    }

    #[test]
    fn keys_are_equal_exactly_when_granule_and_class_are(
        (a, b) in two_facts(),
        i in number(MAX_INDEX),
        near in prop_oneof![Just(0i64), -2i64..=2],
        far in prop_oneof![3 => Just(None), 1 => number(MAX_INDEX).prop_map(Some)],
    ) {
        let j = far.unwrap_or_else(|| i.saturating_add_signed(near).min(MAX_INDEX));
        let (one, other) = (Key::new(granule(i), class(a)), Key::new(granule(j), class(b)));
        let same = i == j && relevant(a) == relevant(b);
        prop_assert_eq!(one == other, same);
        prop_assert_eq!(one.to_word() == other.to_word(), same);
        prop_assert_eq!((one.index(), other.index()), (i, j));
        prop_assert_eq!(Key::from_word(one.to_word()), one);
    }

    /// From the mappings on: where they are does not matter, what they show does.
    #[test]
    fn mappings_of_one_granule_have_one_key(
        a in span().prop_filter("congruent", Span::congruent),
        (one, other) in two_facts(),
        place in number(1 << 35),
        shift in 0u64..3,
    ) {
        let Some(of_a) = a.touched(a.start, a.end).find_map(|start| a.granule(start)) else {
            return Ok(());
        };
        // Shows the same granule, or the one after, or the one after that, at its start.
        let index = (of_a.index + shift).min(MAX_INDEX);
        let pgoff = index * (GRANULE / PAGE);
        let start = congruent_from(place * PAGE, pgoff);
        let b = Span { start, end: start + GRANULE, pgoff };
        let of_b = b.granule(start).unwrap();
        prop_assert_eq!(
            Key::new(of_a, class(one)) == Key::new(of_b, class(other)),
            of_a.index == index && relevant(one) == relevant(other)
        );
    }

    #[test]
    fn a_bucket_is_in_the_index(
        file in any::<u64>(),
        index in prop_oneof![number(MAX_INDEX), any::<u64>()],
        bits in 0u32..20,
    ) {
        prop_assert!(bucket(file, index, 1 << bits) < 1 << bits);
    }
}

#[test]
fn every_bit_that_matters_makes_a_class_of_its_own() {
    let base = class((0, 0, false));
    let mut seen = vec![base];
    for bit in 0..64 {
        let prot = class((1 << bit, 0, false));
        let name = PROTECTION.iter().find(|(number, _)| *number == bit);
        assert_eq!(prot != base, name.is_some(), "bit {bit}, {name:?}");
        let access = class((0, 1 << bit, false));
        let name = ACCESS.iter().find(|(number, _)| *number == bit);
        assert_eq!(access != base, name.is_some(), "bit {bit}, {name:?}");
        seen.extend([prot, access].into_iter().filter(|&class| class != base));
    }
    seen.push(class((0, 0, true)));
    for (i, one) in seen.iter().enumerate() {
        assert!(!seen[..i].contains(one), "two bits make one class");
    }
}

/// The protections of `PROT_READ`, of `PROT_READ | PROT_WRITE`, and of the latter before its first
/// write is noted, which is that of a reader.
#[test]
fn a_reader_and_a_writer_never_share() {
    let (read_only, writable) = (0x8000_0000_0000_0025, 0x8000_0000_0000_0027);
    let reader = Class::new(read_only, 1, false);
    let writer = Class::new(writable, 3, false);
    let noted_on_write = Class::new(read_only, 3, false);
    assert_ne!(reader, writer);
    assert_ne!(reader, noted_on_write);
    assert_ne!(writer, noted_on_write);
}

#[test]
fn the_last_granule_of_the_largest_file() {
    assert_eq!(MAX_INDEX, (1 << 42) - 1);
    let all = class((u64::MAX, u64::MAX, true));
    let none = class((0, 0, false));
    for index in [0, 1, MAX_INDEX - 1, MAX_INDEX] {
        let (low, high) = (
            Key::new(granule(index), none),
            Key::new(granule(index), all),
        );
        assert_eq!(low.index(), index);
        assert_eq!(high.index(), index);
        assert_ne!(low, high);
        assert_eq!(Key::from_word(high.to_word()), high);
    }
}

/// How many tables are on the longest chain, and how many chains have one.
fn chains(tables: impl Iterator<Item = (u64, u64)>, buckets: usize) -> (usize, usize) {
    let mut chains = vec![0; buckets];
    for (file, index) in tables {
        chains[bucket(file, index, buckets)] += 1;
    }
    let used = chains.iter().filter(|&&length| length > 0).count();
    (*chains.iter().max().unwrap(), used)
}

/// Where an inode's page cache may be.
const FILES: [u64; 5] = [
    0xffff_8880_0123_4570,
    0xffff_8881_dead_b0c8,
    0xffff_a0c3_4000_0178,
    0xff11_0001_0000_0000,
    0,
];

/// How many chains would have one if chance alone chose them.
fn by_chance(tables: usize, buckets: usize) -> f64 {
    let buckets = buckets as f64;
    buckets * (1.0 - (1.0 - 1.0 / buckets).powi(tables as i32))
}

/// One table for each bucket, all of one file in sequence.
#[test]
#[cfg_attr(miri, ignore = "too many for an interpreter")]
fn the_granules_of_one_file_spread() {
    for file in FILES {
        for buckets in [256, 1024, 4096] {
            for first in [0, 511, MAX_INDEX - buckets as u64] {
                let granules = (first..first + buckets as u64).map(|index| (file, index));
                let (longest, used) = chains(granules, buckets);
                let case = format!("{file:#x} from {first} in {buckets}: {longest}, {used}");
                assert!(longest <= 8 && used >= buckets / 2, "{case}");
            }
        }
    }
}

#[test]
fn the_first_granules_of_small_files_spread() {
    for (size, files, granules) in [
        (640u64, 4096u64, 1u64),
        (704, 512, 8),
        (1080, 512, 8),
        (704, 64, 4),
    ] {
        let buckets = (files * granules).next_power_of_two() as usize;
        let all =
            (0..files).flat_map(|file| (0..granules).map(move |i| (FILES[0] + file * size, i)));
        let (longest, used) = chains(all, buckets);
        let case = format!("{files} x {granules}, {size} apart: {longest}, {used}");
        assert!(longest <= 8 && used >= buckets / 2, "{case}");
    }
}

/// Inodes of one slab lie close together, and their files' granules are numbered from 0: neither may
/// make chains that chance would not.
#[test]
fn tables_spread_as_by_chance() {
    for (size, files, granules) in [
        (704u64, 1u64, 256u64),
        (704, 1, 1 << 16),
        (704, 256, 1),
        (704, 4096, 1),
        (1080, 4096, 1),
        (704, 64, 1024),
        (704, 100, 512),
        (1080, 100, 512),
        (2048, 64, 1024),
        (704, 1000, 64),
    ] {
        let tables = (files * granules) as usize;
        let buckets = tables.next_power_of_two().clamp(256, 1 << 16);
        let all =
            (0..files).flat_map(|file| (0..granules).map(move |i| (FILES[0] + file * size, i)));
        let (longest, used) = chains(all, buckets);
        let case = format!("{files} x {granules}, {size} apart: {longest}, {used} of {buckets}");
        assert!(longest <= 10, "{case}");
        assert!(used as f64 > 0.9 * by_chance(tables, buckets), "{case}");
    }
}
