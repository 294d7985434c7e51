// SPDX-License-Identifier: GPL-2.0-only

//! Who shares, and what `mmap` with `MAP_SHARED_PT` accepts: the contract's tables, and a model.

mod common;

use common::{config, number, PAGE, PAGES};
use proptest::prelude::*;
use ptshare_core::granule::GRANULE;
use ptshare_core::mode::{Mode, Refusal, Request};

const MODES: [Mode; 3] = [Mode::Off, Mode::OptIn, Mode::Always];

#[test]
fn the_numbers_of_the_modes() {
    for (number, mode) in (0..).zip(MODES) {
        assert_eq!(Mode::from_number(number), Some(mode));
        // The kernel stores the number.
        assert_eq!(mode as i32, number);
    }
    for number in [i32::MIN, -1, 3, i32::MAX] {
        assert_eq!(Mode::from_number(number), None);
    }
}

/// Mode, made with `MAP_SHARED_PT`, process asked: shares.
#[test]
fn who_shares() {
    for (mode, explicit, asked, shares) in [
        (Mode::Off, false, false, false),
        (Mode::Off, false, true, false),
        (Mode::Off, true, false, false),
        (Mode::Off, true, true, false),
        (Mode::OptIn, false, false, false),
        (Mode::OptIn, false, true, true),
        (Mode::OptIn, true, false, true),
        (Mode::OptIn, true, true, true),
        (Mode::Always, false, false, true),
        (Mode::Always, false, true, true),
        (Mode::Always, true, false, true),
        (Mode::Always, true, true, true),
    ] {
        let case = format!("{mode:?}, explicit {explicit}, asked {asked}");
        assert_eq!(mode.applies(explicit, asked), shares, "{case}");
    }
}

/// A call that is in order: two granules of a file.
const GOOD: Request = Request {
    shared: true,
    hugetlb: false,
    fixed: false,
    addr: 0,
    len: 2 * GRANULE,
    pgoff: Some(3 * PAGES),
    plain_file: true,
};
/// The same without a file.
const ANONYMOUS: Request = Request {
    pgoff: None,
    ..GOOD
};
/// The same at an address.
const FIXED: Request = Request {
    fixed: true,
    addr: 0x7f00_0000_0000,
    ..GOOD
};

/// The contract's table, as far as it can be told from the call. That the length is not 0 and the
/// offset page aligned, mmap sees by itself.
#[test]
fn the_table_of_errors() {
    let accepted: &[(&str, Request)] = &[
        ("a file", GOOD),
        ("MAP_ANONYMOUS", ANONYMOUS),
        ("MAP_FIXED", FIXED),
        ("MAP_FIXED at 0", Request { addr: 0, ..FIXED }),
        (
            "MAP_FIXED, anonymous",
            Request {
                pgoff: None,
                ..FIXED
            },
        ),
        (
            "offset 0",
            Request {
                pgoff: Some(0),
                ..GOOD
            },
        ),
        (
            "one granule",
            Request {
                len: GRANULE,
                ..GOOD
            },
        ),
        (
            "an aligned hint",
            Request {
                fixed: false,
                ..FIXED
            },
        ),
        (
            "a hint that is only page aligned",
            Request {
                addr: 5 * PAGE,
                ..GOOD
            },
        ),
        (
            "a hint that is not aligned at all",
            Request {
                addr: 12345,
                ..GOOD
            },
        ),
    ];
    let refused: &[(&str, Request)] = &[
        (
            "MAP_PRIVATE",
            Request {
                shared: false,
                ..GOOD
            },
        ),
        (
            "MAP_PRIVATE | MAP_ANONYMOUS",
            Request {
                shared: false,
                ..ANONYMOUS
            },
        ),
        (
            "MAP_HUGETLB",
            Request {
                hugetlb: true,
                ..ANONYMOUS
            },
        ),
        (
            "MAP_HUGETLB with a file",
            Request {
                hugetlb: true,
                ..GOOD
            },
        ),
        (
            "a hugetlb, DAX or device file",
            Request {
                plain_file: false,
                ..GOOD
            },
        ),
        (
            "an offset of a page",
            Request {
                pgoff: Some(1),
                ..GOOD
            },
        ),
        (
            "an offset a page short",
            Request {
                pgoff: Some(PAGES - 1),
                ..GOOD
            },
        ),
        ("a length of a byte", Request { len: 1, ..GOOD }),
        (
            "a length a byte short",
            Request {
                len: GRANULE - 1,
                ..GOOD
            },
        ),
        (
            "a length of a byte more",
            Request {
                len: GRANULE + 1,
                ..GOOD
            },
        ),
        (
            "a length of a page more",
            Request {
                len: GRANULE + PAGE,
                ..GOOD
            },
        ),
        (
            "an anonymous length of a page",
            Request {
                len: PAGE,
                ..ANONYMOUS
            },
        ),
        (
            "the largest length",
            Request {
                len: u64::MAX,
                ..GOOD
            },
        ),
        (
            "MAP_FIXED a page off",
            Request {
                addr: FIXED.addr + PAGE,
                ..FIXED
            },
        ),
        (
            "MAP_FIXED half a granule off",
            Request {
                addr: FIXED.addr + GRANULE / 2,
                ..FIXED
            },
        ),
        (
            "MAP_FIXED a byte off",
            Request {
                addr: FIXED.addr - 1,
                ..FIXED
            },
        ),
        (
            "MAP_FIXED a page off, anonymous",
            Request {
                addr: FIXED.addr + PAGE,
                pgoff: None,
                ..FIXED
            },
        ),
    ];
    for (case, request) in accepted {
        assert_eq!(request.check(Mode::Off), Err(Refusal::Off), "{case}");
        assert_eq!(request.check(Mode::OptIn), Ok(()), "{case}");
        assert_eq!(request.check(Mode::Always), Ok(()), "{case}");
    }
    for (case, request) in refused {
        for mode in MODES {
            assert_eq!(
                request.check(mode),
                Err(Refusal::Invalid),
                "{case}, {mode:?}"
            );
        }
    }
}

/// Mostly multiples of a granule, else near one.
fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..=u64::MAX / GRANULE).prop_map(|n| n * GRANULE),
        1 => number(1 << 45).prop_map(|pages| pages * PAGE),
        1 => any::<u64>(),
    ]
}

fn mostly(truth: bool) -> impl Strategy<Value = bool> {
    prop_oneof![7 => Just(truth), 1 => Just(!truth)]
}

fn request() -> impl Strategy<Value = Request> {
    let pgoff = prop_oneof![Just(None), bytes().prop_map(|bytes| Some(bytes / PAGE))];
    (
        mostly(true),
        mostly(false),
        any::<bool>(),
        bytes(),
        bytes(),
        pgoff,
        mostly(true),
    )
        .prop_map(
            |(shared, hugetlb, fixed, addr, len, pgoff, plain_file)| Request {
                shared,
                hugetlb,
                fixed,
                addr,
                len,
                pgoff,
                // Without a file there is none that is not plain.
                plain_file: plain_file || pgoff.is_none(),
            },
        )
}

/// Whether the bytes end where a granule does: their low bits are all clear.
fn aligned(bytes: u128) -> bool {
    bytes.trailing_zeros() >= GRANULE.trailing_zeros()
}

proptest! {
    #![proptest_config(config())]

    /// Each line of the table says no by itself; if none does, the mode decides.
    #[test]
    fn the_table_as_a_model(request in request(), mode in prop::sample::select(&MODES[..])) {
        let offset = u128::from(request.pgoff.unwrap_or(0)) * u128::from(PAGE);
        let complaints = [
            !request.shared,
            request.hugetlb,
            !request.plain_file,
            !aligned(offset),
            !aligned(request.len.into()),
            request.fixed && !aligned(request.addr.into()),
        ];
        let expected = if complaints.contains(&true) {
            Err(Refusal::Invalid)
        } else if mode == Mode::Off {
            Err(Refusal::Off)
        } else {
            Ok(())
        };
        prop_assert_eq!(request.check(mode), expected);
    }

    #[test]
    fn a_number_is_a_mode_or_none(number in any::<i32>()) {
        prop_assert_eq!(Mode::from_number(number).map(|mode| mode as i32),
            (0..=2).contains(&number).then_some(number));
    }
}
