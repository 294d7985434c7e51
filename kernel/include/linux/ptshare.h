/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Sharing of last-level page tables between processes (mm/ptshare).
 *
 * A PTE table whose share count is above zero may be reached from the PMD
 * entries of several mms.  What follows is all that other code has to know:
 *
 *  - While the PTE lock of such a table is held and the PMD entry through which
 *    it was found is known to be unchanged, that mm is one of its sharers.
 *  - Pages in it belong to no mm's rss: ptshare_table().
 *  - Who clears or restricts a PTE in it flushes all of its sharers, not one
 *    mm: ptshare_flush_pte(), ptshare_defer_flush() or ptshare_zap_end().
 *  - Who would change what one mm sees leaves the table first: ptshare_leave()
 *    and ptshare_leave_range().  Leaving needs no memory and cannot fail.
 *
 * All of it is behind one static key, which is off until the first process
 * asks for sharing.
 */
#ifndef _LINUX_PTSHARE_H
#define _LINUX_PTSHARE_H

#include <linux/jump_label.h>
#include <linux/mm.h>
#include <linux/mman.h>

#ifdef CONFIG_PTSHARE

DECLARE_STATIC_KEY_FALSE(ptshare_key);

/* PTEs of shared tables cleared without a flush, and how many are flushed. */
extern atomic_long_t ptshare_flush_wanted;
extern atomic_long_t ptshare_flush_done;

/* PMD entries that were cleared, and may still be cached: cow_pte_leave(). */
extern atomic_long_t ptshare_leaving;

/* One chain of the index of shared tables; they are linked by pt_share_next. */
struct ptshare_bucket {
	spinlock_t lock;	/* innermost: nothing is taken under it */
	struct ptdesc *first;
};

/* What mm/ptshare wants to know of a VMA, in one piece. */
struct ptshare_vma_facts {
	struct mm_struct *mm;
	struct address_space *mapping;	/* NULL without a file */
	unsigned long start;
	unsigned long end;
	unsigned long pgoff;
	unsigned long page_prot;	/* pgprot_val() */
	unsigned long access;		/* VM_READ | VM_WRITE | VM_EXEC */
	bool page_cache;	/* shared mapping whose faults map the cache */
	bool excluded;		/* something that sharing would change */
	bool asked;		/* its process asked with prctl(2) */
	bool explicitly;	/* MAP_SHARED_PT */
};

void ptshare_arch_flush_granule(struct mm_struct *mm, unsigned long start);
void ptshare_arch_flush_range(struct mm_struct *mm, unsigned long start,
			      unsigned long end);
void ptshare_arch_flush_all(void);

/* In mm/ptshare, called by the functions below and by the hooks. */
bool ptshare_link_fault(struct vm_fault *vmf);
bool ptshare_install_fault(struct vm_fault *vmf);
bool ptshare_leave_entry(struct mm_struct *mm, pmd_t *pmd, unsigned long addr);
void ptshare_leave_vma_range(struct vm_area_struct *vma, unsigned long start,
			     unsigned long end);
void ptshare_flush_all(void);
void ptshare_activate(unsigned long map_flags);
int ptshare_extra_mappers(const struct page *page);
void ptshare_rejoin_vma_range(struct vm_area_struct *vma, unsigned long start,
			      unsigned long end, bool zap);
unsigned long ptshare_links_ended(struct address_space *mapping);
unsigned long ptshare_links_begun(struct address_space *mapping);
void ptshare_hold_links(struct address_space *mapping, bool hold);
int ptshare_check_mmap(struct file *file, unsigned long addr,
		       unsigned long len, unsigned long flags,
		       unsigned long pgoff);
int ptshare_check_vma(struct vm_area_struct *vma);
unsigned long ptshare_unmapped_area(struct file *file, unsigned long addr,
				    unsigned long len, unsigned long pgoff,
				    unsigned long flags, vm_flags_t vm_flags);
int ptshare_prctl_set(unsigned long value);
int ptshare_prctl_get(void);
unsigned long ptshare_nr_tables(void);
unsigned long ptshare_nr_links(void);

/* Has any process asked for sharing since boot? */
static __always_inline bool ptshare_enabled(void)
{
	return static_branch_unlikely(&ptshare_key);
}

static inline void ptshare_mm_init(struct mm_struct *mm)
{
	atomic_long_set(&mm->ptshare_links, 0);
}

/* How many shared tables does @mm link now? */
static inline unsigned long ptshare_mm_links(struct mm_struct *mm)
{
	return atomic_long_read(&mm->ptshare_links);
}

#else /* !CONFIG_PTSHARE */

static __always_inline bool ptshare_enabled(void)
{
	return false;
}

static inline void ptshare_mm_init(struct mm_struct *mm) { }

static inline unsigned long ptshare_mm_links(struct mm_struct *mm)
{
	return 0;
}

static inline bool ptshare_link_fault(struct vm_fault *vmf)
{
	return false;
}

static inline bool ptshare_install_fault(struct vm_fault *vmf)
{
	return false;
}

static inline bool ptshare_leave_entry(struct mm_struct *mm, pmd_t *pmd,
				       unsigned long addr)
{
	return false;
}

static inline void ptshare_leave_vma_range(struct vm_area_struct *vma,
					   unsigned long start,
					   unsigned long end) { }
static inline void ptshare_rejoin_vma_range(struct vm_area_struct *vma,
					    unsigned long start,
					    unsigned long end, bool zap) { }
static inline void ptshare_flush_all(void) { }
static inline void ptshare_activate(unsigned long map_flags) { }

static inline unsigned long ptshare_links_ended(struct address_space *mapping)
{
	return 0;
}

static inline unsigned long ptshare_links_begun(struct address_space *mapping)
{
	return 0;
}

static inline void ptshare_hold_links(struct address_space *mapping, bool hold)
{
}

static inline int ptshare_extra_mappers(const struct page *page)
{
	return 0;
}

static inline int ptshare_check_mmap(struct file *file, unsigned long addr,
				     unsigned long len, unsigned long flags,
				     unsigned long pgoff)
{
	return -EOPNOTSUPP;
}

static inline int ptshare_check_vma(struct vm_area_struct *vma)
{
	return 0;
}

static inline unsigned long
ptshare_unmapped_area(struct file *file, unsigned long addr, unsigned long len,
		      unsigned long pgoff, unsigned long flags,
		      vm_flags_t vm_flags)
{
	return 0;
}

static inline int ptshare_prctl_set(unsigned long value)
{
	return -EINVAL;
}

static inline int ptshare_prctl_get(void)
{
	return -EINVAL;
}

#endif /* CONFIG_PTSHARE */

/* Is a page of @folio mapped in a table that several mms share? */
static inline bool ptshare_folio_shared(struct folio *folio)
{
	long i;

	if (!ptshare_enabled() || folio_test_anon(folio) ||
	    folio_test_hugetlb(folio))
		return false;
	for (i = 0; i < folio_nr_pages(folio); i++)
		if (ptshare_extra_mappers(folio_page(folio, i)) > 0)
			return true;
	return false;
}

/* A boundary of @vma moves to @addr, which may cut a granule in two. */
static inline void ptshare_leave_cut(struct vm_area_struct *vma,
				     unsigned long addr)
{
	if (!IS_ALIGNED(addr, PMD_SIZE) &&
	    addr > vma->vm_start && addr < vma->vm_end)
		ptshare_leave_vma_range(vma, addr, addr + 1);
}

/*
 * Called before a boundary of @vma moves, once the VMAs are locked, with the
 * arguments of vma_adjust_trans_huge(): a shared table lies wholly inside one VMA.
 */
static inline void ptshare_adjust_vma(struct vm_area_struct *vma,
				      unsigned long start, unsigned long end,
				      long adjust_next)
{
	if (!ptshare_enabled() || !ptshare_mm_links(vma->vm_mm))
		return;
	ptshare_leave_cut(vma, start);
	ptshare_leave_cut(vma, end);
	if (adjust_next > 0) {
		struct vm_area_struct *next = find_vma(vma->vm_mm, vma->vm_end);

		ptshare_leave_cut(next, next->vm_start + adjust_next);
	}
}

/*
 * VMAs that merge have equal flags but for soft-dirty tracking, whose users do
 * not share: if one of the two is tracked, the result may be.
 */
static inline void ptshare_merge_vma(struct vm_area_struct *vma,
				     struct vm_area_struct *other)
{
	if (!ptshare_enabled() || !other ||
	    !((vma->vm_flags ^ other->vm_flags) & VM_SOFTDIRTY))
		return;
	ptshare_leave_vma_range(vma, vma->vm_start, vma->vm_end);
	ptshare_leave_vma_range(other, other->vm_start, other->vm_end);
}

/*
 * Leave every shared table that @vma links in [start, end), before its flags or
 * protection change.  The caller holds the mmap lock for write.  @vma is locked
 * against faults first, so that none links a table between here and the change.
 */
static inline void ptshare_leave_before_change(struct vm_area_struct *vma,
					       unsigned long start,
					       unsigned long end)
{
	if (!IS_ENABLED(CONFIG_PTSHARE))
		return;
	/* In this order: sharing may be switched on at any time. */
	vma_start_write(vma);
	if (ptshare_enabled())
		ptshare_leave_vma_range(vma, start, end);
}

/*
 * After a change that may have made @vma eligible again: drop tables of its own
 * in the granules around [start, end), so that the next fault links the shared
 * ones.  That is never visible where pages come from the page cache.  The
 * caller holds the mmap lock for write.
 */
static inline void ptshare_rejoin_after_change(struct vm_area_struct *vma,
					       unsigned long start,
					       unsigned long end)
{
	if (ptshare_enabled() && (vma->vm_flags & VM_MAYSHARE))
		ptshare_rejoin_vma_range(vma, start, end, true);
}

/*
 * A walk over all mappings of a file, under its i_mmap_rwsem, that must not miss
 * a PTE.  A table can move on while the walk is under way: linked by an mm that
 * was visited already, left by the one that was yet to be.  So walk again when
 * some mm has linked a table of the file meanwhile:
 *
 *	ptshare_walk_begin(mapping, &walk);
 *	do {
 *		visit all mappings;
 *	} while (ptshare_walk_again(mapping, &walk));
 *
 * After some turns links of the file are refused until the walk is over.  A
 * walk that ends early calls ptshare_walk_end() instead.
 */
struct ptshare_walk {
	unsigned long ended;
	unsigned int turns;
	bool begun;
	bool held;
};

#define PTSHARE_WALK_TURNS	3

static inline void ptshare_walk_begin(struct address_space *mapping,
				      struct ptshare_walk *walk)
{
	*walk = (struct ptshare_walk){ };
	if (ptshare_enabled()) {
		walk->begun = true;
		walk->ended = ptshare_links_ended(mapping);
	}
}

static inline void ptshare_walk_end(struct address_space *mapping,
				    struct ptshare_walk *walk)
{
	if (walk->held)
		ptshare_hold_links(mapping, false);
	walk->held = false;
}

static inline bool ptshare_walk_again(struct address_space *mapping,
				      struct ptshare_walk *walk)
{
	if (!ptshare_enabled())
		return false;
	if (walk->begun && ptshare_links_begun(mapping) == walk->ended) {
		ptshare_walk_end(mapping, walk);
		return false;
	}
	if (++walk->turns == PTSHARE_WALK_TURNS) {
		ptshare_hold_links(mapping, true);
		walk->held = true;
	}
	walk->begun = true;
	walk->ended = ptshare_links_ended(mapping);
	return true;
}

#endif /* _LINUX_PTSHARE_H */
