// SPDX-License-Identifier: GPL-2.0-only
/*
 * kho_exercise - make KHO hand over each kind of memory, on request
 *
 * In /sys/kernel/debug/kho_exercise:
 *
 *   preserve  write "NAME", "NAME N", "many N", "scratch PHYS", "blob-at PHYS",
 *             "folio-at PHYS", "node-border PHYS" or "node-halves PHYS":
 *             allocates the memory of a scenario and has KHO preserve it. N is
 *             how many blocks of the scenarios that are made of some, of all its
 *             orders in turn (else one of each); how many pages "many" has, and
 *             "vmalloc" if it is not to have its usual number; how many subtrees
 *             "blob" adds, if KHO does not refuse one before that. May be done
 *             again: the pieces add up.
 *   break     write "NAME HOW": writes to the descriptions of the scenario's
 *             preserved vmalloc areas. HOW is "loop" (the last chunk leads to the
 *             first), "outside-ram" (it leads to where no memory is),
 *             "unpreserved" (the first page that is listed is so no more),
 *             "too-many" (a page is listed that total_pages does not count),
 *             "too-few" (total_pages counts one that is not listed) or "mend",
 *             which takes all of that back.
 *   restore   write "NAME", after the kexec: restores what was handed over, broken
 *             or not.
 *   free      write "NAME": frees the memory as its owner would, after having it
 *             mended and unpreserved if it was preserved in this kernel. On a
 *             kernel that restores wrongly this trips the checks of
 *             CONFIG_DEBUG_VM.
 *   report    read: one JSON object per piece and line.
 *   time      write "ORDER ROUNDS": preserves and unpreserves one block that often;
 *             read: how long both took in total, as one line of JSON.
 *
 * A piece is the memory of one preserve call, or one vmalloc area, or all pages
 * of one "many N", or the blob of a subtree. A write fails if there is no such
 * scenario (EINVAL), this kernel cannot have it (EOPNOTSUPP), there is no memory
 * for it (ENOMEM), or there is nothing of it to restore, to free or to break
 * (ENOENT). What KHO returned is no failure of the write, except of one to
 * "time". The report has it:
 *
 *   scenario, piece  which one it is
 *   state    preserved, unpreserved or freed; after the kexec, handed-over until
 *            it is restored, restore-failed or restored. "unpreserved" then is
 *            what was left behind, whose memory is somebody else's by now.
 *   call     the last call of KHO, and
 *   ret      what it returned; 0 for a pointer and -ENOENT for NULL
 *   phys     of the first page
 *   pages    how many there are
 *   physes   of each page, if that does not follow from the first; empty if they
 *            are too many
 *   order    of the allocation, or of each if there are several
 *   compound is the first page part of a compound page now?
 *   refs     the reference counts now, page after page, as run lengths:
 *            [[1,1],[0,3]] are a page with 1 and three with 0
 *   descriptor  physical address of the struct kho_vmalloc of an area that was
 *            preserved as such; it is in a preserved page
 *   subtree  name of the subtree whose blob this is
 *
 * What was made is recorded in preserved pages, which the module finds again
 * after the kexec as the KHO subtree "kho_exercise". The same code builds
 * against kernels with and without types of preserved pages.
 *
 * The module can be unloaded as long as it has no record: what it has preserved
 * has to stay allocated until the kexec.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/debugfs.h>
#include <linux/dma-mapping.h>
#include <linux/gfp.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/log2.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/platform_device.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/sizes.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#ifdef HAVE_RADIX_KEYS
#include <linux/kho_radix_tree.h>
#endif

#include "compat.h"

#define SUBTREE "kho_exercise"

/* Room for the name of one more: SUBTREE, scenario, number. */
#define SUBTREE_NAME 48

/* Changes with the layout of struct record or struct piece. */
#define RECORD_VERSION 2

/* Longer lists of page addresses are left out of the report. */
#define REPORTED_ADDRESSES 4096

#define DMA_ORDER (const_ilog2(SZ_64K) - PAGE_SHIFT)
#define HUGE_ORDER (PMD_SHIFT - PAGE_SHIFT)
#define VMALLOC_PAGES 64

/* Beyond what any machine here has, within what a physical address can be. */
#define OUTSIDE_RAM BIT_ULL(45)

/* Of a block of 8. */
#define PART_PAGES 5

/* For as much as user space asks for: rather fail than have the OOM killer make room. */
#define MAY_FAIL (GFP_KERNEL | __GFP_NOWARN | __GFP_RETRY_MAYFAIL)

enum state {
	PRESERVED,
	UNPRESERVED,
	FREED,
	HANDED_OVER,
	RESTORED,
	RESTORE_FAILED,
};

static const char * const state_names[] = {
	[PRESERVED] = "preserved",
	[UNPRESERVED] = "unpreserved",
	[FREED] = "freed",
	[HANDED_OVER] = "handed-over",
	[RESTORED] = "restored",
	[RESTORE_FAILED] = "restore-failed",
};

struct piece {
	char scenario[16];
	char call[32];			/* the last call of KHO, and */
	s32 ret;			/* what it returned */
	u32 number;			/* within the scenario */
	u32 state;			/* enum state */
	u32 order;			/* of the allocation or allocations */
	phys_addr_t phys;		/* of the first page */
	u64 pages;
	bool recorded;			/* is in the tree of this kernel */
	bool handed_over;		/* was made by the previous kernel */
	bool split;			/* into order-0 pages */
	bool lacks_first;		/* break_unpreserved() */
	struct kho_vmalloc area_handover;
	struct kho_vmalloc list_handover;
	/* Only good in the kernel that has set them: */
	void *area;			/* of vmalloc() */
	phys_addr_t *list;		/* of each page, if not contiguous */
};

/* One page, preserved; the first one is the subtree. */
struct record {
	u32 version;
	u32 piece_size;
	phys_addr_t next;		/* 0 in the last one */
	u64 nr_pieces;
	struct list_head node;		/* only good in this kernel */
	struct piece pieces[];
};

#define RECORD_PIECES \
	((PAGE_SIZE - sizeof(struct record)) / sizeof(struct piece))

/* How a kind of memory is told to KHO. Each sets @call and returns its result. */
struct kind {
	int (*preserve)(struct piece *p);
	void (*unpreserve)(struct piece *p);
	int (*restore)(struct piece *p);
};

/* What is written after the name of a scenario to have it preserved. */
enum argument {
	NOTHING,
	MAYBE_A_COUNT,
	A_COUNT,
	AN_ADDRESS,
};

struct scenario {
	const char *name;
	const struct kind *kind;
	enum argument argument;
	/* @argument is 0 if there was none. */
	int (*make)(const struct scenario *s, unsigned long argument);
	/* What make_block() does before preserving it, and after that. */
	void (*before)(const struct scenario *s, struct piece *p);
	void (*after)(const struct scenario *s, struct piece *p);
	void (*free)(struct piece *p);		/* NULL: it is not ours */
	unsigned int first_order;		/* of the pieces, or the only one */
	unsigned int last_order;
	gfp_t gfp;				/* more flags for alloc_pages() */
	bool never_restored;
};

/*
 * Protects the records and the state of the pieces. Not held while memory is
 * freed: that may be an oops, and the report has to be readable after it.
 */
static DEFINE_MUTEX(lock);

/* Of the previous kernel, if it has handed over any, then those of this one. */
static LIST_HEAD(records);

/* The last record of this kernel, NULL as long as there is none. */
static struct record *last_record;

/* A device without a driver, for dma_alloc_coherent(). */
static struct platform_device *device;

/* NULL where the kernel does not have it, which includes its prototype. */
int kho_split_preserved_pages(struct page *page, unsigned int order);
static typeof(&kho_split_preserved_pages) split_preserved_pages;

#define for_each_piece(r, p)					\
	list_for_each_entry(r, &records, node)			\
		for (p = r->pieces; p < r->pieces + r->nr_pieces; p++)

static bool is_of(const struct piece *p, const struct scenario *s)
{
	return !strcmp(p->scenario, s->name);
}

static phys_addr_t phys_of(const struct piece *p, unsigned long i)
{
	return p->list ? p->list[i] : p->phys + PFN_PHYS(i);
}

static struct page *page_of(const struct piece *p, unsigned long i)
{
	return phys_to_page(phys_of(p, i));
}

static int called(struct piece *p, const char *call, int ret)
{
	strscpy(p->call, call);
	p->ret = ret;
	return ret;
}

/* The calls that restore return a pointer; -ENOENT stands for NULL. */
static int restored(struct piece *p, const char *call, const void *returned)
{
	return called(p, call, returned ? 0 : -ENOENT);
}

/* Contiguous pages, in one call */

static int preserve_pages(struct piece *p)
{
	return called(p, "kho_preserve_pages",
		      kho_preserve_pages(page_of(p, 0), p->pages));
}

static void unpreserve_pages(struct piece *p)
{
	kho_unpreserve_pages(page_of(p, 0), p->pages);
	called(p, "kho_unpreserve_pages", 0);
}

static int restore_pages(struct piece *p)
{
	return restored(p, "kho_restore_pages",
			kho_restore_pages(p->phys, p->pages));
}

static const struct kind contiguous = {
	.preserve = preserve_pages,
	.unpreserve = unpreserve_pages,
	.restore = restore_pages,
};

/* Pages that are claimed as something that they are not */

static int restore_mistaken(struct piece *p)
{
	if (p->split)
		return restored(p, "kho_restore_folio",
				kho_restore_folio(p->phys));
	return restored(p, "kho_restore_pages", kho_restore_pages(p->phys, 1));
}

static const struct kind mistaken = {
	.preserve = preserve_pages,
	.unpreserve = unpreserve_pages,
	.restore = restore_mistaken,
};

/* Pages of two nodes, half of them in each, restored node by node */

static int restore_halves(struct piece *p)
{
	const unsigned long half = p->pages / 2;
	struct page *page;

	page = kho_restore_pages(p->phys, half);
	if (page)
		page = kho_restore_pages(p->phys + PFN_PHYS(half), half);

	return restored(p, "kho_restore_pages", page);
}

static const struct kind halves = {
	.preserve = preserve_pages,
	.unpreserve = unpreserve_pages,
	.restore = restore_halves,
};

/* Folios */

static int preserve_folio(struct piece *p)
{
	return called(p, "kho_preserve_folio",
		      kho_preserve_folio(page_folio(page_of(p, 0))));
}

static void unpreserve_folio(struct piece *p)
{
	kho_unpreserve_folio(page_folio(page_of(p, 0)));
	called(p, "kho_unpreserve_folio", 0);
}

static int restore_folio(struct piece *p)
{
	return restored(p, "kho_restore_folio", kho_restore_folio(p->phys));
}

static const struct kind folios = {
	.preserve = preserve_folio,
	.unpreserve = unpreserve_folio,
	.restore = restore_folio,
};

/* Areas of vmalloc() */

static struct kho_vmalloc_chunk *last_chunk(const struct piece *p)
{
	const struct kho_vmalloc *v = &p->area_handover;
	struct kho_vmalloc_chunk *chunk = phys_to_virt(v->first.phys);
	/* Counted, as the link of the last one may be wrong. */
	unsigned long links = (p->pages >> v->order) / ARRAY_SIZE(chunk->phys);

	while (links--)
		chunk = phys_to_virt(chunk->hdr.next.phys);

	return chunk;
}

static int break_loop(struct piece *p)
{
	last_chunk(p)->hdr.next.phys = p->area_handover.first.phys;
	return 0;
}

static int break_outside_ram(struct piece *p)
{
	last_chunk(p)->hdr.next.phys = OUTSIDE_RAM;
	return 0;
}

static int break_unpreserved(struct piece *p)
{
	if (!CAN_UNPRESERVE)
		return -EOPNOTSUPP;
	if (!p->lacks_first)
		kho_unpreserve_pages(page_of(p, 0),
				     1UL << p->area_handover.order);
	p->lacks_first = true;
	return 0;
}

static int break_too_many(struct piece *p)
{
	p->area_handover.total_pages = p->pages - 1;
	return 0;
}

static int break_too_few(struct piece *p)
{
	p->area_handover.total_pages = p->pages + 1;
	return 0;
}

static int mend(struct piece *p)
{
	int err = 0;

	last_chunk(p)->hdr.next.phys = 0;
	p->area_handover.total_pages = p->pages;

	if (p->lacks_first)
		err = kho_preserve_pages(page_of(p, 0),
					 1UL << p->area_handover.order);
	p->lacks_first = err;

	return err;
}

static const struct damage {
	const char *name;
	int (*inflict)(struct piece *p);
} damages[] = {
	{ "loop", break_loop },
	{ "outside-ram", break_outside_ram },
	{ "unpreserved", break_unpreserved },
	{ "too-many", break_too_many },
	{ "too-few", break_too_few },
	{ "mend", mend },
};

static int preserve_area(struct piece *p)
{
	return called(p, "kho_preserve_vmalloc",
		      kho_preserve_vmalloc(p->area, &p->area_handover));
}

static void unpreserve_area(struct piece *p)
{
	/* KHO follows the chain, and frees it. */
	mend(p);
	kho_unpreserve_vmalloc(&p->area_handover);
	called(p, "kho_unpreserve_vmalloc", 0);
}

static int restore_area(struct piece *p)
{
	p->area = kho_restore_vmalloc(&p->area_handover);
	return restored(p, "kho_restore_vmalloc", p->area);
}

static const struct kind areas = {
	.preserve = preserve_area,
	.unpreserve = unpreserve_area,
	.restore = restore_area,
};

/* Single pages, with a call for each */

static void unpreserve_first(struct piece *p, unsigned long n)
{
	for (unsigned long i = 0; i < n; i++) {
		kho_unpreserve_pages(page_of(p, i), 1);
		cond_resched();
	}
}

static int preserve_each(struct piece *p)
{
	int err;

	for (unsigned long i = 0; i < p->pages; i++) {
		err = kho_preserve_pages(page_of(p, i), 1);
		if (err) {
			unpreserve_first(p, i);
			return called(p, "kho_preserve_pages", err);
		}
		cond_resched();
	}

	return called(p, "kho_preserve_pages", 0);
}

static void unpreserve_each(struct piece *p)
{
	unpreserve_first(p, p->pages);
	called(p, "kho_unpreserve_pages", 0);
}

static int restore_each(struct piece *p)
{
	for (unsigned long i = 0; i < p->pages; i++) {
		if (!kho_restore_pages(phys_of(p, i), 1))
			return restored(p, "kho_restore_pages", NULL);
		cond_resched();
	}

	return called(p, "kho_restore_pages", 0);
}

static const struct kind single = {
	.preserve = preserve_each,
	.unpreserve = unpreserve_each,
	.restore = restore_each,
};

/* Blobs of subtrees */

static void subtree_name(const struct piece *p, char *name, size_t size)
{
	snprintf(name, size, SUBTREE "-%s-%u", p->scenario, p->number);
}

static int add_subtree(struct piece *p)
{
	char name[SUBTREE_NAME];

	subtree_name(p, name, sizeof(name));

	return called(p, "kho_add_subtree",
		      publish_blob(name, phys_to_virt(p->phys)));
}

static void remove_subtree(struct piece *p)
{
	withdraw_blob(phys_to_virt(p->phys));
	called(p, "kho_remove_subtree", 0);
}

static int retrieve_subtree(struct piece *p)
{
	char name[SUBTREE_NAME];
	phys_addr_t phys;
	int err;

	subtree_name(p, name, sizeof(name));
	err = find_blob(name, &phys);
	if (!err && phys != p->phys)
		err = -ESTALE;

	return called(p, "kho_retrieve_subtree", err);
}

static int preserve_blob(struct piece *p)
{
	if (!preserve_pages(p) && add_subtree(p))
		kho_unpreserve_pages(page_of(p, 0), p->pages);

	return p->ret;
}

static void unpreserve_blob(struct piece *p)
{
	unpreserve_pages(p);
	remove_subtree(p);
}

static int restore_blob(struct piece *p)
{
	return retrieve_subtree(p) ?: restore_pages(p);
}

static const struct kind blobs = {
	.preserve = preserve_blob,
	.unpreserve = unpreserve_blob,
	.restore = restore_blob,
};

/* KHO takes the address of a blob, and leaves it to the caller to preserve it. */
static const struct kind lost_blobs = {
	.preserve = add_subtree,
	.unpreserve = remove_subtree,
};

/* The record */

/* From here on nothing can be unloaded. */
static void keep_record(struct record *r)
{
	__module_get(THIS_MODULE);
	list_add_tail(&r->node, &records);
}

static struct record *add_record(void)
{
	struct record *r = kho_alloc_preserve(PAGE_SIZE);
	int err;

	if (IS_ERR(r))
		return r;

	r->version = RECORD_VERSION;
	r->piece_size = sizeof(struct piece);

	if (last_record) {
		last_record->next = virt_to_phys(r);
	} else {
		err = publish_record(SUBTREE, r);
		if (err) {
			kho_unpreserve_free(r);
			return ERR_PTR(err);
		}
	}

	keep_record(r);
	last_record = r;

	return r;
}

/* A place in the record, which preserve() takes. */
static struct piece *new_piece(const struct scenario *s)
{
	struct record *r = last_record;
	struct piece *p, *other;
	u32 number = 0;

	if (!r || r->nr_pieces == RECORD_PIECES) {
		r = add_record();
		if (IS_ERR(r))
			return ERR_CAST(r);
	}
	p = &r->pieces[r->nr_pieces];

	for_each_piece(r, other)
		if (!other->handed_over && is_of(other, s))
			number++;

	memset(p, 0, sizeof(*p));
	strscpy(p->scenario, s->name);
	p->number = number;
	p->state = UNPRESERVED;

	return p;
}

static struct piece *last_piece(void)
{
	return &last_record->pieces[last_record->nr_pieces - 1];
}

/* That KHO refuses the memory is for the report, and no error. */
static int preserve(const struct scenario *s, struct piece *p)
{
	int err;

	last_record->nr_pieces++;

	if (p->list) {
		err = kho_preserve_vmalloc(p->list, &p->list_handover);
		if (err)
			return err;
	}

	if (s->kind->preserve(p)) {
		if (p->list)
			kho_unpreserve_vmalloc(&p->list_handover);
		return 0;
	}

	p->recorded = true;
	p->state = PRESERVED;

	return 0;
}

static void unpreserve(const struct scenario *s, struct piece *p)
{
	s->kind->unpreserve(p);
	if (p->list)
		kho_unpreserve_vmalloc(&p->list_handover);
	p->recorded = !CAN_UNPRESERVE;
	p->state = UNPRESERVED;
}

/* Freeing memory as what its owner takes it to be */

static void free_blocks(struct piece *p)
{
	const unsigned int order = p->split ? 0 : p->order;

	for (unsigned long i = 0; i < p->pages; i += 1UL << order) {
		__free_pages(page_of(p, i), order);
		cond_resched();
	}
}

/* After the kexec the part is all there is: it is freed as the blocks that came. */
static void free_part(struct piece *p)
{
	if (p->handed_over) {
		__free_pages(page_of(p, 0), ilog2(PART_PAGES));
		__free_page(page_of(p, PART_PAGES - 1));
	} else {
		__free_pages(page_of(p, 0), p->order);
	}
}

/* Before the kexec it is somebody else's. */
static void free_border(struct piece *p)
{
	if (p->handed_over)
		free_blocks(p);
}

static void free_folio(struct piece *p)
{
	folio_put(page_folio(page_of(p, 0)));
}

/* Before the kexec it is somebody else's. */
static void free_folio_of_others(struct piece *p)
{
	if (p->handed_over)
		free_folio(p);
}

/* make_dma() has seen to it that the device has the same address for it. */
static void free_dma(struct piece *p)
{
	dma_free_coherent(&device->dev, PAGE_SIZE << p->order,
			  phys_to_virt(p->phys), p->phys);
}

static void free_area(struct piece *p)
{
	vfree(p->area);
}

/* Nothing maps the pages after the kexec. */
static void free_area_or_pages(struct piece *p)
{
	if (p->handed_over)
		free_blocks(p);
	else
		free_area(p);
}

static void free_object(struct piece *p)
{
	kfree(p->area);
}

/* As what restore_mistaken() has asked for. */
static void free_mistaken(struct piece *p)
{
	if (!p->handed_over)
		free_blocks(p);
	else if (p->split)
		free_folio(p);
	else
		__free_page(page_of(p, 0));
}

/* Making the scenarios. What was made before memory ran out can be freed. */

static void split(const struct scenario *s, struct piece *p)
{
	for (unsigned long i = 0; i < p->pages; i += 1UL << p->order)
		split_page(page_of(p, i), p->order);
	p->split = true;
}

static void split_with_helper(const struct scenario *s, struct piece *p)
{
	int err = split_preserved_pages(page_of(p, 0), p->order);

	p->split = true;
	if (called(p, "kho_split_preserved_pages", err)) {
		p->recorded = false;
		p->state = UNPRESERVED;
	}
}

static void free_while_preserved(const struct scenario *s, struct piece *p)
{
	p->state = FREED;
	__free_pages(page_of(p, 0), p->order);
}

static void prepare(const struct scenario *s, struct piece *p)
{
	prepare_blob(phys_to_virt(p->phys));
}

static struct page *alloc_block(const struct scenario *s, unsigned int order)
{
	struct folio *folio;

	if (s->kind != &folios)
		return alloc_pages(MAY_FAIL | s->gfp, order);

	folio = folio_alloc(MAY_FAIL, order);

	return folio ? folio_page(folio, 0) : NULL;
}

static int make_block(const struct scenario *s, unsigned int order,
		      unsigned long pages)
{
	struct piece *p = new_piece(s);
	struct page *page;
	int err;

	if (IS_ERR(p))
		return PTR_ERR(p);

	page = alloc_block(s, order);
	if (!page)
		return -ENOMEM;

	p->phys = page_to_phys(page);
	p->pages = pages;
	p->order = order;

	if (s->before)
		s->before(s, p);
	err = preserve(s, p);
	if (p->recorded && s->after)
		s->after(s, p);

	return err;
}

static int make_blocks(const struct scenario *s, unsigned long n)
{
	const unsigned int orders = s->last_order - s->first_order + 1;
	int err = 0;

	for (unsigned long i = 0; i < (n ?: orders) && !err; i++) {
		const unsigned int order = s->first_order + i % orders;

		if (fatal_signal_pending(current))
			return -EINTR;
		err = make_block(s, order, 1UL << order);
		cond_resched();
	}

	return err;
}

static int make_unpreserved(const struct scenario *s, unsigned long n)
{
	return CAN_UNPRESERVE ? make_blocks(s, n) : -EOPNOTSUPP;
}

static int make_part(const struct scenario *s, unsigned long unused)
{
	return make_block(s, s->first_order, PART_PAGES);
}

static int make_helper(const struct scenario *s, unsigned long n)
{
	return split_preserved_pages ? make_blocks(s, n) : -EOPNOTSUPP;
}

static int make_wrong_call(const struct scenario *s, unsigned long unused)
{
	struct scenario of_split_pages = *s;

	of_split_pages.before = split;

	return make_blocks(&of_split_pages, 0) ?: make_blocks(s, 0);
}

/* The block, if it is there, that makes one of twice the size with @page. */
static struct page *find_buddy(struct list_head *blocks, struct page *page,
			       unsigned int order)
{
	struct page *other;

	list_for_each_entry(other, blocks, lru)
		if (page_to_pfn(other) == (page_to_pfn(page) ^ (1UL << order)))
			return other;

	return NULL;
}

static int make_neighbours(const struct scenario *s, unsigned long unused)
{
	const unsigned int order = s->first_order;
	struct page *page, *next, *buddy = NULL;
	struct piece *p = new_piece(s);
	LIST_HEAD(blocks);

	if (IS_ERR(p))
		return PTR_ERR(p);

	for (int tries = 0; tries < 1024 && !buddy; tries++) {
		page = alloc_pages(MAY_FAIL, order);
		if (!page)
			break;
		buddy = find_buddy(&blocks, page, order);
		if (buddy) {
			list_del(&buddy->lru);
			p->phys = page_to_phys(min(page, buddy));
		} else {
			list_add(&page->lru, &blocks);
		}
	}

	list_for_each_entry_safe(page, next, &blocks, lru)
		__free_pages(page, order);

	if (!buddy)
		return -ENOMEM;

	p->pages = 2UL << order;
	p->order = order;

	if (s->before)
		s->before(s, p);

	return preserve(s, p);
}

static int make_dma(const struct scenario *s, unsigned long unused)
{
	const size_t size = PAGE_SIZE << s->first_order;
	struct piece *p = new_piece(s);
	dma_addr_t handle;
	void *memory;

	if (IS_ERR(p))
		return PTR_ERR(p);

	memory = dma_alloc_coherent(&device->dev, size, &handle, GFP_KERNEL);
	if (!memory)
		return -ENOMEM;

	/* Behind an IOMMU, or remapped: then this does not say where it is. */
	if (!virt_addr_valid(memory) || virt_to_phys(memory) != handle) {
		dma_free_coherent(&device->dev, size, memory, handle);
		return -EOPNOTSUPP;
	}

	p->phys = handle;
	p->pages = 1UL << s->first_order;
	p->order = s->first_order;

	return preserve(s, p);
}

static int make_vmalloc(const struct scenario *s, unsigned long n)
{
	const unsigned long pages = n ?: VMALLOC_PAGES;
	struct piece *p = new_piece(s);

	if (IS_ERR(p))
		return PTR_ERR(p);

	p->area = __vmalloc(array_size(pages, PAGE_SIZE), MAY_FAIL);
	p->list = vmalloc_array(pages, sizeof(*p->list));
	if (!p->area || !p->list) {
		vfree(p->area);
		vfree(p->list);
		return -ENOMEM;
	}

	for (unsigned long i = 0; i < pages; i++) {
		struct page *page = vmalloc_to_page(p->area + i * PAGE_SIZE);

		p->list[i] = page_to_phys(page);
	}
	p->phys = p->list[0];
	p->pages = pages;

	return preserve(s, p);
}

static int make_vmalloc_huge(const struct scenario *s, unsigned long unused)
{
	const unsigned int order = s->first_order;
	struct piece *p = new_piece(s);
	int err;

	if (IS_ERR(p))
		return PTR_ERR(p);

	p->area = vmalloc_huge(PAGE_SIZE << order, GFP_KERNEL);
	if (!p->area)
		return -ENOMEM;

	/* One huge page, so the area is contiguous. */
	p->phys = page_to_phys(vmalloc_to_page(p->area));
	p->pages = 1UL << order;
	p->order = order;

	err = preserve(s, p);
	if (!p->recorded || p->area_handover.order == order)
		return err;

	/* There was no huge page, and vmalloc_huge() has taken small ones. */
	unpreserve(s, p);
	vfree(p->area);
	last_record->nr_pieces--;

	return -ENOMEM;
}

static int make_many(const struct scenario *s, unsigned long n)
{
	struct piece *p = new_piece(s);

	if (IS_ERR(p))
		return PTR_ERR(p);

	p->list = vmalloc_array(n, sizeof(*p->list));
	if (!p->list)
		return -ENOMEM;

	for (p->pages = 0; p->pages < n; p->pages++) {
		struct page *page = alloc_page(MAY_FAIL);

		if (!page) {
			free_blocks(p);
			vfree(p->list);
			return -ENOMEM;
		}
		p->list[p->pages] = page_to_phys(page);
		cond_resched();
	}
	p->phys = p->list[0];

	return preserve(s, p);
}

static int make_slab(const struct scenario *s, unsigned long unused)
{
	struct piece *p = new_piece(s);

	if (IS_ERR(p))
		return PTR_ERR(p);

	p->area = kmalloc(PAGE_SIZE / 4, GFP_KERNEL);
	if (!p->area)
		return -ENOMEM;
	p->phys = PAGE_ALIGN_DOWN(virt_to_phys(p->area));
	p->pages = 1;

	return preserve(s, p);
}

/* Ends with the first that KHO refuses. */
static int make_blobs(const struct scenario *s, unsigned long n)
{
	bool refused = false;
	int err = 0;

	for (unsigned long i = 0; i < (n ?: 1) && !err && !refused; i++) {
		err = make_block(s, 0, 1);
		refused = !err && last_piece()->ret;
	}

	return err;
}

/* A blob in memory that is somebody else's. */
static int make_blob_at(const struct scenario *s, unsigned long phys)
{
	struct piece *p;

	if (!PAGE_ALIGNED(phys) || !pfn_to_online_page(PHYS_PFN(phys)))
		return -EINVAL;

	p = new_piece(s);
	if (IS_ERR(p))
		return PTR_ERR(p);
	p->phys = phys;
	p->pages = 1;

	return preserve(s, p);
}

/* A folio that is somebody else's, who keeps it. */
static int make_folio_at(const struct scenario *s, unsigned long phys)
{
	struct page *page = pfn_to_online_page(PHYS_PFN(phys));
	struct piece *p;

	if (!PAGE_ALIGNED(phys) || !page || !page_count(page) ||
	    page != &page_folio(page)->page)
		return -EINVAL;

	p = new_piece(s);
	if (IS_ERR(p))
		return PTR_ERR(p);
	p->phys = phys;
	p->order = folio_order(page_folio(page));
	p->pages = folio_nr_pages(page_folio(page));

	return preserve(s, p);
}

/* Memory that the next kernel uses from its start. Whose it is now does not matter. */
static int make_scratch(const struct scenario *s, unsigned long phys)
{
	/* So that a page of this kernel is followed by as many as are needed. */
	if (!IS_ALIGNED(phys, PAGE_SIZE << s->last_order) ||
	    !pfn_to_online_page(PHYS_PFN(phys)))
		return -EINVAL;

	for (unsigned int i = s->first_order; i <= s->last_order; i++) {
		struct piece *p = new_piece(s);
		int err;

		if (IS_ERR(p))
			return PTR_ERR(p);

		p->phys = phys;
		p->pages = 1UL << i;
		p->order = i;

		err = preserve(s, p);
		if (err)
			return err;
	}

	return 0;
}

/*
 * The smallest block that would lie on both sides of the border of two nodes, in
 * one call. Whose it is now does not matter: after the kexec it is nobody's.
 */
static int make_border(const struct scenario *s, unsigned long phys)
{
	const unsigned long pfn = PHYS_PFN(phys);
	struct piece *p;

	if (!PAGE_ALIGNED(phys) || !pfn_to_online_page(pfn - 1) ||
	    !pfn_to_online_page(pfn) || pfn_to_nid(pfn - 1) == pfn_to_nid(pfn))
		return -EINVAL;

	p = new_piece(s);
	if (IS_ERR(p))
		return PTR_ERR(p);

	p->order = __ffs(pfn) + 1;
	p->pages = 1UL << p->order;
	p->phys = phys - PFN_PHYS(p->pages / 2);
	/* It is freed page by page. */
	p->split = true;

	return preserve(s, p);
}

static const struct scenario scenarios[] = {
	{
		.name = "contig",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_blocks,
		.free = free_blocks,
		.first_order = 1,
		.last_order = 4,
	}, {
		.name = "split",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_blocks,
		.before = split,
		.free = free_blocks,
		.first_order = 1,
		.last_order = 4,
	}, {
		.name = "folio",
		.kind = &folios,
		.argument = MAYBE_A_COUNT,
		.make = make_blocks,
		.free = free_folio,
		.first_order = 0,
		.last_order = 3,
	}, {
		/* A folio to all others, and pages to KHO. */
		.name = "compound",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_blocks,
		.free = free_blocks,
		.first_order = 1,
		.last_order = 4,
		.gfp = __GFP_COMP,
	}, {
		.name = "dma",
		.kind = &contiguous,
		.make = make_dma,
		.free = free_dma,
		.first_order = DMA_ORDER,
	}, {
		.name = "vmalloc",
		.kind = &areas,
		.argument = MAYBE_A_COUNT,
		.make = make_vmalloc,
		.free = free_area,
	}, {
		.name = "vmalloc-huge",
		.kind = &areas,
		.make = make_vmalloc_huge,
		.free = free_area,
		.first_order = HUGE_ORDER,
	}, {
		.name = "helper",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_helper,
		.after = split_with_helper,
		.free = free_blocks,
		.first_order = 1,
		.last_order = 3,
	}, {
		/* Two blocks, in one call. */
		.name = "neighbours",
		.kind = &contiguous,
		.make = make_neighbours,
		.free = free_blocks,
		.first_order = 2,
	}, {
		.name = "part",
		.kind = &contiguous,
		.make = make_part,
		.free = free_part,
		.first_order = 3,
	}, {
		/* Behind the back of KHO. */
		.name = "late-split",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_blocks,
		.after = split,
		.free = free_blocks,
		.first_order = 3,
		.last_order = 3,
	}, {
		.name = "unpreserve",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_unpreserved,
		.after = unpreserve,
		.free = free_blocks,
		.first_order = 2,
		.last_order = 2,
	}, {
		/*
		 * Of an order that the allocator does not keep in per-cpu lists,
		 * and of a kind that little else is allocated from: the block is
		 * to be seen free for a while.
		 */
		.name = "freed",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_blocks,
		.after = free_while_preserved,
		.free = free_blocks,
		.first_order = 5,
		.last_order = 5,
		.gfp = __GFP_RECLAIMABLE,
	}, {
		.name = "leak",
		.kind = &contiguous,
		.argument = MAYBE_A_COUNT,
		.make = make_blocks,
		.free = free_blocks,
		.first_order = 2,
		.last_order = 2,
		.never_restored = true,
	}, {
		/* Split pages claimed as a folio, and a block as a single page. */
		.name = "wrong-call",
		.kind = &mistaken,
		.make = make_wrong_call,
		.free = free_mistaken,
		.first_order = 2,
		.last_order = 2,
	}, {
		.name = "many",
		.kind = &single,
		.argument = A_COUNT,
		.make = make_many,
		.free = free_blocks,
	}, {
		/* Two blocks in one call, which are more than the allocator has in one. */
		.name = "huge",
		.kind = &contiguous,
		.make = make_neighbours,
		.before = split,
		.free = free_blocks,
		.first_order = MAX_PAGE_ORDER,
	}, {
		/* The pages of an area, without kho_preserve_vmalloc(). */
		.name = "vmalloc-pages",
		.kind = &single,
		.argument = MAYBE_A_COUNT,
		.make = make_vmalloc,
		.free = free_area_or_pages,
	}, {
		/* The page of an object of kmalloc(). */
		.name = "slab",
		.kind = &contiguous,
		.make = make_slab,
		.free = free_object,
		.never_restored = true,
	}, {
		.name = "blob",
		.kind = &blobs,
		.argument = MAYBE_A_COUNT,
		.make = make_blobs,
		.before = prepare,
		.free = free_blocks,
	}, {
		/* Of a subtree, and not preserved. */
		.name = "blob-lost",
		.kind = &lost_blobs,
		.make = make_blobs,
		.before = prepare,
		.free = free_blocks,
		.never_restored = true,
	}, {
		.name = "blob-at",
		.kind = &lost_blobs,
		.argument = AN_ADDRESS,
		.make = make_blob_at,
		.never_restored = true,
	}, {
		.name = "folio-at",
		.kind = &folios,
		.argument = AN_ADDRESS,
		.make = make_folio_at,
		.free = free_folio_of_others,
	}, {
		/* Only KHO's own debugging refuses it. */
		.name = "scratch",
		.kind = &contiguous,
		.argument = AN_ADDRESS,
		.make = make_scratch,
		.first_order = 0,
		.last_order = 2,
		.never_restored = true,
	}, {
		.name = "node-border",
		.kind = &contiguous,
		.argument = AN_ADDRESS,
		.make = make_border,
		.free = free_border,
	}, {
		.name = "node-halves",
		.kind = &halves,
		.argument = AN_ADDRESS,
		.make = make_border,
		.free = free_border,
	},
};

static const struct scenario *find_scenario(const char *name)
{
	for (int i = 0; i < ARRAY_SIZE(scenarios); i++)
		if (!strcmp(scenarios[i].name, name))
			return &scenarios[i];

	return NULL;
}

/* The commands */

static int preserve_scenario(const struct scenario *s, unsigned long argument)
{
	guard(mutex)(&lock);

	return s->make(s, argument);
}

static int restore_scenario(const struct scenario *s, unsigned long unused)
{
	bool found = false;
	struct record *r;
	struct piece *p;

	if (s->never_restored)
		return -EPERM;

	guard(mutex)(&lock);

	for_each_piece(r, p) {
		if (!p->handed_over || !is_of(p, s))
			continue;
		found = true;
		if (p->state == HANDED_OVER)
			p->state = s->kind->restore(p) ? RESTORE_FAILED :
							 RESTORED;
	}

	return found ? 0 : -ENOENT;
}

static int break_scenario(const struct scenario *s, const struct damage *d)
{
	bool found = false;
	struct record *r;
	struct piece *p;
	int err = 0;

	if (s->kind != &areas)
		return -EINVAL;

	guard(mutex)(&lock);

	for_each_piece(r, p) {
		if (!p->recorded || !is_of(p, s))
			continue;
		found = true;
		err = err ?: d->inflict(p);
	}

	return found ? err : -ENOENT;
}

/* A piece that it is on us to free, or to take out of the tree. */
static struct piece *find_ours(const struct scenario *s)
{
	struct record *r;
	struct piece *p;

	for_each_piece(r, p) {
		if (!is_of(p, s))
			continue;
		if ((p->recorded && (CAN_UNPRESERVE || p->state != FREED)) ||
		    p->state == RESTORED ||
		    (p->state == UNPRESERVED && !p->handed_over))
			return p;
	}

	return NULL;
}

static int free_scenario(const struct scenario *s, unsigned long unused)
{
	bool found = false;

	for (;;) {
		struct piece *p;
		bool freed;

		scoped_guard(mutex, &lock) {
			p = find_ours(s);
			if (!p)
				return found ? 0 : -ENOENT;

			/* "freed" only has to be taken out of the tree. */
			freed = p->state == FREED;
			if (p->recorded)
				unpreserve(s, p);
			p->state = FREED;
		}

		if (!freed && s->free)
			s->free(p);
		found = true;
	}
}

static const struct command {
	const char *name;
	int (*run)(const struct scenario *s, unsigned long argument);
	bool takes_argument;
} commands[] = {
	{ "preserve", preserve_scenario, true },
	{ "restore", restore_scenario },
	{ "free", free_scenario },
};

/* What has been written: at most two words, of which the second may be missing. */
struct words {
	char buffer[64];
	char *first;
	char *second;
};

static int read_words(struct words *w, const char __user *from, size_t size)
{
	if (size >= sizeof(w->buffer))
		return -EINVAL;
	if (copy_from_user(w->buffer, from, size))
		return -EFAULT;
	w->buffer[size] = '\0';

	w->second = strim(w->buffer);
	w->first = strsep(&w->second, " ");

	return 0;
}

/* Neither a count nor an address is 0. */
static int parse_number(const char *word, unsigned long *n)
{
	const int err = kstrtoul(word, 0, n);

	return err ?: (*n ? 0 : -EINVAL);
}

static ssize_t command_write(struct file *file, const char __user *from,
			     size_t size, loff_t *pos)
{
	const struct command *command = file->private_data;
	enum argument takes = NOTHING;
	const struct scenario *s;
	unsigned long argument = 0;
	struct words words;
	int err;

	err = read_words(&words, from, size);
	if (err)
		return err;

	s = find_scenario(words.first);
	if (!s)
		return -EINVAL;

	if (command->takes_argument)
		takes = s->argument;
	if (words.second ? takes == NOTHING :
			   takes == A_COUNT || takes == AN_ADDRESS)
		return -EINVAL;
	if (words.second) {
		err = parse_number(words.second, &argument);
		if (err)
			return err;
	}

	err = command->run(s, argument);

	return err ?: size;
}

static const struct file_operations command_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = command_write,
};

static const struct damage *find_damage(const char *name)
{
	for (int i = 0; i < ARRAY_SIZE(damages); i++)
		if (!strcmp(damages[i].name, name))
			return &damages[i];

	return NULL;
}

static ssize_t break_write(struct file *file, const char __user *from,
			   size_t size, loff_t *pos)
{
	const struct scenario *s;
	const struct damage *d;
	struct words words;
	int err;

	err = read_words(&words, from, size);
	if (err)
		return err;

	s = find_scenario(words.first);
	d = words.second ? find_damage(words.second) : NULL;
	if (!s || !d)
		return -EINVAL;

	err = break_scenario(s, d);

	return err ?: size;
}

static const struct file_operations break_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = break_write,
};

/* The report */

static void show_addresses(struct seq_file *m, const struct piece *p)
{
	const unsigned long n = p->pages <= REPORTED_ADDRESSES ? p->pages : 0;
	const char *separator = "";

	seq_puts(m, ",\"physes\":[");
	for (unsigned long i = 0; i < n; i++) {
		seq_printf(m, "%s\"%#llx\"", separator, (u64)phys_of(p, i));
		separator = ",";
	}
	seq_puts(m, "]");
}

static bool is_blob(const struct piece *p)
{
	const struct kind *kind = find_scenario(p->scenario)->kind;

	return kind == &blobs || kind == &lost_blobs;
}

static void show_subtree(struct seq_file *m, const struct piece *p)
{
	char name[SUBTREE_NAME];

	subtree_name(p, name, sizeof(name));
	seq_printf(m, ",\"subtree\":\"%s\"", name);
}

/* The reference counts, page after page: each, and how many pages have it. */
static void show_refs(struct seq_file *m, const struct piece *p)
{
	const char *separator = "";
	unsigned long i = 0;

	while (i < p->pages) {
		const int refs = page_ref_count(page_of(p, i));
		const unsigned long first = i;

		do
			i++;
		while (i < p->pages && page_ref_count(page_of(p, i)) == refs);

		seq_printf(m, "%s[%d,%lu]", separator, refs, i - first);
		separator = ",";
		cond_resched();
	}
}

static void show_piece(struct seq_file *m, const struct piece *p)
{
	/* It was left behind, and is the memory of somebody else by now. */
	const bool gone = p->handed_over && p->state == UNPRESERVED;

	seq_printf(m, "{\"scenario\":\"%s\",\"piece\":%u,\"state\":\"%s\"",
		   p->scenario, p->number, state_names[p->state]);
	seq_printf(m, ",\"call\":\"%s\",\"phys\":\"%#llx\",\"pages\":%llu",
		   p->call, (u64)p->phys, p->pages);
	if (!gone && p->list)
		show_addresses(m, p);
	if ((p->recorded || p->state == HANDED_OVER) && p->area_handover.first.phys)
		seq_printf(m, ",\"descriptor\":\"%#llx\"",
			   (u64)__pa(&p->area_handover));
	if (is_blob(p))
		show_subtree(m, p);
	seq_printf(m, ",\"order\":%u,\"ret\":%d,\"compound\":%s,\"refs\":[",
		   p->order, p->ret,
		   !gone && PageCompound(page_of(p, 0)) ? "true" : "false");
	if (!gone)
		show_refs(m, p);
	seq_puts(m, "]}\n");
}

static int report_show(struct seq_file *m, void *unused)
{
	struct record *r;
	struct piece *p;

	guard(mutex)(&lock);

	for_each_piece(r, p)
		show_piece(m, p);

	return 0;
}
DEFINE_SHOW_ATTRIBUTE(report);

/* How long KHO takes, per call of its functions */

struct timing {
	unsigned int order;
	unsigned long rounds;
	u64 preserve_ns;		/* of all rounds */
	u64 unpreserve_ns;
};

/* The last one, if it has any rounds. Under the lock. */
static struct timing last_timing;

static int time_rounds(struct timing *t, struct page *page)
{
	const unsigned long pages = 1UL << t->order;

	for (unsigned long i = 0; i < t->rounds; i++) {
		const u64 start = ktime_get_ns();
		const int err = kho_preserve_pages(page, pages);
		const u64 preserved = ktime_get_ns();

		if (err)
			return err;
		kho_unpreserve_pages(page, pages);
		t->unpreserve_ns += ktime_get_ns() - preserved;
		t->preserve_ns += preserved - start;

		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}

	return 0;
}

static ssize_t time_write(struct file *file, const char __user *from,
			  size_t size, loff_t *pos)
{
	struct timing t = {};
	struct words words;
	struct page *page;
	int err;

	err = read_words(&words, from, size);
	if (err)
		return err;
	if (!words.second)
		return -EINVAL;
	err = kstrtouint(words.first, 0, &t.order) ?:
	      parse_number(words.second, &t.rounds);
	if (err)
		return err;
	if (t.order > MAX_PAGE_ORDER)
		return -EINVAL;
	if (!CAN_UNPRESERVE)
		return -EOPNOTSUPP;

	page = alloc_pages(MAY_FAIL, t.order);
	if (!page)
		return -ENOMEM;
	err = time_rounds(&t, page);
	__free_pages(page, t.order);
	if (err)
		return err;

	guard(mutex)(&lock);
	last_timing = t;

	return size;
}

static int time_show(struct seq_file *m, void *unused)
{
	const struct timing *t = &last_timing;

	guard(mutex)(&lock);

	if (!t->rounds)
		return 0;
	seq_printf(m, "{\"order\":%u,\"rounds\":%lu", t->order, t->rounds);
	seq_printf(m, ",\"preserve_ns\":%llu,\"unpreserve_ns\":%llu}\n",
		   t->preserve_ns, t->unpreserve_ns);

	return 0;
}
DEFINE_SHOW_STORE_ATTRIBUTE(time);

/* A radix tree of keys that are no blocks, for those who look at it from outside */

#ifdef HAVE_RADIX_KEYS
static struct kho_radix_tree kho_exercise_keys;

static ssize_t keys_write(struct file *file, const char __user *from,
			  size_t size, loff_t *pos)
{
	unsigned long key;
	int err;

	err = kstrtoul_from_user(from, size, 0, &key) ?:
	      kho_radix_add_key(&kho_exercise_keys, key);

	return err ?: size;
}

static const struct file_operations keys_fops = {
	.owner = THIS_MODULE,
	.write = keys_write,
};

static int __init make_keys(struct dentry *dir)
{
	debugfs_create_file("keys", 0200, dir, NULL, &keys_fops);

	return kho_radix_init_tree(&kho_exercise_keys, NULL);
}

static void __exit free_keys(void)
{
	kho_radix_destroy_tree(&kho_exercise_keys);
}
#else
static int __init make_keys(struct dentry *dir)
{
	return 0;
}

static void __exit free_keys(void)
{
}
#endif

#ifdef HAVE_KHO_NOTIFIERS
static void forget(void)
{
	struct record *r;
	struct piece *p;

	guard(mutex)(&lock);

	for_each_piece(r, p) {
		if (p->state == PRESERVED)
			p->state = UNPRESERVED;
		p->recorded = false;
	}
	/* The next piece begins another subtree. */
	last_record = NULL;
}
#endif

/* What the previous kernel has handed over */

static int __init take_piece(struct piece *p)
{
	p->handed_over = true;
	p->area = NULL;

	if (!p->recorded) {
		p->state = UNPRESERVED;
		p->list = NULL;
		return 0;
	}
	p->recorded = false;
	p->state = HANDED_OVER;

	if (p->list) {
		p->list = kho_restore_vmalloc(&p->list_handover);
		if (!p->list)
			return -EIO;
	}

	return 0;
}

static int __init take_records(void)
{
	phys_addr_t phys;
	int err;

	err = find_record(SUBTREE, &phys);
	if (err)
		return err == -ENOENT ? 0 : err;

	while (phys) {
		struct folio *folio = kho_restore_folio(phys);
		struct record *r;

		if (!folio)
			return -EIO;

		r = folio_address(folio);
		if (r->version != RECORD_VERSION ||
		    r->piece_size != sizeof(struct piece) ||
		    r->nr_pieces > RECORD_PIECES)
			return -EPROTO;

		for (u64 i = 0; i < r->nr_pieces; i++) {
			err = take_piece(&r->pieces[i]);
			if (err)
				return err;
		}
		keep_record(r);
		phys = r->next;
	}

	return 0;
}

static struct dentry *dir;

static int __init kho_exercise_init(void)
{
	int err;

	if (!kho_is_enabled()) {
		pr_err("KHO is off; the kernel needs kho=on\n");
		return -EOPNOTSUPP;
	}

	device = platform_device_register_simple(KBUILD_MODNAME,
						 PLATFORM_DEVID_NONE, NULL, 0);
	if (IS_ERR(device))
		return PTR_ERR(device);
	err = dma_coerce_mask_and_coherent(&device->dev, DMA_BIT_MASK(64));
	if (err)
		goto err_device;

	err = take_records();
	if (err) {
		pr_err("cannot read what was handed over: %pe\n", ERR_PTR(err));
		goto err_device;
	}

	err = start_publishing();
	if (err)
		goto err_device;

	split_preserved_pages = symbol_get(kho_split_preserved_pages);

	dir = debugfs_create_dir(KBUILD_MODNAME, NULL);
	for (int i = 0; i < ARRAY_SIZE(commands); i++)
		debugfs_create_file(commands[i].name, 0200, dir,
				    (void *)&commands[i], &command_fops);
	debugfs_create_file("break", 0200, dir, NULL, &break_fops);
	debugfs_create_file("report", 0400, dir, NULL, &report_fops);
	debugfs_create_file("time", 0600, dir, NULL, &time_fops);
	err = make_keys(dir);
	if (err)
		goto err_dir;

	return 0;

err_dir:
	debugfs_remove(dir);
	stop_publishing();
err_device:
	platform_device_unregister(device);
	return err;
}
module_init(kho_exercise_init);

static void __exit kho_exercise_exit(void)
{
	debugfs_remove(dir);
	free_keys();
	if (split_preserved_pages)
		symbol_put(kho_split_preserved_pages);
	stop_publishing();
	platform_device_unregister(device);
}
module_exit(kho_exercise_exit);

MODULE_DESCRIPTION("Kexec HandOver of each kind of memory, on request");
MODULE_LICENSE("GPL");
