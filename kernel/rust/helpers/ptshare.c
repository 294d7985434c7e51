// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros for mm/ptshare/sys.
 */

#ifdef CONFIG_PTSHARE

#include <linux/cow_pte.h>
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/oom.h>
#include <linux/pagemap.h>
#include <linux/ptshare.h>
#include <linux/sched/coredump.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/shm.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>
#include <linux/swapops.h>
#include <linux/userfaultfd_k.h>
#include <linux/vmstat.h>
#include <asm/pgalloc.h>
#include <asm/tlbflush.h>

/* The VMA is stable: its lock or the mmap lock is held. */
void rust_helper_ptshare_vma_facts(struct vm_area_struct *vma,
				   struct ptshare_vma_facts *facts)
{
	const struct vm_operations_struct *ops = vma->vm_ops;
	vm_flags_t flags = vma->vm_flags;

	facts->mm = vma->vm_mm;
	facts->mapping = vma->vm_file ? vma->vm_file->f_mapping : NULL;
	facts->start = vma->vm_start;
	facts->end = vma->vm_end;
	facts->pgoff = vma->vm_pgoff;
	facts->page_prot = pgprot_val(vma->vm_page_prot);
	facts->access = flags & VM_ACCESS_FLAGS;
	/* System V segments call the fault handler of tmpfs themselves. */
	facts->page_cache = (flags & VM_MAYSHARE) && vma->vm_file && ops &&
			    (ops->map_pages == filemap_map_pages ||
			     vma_is_shm(vma)) &&
			    !vma_is_dax(vma) && !is_vm_hugetlb_page(vma) &&
			    !(flags & (VM_PFNMAP | VM_MIXEDMAP | VM_IO));
	facts->excluded = (flags & VM_LOCKED) || vma->anon_vma || userfaultfd_armed(vma) ||
			  (IS_ENABLED(CONFIG_MEM_SOFT_DIRTY) &&
			   !(flags & VM_SOFTDIRTY)) ||
			  mm_has_notifiers(vma->vm_mm);
	facts->asked = test_bit(MMF_PTSHARE, &vma->vm_mm->flags);
	facts->explicitly = flags & VM_SHARED_PT;
}

/*
 * Is the granule at @addr backed by a huge page that @vma could map as one, as
 * do_set_pmd() will see under the page's lock?
 */
bool rust_helper_ptshare_granule_huge(struct vm_area_struct *vma,
				      unsigned long addr)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	struct address_space *mapping = vma->vm_file->f_mapping;
	struct folio *folio;
	bool huge;

	if (!(mapping_large_folio_support(mapping) ||
	      filemap_nr_thps(mapping)) ||
	    thp_disabled_by_hw() || vma_thp_disabled(vma, vma->vm_flags))
		return false;
	folio = filemap_get_entry(mapping, linear_page_index(vma, addr));
	if (!folio || xa_is_value(folio))
		return false;
	huge = folio_test_pmd_mappable(folio) &&
	       !folio_test_has_hwpoisoned(folio);
	folio_put(folio);
	return huge;
#else
	return false;
#endif
}

/* The PMD entry for an address, NULL where no table of PMD entries is. */
pmd_t *rust_helper_ptshare_find_pmd(struct mm_struct *mm, unsigned long addr)
{
	pgd_t *pgd = pgd_offset(mm, addr);
	p4d_t *p4d;
	pud_t *pud;

	if (!pgd_present(*pgd))
		return NULL;
	p4d = p4d_offset(pgd, addr);
	if (!p4d_present(*p4d))
		return NULL;
	pud = pud_offset(p4d, addr);
	if (!pud_present(*pud) || pud_leaf(*pud))
		return NULL;
	return pmd_offset(pud, addr);
}

bool rust_helper_ptshare_pmd_none(pmd_t *pmd)
{
	return pmd_none(pmdp_get_lockless(pmd));
}

/* The PTE table that an entry points at, NULL if it points at none. */
struct ptdesc *rust_helper_ptshare_pmd_table(pmd_t *pmd)
{
	pmd_t pmdval = pmdp_get_lockless(pmd);

	/* On x86 what is absent or a leaf is bad, too. */
	if (pmd_bad(pmdval))
		return NULL;
	return page_ptdesc(pmd_page(pmdval));
}

void rust_helper_ptshare_pmd_populate(struct mm_struct *mm, pmd_t *pmd,
				      struct ptdesc *table)
{
	/* As in pmd_install(): the table is seen whole or not at all. */
	smp_wmb();
	pmd_populate(mm, pmd, ptdesc_page(table));
}

void rust_helper_pmd_clear(pmd_t *pmd)
{
	pmd_clear(pmd);
}

spinlock_t *rust_helper_pmd_lock(struct mm_struct *mm, pmd_t *pmd)
{
	return pmd_lock(mm, pmd);
}

spinlock_t *rust_helper_ptshare_table_lock(struct ptdesc *table)
{
	spinlock_t *ptl = ptlock_ptr(table);

	/* The PMD lock, which has the same class, is held. */
	spin_lock_nested(ptl, SINGLE_DEPTH_NESTING);
	return ptl;
}

/* Does rss count what this entry is?  A page, or one on its way. */
bool rust_helper_ptshare_pte_counts(struct ptdesc *table, unsigned int index)
{
	pte_t pte = ptep_get((pte_t *)ptdesc_address(table) + index);

	return pte_present(pte) ||
	       (is_swap_pte(pte) && is_migration_entry(pte_to_swp_entry(pte)));
}

/* Can it be dropped, to be had back from the page cache?  None or a page. */
bool rust_helper_ptshare_pte_drops(struct ptdesc *table, unsigned int index)
{
	pte_t pte = ptep_get((pte_t *)ptdesc_address(table) + index);

	return pte_none(pte) || pte_present(pte);
}

bool rust_helper_ptshare_pte_none(struct ptdesc *table, unsigned int index)
{
	return pte_none(ptep_get((pte_t *)ptdesc_address(table) + index));
}

void rust_helper_ptshare_zap(struct vm_area_struct *vma, unsigned long start)
{
	zap_page_range_single(vma, start, PMD_SIZE, NULL);
}

static void ptshare_free_rcu(struct rcu_head *head)
{
	struct ptdesc *table = container_of(head, struct ptdesc, pt_rcu_head);

	pte_free(NULL, ptdesc_page(table));
}

/* An empty table that was the mm's own, out of its entry and flushed. */
void rust_helper_ptshare_table_free(struct mm_struct *mm, struct ptdesc *table)
{
	mm_dec_nr_ptes(mm);
	call_rcu(&table->pt_rcu_head, ptshare_free_rcu);
}

bool rust_helper_ptshare_pte_maps(struct ptdesc *table, unsigned int index,
				  const struct page *page)
{
	pte_t pte = ptep_get((pte_t *)ptdesc_address(table) + index);

	return pte_present(pte) && pte_pfn(pte) == page_to_pfn(page);
}

int rust_helper_ptshare_count_read(struct ptdesc *table)
{
	return atomic_read(&table->pt_share_count);
}

int rust_helper_ptshare_count_cmpxchg(struct ptdesc *table, int old, int new)
{
	return atomic_cmpxchg(&table->pt_share_count, old, new);
}

int rust_helper_ptshare_count_dec(struct ptdesc *table)
{
	return atomic_dec_return(&table->pt_share_count);
}

void rust_helper_ptshare_count_set(struct ptdesc *table, int count)
{
	atomic_set(&table->pt_share_count, count);
}

long rust_helper_ptshare_mm_links_add(struct mm_struct *mm, long delta)
{
	return atomic_long_add_return(delta, &mm->ptshare_links);
}

/* The mm owns one PTE table more, which maps @pages pages of @mapping. */
void rust_helper_ptshare_mm_own(struct mm_struct *mm, long pages,
				struct address_space *mapping)
{
	mm_inc_nr_ptes(mm);
	add_mm_counter(mm, shmem_mapping(mapping) ? MM_SHMEMPAGES :
						    MM_FILEPAGES, pages);
}

/* Bindings are generated as for a module, to which the TLB is not shown. */
#ifndef MODULE
void ptshare_arch_flush_granule(struct mm_struct *mm, unsigned long start)
{
	/*
	 * As if the table were freed, for it may be, by another mm: CPUs that
	 * only borrow this mm must not walk it any more either.
	 */
	flush_tlb_mm_range(mm, start, start + PMD_SIZE, PAGE_SHIFT, true);
}

void ptshare_arch_flush_range(struct mm_struct *mm, unsigned long start,
			      unsigned long end)
{
	/* The stride is that of the translations, not of the PMD entries. */
	flush_tlb_mm_range(mm, start, end, PAGE_SHIFT, true);
}

void ptshare_arch_flush_all(void)
{
	flush_tlb_all();
}
#endif

long rust_helper_atomic_long_read_acquire(const atomic_long_t *v)
{
	return atomic_long_read_acquire(v);
}

bool rust_helper_atomic_long_try_cmpxchg(atomic_long_t *v, long *old, long new)
{
	return atomic_long_try_cmpxchg(v, old, new);
}

long rust_helper_atomic_long_add_return_release(long i, atomic_long_t *v)
{
	return atomic_long_add_return_release(i, v);
}

void rust_helper_count_vm_event(enum vm_event_item item)
{
	count_vm_event(item);
}

struct ptshare_bucket *rust_helper_ptshare_alloc_buckets(size_t n)
{
	struct ptshare_bucket *buckets = kvcalloc(n, sizeof(*buckets),
						  GFP_KERNEL);
	size_t i;

	for (i = 0; buckets && i < n; i++)
		spin_lock_init(&buckets[i].lock);
	return buckets;
}

unsigned long rust_helper_totalram_pages(void)
{
	return totalram_pages();
}

bool rust_helper_ptshare_enabled(void)
{
	return ptshare_enabled();
}

void rust_helper_ptshare_enable(void)
{
	static_branch_enable(&ptshare_key);
}

struct mm_struct *rust_helper_ptshare_current_mm(void)
{
	return current->mm;
}

bool rust_helper_ptshare_mm_asked(struct mm_struct *mm)
{
	return test_bit(MMF_PTSHARE, &mm->flags);
}

void rust_helper_ptshare_mm_ask(struct mm_struct *mm, bool ask)
{
	if (ask)
		set_bit(MMF_PTSHARE, &mm->flags);
	else
		clear_bit(MMF_PTSHARE, &mm->flags);
}

/* Is this a file whose pages are in the page cache, as far as one can tell? */
bool rust_helper_ptshare_plain_file(struct file *file)
{
	struct inode *inode = file_inode(file);

	return S_ISREG(inode->i_mode) && !is_file_hugepages(file) &&
	       !IS_DAX(file->f_mapping->host);
}

unsigned long rust_helper_ptshare_get_area(struct file *file,
					   unsigned long addr,
					   unsigned long len,
					   unsigned long pgoff,
					   unsigned long flags,
					   vm_flags_t vm_flags)
{
	return mm_get_unmapped_area_vmflags(current->mm, file, addr, len, pgoff,
					    flags, vm_flags);
}

unsigned long rust_helper_ptshare_page_mapping(const struct page *page,
					       unsigned long *index)
{
	const struct folio *folio = page_folio(page);

	if (folio_test_anon(folio) || folio_test_hugetlb(folio))
		return 0;
	*index = folio->index + folio_page_idx(folio, page);
	return (unsigned long)READ_ONCE(folio->mapping);
}

void rust_helper_ptshare_mmap_write_lock(struct mm_struct *mm)
{
	mmap_write_lock(mm);
}

void rust_helper_ptshare_mmap_write_unlock(struct mm_struct *mm)
{
	mmap_write_unlock(mm);
}

void rust_helper_ptshare_cond_resched(void)
{
	cond_resched();
}

void rust_helper_ptshare_vma_start_write(struct vm_area_struct *vma)
{
	vma_start_write(vma);
}

/* The mm of the first process whose PID is at least *@nr; *@nr is that PID. */
struct mm_struct *rust_helper_ptshare_next_mm(int *nr)
{
	struct task_struct *task = NULL, *thread;
	struct mm_struct *mm = NULL;
	struct pid *pid;

	rcu_read_lock();
	pid = find_ge_pid(*nr, &init_pid_ns);
	if (pid) {
		*nr = pid_nr(pid);
		task = get_pid_task(pid, PIDTYPE_TGID);
	} else {
		*nr = -1;
	}
	rcu_read_unlock();
	if (!task)
		return NULL;
	/* The main thread may be gone while others live. */
	rcu_read_lock();
	thread = find_lock_task_mm(task);
	if (thread) {
		mm = thread->mm;
		mmget(mm);
		task_unlock(thread);
	}
	rcu_read_unlock();
	put_task_struct(task);
	return mm;
}

#ifdef CONFIG_COW_PTE
bool rust_helper_cow_pte_killed(void)
{
	return fatal_signal_pending(current);
}

bool rust_helper_ptshare_pmd_writes(pmd_t *pmd)
{
	return pmd_table_write(pmdp_get_lockless(pmd));
}

/* Point an empty entry at the table of another one, and write-protect both. */
void rust_helper_cow_pte_pair(pmd_t *dst, pmd_t *src)
{
	pmd_t pmd = *src;

	if (pmd_table_write(pmd)) {
		pmd = pmd_table_wrprotect(pmd);
		set_pmd(src, pmd);
	}
	set_pmd(dst, pmd);
}

void rust_helper_cow_pte_unprotect(pmd_t *pmd)
{
	set_pmd(pmd, pmd_table_mkwrite(*pmd));
}

static void cow_pte_find_at_swapoff(struct mm_struct *mm)
{
	if (!list_empty(&mm->mmlist))
		return;
	spin_lock(&mmlist_lock);
	if (list_empty(&mm->mmlist))
		list_add(&mm->mmlist, &init_mm.mmlist);
	spin_unlock(&mmlist_lock);
}

/* @mm has less in the tables that it borrows. */
void rust_helper_cow_pte_note_owned(struct mm_struct *mm, const int *rss)
{
	long pages = 0;
	int i;

	for (i = 0; i < NR_MM_COUNTERS; i++)
		pages += rss[i];
	atomic_long_sub(pages, &mm->cow_pte_most);
}

void rust_helper_cow_pte_borrows_add(struct mm_struct *mm, long n)
{
	atomic_long_add(n, &mm->cow_pte_borrows);
}

/* Is it being torn down, or otherwise beyond the reach of all but rmap? */
bool rust_helper_cow_pte_mm_exits(struct mm_struct *mm)
{
	return !atomic_read(&mm->mm_users);
}

/* A fork has made @child use @n tables that @parent uses. */
void rust_helper_cow_pte_note_shared(struct mm_struct *child,
				     struct mm_struct *parent, long n)
{
	/* Whichever sharer reclaim finds a page through, all have the entry. */
	cow_pte_find_at_swapoff(parent);
	cow_pte_find_at_swapoff(child);
	set_bit(MMF_ODF_BORROWS, &child->flags);
	set_bit(MMF_ODF_LENDS, &parent->flags);
	atomic_long_add(n, &child->cow_pte_borrows);
	count_vm_events(ODF_TABLE_SHARED, n);
}

void rust_helper_cow_pte_add_rss(struct mm_struct *mm, const int *rss, int sign)
{
	int i;

	for (i = 0; i < NR_MM_COUNTERS; i++)
		if (rss[i])
			add_mm_counter(mm, i, sign * rss[i]);
}

void rust_helper_mm_inc_nr_ptes(struct mm_struct *mm)
{
	mm_inc_nr_ptes(mm);
}

void rust_helper_mm_dec_nr_ptes(struct mm_struct *mm)
{
	mm_dec_nr_ptes(mm);
}

struct ptdesc *rust_helper_ptshare_table_alloc(struct mm_struct *mm)
{
	pgtable_t table = pte_alloc_one(mm);

	return table ? page_ptdesc(table) : NULL;
}

void rust_helper_ptshare_table_unalloc(struct mm_struct *mm,
				       struct ptdesc *table)
{
	pte_free(mm, ptdesc_page(table));
}

int rust_helper_cow_pte_flag(struct mm_struct *mm, int bit)
{
	return test_bit(bit, &mm->flags);
}

void rust_helper_cow_pte_choose(struct mm_struct *mm, bool use)
{
	if (use)
		set_bit(MMF_ODF, &mm->flags);
	else
		clear_bit(MMF_ODF, &mm->flags);
	set_bit(MMF_ODF_CHOSEN, &mm->flags);
}
#endif /* CONFIG_COW_PTE */

#endif /* CONFIG_PTSHARE */
