// SPDX-License-Identifier: GPL-2.0

//! Address spaces, mappings, files and faults, as far as sharing looks at them.

use super::entry::Upper;
use super::table::Fresh;
use crate::core_logic::granule::{self, Span, ENTRIES};
use crate::core_logic::key::Class;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ptr::NonNull;
use kernel::bindings;

/// An address space that is alive as long as this is used.
///
/// # Invariants
///
/// The pointer is to an mm with users, or to one that is being torn down by its last user.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mm(NonNull<bindings::mm_struct>);

impl Mm {
    /// # Safety
    ///
    /// `mm` is not null and stays alive as long as the value is used.
    pub(crate) unsafe fn from_raw(mm: *mut bindings::mm_struct) -> Self {
        // SAFETY: not null, as the caller promises.
        // INVARIANT: as the caller promises.
        Mm(unsafe { NonNull::new_unchecked(mm) })
    }

    /// The caller's own. `None` in a kernel thread.
    pub(crate) fn current() -> Option<Self> {
        // SAFETY: no requirements; a task's own mm is alive as long as the task runs.
        NonNull::new(unsafe { bindings::ptshare_current_mm() }).map(Mm)
    }

    pub(crate) fn as_ptr(self) -> *mut bindings::mm_struct {
        self.0.as_ptr()
    }

    /// Did the process ask with prctl(2)?
    pub(crate) fn asked(self) -> bool {
        // SAFETY: the mm is alive, by the invariant.
        unsafe { bindings::ptshare_mm_asked(self.as_ptr()) }
    }

    /// Notes that it asked, or did not.
    pub(crate) fn ask(self, ask: bool) {
        // SAFETY: the mm is alive, by the invariant.
        unsafe { bindings::ptshare_mm_ask(self.as_ptr(), ask) }
    }

    /// How many shared tables it links.
    pub(crate) fn links(self) -> i64 {
        // SAFETY: the mm is alive, by the invariant.
        unsafe { bindings::ptshare_mm_links_add(self.as_ptr(), 0) as i64 }
    }

    /// Calls `each` with every mapping, locked so that no fault runs in it.
    pub(crate) fn for_each_vma_locked(self, mut each: impl FnMut(Vma<'_>)) {
        // SAFETY: the mm is alive, by the invariant; its lock is not held by callers of this.
        unsafe { bindings::ptshare_mmap_write_lock(self.as_ptr()) };
        let mut addr = 0;
        loop {
            // SAFETY: the mm's lock is held.
            let vma = unsafe { bindings::find_vma(self.as_ptr(), addr) };
            let Some(vma) = NonNull::new(vma) else { break };
            // SAFETY: the mm's lock is held for write, so the VMA is alive and stable, and may be
            // locked against faults, which lasts until the mm's lock is released.
            unsafe {
                bindings::ptshare_vma_start_write(vma.as_ptr());
                let vma = Vma::from_raw(vma.as_ptr());
                addr = vma.facts().span.end as usize;
                each(vma);
                bindings::ptshare_cond_resched();
            }
        }
        // SAFETY: taken above.
        unsafe { bindings::ptshare_mmap_write_unlock(self.as_ptr()) };
    }

    /// Calls `each` with the address space of every process.
    pub(crate) fn for_each(mut each: impl FnMut(Mm)) {
        let mut pid = 1;
        loop {
            // SAFETY: no requirements.
            let mm = unsafe { bindings::ptshare_next_mm(&mut pid) };
            if pid < 0 {
                break;
            }
            if let Some(mm) = NonNull::new(mm) {
                // INVARIANT: the helper took a reference, which is dropped below.
                each(Mm(mm));
                // SAFETY: the reference is ours.
                unsafe { bindings::mmput(mm.as_ptr()) };
            }
            pid += 1;
        }
    }
}

/// A file's page cache, as the name of the file. Never looked into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct File(NonNull<bindings::address_space>);

impl File {
    /// # Safety
    ///
    /// `mapping` is not null.
    pub(crate) unsafe fn from_raw(mapping: *mut bindings::address_space) -> Self {
        // SAFETY: not null, as the caller promises.
        File(unsafe { NonNull::new_unchecked(mapping) })
    }

    pub(crate) fn as_ptr(self) -> *mut bindings::address_space {
        self.0.as_ptr()
    }

    /// A number that tells files apart while they are mapped.
    pub(crate) fn number(self) -> u64 {
        self.0.as_ptr() as u64
    }
}

/// A mapping whose flags and extent do not change for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Vma<'a>(NonNull<bindings::vm_area_struct>, PhantomData<&'a ()>);

/// What sharing wants to know of a mapping.
pub(crate) struct Facts {
    pub(crate) mm: Mm,
    /// The file, if any.
    pub(crate) file: Option<File>,
    pub(crate) span: Span,
    pub(crate) class: Class,
    /// A shared mapping whose faults map pages of the page cache.
    pub(crate) page_cache: bool,
    /// Locked, watched or tracked: something that sharing would change.
    pub(crate) excluded: bool,
    /// Its process asked with prctl(2).
    pub(crate) asked: bool,
    /// Made with MAP_SHARED_PT.
    pub(crate) explicit: bool,
}

impl<'a> Vma<'a> {
    /// # Safety
    ///
    /// `vma` is a VMA that is stable for `'a`: its own lock, the mm's lock, or the lock of its
    /// file's tree is held.
    pub(crate) unsafe fn from_raw(vma: *mut bindings::vm_area_struct) -> Self {
        // SAFETY: not null, as the caller promises.
        Vma(unsafe { NonNull::new_unchecked(vma) }, PhantomData)
    }

    /// For calls that look into it.
    pub(super) fn as_ptr(self) -> *mut bindings::vm_area_struct {
        self.0.as_ptr()
    }

    /// Is a huge page there, around `start` in the file, that the mapping could map as one? A guess.
    pub(crate) fn is_huge(self, start: u64) -> bool {
        // SAFETY: the VMA is stable, by the invariant, and has `start` and, as the caller has looked,
        // a file whose pages are in the page cache.
        unsafe { bindings::ptshare_granule_huge(self.as_ptr(), start as usize) }
    }

    pub(crate) fn facts(self) -> Facts {
        let mut raw = MaybeUninit::<bindings::ptshare_vma_facts>::uninit();
        // SAFETY: the VMA is stable; the helper fills all fields.
        let raw = unsafe {
            bindings::ptshare_vma_facts(self.0.as_ptr(), raw.as_mut_ptr());
            raw.assume_init()
        };
        Facts {
            // SAFETY: a VMA's mm is alive.
            mm: unsafe { Mm::from_raw(raw.mm) },
            file: NonNull::new(raw.mapping).map(File),
            span: Span {
                start: raw.start as u64,
                end: raw.end as u64,
                pgoff: raw.pgoff as u64,
            },
            class: Class::new(raw.page_prot as u64, raw.access as u64, raw.explicitly),
            page_cache: raw.page_cache,
            excluded: raw.excluded,
            asked: raw.asked,
            explicit: raw.explicitly,
        }
    }

    /// Calls `each` with every granule that the mapping covers whole, that `from..to` touches, and
    /// for which there are PMD entries, until it returns false. Sleeps in between.
    pub(crate) fn each_granule(
        self,
        facts: &Facts,
        from: u64,
        to: u64,
        mut each: impl FnMut(u64) -> bool,
    ) {
        let mut from = from;
        'next: loop {
            for start in facts.span.touched(from, to) {
                super::resched();
                if self.upper(facts.mm, start).is_none() {
                    from = granule::next_neighbourhood(start);
                    continue 'next;
                }
                if facts.span.covers(start) && !each(start) {
                    return;
                }
            }
            return;
        }
    }

    /// Drops the PTEs of the granule at `start`, which is in the mapping.
    ///
    /// # Safety
    ///
    /// The mm's lock is held, and the mapping's pages come from the page cache.
    pub(crate) unsafe fn zap(self, start: u64) {
        // SAFETY: as the caller promises.
        unsafe { bindings::ptshare_zap(self.0.as_ptr(), start as usize) };
    }

    /// Locks the PMD entries around `addr`, which is in the mapping, of `mm`. `None` where there are
    /// none.
    pub(crate) fn upper(self, mm: Mm, addr: u64) -> Option<Upper<'a>> {
        // SAFETY: the mm is alive.
        let pmd = NonNull::new(unsafe { bindings::ptshare_find_pmd(mm.as_ptr(), addr as usize) })?;
        // SAFETY: the entry is that of `addr`; page tables below a VMA that is stable are not
        // freed.
        Some(unsafe { Upper::lock(mm, pmd, addr) })
    }
}

/// A page fault in progress, with the upper page tables in place.
pub(crate) struct Fault<'a>(NonNull<bindings::vm_fault>, PhantomData<&'a mut ()>);

impl<'a> Fault<'a> {
    /// # Safety
    ///
    /// `vmf` is a fault in progress whose `pmd` is set; nobody else uses it for `'a`.
    pub(crate) unsafe fn from_raw(vmf: *mut bindings::vm_fault) -> Self {
        // SAFETY: not null, as the caller promises.
        Fault(unsafe { NonNull::new_unchecked(vmf) }, PhantomData)
    }

    /// The address that was touched.
    pub(crate) fn address(&self) -> u64 {
        // SAFETY: valid by the contract of `from_raw`.
        unsafe { (*self.0.as_ptr()).__bindgen_anon_1.address as u64 }
    }

    pub(crate) fn vma(&self) -> Vma<'a> {
        // SAFETY: a fault holds the lock of its VMA or of its mm.
        unsafe { Vma::from_raw((*self.0.as_ptr()).__bindgen_anon_1.vma) }
    }

    /// Locks the PMD entries around the address.
    pub(crate) fn upper(&self, mm: Mm) -> Upper<'a> {
        // SAFETY: `pmd` is set, by the contract of `from_raw`, and is the entry of the address.
        unsafe {
            let pmd = NonNull::new_unchecked((*self.0.as_ptr()).pmd);
            Upper::lock(mm, pmd, self.address())
        }
    }

    /// The table that was allocated for this fault, if it was.
    pub(crate) fn fresh(&mut self) -> Option<Fresh<'_>> {
        // SAFETY: valid by the contract of `from_raw`, and nobody else uses the fault.
        let place = unsafe { &mut (*self.0.as_ptr()).prealloc_pte };
        // INVARIANT: `prealloc_pte` is null or a PTE table that only this fault knows.
        (!place.is_null()).then(|| Fresh(place))
    }
}

/// A page of a file.
pub(crate) struct Page {
    page: *const bindings::page,
    index: u64,
}

impl Page {
    /// The page and its file. `None` if it is not in a file's page cache.
    ///
    /// # Safety
    ///
    /// `page` is a page that the caller holds a reference to.
    pub(crate) unsafe fn from_raw(page: *const bindings::page) -> Option<(Self, File)> {
        let mut index = 0;
        // SAFETY: the page is alive, as the caller promises.
        let mapping = unsafe { bindings::ptshare_page_mapping(page, &mut index) };
        let file = File(NonNull::new(mapping as *mut bindings::address_space)?);
        Some((
            Page {
                page,
                index: index as u64,
            },
            file,
        ))
    }

    pub(crate) fn as_ptr(&self) -> *const bindings::page {
        self.page
    }

    /// The number of the granule it is in.
    pub(crate) fn granule(&self) -> u64 {
        self.index / ENTRIES as u64
    }

    /// Its number in the granule.
    pub(crate) fn entry(&self) -> usize {
        self.index as usize % ENTRIES
    }
}

/// Is this a regular file that is neither hugetlb nor DAX?
///
/// # Safety
///
/// `file` is an open file.
pub(crate) unsafe fn plain_file(file: *mut bindings::file) -> bool {
    // SAFETY: as the caller promises.
    unsafe { bindings::ptshare_plain_file(file) }
}
