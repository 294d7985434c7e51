// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lines of the reports, and the limits that our kernel must keep.

/// What our kernel must reach.
#[derive(Clone, Copy)]
pub enum Limit {
    /// The value itself
    AtMost(f64),
    /// The value as a part of the stock kernel's
    RatioAtMost(f64),
    /// The stock kernel's value is so many times ours
    TimesLess(f64),
    /// The value is so many times the stock kernel's
    TimesMore(f64),
    /// Shown, not judged
    None,
}

/// A line of a table: the figure's name, what it is, its limit.
pub type Line = (&'static str, &'static str, Limit);

/// A report's lines.
pub struct Table {
    /// The report's name, and of its files
    pub name: &'static str,
    /// Figures in the order in which they are shown
    pub lines: &'static [Line],
    /// Figures whose names begin so follow, in the order of measurement: the beginning, what their labels
    /// begin with, and the limit of each
    pub families: &'static [Line],
}

/// `./x bench share`.
pub const SHARE: Table = Table {
    name: "share",
    lines: &[
        (
            "table_memory",
            "page tables per extra process, 256 MiB memfd, 200 processes",
            Limit::AtMost(12.0),
        ),
        (
            "faults",
            "faults of a process that reads 1 GiB page by page",
            Limit::AtMost(40.0),
        ),
        (
            "attach",
            "attach 128 MiB: mmap, one byte of each page",
            Limit::AtMost(600_000.0),
        ),
        (
            "attach_thp",
            "  the same in transparent huge pages",
            Limit::None,
        ),
        ("attach_hugetlb", "  the same in hugetlb pages", Limit::None),
        ("detach", "munmap of the same", Limit::AtMost(100_000.0)),
        (
            "detach_thp",
            "  the same in transparent huge pages",
            Limit::None,
        ),
        ("detach_hugetlb", "  the same in hugetlb pages", Limit::None),
        (
            "reclaim",
            "reclaim of memory that 200 processes map, to zram",
            Limit::RatioAtMost(0.1),
        ),
        (
            "reclaim_one",
            "  the same when one process maps it",
            Limit::None,
        ),
        (
            "reclaim_dense",
            "  the same with 200, pages that are hard to compress",
            Limit::None,
        ),
    ],
    families: &[("unused_", "not used: ", Limit::RatioAtMost(1.01))],
};

/// `./x bench fork`.
pub const FORK: Table = Table {
    name: "fork",
    lines: &[
        (
            "fork_1gib",
            "fork of 1 GiB (aim: 260)",
            Limit::TimesLess(220.0),
        ),
        (
            "fork_4gib",
            "fork of 4 GiB (aim: 480)",
            Limit::TimesLess(400.0),
        ),
        (
            "exit_1gib",
            "exit of a child of 1 GiB that touched nothing",
            Limit::TimesLess(200.0),
        ),
        (
            "exit_4gib",
            "exit of a child of 4 GiB that touched nothing",
            Limit::None,
        ),
        (
            "first_write_parent",
            "first write in a granule, parent (stock: fork's part + fault)",
            Limit::RatioAtMost(1.25),
        ),
        (
            "first_write_child",
            "first write in a granule, child (stock: fork's part + fault)",
            Limit::RatioAtMost(1.25),
        ),
        (
            "second_write_parent",
            "  the next there, parent",
            Limit::None,
        ),
        ("second_write_child", "  the next there, child", Limit::None),
        (
            "write_each_parent",
            "fork of 4 GiB, then the parent writes to every granule",
            Limit::RatioAtMost(1.1),
        ),
        (
            "write_each_child",
            "fork of 4 GiB, then the child writes to every granule",
            Limit::RatioAtMost(1.1),
        ),
        (
            "again",
            "fork of 256 MiB while an earlier child lives",
            Limit::None,
        ),
        (
            "again_growth",
            "  what each adds to the instructions of the next",
            Limit::AtMost(10.0),
        ),
        (
            "again_tables",
            "  growth of page tables",
            Limit::AtMost(0.0),
        ),
        (
            "again_crowd",
            "fork of 256 MiB while all earlier children live",
            Limit::None,
        ),
        (
            "again_crowd_growth",
            "  what each adds to the instructions of the next",
            // Far below one for each of the 128 tables. Other than the line above it is not nothing: the
            // children are in a tree, and so are their mappings.
            Limit::AtMost(64.0),
        ),
        (
            "again_crowd_tables",
            "  growth of page tables",
            Limit::RatioAtMost(0.1),
        ),
        (
            "redis_memory",
            "Redis, 1 GiB in values of 1 KiB: its memory",
            Limit::None,
        ),
        (
            "redis_fork",
            "  latest_fork_usec of BGSAVE, a client writes",
            Limit::TimesLess(50.0),
        ),
        (
            "redis_writes",
            "  writes during the save; dump and server checked",
            Limit::None,
        ),
        (
            "afl_executions",
            "AFL++, 512 MB of initialised heap: executions",
            Limit::TimesMore(3.0),
        ),
        (
            "python_fork",
            "Python, multiprocessing over 280 MB: fork of a worker",
            Limit::None,
        ),
        (
            "python_whole",
            "  8 workers, each reads its part and writes to it",
            Limit::None,
        ),
    ],
    families: &[
        (
            "nothing_to_share_",
            "fork, nothing to share ",
            Limit::RatioAtMost(1.01),
        ),
        ("unused_", "not used: ", Limit::RatioAtMost(1.01)),
    ],
};
