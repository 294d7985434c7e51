// SPDX-License-Identifier: GPL-2.0

//! Page tables shared between processes.
//!
//! A last-level page table (512 PTEs, 2 MiB of address space: a *granule*) may be reached from the
//! PMD entries of several mms. Every mapping stays an ordinary VMA of its own mm, in the tree of its
//! file, so that faults, rmap, GUP and accounting find it as they always did; what changes is what a
//! table means. How many entries point at it is its *share count*, in its own descriptor.
//!
//! # Invariants
//!
//! 1. In every mm a shared table lies wholly inside one VMA. A granule is linked only if one VMA
//!    covers it whole at an address congruent to the file offset; it is left before a VMA boundary
//!    moves into it.
//! 2. The share count is the number of PMD entries that point at the table. A count of 0 means an
//!    ordinary table of one mm, which cannot be found. [`core_logic::count`] has the protocol.
//! 3. All sharers of a table map the same granule of the same file with the same protection, and
//!    none of them is locked in memory, watched by userfaultfd or an MMU notifier, or tracked by
//!    soft-dirty. What would change that leaves first.
//! 4. Whoever clears or restricts a PTE of a table with more than one sharer flushes all of them:
//!    [`sys::flush`].
//! 5. The table is freed by RCU: a GUP-fast of a process that has just left may be in it.
//! 6. Its pages are in no mm's rss, and its own page in no mm's pgtables_bytes; the last sharer
//!    takes both over.
//!
//! # Lock order
//!
//! 1. `mmap_lock`, VMA locks, the file's `i_mmap_rwsem`: one of them keeps VMA and upper tables.
//! 2. The PMD lock of one mm: to point an entry at a table or to clear it.
//! 3. The PTE lock of the table, nested: to leave it. Those who leave one table exclude each other
//!    by it, and rmap walks and faults, which hold it, see that an mm is a sharer or is not.
//! 4. A bucket of the index: to find, publish or withdraw a table.
//!
//! A fault links with 2 and 4; it does not need 3, because lookup and the last leave decide between
//! them by the count alone. Linking, publishing and leaving allocate nothing and cannot fail.

/// Pure logic, also built and tested on the host.
#[path = "core/mod.rs"]
#[allow(
    unreachable_pub,
    reason = "public in the crate that tests it on the host"
)]
#[cfg_attr(
    not(CONFIG_COW_PTE),
    allow(dead_code, reason = "what only fork needs")
)]
mod core_logic;
mod file;
#[cfg(CONFIG_COW_PTE)]
mod fork;
mod sys;

use core::ptr::NonNull;
use core::sync::atomic::{AtomicI32, Ordering};
use core_logic::granule;
use core_logic::mode::{Mode, Refusal, Request};
use kernel::bindings;
use kernel::ffi::{c_int, c_ulong};
use kernel::prelude::*;
use sys::vma::{Fault, File, Mm, Page, Vma};

module! {
    type: PtShare,
    name: "ptshare",
    author: "The ptshare developers",
    description: "Page tables shared between processes",
    license: "GPL",
}

struct PtShare;

impl kernel::Module for PtShare {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        sys::index::init()?;
        sys::boot::init()?;
        if mode() == Mode::Always {
            activate();
        }
        #[cfg(CONFIG_COW_PTE)]
        if fork::default() {
            activate();
        }
        Ok(PtShare)
    }
}

/// `vm.ptshare`.
static MODE: AtomicI32 = AtomicI32::new(Mode::OptIn as i32);

/// The mode now.
fn mode() -> Mode {
    // Faults read it under the lock of their VMA, which `set_mode` takes for write afterwards.
    Mode::from_number(MODE.load(Ordering::Relaxed)).unwrap_or(Mode::Off)
}

/// Sets the mode before there are processes.
fn set_mode_at_boot(number: i32) -> Result {
    Mode::from_number(number).ok_or(EINVAL)?;
    MODE.store(number, Ordering::Relaxed);
    Ok(())
}

/// Sets the mode to a number in range, and makes all processes follow it.
fn set_mode(number: i32) {
    // The hooks before the mode: what is linked must be seen by all of them.
    if number != Mode::Off as i32 {
        activate();
    }
    let before = MODE.swap(number, Ordering::SeqCst);
    if number != before && sys::enabled() {
        Mm::for_each(file::review);
    }
}

/// Switches the hooks on, for good. When it returns all are: no look at whether they are on already
/// could tell that the one who switches them has done so with every one of them.
fn activate() {
    sys::enable();
}

/// Somebody asks for `MAP_SHARED_PT`, with these flags of mmap(2). To be called without the mm's
/// lock.
#[no_mangle]
extern "C" fn ptshare_activate(map_flags: c_ulong) {
    if mode() != Mode::Off && is_shared(map_flags) {
        activate();
    }
}

/// Do the flags of mmap(2) ask for a shared mapping?
fn is_shared(map_flags: c_ulong) -> bool {
    let kind = map_flags as u32 & bindings::MAP_TYPE;
    kind == bindings::MAP_SHARED || kind == bindings::MAP_SHARED_VALIDATE
}

/// A fault found its PMD entry empty. Returns whether it no longer is.
///
/// # Safety
///
/// `vmf` is a fault in progress whose `pmd` is set.
#[no_mangle]
unsafe extern "C" fn ptshare_link_fault(vmf: *mut bindings::vm_fault) -> bool {
    // SAFETY: as the caller promises.
    file::link(unsafe { &Fault::from_raw(vmf) })
}

/// A fault has allocated a table for its PMD entry. Returns whether the entry is no longer empty.
///
/// # Safety
///
/// `vmf` is a fault in progress whose `pmd` is set.
#[no_mangle]
unsafe extern "C" fn ptshare_install_fault(vmf: *mut bindings::vm_fault) -> bool {
    // SAFETY: as the caller promises.
    file::install(unsafe { &mut Fault::from_raw(vmf) })
}

/// Leaves the table that one PMD entry points at, if it is shared. Returns whether the entry was
/// cleared.
///
/// # Safety
///
/// `pmd` is the entry of `mm` for `addr`, and its table is not freed: the mm's lock, or that of the
/// tree of a file mapped there, is held, or the mm has no users any more.
#[no_mangle]
unsafe extern "C" fn ptshare_leave_entry(
    mm: *mut bindings::mm_struct,
    pmd: *mut bindings::pmd_t,
    addr: c_ulong,
) -> bool {
    // SAFETY: as the caller promises; neither is null.
    let mut upper = unsafe {
        sys::entry::Upper::lock(Mm::from_raw(mm), NonNull::new_unchecked(pmd), addr as u64)
    };
    file::leave(&mut upper, granule::down(addr as u64))
}

/// Leaves every shared table that a VMA links in a range.
///
/// # Safety
///
/// `vma` is stable: the mm's lock is held.
#[no_mangle]
unsafe extern "C" fn ptshare_leave_vma_range(
    vma: *mut bindings::vm_area_struct,
    start: c_ulong,
    end: c_ulong,
) {
    // SAFETY: as the caller promises.
    file::leave_range(unsafe { Vma::from_raw(vma) }, start as u64, end as u64)
}

/// Drops tables of an mm's own in a range where it could share.
///
/// # Safety
///
/// `vma` is stable: the mm's lock is held, for write if `zap`.
#[no_mangle]
unsafe extern "C" fn ptshare_rejoin_vma_range(
    vma: *mut bindings::vm_area_struct,
    start: c_ulong,
    end: c_ulong,
    zap: bool,
) {
    // SAFETY: as the caller promises.
    unsafe { file::rejoin_range(Vma::from_raw(vma), start as u64, end as u64, zap) }
}

/// How many links of a file's tables have ended.
///
/// # Safety
///
/// `mapping` is a file's page cache.
#[no_mangle]
unsafe extern "C" fn ptshare_links_ended(mapping: *mut bindings::address_space) -> c_ulong {
    // SAFETY: as the caller promises.
    sys::linking::ended(unsafe { File::from_raw(mapping) })
}

/// How many links of a file's tables have begun.
///
/// # Safety
///
/// `mapping` is a file's page cache.
#[no_mangle]
unsafe extern "C" fn ptshare_links_begun(mapping: *mut bindings::address_space) -> c_ulong {
    // SAFETY: as the caller promises.
    sys::linking::begun(unsafe { File::from_raw(mapping) })
}

/// Holds back links of a file's tables, or lets them go on.
///
/// # Safety
///
/// `mapping` is a file's page cache.
#[no_mangle]
unsafe extern "C" fn ptshare_hold_links(mapping: *mut bindings::address_space, hold: bool) {
    // SAFETY: as the caller promises.
    sys::linking::hold(unsafe { File::from_raw(mapping) }, hold)
}

/// Makes every CPU drop what it has cached of shared tables. PTE locks may be held.
#[no_mangle]
extern "C" fn ptshare_flush_all() {
    sys::flush::all()
}

/// How many processes map a page through shared tables, beyond one for each such table.
///
/// # Safety
///
/// The caller holds a reference to `page`.
#[no_mangle]
unsafe extern "C" fn ptshare_extra_mappers(page: *const bindings::page) -> c_int {
    // SAFETY: as the caller promises.
    unsafe { Page::from_raw(page) }
        .and_then(|(page, file)| {
            let chain = sys::index::Chain::lock(file, page.granule())?;
            Some(chain.extra_mappers(file, &page))
        })
        .unwrap_or(0)
}

/// Checks a call of mmap(2) with `MAP_SHARED_PT`. Returns 0 or a negative error number.
///
/// # Safety
///
/// `file` is null or an open file.
#[no_mangle]
unsafe extern "C" fn ptshare_check_mmap(
    file: *mut bindings::file,
    addr: c_ulong,
    len: c_ulong,
    flags: c_ulong,
    pgoff: c_ulong,
) -> c_int {
    let shared = is_shared(flags);
    let flags = flags as u32;
    let request = Request {
        shared,
        hugetlb: flags & bindings::MAP_HUGETLB != 0,
        fixed: flags & (bindings::MAP_FIXED | bindings::MAP_FIXED_NOREPLACE) != 0,
        addr: addr as u64,
        len: len as u64,
        pgoff: (!file.is_null()).then_some(pgoff as u64),
        // SAFETY: as the caller promises.
        plain_file: file.is_null() || unsafe { sys::vma::plain_file(file) },
    };
    match request.check(mode()) {
        Ok(()) => 0,
        Err(Refusal::Invalid) => EINVAL.to_errno(),
        Err(Refusal::Off) => -(bindings::EOPNOTSUPP as c_int),
    }
}

/// Checks a VMA that mmap(2) with `MAP_SHARED_PT` has made. Returns 0 or a negative error number.
///
/// # Safety
///
/// `vma` is stable: the mm's lock is held.
#[no_mangle]
unsafe extern "C" fn ptshare_check_vma(vma: *mut bindings::vm_area_struct) -> c_int {
    // SAFETY: as the caller promises.
    if unsafe { Vma::from_raw(vma) }.facts().page_cache {
        0
    } else {
        EINVAL.to_errno()
    }
}

/// Without a hint above it no mapping is placed beyond: the kernel's `DEFAULT_MAP_WINDOW`.
const WINDOW: c_ulong = (1 << 47) - (1 << granule::PAGE_SHIFT);

/// Finds a place for a mapping at an address congruent to its file offset.
///
/// Returns the address, a negative error number, or 0 if the mapping goes where any would.
///
/// # Safety
///
/// `file` is null or an open file; the mm's lock is held.
#[no_mangle]
unsafe extern "C" fn ptshare_unmapped_area(
    file: *mut bindings::file,
    addr: c_ulong,
    len: c_ulong,
    pgoff: c_ulong,
    flags: c_ulong,
    vm_flags: bindings::vm_flags_t,
) -> c_ulong {
    let failed = ENOMEM.to_errno() as u64;
    let explicit = flags as u32 & bindings::MAP_SHARED_PT != 0;
    let asked = Mm::current().is_some_and(Mm::asked);
    // A mapping made with MAP_SHARED_PT keeps its place congruent whatever the mode is now.
    if !(explicit || mode().applies(explicit, asked)) || (!explicit && (len as u64) < granule::GRANULE) {
        return 0;
    }
    if !explicit && addr != 0 {
        return 0;
    }
    // SAFETY: as the caller promises.
    if !file.is_null() && !unsafe { sys::vma::plain_file(file) } {
        return 0;
    }
    let area = |addr: c_ulong, len: u64| {
        // SAFETY: as the caller promises; the function only looks for a gap.
        unsafe { bindings::ptshare_get_area(file, addr, len as usize, pgoff, flags, vm_flags) }
    };
    let congruent_from = |room: u64| granule::congruent_from(room, pgoff as u64) as c_ulong;
    let hint = addr == congruent_from(granule::down(addr as u64));
    if addr != 0 && hint && area(addr, len as u64) == addr {
        return addr;
    }
    let room = match granule::padded(len as u64) {
        // A hint above 47 bits still says that the whole address space may be used.
        Some(padded) => area(if addr > WINDOW { addr } else { 0 }, padded) as u64,
        None => failed,
    };
    // Addresses are page aligned, error numbers are not.
    if room % (1 << granule::PAGE_SHIFT) == 0 {
        congruent_from(room)
    } else if explicit {
        failed as c_ulong
    } else {
        0
    }
}

/// `prctl(PR_SET_PTSHARE, value)`. Returns 0 or a negative error number.
#[no_mangle]
extern "C" fn ptshare_prctl_set(value: c_ulong) -> c_int {
    let Some(mm) = Mm::current() else {
        return EINVAL.to_errno();
    };
    match value {
        0 => {
            mm.ask(false);
            if !sys::enabled() {
                return 0;
            }
        }
        1 => {
            activate();
            mm.ask(true);
        }
        _ => return EINVAL.to_errno(),
    }
    file::review(mm);
    0
}

/// `prctl(PR_GET_PTSHARE)`: 0 or 1.
#[no_mangle]
extern "C" fn ptshare_prctl_get() -> c_int {
    Mm::current().is_some_and(Mm::asked) as c_int
}

/// Shared tables alive now.
#[no_mangle]
extern "C" fn ptshare_nr_tables() -> c_ulong {
    sys::table::gauges().0.max(0) as c_ulong
}

/// PMD entries that point at shared tables now.
#[no_mangle]
extern "C" fn ptshare_nr_links() -> c_ulong {
    sys::table::gauges().1.max(0) as c_ulong
}

/// Is a fork of `mm` with these flags of clone3(2) to share tables? If so, the hooks are on.
///
/// # Safety
///
/// `mm` is alive. Sleeping is allowed, and no lock is held.
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn cow_pte_wanted(mm: *mut bindings::mm_struct, clone_flags: u64) -> bool {
    // SAFETY: as the caller promises.
    let wanted = fork::wanted(unsafe { Mm::from_raw(mm) }, clone_flags);
    if wanted {
        activate();
    }
    wanted
}

/// Shares the tables that `n` entries of a fork's parent point at with the child, up to the first
/// that points at none. Returns how many.
///
/// # Safety
///
/// `src_pmd` is the entry of `src_mm` for `addr`, `dst_pmd` that of `dst_mm`, and each is followed by
/// `n` - 1 more in the same table. `dst_mm` is being made by a fork of `src_mm`, whose mapping there
/// is locked for write, covers all of these granules, and has nothing that a fork would not copy.
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn cow_pte_share(
    dst_mm: *mut bindings::mm_struct,
    src_mm: *mut bindings::mm_struct,
    dst_pmd: *mut bindings::pmd_t,
    src_pmd: *mut bindings::pmd_t,
    addr: c_ulong,
    n: c_ulong,
) -> c_ulong {
    // SAFETY: as the caller promises; none is null.
    unsafe {
        let mut upper = sys::entry::Upper::lock(
            Mm::from_raw(src_mm),
            NonNull::new_unchecked(src_pmd),
            addr as u64,
        );
        let mut blank = sys::cow::Blank::new(NonNull::new_unchecked(dst_pmd), n as usize);
        fork::share(&mut upper, Mm::from_raw(dst_mm), &mut blank, addr as u64) as c_ulong
    }
}

/// Makes the table around `addr` the mm's own, if a fork left it shared. Returns 0 or -ENOMEM.
///
/// # Safety
///
/// `vma` is stable and around `addr`: its lock or the mm's lock is held. Sleeping is allowed.
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn cow_pte_unshare(vma: *mut bindings::vm_area_struct, addr: c_ulong) -> c_int {
    // SAFETY: as the caller promises.
    let vma = unsafe { Vma::from_raw(vma) };
    let start = granule::down(addr as u64);
    fork::unshare(vma, vma.facts().mm, start).map_or_else(|error| error.to_errno(), |()| 0)
}

/// Makes the tables that a mapping uses in a range its mm's own. Returns as [`cow_pte_unshare`], or
/// `-EINTR` once the task is killed.
///
/// # Safety
///
/// As for [`cow_pte_unshare`].
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn __cow_pte_unshare_range(
    vma: *mut bindings::vm_area_struct,
    start: c_ulong,
    end: c_ulong,
) -> c_int {
    // SAFETY: as the caller promises.
    fork::unshare_range(unsafe { Vma::from_raw(vma) }, start as u64, end as u64)
        .map_or_else(|error| error.to_errno(), |()| 0)
}

/// Unmaps the table that an entry points at, if a fork left it shared. Adds it to what was left if
/// the entry was cleared: then [`__cow_pte_flush_left`] must follow.
///
/// # Safety
///
/// As for [`ptshare_leave_entry`]; nobody else uses `left`.
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn cow_pte_leave(
    mm: *mut bindings::mm_struct,
    pmd: *mut bindings::pmd_t,
    addr: c_ulong,
    left: *mut bindings::cow_pte_left,
) {
    let start = granule::down(addr as u64);
    // SAFETY: as the caller promises; none is null.
    let (mut upper, left) = unsafe {
        (
            sys::entry::Upper::lock(Mm::from_raw(mm), NonNull::new_unchecked(pmd), addr as u64),
            &mut *left,
        )
    };
    if fork::leave(&mut upper, start) {
        sys::flush::remember(left, start);
    }
}

/// Flushes what an mm has left, and forgets it.
///
/// # Safety
///
/// `mm` is alive; it is what [`cow_pte_leave`] has filled `left` for. Nobody else uses `left`.
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn __cow_pte_flush_left(
    mm: *mut bindings::mm_struct,
    left: *mut bindings::cow_pte_left,
) {
    // SAFETY: as the caller promises; `left` is not null.
    unsafe { sys::flush::leave_ends(Mm::from_raw(mm), core::mem::take(&mut *left)) };
}

/// What /proc/PID/use_odf says: 0 or 1.
///
/// # Safety
///
/// `mm` is alive.
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn cow_pte_get_use(mm: *mut bindings::mm_struct) -> c_int {
    // SAFETY: as the caller promises.
    fork::uses(unsafe { Mm::from_raw(mm) }) as c_int
}

/// Sets what /proc/PID/use_odf says.
///
/// # Safety
///
/// `mm` is alive.
#[cfg(CONFIG_COW_PTE)]
#[no_mangle]
unsafe extern "C" fn cow_pte_set_use(mm: *mut bindings::mm_struct, wanted: c_int) {
    // SAFETY: as the caller promises.
    unsafe { Mm::from_raw(mm) }.choose_odf(wanted != 0);
}
