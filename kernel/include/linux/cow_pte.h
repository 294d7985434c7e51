/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Page tables that fork leaves shared between parent and child (mm/ptshare).
 *
 * All PMD entries that point at such a table are write-protected.  What other
 * code has to know:
 *
 *  - No sharer changes a PTE in it on its own behalf.  Who wants to makes the
 *    table its own before: cow_pte_unshare() and its kin, which may sleep and
 *    may fail with -ENOMEM; for a range also with -EINTR, once the task is
 *    killed.  After that, an ordinary table is there.
 *  - Who unmaps a whole granule of one mm just leaves: cow_pte_leave().
 *  - Who changes a PTE for everybody (reclaim, migration, truncation) does it in
 *    place, under the PTE lock, and flushes all sharers: see linux/ptshare.h.
 *    So does a fork that copies, which write-protects them; nobody can have one
 *    cached as writable.
 *  - Its pages are in the rss of its owner, the mm that had the table before the
 *    fork, as long as that uses it: ptshare_rss_mm().  Others borrow the table:
 *    cow_pte_borrows().
 *  - A page in it may be PageAnonExclusive: exclusive to the table.  GUP neither
 *    writes through it nor pins.  Other references are looked for when the last
 *    one who uses the table takes it back.
 */
#ifndef _LINUX_COW_PTE_H
#define _LINUX_COW_PTE_H

#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/ptshare.h>
#include <linux/sched/coredump.h>
#include <linux/userfaultfd_k.h>

/* Tables that an mm has left, and that its TLBs may still know. */
struct cow_pte_left {
	unsigned long start;	/* what they mapped, at least */
	unsigned long end;
	unsigned long tables;
};

#ifdef CONFIG_COW_PTE

/* Does the entry point at a table that fork left shared? */
static inline bool cow_pte_protected(pmd_t pmd)
{
	return ptshare_enabled() && pmd_present(pmd) && !pmd_leaf(pmd) &&
	       !pmd_table_write(pmd);
}

/* The same of an entry that may change meanwhile. */
static inline bool cow_pte_pmd(pmd_t *pmd)
{
	return ptshare_enabled() && cow_pte_protected(pmdp_get_lockless(pmd));
}

/* Is this PTE in such a table?  The PTE lock is held. */
static inline bool cow_pte_table(const pte_t *ptep)
{
	struct ptdesc *table = virt_to_ptdesc(ptep);

	return ptshare_enabled() && ptdesc_pte_share_count(table) > 0 &&
	       !table->pt_share_mapping;
}

/* For how many mms, other than its own, does this PTE map what it maps? */
static inline int cow_pte_others(const pte_t *ptep)
{
	return cow_pte_table(ptep) ?
	       ptdesc_pte_share_count(virt_to_ptdesc(ptep)) - 1 : 0;
}

static inline void cow_pte_mm_init(struct mm_struct *mm)
{
	atomic_long_set(&mm->cow_pte_borrows, 0);
	atomic_long_set(&mm->cow_pte_most, 0);
}

/* How many tables does @mm use that another mm owns, or nobody? */
static inline unsigned long cow_pte_borrows(struct mm_struct *mm)
{
	return atomic_long_read(&mm->cow_pte_borrows);
}

/*
 * How many pages and swap entries may @mm have in tables that it borrows?  To
 * be added to its rss where one cannot look: as if all tables were full, but not
 * more than its parent had, less what it has made its own.
 */
static inline unsigned long cow_pte_borrowed_pages(struct mm_struct *mm)
{
	/* The counters that it comes from are not exact. */
	unsigned long most = max(atomic_long_read(&mm->cow_pte_most), 0L);

	return min(cow_pte_borrows(mm) * PTRS_PER_PTE, most);
}

/* In mm/ptshare. */
bool cow_pte_wanted(struct mm_struct *mm, u64 clone_flags);
unsigned long cow_pte_share(struct mm_struct *dst_mm, struct mm_struct *src_mm,
			    pmd_t *dst_pmd, pmd_t *src_pmd, unsigned long addr,
			    unsigned long n);
int cow_pte_unshare(struct vm_area_struct *vma, unsigned long addr);
int __cow_pte_unshare_range(struct vm_area_struct *vma, unsigned long start,
			    unsigned long end);
void cow_pte_leave(struct mm_struct *mm, pmd_t *pmd, unsigned long addr,
		   struct cow_pte_left *left);
void __cow_pte_flush_left(struct mm_struct *mm, struct cow_pte_left *left);
int cow_pte_get_use(struct mm_struct *mm);
void cow_pte_set_use(struct mm_struct *mm, int use);

/* In mm/memory.c. */
void cow_pte_count(struct ptdesc *table, int *rss);
void cow_pte_settle(struct mm_struct *mm, unsigned long addr,
		    struct ptdesc *table);
int cow_pte_copy(struct vm_area_struct *vma, unsigned long addr,
		 struct ptdesc *dst, struct ptdesc *src, int *rss,
		 swp_entry_t *full);

/* Around the copying of @oldmm's mappings: whether tables are to be shared. */
static inline void cow_pte_fork_begin(struct mm_struct *mm,
				      struct mm_struct *oldmm, u64 clone_flags)
{
	if (cow_pte_wanted(oldmm, clone_flags))
		set_bit(MMF_ODF_FORK, &mm->flags);
}

/*
 * The mmap locks of both are held, so @oldmm unmaps nothing.  Notes what @mm may
 * have in tables that it borrows, and its rss, at most.
 */
static inline void cow_pte_fork_end(struct mm_struct *mm,
				    struct mm_struct *oldmm)
{
	unsigned long had, has;

	if (!ptshare_enabled())
		return;
	clear_bit(MMF_ODF_FORK, &mm->flags);
	if (!cow_pte_borrows(mm))
		return;

	had = get_mm_rss(oldmm) + get_mm_counter(oldmm, MM_SWAPENTS) +
	      cow_pte_borrowed_pages(oldmm);
	has = get_mm_rss(mm) + get_mm_counter(mm, MM_SWAPENTS);
	atomic_long_set(&mm->cow_pte_most, had > has ? had - has : 0);
	mm->hiwater_rss = min(get_mm_rss(mm) + cow_pte_borrowed_pages(mm),
			      get_mm_rss(oldmm) + cow_pte_borrowed_pages(oldmm));
}

/* The rss of a new child, at most, once cow_pte_fork_end() was called. */
static inline unsigned long cow_pte_fork_rss(struct mm_struct *mm)
{
	return cow_pte_borrows(mm) ? mm->hiwater_rss : get_mm_rss(mm);
}

/* Flush what cow_pte_leave() has left behind. */
static inline void cow_pte_flush_left(struct mm_struct *mm,
				      struct cow_pte_left *left)
{
	if (ptshare_enabled() && left->tables)
		__cow_pte_flush_left(mm, left);
}

/*
 * Does the entry point at a table that others use, too?  One that nobody else
 * uses any more is taken back first, which needs no memory.  The caller holds the
 * mmap lock.
 */
static inline bool cow_pte_shared(struct vm_area_struct *vma, pmd_t *pmd,
				  unsigned long addr)
{
	pmd_t pmdval;
	bool alone;

	if (!ptshare_enabled())
		return false;
	rcu_read_lock();
	pmdval = pmdp_get_lockless(pmd);
	alone = cow_pte_protected(pmdval) &&
		ptdesc_pte_share_count(page_ptdesc(pmd_page(pmdval))) == 1;
	rcu_read_unlock();
	if (alone)
		cow_pte_unshare(vma, addr);
	return cow_pte_pmd(pmd);
}

/*
 * Is fork to share the tables of this mapping?  Not where it must look at every
 * page, nor where somebody relies on how this mm's PTEs change.
 */
static inline bool cow_pte_may_share(struct mm_struct *dst_mm,
				     struct vm_area_struct *src_vma)
{
	return ptshare_enabled() && test_bit(MMF_ODF_FORK, &dst_mm->flags) &&
	       is_cow_mapping(src_vma->vm_flags) && src_vma->anon_vma &&
	       !(src_vma->vm_flags & (VM_LOCKED | VM_PFNMAP | VM_MIXEDMAP |
				      VM_IO | VM_MERGEABLE | VM_SHADOW_STACK)) &&
	       !userfaultfd_armed(src_vma) && !vma_is_dax(src_vma) &&
	       !mm_has_notifiers(src_vma->vm_mm);
}

/* May @mm use tables that a fork left shared? */
static inline bool cow_pte_mm(struct mm_struct *mm)
{
	unsigned long flags = BIT(MMF_ODF_BORROWS) | BIT(MMF_ODF_LENDS);

	return ptshare_enabled() && (READ_ONCE(mm->flags) & flags);
}

/*
 * Make the tables that @vma uses in [start, end) its own.  The caller holds the
 * mmap lock, for write if nothing may be shared again meanwhile.
 */
static inline int cow_pte_unshare_range(struct vm_area_struct *vma,
					unsigned long start, unsigned long end)
{
	if (!cow_pte_mm(vma->vm_mm))
		return 0;
	return __cow_pte_unshare_range(vma, start, end);
}

/* Make the table that @vma uses at @addr its own, whatever becomes of the task. */
static inline int cow_pte_unshare_at(struct vm_area_struct *vma,
				     unsigned long addr)
{
	if (!cow_pte_mm(vma->vm_mm))
		return 0;
	return cow_pte_unshare(vma, addr);
}

/* A boundary of @vma moves to @addr, which may cut a granule in two. */
static inline int cow_pte_unshare_cut(struct vm_area_struct *vma,
				      unsigned long addr)
{
	if (!ptshare_enabled() || IS_ALIGNED(addr, PMD_SIZE) ||
	    addr <= vma->vm_start || addr >= vma->vm_end)
		return 0;
	return cow_pte_unshare_at(vma, addr);
}

#else /* !CONFIG_COW_PTE */

static inline bool cow_pte_protected(pmd_t pmd)
{
	return false;
}

static inline bool cow_pte_pmd(pmd_t *pmd)
{
	return false;
}

static inline bool cow_pte_table(const pte_t *ptep)
{
	return false;
}

static inline int cow_pte_others(const pte_t *ptep)
{
	return 0;
}

static inline void cow_pte_mm_init(struct mm_struct *mm)
{
}

static inline unsigned long cow_pte_borrows(struct mm_struct *mm)
{
	return 0;
}

static inline unsigned long cow_pte_borrowed_pages(struct mm_struct *mm)
{
	return 0;
}

static inline void cow_pte_fork_begin(struct mm_struct *mm,
				      struct mm_struct *oldmm, u64 clone_flags)
{
}

static inline void cow_pte_fork_end(struct mm_struct *mm,
				    struct mm_struct *oldmm)
{
}

static inline bool cow_pte_may_share(struct mm_struct *dst_mm,
				     struct vm_area_struct *src_vma)
{
	return false;
}

static inline unsigned long cow_pte_share(struct mm_struct *dst_mm,
					  struct mm_struct *src_mm,
					  pmd_t *dst_pmd, pmd_t *src_pmd,
					  unsigned long addr, unsigned long n)
{
	return 0;
}

static inline int cow_pte_unshare(struct vm_area_struct *vma,
				  unsigned long addr)
{
	return 0;
}

static inline void cow_pte_leave(struct mm_struct *mm, pmd_t *pmd,
				 unsigned long addr, struct cow_pte_left *left)
{
}

static inline void cow_pte_flush_left(struct mm_struct *mm,
				      struct cow_pte_left *left)
{
}

static inline unsigned long cow_pte_fork_rss(struct mm_struct *mm)
{
	return get_mm_rss(mm);
}

static inline bool cow_pte_shared(struct vm_area_struct *vma, pmd_t *pmd,
				  unsigned long addr)
{
	return false;
}

static inline int cow_pte_unshare_range(struct vm_area_struct *vma,
					unsigned long start, unsigned long end)
{
	return 0;
}

static inline int cow_pte_unshare_at(struct vm_area_struct *vma,
				     unsigned long addr)
{
	return 0;
}

static inline int cow_pte_unshare_cut(struct vm_area_struct *vma,
				      unsigned long addr)
{
	return 0;
}

#endif /* CONFIG_COW_PTE */

/*
 * Between these the task changes PTEs for all who share a table, and flushes
 * them: cow_pte_check() accepts it.
 */
static inline void cow_pte_for_all_begin(void)
{
#ifdef CONFIG_DEBUG_COW_PTE
	current->cow_pte_for_all++;
#endif
}

static inline void cow_pte_for_all_end(void)
{
#ifdef CONFIG_DEBUG_COW_PTE
	current->cow_pte_for_all--;
#endif
}

/* Make the table that @pmd points at the mm's own, if it is not. */
static inline int cow_pte_unshare_pmd(struct vm_area_struct *vma, pmd_t *pmd,
				      unsigned long addr)
{
	return cow_pte_pmd(pmd) ? cow_pte_unshare(vma, addr) : 0;
}

#endif /* _LINUX_COW_PTE_H */
