// SPDX-License-Identifier: GPL-2.0-only

//! The arithmetic of granules against models that look at every page.

mod common;

use common::{address, config, number, pages_of, shown, space, span, MAX_PAGE, PAGE, PAGES};
use proptest::prelude::*;
use ptshare_core::granule::{
    congruent_from, down, padded, Granule, Span, GRANULE, NEIGHBOURHOOD, WINDOW,
};
use std::collections::BTreeSet;

/// Is every page of the granule at `start` mapped?
fn whole(span: &Span, start: u64) -> bool {
    pages_of(start).all(|page| shown(span, page).is_some())
}

/// The granule around `addr`, if the mapping shows exactly one granule of the file there: every
/// entry of its table shows the page that the same entry shows in every other mapping.
fn granule(span: &Span, addr: u64) -> Option<Granule> {
    let start = addr - addr % GRANULE;
    let index = shown(span, start / PAGE)? / PAGES;
    pages_of(start)
        .enumerate()
        .all(|(entry, page)| shown(span, page) == Some(index * PAGES + entry as u64))
        .then_some(Granule { start, index })
}

fn span_and_address() -> impl Strategy<Value = (Span, u64)> {
    span().prop_flat_map(|span| (Just(span), address(span)))
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_granule_around_an_address((span, addr) in span_and_address()) {
        prop_assert_eq!(span.granule(addr), granule(&span, addr));
    }

    #[test]
    fn what_is_covered((span, addr) in span_and_address()) {
        let start = down(addr);
        prop_assert_eq!(start % GRANULE, 0);
        prop_assert!(start <= addr && addr - start < GRANULE);
        prop_assert_eq!(span.covers(start), whole(&span, start));
    }

    /// Being congruent says the same of the first page, the last page and all between.
    #[test]
    fn what_is_congruent(span in span(), at in any::<prop::sample::Index>()) {
        let pages = (span.end - span.start) / PAGE;
        let page = span.start / PAGE + at.index(pages as usize) as u64;
        let file = shown(&span, page).unwrap();
        prop_assert_eq!(span.congruent(), page % PAGES == file % PAGES);
    }

    /// A fault's window: the aligned group of granules around it, as far as they are whole. A
    /// neighbourhood is a multiple of it, so it never leaves the upper table.
    #[test]
    fn what_a_fault_may_link((span, addr) in span_and_address()) {
        let first = addr - addr % (WINDOW * GRANULE);
        let model: Vec<u64> = (0..WINDOW)
            .map(|i| first + i * GRANULE)
            .filter(|&start| whole(&span, start))
            .collect();
        let window: Vec<u64> = span.window(addr).collect();
        for &start in &window {
            prop_assert_eq!(start / NEIGHBOURHOOD, addr / NEIGHBOURHOOD);
            prop_assert!(start >= span.start && start + GRANULE <= span.end);
        }
        prop_assert_eq!(window.contains(&down(addr)), whole(&span, down(addr)));
        prop_assert_eq!(window, model);
    }

    /// The granules of which a page is in the mapping and in the range. The range may be any.
    #[test]
    fn what_a_range_touches(
        (span, from, to) in span().prop_flat_map(|span| {
            // A range of a few granules, lest the model counts pages for long.
            let near = (0..8 * GRANULE).prop_map(|len| len as i64 - GRANULE as i64);
            (Just(span), address(span), near).prop_map(|(span, from, len)| {
                (span, from, from.saturating_add_signed(len))
            })
        }),
    ) {
        let model: BTreeSet<u64> = (from / PAGE..to.div_ceil(PAGE))
            .filter(|&page| from < to && shown(&span, page).is_some())
            .map(|page| page * PAGE / GRANULE * GRANULE)
            .collect();
        let touched: Vec<u64> = span.touched(from, to).collect();
        prop_assert_eq!(touched, model.into_iter().collect::<Vec<u64>>());
    }

    /// The same for a whole mapping of any length, by its first and last granule.
    #[test]
    fn what_a_mapping_touches(span in span()) {
        let touched: Vec<u64> = span.touched(0, u64::MAX).collect();
        prop_assert_eq!(touched[0], down(span.start));
        prop_assert_eq!(*touched.last().unwrap(), down(span.end - 1));
        prop_assert!(touched.windows(2).all(|pair| pair[1] == pair[0] + GRANULE));
        prop_assert_eq!(&touched, &span.touched(span.start, span.end).collect::<Vec<_>>());
        prop_assert_eq!(span.touched(0, span.start).count(), 0);
        prop_assert_eq!(span.touched(span.end, u64::MAX).count(), 0);
    }

    /// However two processes map a file, at whatever addresses, offsets and lengths: a granule that
    /// both show whole at congruent addresses is the same to both.
    #[test]
    fn placement_does_not_matter(
        (a, b) in span().prop_flat_map(|a| {
            let other = (number(1 << 20), 1..6 * PAGES, 0..4 * PAGES, any::<bool>());
            (Just(a), other).prop_map(|(a, (place, len, shift, back))| {
                let pgoff = if back {
                    a.pgoff.saturating_sub(shift)
                } else {
                    (a.pgoff + shift).min(MAX_PAGE + 1 - len)
                };
                let start = congruent_from(place * PAGE, pgoff);
                (a, Span { start, end: start + len * PAGE, pgoff })
            })
        }),
    ) {
        prop_assert!(b.congruent());
        let indices = |span: Span| -> BTreeSet<u64> {
            span.touched(span.start, span.end.min(span.start + 16 * GRANULE))
                .filter_map(|start| span.granule(start))
                .map(|granule| granule.index)
                .collect()
        };
        let last = (a.pgoff + (a.end - a.start) / PAGE).min(a.pgoff + 15 * PAGES);
        let both = |index: u64| {
            let first = index * PAGES;
            let in_a = first >= a.pgoff && first + PAGES <= last;
            in_a && first >= b.pgoff && first + PAGES <= b.pgoff + (b.end - b.start) / PAGE
        };
        let (of_a, of_b) = (indices(a), indices(b));
        for index in b.pgoff / PAGES..=(b.pgoff + (b.end - b.start) / PAGE) / PAGES {
            if both(index) {
                prop_assert!(of_b.contains(&index));
                prop_assert_eq!(of_a.contains(&index), a.congruent());
            }
        }
    }

    /// A room of the padded length holds the mapping at a congruent address, wherever it is.
    #[test]
    fn a_place_in_a_room(
        (room, len) in (space(), number(1 << 30)).prop_flat_map(|(space, len)| {
            let len = len.max(1);
            let room = number(space - len - PAGES);
            (room, Just(len)).prop_map(|(room, len)| (room * PAGE, len * PAGE))
        }),
        pgoff in prop_oneof![number(MAX_PAGE), any::<u64>()],
    ) {
        let size = padded(len).unwrap();
        let start = congruent_from(room, pgoff);
        prop_assert_eq!(start % PAGE, 0);
        prop_assert!(start >= room && start + len <= room + size);
        let span = Span { start, end: start + len, pgoff };
        prop_assert!(span.congruent());
        // It is the first: one page less each has another remainder.
        prop_assert!(start - room < GRANULE);
        // Some offset needs all of the room.
        let worst = (room / PAGE + PAGES - 1) % PAGES;
        prop_assert_eq!(congruent_from(room, worst) + len, room + size);
        // A place that is found is kept.
        prop_assert_eq!(congruent_from(start, pgoff), start);
    }

    /// What is asked for with MAP_SHARED_PT is shared to its last page.
    #[test]
    fn a_mapping_of_whole_granules_is_shared_whole(
        place in number(1 << 35),
        index in number(1 << 20),
        granules in 1u64..40,
    ) {
        let pgoff = index * PAGES;
        let start = congruent_from(place * PAGE, pgoff);
        let span = Span { start, end: start + granules * GRANULE, pgoff };
        let found: Vec<_> = span
            .touched(span.start, span.end)
            .map(|start| span.granule(start).map(|granule| granule.index))
            .collect();
        let all: Vec<_> = (index..index + granules).map(Some).collect();
        prop_assert_eq!(found, all);
    }

    #[test]
    fn padding_overflows_only_beyond_64_bits(len in prop_oneof![
        any::<u64>(),
        u64::MAX - 2 * GRANULE..=u64::MAX,
    ]) {
        let model = u128::from(len) + u128::from(GRANULE - PAGE);
        prop_assert_eq!(padded(len), u64::try_from(model).ok());
    }
}

#[test]
fn the_first_and_the_last_granule_of_the_address_space() {
    for bits in [47, 57] {
        let space = 1u64 << bits;
        let span = Span {
            start: 0,
            end: GRANULE,
            pgoff: 0,
        };
        assert_eq!(span.granule(0), Some(Granule { start: 0, index: 0 }));
        assert_eq!(span.granule(GRANULE - 1).map(|g| g.start), Some(0));
        assert_eq!(span.granule(GRANULE), None);
        assert_eq!(span.window(0).collect::<Vec<_>>(), [0]);

        // User space ends a page before the end of its half.
        let span = Span {
            start: space - 2 * GRANULE,
            end: space - PAGE,
            pgoff: MAX_PAGE + 1 - 2 * PAGES,
        };
        let first = span.granule(span.start).unwrap();
        assert_eq!(first.index, common::MAX_INDEX - 1);
        assert_eq!(span.granule(span.end - 1), None);
        assert_eq!(span.window(span.end - 1).collect::<Vec<_>>(), [span.start]);
        assert_eq!(span.touched(0, u64::MAX).count(), 2);

        let span = Span { end: space, ..span };
        assert_eq!(span.granule(space - 1).unwrap().index, common::MAX_INDEX);
        assert_eq!(span.granule(space), None);
    }
}

#[test]
fn a_head_and_a_tail_that_are_not_whole() {
    let span = Span {
        start: GRANULE - PAGE,
        end: 3 * GRANULE + PAGE,
        pgoff: PAGES - 1,
    };
    let shared = |addr| span.granule(addr).map(|granule| granule.index);
    assert_eq!(shared(span.start), None);
    assert_eq!(shared(GRANULE), Some(1));
    assert_eq!(shared(3 * GRANULE - 1), Some(2));
    assert_eq!(shared(3 * GRANULE), None);
    let starts: Vec<_> = span.touched(0, u64::MAX).collect();
    assert_eq!(starts, [0, GRANULE, 2 * GRANULE, 3 * GRANULE]);
    let window: Vec<_> = span.window(span.start).collect();
    assert_eq!(window, [GRANULE, 2 * GRANULE]);
}

#[test]
fn a_window_ends_with_its_upper_table() {
    let span = Span {
        start: 0,
        end: 3 * NEIGHBOURHOOD,
        pgoff: 0,
    };
    let window: Vec<_> = span.window(2 * NEIGHBOURHOOD - 1).collect();
    assert_eq!(window.len() as u64, WINDOW);
    assert_eq!(window[0], 2 * NEIGHBOURHOOD - WINDOW * GRANULE);
    assert_eq!(*window.last().unwrap(), 2 * NEIGHBOURHOOD - GRANULE);
    let window: Vec<_> = span.window(2 * NEIGHBOURHOOD).collect();
    assert_eq!(window[0], 2 * NEIGHBOURHOOD);
}

#[test]
fn a_range_that_is_empty_touches_nothing() {
    let span = Span {
        start: GRANULE,
        end: 4 * GRANULE,
        pgoff: 0,
    };
    for (from, to) in [
        (0, 0),
        (2 * GRANULE, 2 * GRANULE),
        (2 * GRANULE + 1, 2 * GRANULE),
        (0, GRANULE),
        (4 * GRANULE, u64::MAX),
        (u64::MAX, 0),
    ] {
        assert_eq!(span.touched(from, to).count(), 0, "{from:#x}..{to:#x}");
    }
    let one: Vec<_> = span.touched(2 * GRANULE, 2 * GRANULE + 1).collect();
    assert_eq!(one, [2 * GRANULE]);
}

/// mmap refuses what lies beyond the end of the largest file. A mapping that mremap lets grow may
/// reach there; nothing can be mapped, and the numbers no longer fit a key.
#[test]
fn beyond_the_largest_file_nothing_is_shared() {
    let span = Span {
        start: 0x7f00_0000_0000,
        end: 0x7f00_0000_0000 + 4 * GRANULE,
        pgoff: MAX_PAGE + 1 - 2 * PAGES,
    };
    let shared: Vec<_> = span
        .touched(span.start, span.end)
        .map(|start| span.granule(start).map(|granule| granule.index))
        .collect();
    let last = common::MAX_INDEX;
    assert_eq!(shared, [Some(last - 1), Some(last), None, None]);
}
