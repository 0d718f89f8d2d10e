// SPDX-License-Identifier: GPL-2.0-only
/*
 * kho_trace - report each call of KHO, and each block that it touches
 *
 * Compiled by bcc. It gathers facts and decides nothing. The only kernel header is
 * the one with struct pt_regs: what is known of this kernel is passed in.
 *
 * sizes, offsets and addresses, in bytes unless they say otherwise:
 *   VMEMMAP, PAGE_STRUCT_SIZE, REFCOUNT_OFFSET, PRIVATE_OFFSET, FLAGS_OFFSET  of struct page
 *   HEAD_BIT                             PG_head in its flags
 *   PAGE_SHIFT_BITS, DIRECT_MAP          the page size, and where phys 0 is mapped
 *   TREE, ROOT_OFFSET                    &kho_out.radix_tree and .root in it; 0: there is none
 *   ORDERS                               the xarray of struct kho_mem_track; 0: there is none
 *   XA_HEAD                              .xa_head in struct xarray
 *   XA_SHIFT, XA_SLOTS, XA_CHUNK_LOG2    .shift and .slots in struct xa_node, and how many slots
 *   PHYS_BITS                            .phys_bits in struct kho_mem_phys
 *   PRESERVE_LOG2                        bits in struct kho_mem_phys_bits
 *   ORDER_0_LOG2, TABLE_LOG2, BITMAP_LOG2, DEPTH, STORED_BITS   enum kho_radix_consts
 *   KEY_WIDTH                            bits of a key that the tree takes; 64: any
 *   TYPE_SHIFT                           key bit of the page type; 64: none
 *   STAMP_MAGIC, STAMP_MAGIC_SHIFT, STAMP_ORDER_MASK   union kho_page_info
 * and what the user asked for:
 *   RING_PAGES                           size of the ring buffer
 *   STACK_FRAMES                         kernel stack frames kept of each call
 *   ONLY                                 bit mask of the kinds of outermost calls
 *   WANTED_TGID, WANTED_COMM             other tasks are left alone
 *
 * The functions to trace follow behind the last line: FENTRY() and FEXIT(), or KPROBE()
 * and KRETPROBE(), of each, with
 *   name, number    of the function, in khoscope/facts/calls.py
 *   kind            bit of ONLY
 *   use             enum block_use
 *   adds            whether it adds blocks: then their refcounts are looked at
 *   a, b, c, d      where its arguments are
 *   ret             where its result is; 0 if it has none
 */

#include <uapi/linux/ptrace.h>

/* What a function does to a block of memory. */
enum block_use {
	NO_BLOCK,	/* nothing by itself */
	NAMED,		/* nothing; kho_add_subtree(name, …) */
	BLOCK_BY_PFN,	/* kho_radix_{add,del}_page(tree, pfn, order, type) */
	BLOCK_BY_KEY,	/* kho_radix_{add,del}_key(tree, key) */
	BLOCK_BY_STAMP,	/* kho_restore_page(phys, …): the order is in the stamp */
	/* Where no function of its own adds, deletes or restores a block: */
	BLOCK_OF_FOLIO,	/* kho_{,un}preserve_folio(folio) */
	BLOCKS_OF_PAGES,	/* kho_{,un}preserve_pages(page, nr_pages) */
	BLOCKS_OF_PHYS,	/* kho_preserve_phys(phys, size) */
	BLOCKS_BY_STAMP,	/* kho_restore_pages(phys, nr_pages) */
};

/* Whether a block's bit is set in the tree. */
enum bit {
	BIT_CLEAR,
	BIT_SET,
	BIT_UNKNOWN,	/* not in KHO's own tree, or not readable */
};

/* The calls of a task nest no deeper; what is deeper is counted as missed. */
#define MAX_DEPTH 5
#define NO_FUNCTION 255
#define NO_ORDER 255
#define MAX_TASKS 1024

/* struct pages are read by so many at once, and so many times at most. */
#define WINDOW_ORDER 4
#define WINDOWS_ORDER 6
#define WINDOW (1 << WINDOW_ORDER)
#define WINDOWS (1 << WINDOWS_ORDER)

/*
 * A range of less than 2^32 pages is cut into no more blocks.  So many windows of all of
 * them are looked at.
 */
#define BLOCKS 64
#define ALL_WINDOWS 128

struct header {
	u64 call;		/* names the outermost call of this one */
	u64 enter;		/* ktime in ns */
	u64 leave;
	u64 args[4];
	u64 ret;
	u32 tid;
	u32 tgid;
	u8 function;
	u8 depth;		/* 0: the outermost call */
	u8 is_call;		/* a struct call, else a struct block */
	u8 spare[5];
};

struct call {
	struct header h;
	char comm[16];
	char name[32];		/* of a subtree */
	u64 stack[STACK_FRAMES];
};

struct block {
	struct header h;
	u64 pfn;
	u64 key;
	u64 stamp;		/* page->private at entry */
	u32 order;
	u8 before, after;	/* enum bit */
	u8 outer;		/* function from which this one was called; 255: none */
	u8 spare;
	u64 outer_args[2];
	u32 looked;		/* pages whose refcount was read */
	u32 unread;		/* pages whose refcount could not be read */
	u32 zeros, ones;	/* pages with refcount 0 and 1, the first one included */
	u64 odd;		/* first page behind the second with another refcount; 0: none */
	u8 pages[2 * PAGE_STRUCT_SIZE];
};

/* All have one size, so that a buffer full of them is an array. */
union record {
	struct call call;
	struct block block;
};

struct frame {
	u64 enter;
	u64 args[4];
	u64 function;
};

/* Blocks of the range that a call names, one by one. */
struct range {
	u64 pfn;		/* where the next one begins */
	u64 end;
	u64 page;		/* of it, the next to be looked at */
	u64 step;		/* pages from one window to the next */
	u32 order;		/* as the call cuts it off */
	u32 block;		/* its number */
	u64 stamps[BLOCKS];	/* page->private at entry */
	u8 before[BLOCKS];	/* enum bit, at entry */
};

struct task {
	u32 depth;
	u32 muted;		/* nobody asked for what this task is doing */
	struct frame frames[8];	/* MAX_DEPTH, and what an index of 3 bits reaches */
	union record outer;	/* its .call */
	union record inner;	/* its .block, one at a time */
	struct range range;
	u64 step;		/* pages from one window to the next */
	u8 window[WINDOW * PAGE_STRUCT_SIZE];
};

/* What is counted, each by CPU. */
enum counter {
	MADE,		/* events */
	LOST,		/* events for which there was no room */
	MISSED,		/* calls that could not be followed to their end */
	UNSEEN,		/* returns of calls whose beginning was not seen */
	COUNTERS,
};

BPF_PERCPU_ARRAY(counters, u64, COUNTERS);
BPF_ARRAY(armed, u32, 1);
BPF_ARRAY(blank, struct task, 1);
BPF_HASH(tasks, u32, struct task, MAX_TASKS);

BPF_RINGBUF_OUTPUT(events, RING_PAGES);

#define INLINE static inline __attribute__((always_inline))

INLINE void count(int what, u64 times)
{
	u64 *counter = counters.lookup(&what);

	if (counter)
		*counter += times;
}

INLINE void output(union record *event)
{
	count(MADE, 1);
	if (events.ringbuf_output(event, sizeof(*event), 0))
		count(LOST, 1);
}

/*
 * The verifier walks both sides of each branch, so the loops over pages have none: 1 if
 * a is less than b, both less than 2^63, else 0. OPAQUE() keeps the compiler from finding
 * out that this is a comparison.
 */
#define LESS(a, b) (((u64)(a) - (u64)(b)) >> 63)
#define IS_ZERO(a) LESS(a, 1)
#define OPAQUE(variable) asm volatile("" : "+r"(variable))
#define REFS(pages, i) (*(u32 *)((pages) + (i) * PAGE_STRUCT_SIZE + REFCOUNT_OFFSET))

/* Add one page to the sums; @index counts for the first odd page where @other is not 0. */
#define ADD_PAGE(zeros, ones, odd, refs, index, other)                             \
	do {                                                                      \
		u64 _refs = (refs), _other = (other);                             \
										  \
		OPAQUE(_refs);                                                    \
		OPAQUE(_other);                                                   \
		OPAQUE(odd);                                                      \
		zeros += IS_ZERO(_refs);                                          \
		ones += IS_ZERO(_refs ^ 1);                                       \
		odd |= (index) & -(IS_ZERO(odd) & LESS(0, _other));               \
	} while (0)

/*
 * Count the refcounts of a block, its first page included.
 *
 * The sums are kept in memory, of which the verifier does not know the value: else it
 * would tell apart all that may come out of each window.
 */
INLINE void look(struct task *t)
{
	struct block *b = &t->inner.block;
	const u64 first = VMEMMAP + b->pfn * PAGE_STRUCT_SIZE;
	const u32 order = b->order & 63;
	u64 zeros = 0, ones = 0, odd = 0, second;

	if (bpf_probe_read_kernel(b->pages, 2 * PAGE_STRUCT_SIZE, (void *)first))
		bpf_probe_read_kernel(b->pages, PAGE_STRUCT_SIZE, (void *)first);
	second = REFS(b->pages, 1);
	b->looked = 0;
	b->unread = 0;
	b->zeros = 0;
	b->ones = 0;
	b->odd = 0;

	if (order < WINDOW_ORDER) {
		u64 pages = 1ULL << order;

		OPAQUE(pages);
		pages &= WINDOW - 1;
		if (bpf_probe_read_kernel(t->window, pages * PAGE_STRUCT_SIZE, (void *)first)) {
			b->unread = pages;
			return;
		}
#pragma unroll
		for (u32 i = 0; i < WINDOW / 2; i++)
			if (i < pages)
				ADD_PAGE(zeros, ones, odd, REFS(t->window, i), i,
					 i ? REFS(t->window, i) ^ second : 0);
		b->looked = pages;
		b->zeros = zeros;
		b->ones = ones;
		b->odd = odd;
		return;
	}

	/* More windows than there is time for: some of all parts of the block. */
	t->step = order <= WINDOW_ORDER + WINDOWS_ORDER ?
		  WINDOW : 1ULL << (order - WINDOWS_ORDER);
	asm volatile("" : : : "memory");

	for (u32 w = 0; w < WINDOWS; w++) {
		u64 at = w * t->step;

		if (at >> order)
			break;
		OPAQUE(at);
		if (bpf_probe_read_kernel(t->window, WINDOW * PAGE_STRUCT_SIZE,
					  (void *)(first + at * PAGE_STRUCT_SIZE))) {
			b->unread += WINDOW;
			continue;
		}

		zeros = ones = odd = 0;
		ADD_PAGE(zeros, ones, odd, REFS(t->window, 0), at,
			 (REFS(t->window, 0) ^ second) & -LESS(0, at));
#pragma unroll
		for (u32 i = 1; i < WINDOW; i++)
			ADD_PAGE(zeros, ones, odd, REFS(t->window, i), at + i,
				 REFS(t->window, i) ^ second);
		b->looked += WINDOW;
		b->zeros += zeros;
		b->ones += ones;
		if (!b->odd)
			b->odd = odd;
	}
}

/* Is the key's bit set in KHO's tree? As kho_radix_walk_tree() finds it, with no lock. */
INLINE u8 bit_of(u64 key)
{
	const u64 index = key & ((1ULL << BITMAP_LOG2) - 1);
	u64 node = 0, phys = 0;
	u8 byte = 0;

	if (bpf_probe_read_kernel(&node, sizeof(node), (void *)(TREE + ROOT_OFFSET)) || !node)
		return BIT_UNKNOWN;

#pragma unroll
	for (int level = DEPTH - 1; level > 0; level--) {
		const u64 shift = (level - 1) * TABLE_LOG2 + BITMAP_LOG2;
		const u64 entry = (key >> shift) & ((1ULL << TABLE_LOG2) - 1);

		if (bpf_probe_read_kernel(&phys, sizeof(phys), (void *)(node + 8 * entry)))
			return BIT_UNKNOWN;
		if (!phys)
			return BIT_CLEAR;
		node = DIRECT_MAP + phys;
	}

	if (bpf_probe_read_kernel(&byte, sizeof(byte), (void *)(node + (index >> 3))))
		return BIT_UNKNOWN;

	return (byte >> (index & 7)) & 1;
}

/* The same of a key as KHO made it. */
INLINE u8 bit_in_tree(u64 key)
{
#if KEY_WIDTH < 64
	/* Refused, whatever is under the rest of it. */
	if (key >> KEY_WIDTH)
		return BIT_CLEAR;
#endif
	/* What lies above the levels of the tree is dropped. */
	return bit_of(key & ((1ULL << STORED_BITS) - 1));
}

/* fls64() - 1 of a key that is not 0. */
INLINE u32 highest_bit(u64 key)
{
	u32 bit = 0;

#pragma unroll
	for (int step = 32; step; step /= 2) {
		const u64 more = LESS(0, key >> step);

		bit += step * more;
		key >>= step * more;
	}

	return bit;
}

#if ORDERS
/* Levels of an xarray whose last index belongs to the last page that there can be. */
#define XA_LEVELS ((ORDER_0_LOG2 - PRESERVE_LOG2 + XA_CHUNK_LOG2 - 1) / XA_CHUNK_LOG2)
/* Internal entries up to here are no nodes (xa_is_node()). */
#define XA_NOT_A_NODE 4096
/* Not readable, or moving. */
#define XA_UNKNOWN 1

/* xa_load(), with no lock. */
INLINE u64 xa_entry(u64 xarray, u64 index)
{
	u64 entry = 0;
	u8 shift = 64;

	if (bpf_probe_read_kernel(&entry, sizeof(entry), (void *)(xarray + XA_HEAD)))
		return XA_UNKNOWN;

#pragma unroll
	for (int level = 0; level < XA_LEVELS; level++) {
		const u64 node = entry - 2;
		u64 slot;

		if ((entry & 3) != 2)
			break;
		if (entry <= XA_NOT_A_NODE)
			return XA_UNKNOWN;
		if (bpf_probe_read_kernel(&shift, sizeof(shift), (void *)(node + XA_SHIFT)))
			return XA_UNKNOWN;
		slot = index >> (shift & 63);
		if (slot >> XA_CHUNK_LOG2)
			return 0;
		index &= (1ULL << (shift & 63)) - 1;
		if (bpf_probe_read_kernel(&entry, sizeof(entry),
					  (void *)(node + XA_SLOTS + 8 * slot)))
			return XA_UNKNOWN;
	}

	/* Only nodes have entries for anything but index 0. */
	return index ? 0 : entry;
}

/* Is the block's bit set in KHO's bitmaps? As __kho_preserve_order() finds it. */
INLINE u8 bit_in_track(u64 pfn, u32 order)
{
	const u64 high = pfn >> (order & 63);
	u64 found;
	u8 byte = 0;

	found = xa_entry(ORDERS, order);
	if (found && !(found & 3))
		found = xa_entry(found + PHYS_BITS, high >> PRESERVE_LOG2);
	if (!found)
		return BIT_CLEAR;
	if (found & 3)
		return BIT_UNKNOWN;
	found += (high & ((1ULL << PRESERVE_LOG2) - 1)) >> 3;
	if (bpf_probe_read_kernel(&byte, sizeof(byte), (void *)found))
		return BIT_UNKNOWN;

	return (byte >> (high & 7)) & 1;
}
#else
INLINE u8 bit_in_track(u64 pfn, u32 order)
{
	return BIT_UNKNOWN;
}
#endif

/* The block that a call is about to add, to delete or to restore. */
INLINE void
name_block(struct task *t, int use, u64 a, u64 b, u64 c, u64 d)
{
	struct block *block = &t->inner.block;

	block->before = BIT_UNKNOWN;
	block->after = BIT_UNKNOWN;
	block->pfn = 0;
	block->key = 0;
	block->stamp = 0;
	block->order = NO_ORDER;
	block->looked = 0;
	block->unread = 0;

	if (use == BLOCK_BY_STAMP) {
		block->pfn = a >> PAGE_SHIFT_BITS;
		bpf_probe_read_kernel(&block->stamp, sizeof(block->stamp),
				      (void *)(VMEMMAP + block->pfn * PAGE_STRUCT_SIZE +
					       PRIVATE_OFFSET));
		if (block->stamp >> STAMP_MAGIC_SHIFT == STAMP_MAGIC)
			block->order = block->stamp & STAMP_ORDER_MASK;
		return;
	}

	/* Others have trees of the same kind, whose keys are no blocks. */
	if (a != TREE)
		return;

	if (use == BLOCK_BY_PFN) {
		block->pfn = b;
		block->order = (u32)c;
		block->key = 1ULL << ((ORDER_0_LOG2 - block->order) & 63);
		block->key |= b >> (block->order & 63);
#if TYPE_SHIFT < 64
		block->key |= (d & 1) << TYPE_SHIFT;
#endif
	} else {
		u64 plain = b;

#if TYPE_SHIFT < 64
		plain &= ~(1ULL << TYPE_SHIFT);
#endif
		block->key = b;
		block->order = ORDER_0_LOG2 - highest_bit(plain);
		block->pfn = plain << (block->order & 63);
		block->pfn &= (1ULL << (64 - PAGE_SHIFT_BITS)) - 1;
	}
	block->before = bit_in_tree(block->key);
}

INLINE void
block_at_entry(struct task *t, int use, int adds, u64 a, u64 b, u64 c, u64 d)
{
	struct block *block = &t->inner.block;
	const u32 depth = t->depth;

	block->outer = NO_FUNCTION;
	if (depth > 1) {
		struct frame *outer = &t->frames[(depth - 2) & 7];

		block->outer = outer->function;
		block->outer_args[0] = outer->args[0];
		block->outer_args[1] = outer->args[1];
	}
	name_block(t, use, a, b, c, d);
	if (adds && block->order < 64)
		look(t);
}

INLINE u64 page_to_pfn(u64 page)
{
	return (page - VMEMMAP) / PAGE_STRUCT_SIZE;
}

INLINE u64 pfn_to_page(u64 pfn)
{
	return VMEMMAP + pfn * PAGE_STRUCT_SIZE;
}

/* folio_nr_pages() */
INLINE u64 folio_pages(u64 folio)
{
	u64 flags = 0;

	if (bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(folio + FLAGS_OFFSET)) ||
	    !(flags >> HEAD_BIT & 1))
		return 1;
	/* The order is in the flags of the second page. */
	folio += PAGE_STRUCT_SIZE;
	if (bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(folio + FLAGS_OFFSET)))
		return 1;

	return 1ULL << (flags & 0xff & 63);
}

/* The range that a call names. */
INLINE void set_range(struct task *t, int use, u64 a, u64 b)
{
	struct range *r = &t->range;
	u64 pfn, pages;

	switch (use) {
	case BLOCK_OF_FOLIO:
		pfn = page_to_pfn(a);
		pages = folio_pages(a);
		break;
	case BLOCKS_OF_PAGES:
		pfn = page_to_pfn(a);
		pages = b;
		break;
	case BLOCKS_OF_PHYS:
		pfn = a >> PAGE_SHIFT_BITS;
		pages = b >> PAGE_SHIFT_BITS;
		break;
	default:
		pfn = a >> PAGE_SHIFT_BITS;
		pages = b;
	}
	r->pfn = pfn;
	r->end = pfn + pages;
	r->page = 0;
	r->block = 0;
}

/*
 * The order of the next block of a range, as KHO cuts it off:
 * min(count_trailing_zeros(pfn), ilog2(end - pfn)).
 */
INLINE u32 next_order(struct range *r)
{
	const u64 left = r->end - r->pfn;
	u64 size = r->pfn & -r->pfn;

	/* Nothing is too large to begin at pfn 0. */
	size |= IS_ZERO(r->pfn) << 62;
	size += LESS(left, size) * (left - size);

	return highest_bit(size);
}

/* What is known of the blocks of a range only before something becomes of them. */
INLINE void range_at_entry(struct task *t, int use, u64 a, u64 b)
{
	struct range *r = &t->range;

	set_range(t, use, a, b);
	for (u32 i = 0; i < BLOCKS; i++) {
		u32 order;

		asm volatile("" : : : "memory");
		if (r->pfn == r->end)
			break;
		order = next_order(r);
		if (use == BLOCKS_BY_STAMP) {
			r->stamps[i] = 0;
			bpf_probe_read_kernel(&r->stamps[i], sizeof(r->stamps[i]),
					      (void *)(pfn_to_page(r->pfn) + PRIVATE_OFFSET));
		} else {
			r->before[i] = bit_in_track(r->pfn, order);
		}
		r->pfn += 1ULL << order;
	}
}

/* The next block of a range; what became of it, too, if it is a restored one. */
INLINE void begin_block(struct task *t, int use, u64 ret)
{
	struct block *b = &t->inner.block;
	struct range *r = &t->range;
	const u32 number = r->block & (BLOCKS - 1);
	const u64 page = pfn_to_page(r->pfn);
	u64 private = 0;

	r->order = next_order(r);
	b->pfn = r->pfn;
	b->order = r->order;
	b->key = 0;
	b->stamp = 0;
	b->before = BIT_UNKNOWN;
	b->after = BIT_UNKNOWN;
	b->looked = 0;
	b->unread = 0;
	b->zeros = 0;
	b->ones = 0;
	b->odd = 0;
	if (bpf_probe_read_kernel(b->pages, 2 * PAGE_STRUCT_SIZE, (void *)page))
		bpf_probe_read_kernel(b->pages, PAGE_STRUCT_SIZE, (void *)page);

	if (use != BLOCKS_BY_STAMP) {
		b->key = (1ULL << ((ORDER_0_LOG2 - b->order) & 63)) | b->pfn >> b->order;
		b->before = r->before[number];
		b->after = bit_in_track(b->pfn, b->order);
	} else {
		b->stamp = r->stamps[number];
		b->order = NO_ORDER;
		b->h.ret = 0;
		bpf_probe_read_kernel(&private, sizeof(private),
				      (void *)(page + PRIVATE_OFFSET));
		if (b->stamp >> STAMP_MAGIC_SHIFT == STAMP_MAGIC) {
			b->order = b->stamp & STAMP_ORDER_MASK;
			/* Of a call that failed, some blocks may be restored all the same. */
			if (ret || private != b->stamp)
				b->h.ret = page;
		}
	}

	/* As in look(). */
	r->step = b->order <= WINDOW_ORDER + WINDOWS_ORDER ?
		  WINDOW : 1ULL << ((b->order - WINDOWS_ORDER) & 63);
}

/* What look() does for one window, and for blocks that are smaller than one. */
INLINE void look_at_window(struct task *t)
{
	struct block *b = &t->inner.block;
	struct range *r = &t->range;
	const u64 second = REFS(b->pages, 1);
	const u64 at = r->page;
	const u64 first = pfn_to_page(b->pfn + at);
	u64 last = ((1ULL << (b->order & 63)) - 1) & (WINDOW - 1);
	u64 zeros = 0, ones = 0, odd = 0;

	r->page += r->step;
	OPAQUE(last);
	last &= WINDOW - 1;
	if (bpf_probe_read_kernel(t->window, (last + 1) * PAGE_STRUCT_SIZE, (void *)first)) {
		b->unread += last + 1;
		return;
	}
#pragma unroll
	for (u32 i = 0; i < WINDOW; i++) {
		const u64 refs = REFS(t->window, i);
		const u64 beyond = LESS(last, i);
		u64 other = (refs ^ second) & (beyond - 1);

		/* The first page of all is no tail. */
		if (i == 0)
			other &= -LESS(0, at);
		ADD_PAGE(zeros, ones, odd, refs | beyond << 32, at + i, other);
	}
	b->looked += last + 1;
	b->zeros += zeros;
	b->ones += ones;
	if (!b->odd)
		b->odd = odd;
}

INLINE int is_wanted(struct task *t, int kind)
{
	if (!(ONLY & kind))
		return 0;
#ifdef WANTED_TGID
	if (t->outer.call.h.tgid != WANTED_TGID)
		return 0;
#endif
#ifdef WANTED_COMM
	const char wanted[16] = WANTED_COMM;

#pragma unroll
	for (int i = 0; i < 16; i++)
		if (t->outer.call.comm[i] != wanted[i])
			return 0;
#endif
	return 1;
}

/* A call begins; returns its task if somebody asked for it. */
INLINE struct task *
enter(void *ctx, int function, int kind, u64 a, u64 b, u64 c, u64 d)
{
	const u64 now = bpf_ktime_get_ns();
	const u64 id = bpf_get_current_pid_tgid();
	u32 tid = id;
	int zero = 0;
	u32 *on = armed.lookup(&zero);
	struct task *t = tasks.lookup(&tid);
	struct frame *frame;
	u32 depth;

	/* A task is known while it is in a call, which is followed to its end. */
	if (!t && (!on || !*on))
		return 0;

	if (!t) {
		t = blank.lookup(&zero);
		if (!t)
			return 0;
		tasks.update(&tid, t);
		t = tasks.lookup(&tid);
		if (!t) {
			count(MISSED, 1);
			return 0;
		}
	}

	/* No function of KHO calls itself: its last return was missed. */
	depth = t->depth;
#pragma unroll
	for (int i = MAX_DEPTH - 1; i >= 0; i--)
		if (i < t->depth && t->frames[i].function == function)
			t->depth = i;
	if (t->depth != depth)
		count(MISSED, 1);

	depth = t->depth;
	if (depth == 0) {
		t->outer.call.h.call = now << 12 | (bpf_get_smp_processor_id() & 0xfff);
		t->outer.call.h.tid = tid;
		t->outer.call.h.tgid = id >> 32;
		t->outer.call.h.is_call = 1;
		bpf_get_current_comm(t->outer.call.comm, sizeof(t->outer.call.comm));
		t->muted = !is_wanted(t, kind);
		if (!t->muted)
			bpf_get_stack(ctx, t->outer.call.stack, sizeof(t->outer.call.stack), 0);
	}
	if (depth >= MAX_DEPTH) {
		count(MISSED, 1);
		return 0;
	}

	frame = &t->frames[depth & 7];
	frame->enter = now;
	frame->args[0] = a;
	frame->args[1] = b;
	frame->args[2] = c;
	frame->args[3] = d;
	frame->function = function;
	t->depth = depth + 1;

	return t->muted ? 0 : t;
}

INLINE void fill(struct header *h, struct task *t, u64 now, u64 ret)
{
	const u32 depth = t->depth & 7;
	struct frame *frame = &t->frames[depth];

	h->call = t->outer.call.h.call;
	h->tid = t->outer.call.h.tid;
	h->tgid = t->outer.call.h.tgid;
	h->enter = frame->enter;
	h->leave = now;
	h->args[0] = frame->args[0];
	h->args[1] = frame->args[1];
	h->args[2] = frame->args[2];
	h->args[3] = frame->args[3];
	h->ret = ret;
	h->function = frame->function;
	h->depth = depth;
}

/* A call returns; its task, with the call's depth, or 0 if it was not seen to begin. */
INLINE struct task *leave(int function)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct task *t = tasks.lookup(&tid);
	u32 depth = NO_FUNCTION;
	int zero = 0;
	u32 *on = armed.lookup(&zero);

	if (t) {
#pragma unroll
		for (int i = 0; i < MAX_DEPTH; i++)
			if (i < t->depth && t->frames[i].function == function)
				depth = i;
	}
	if (!t || depth == NO_FUNCTION) {
		if (on && *on)
			count(UNSEEN, 1);
		return 0;
	}
	/* Calls inside of this one that have not returned: their returns were missed. */
	if (t->depth != depth + 1)
		count(MISSED, t->depth - depth - 1);
	t->depth = depth;

	return t;
}

INLINE void block_at_return(struct task *t, int use, u64 now, u64 ret)
{
	if (t->muted)
		return;
	fill(&t->inner.block.h, t, now, ret);
	if (use == BLOCK_BY_STAMP) {
		if (t->inner.block.order < 64)
			look(t);
	} else if (t->inner.block.key) {
		t->inner.block.after = bit_in_tree(t->inner.block.key);
	}
	output(&t->inner);
}

/*
 * Tell of the blocks of a range, when the call returns that names it: KHO sets and clears
 * bits, and touches no page, so those that were preserved are what they were before.
 *
 * One loop over the windows of all blocks: a loop in a loop would be too much for the
 * verifier. If there are too many windows, each block that is left is told of all the same.
 */
INLINE void
range_at_return(struct task *t, int use, int adds, u64 now, u64 ret)
{
	const struct frame *frame = &t->frames[t->depth & 7];
	const int looks = adds || use == BLOCKS_BY_STAMP;
	struct block *b = &t->inner.block;
	struct range *r = &t->range;

	if (t->muted)
		return;
	fill(&b->h, t, now, ret);
	b->outer = NO_FUNCTION;
	/* If preserving fails, or unpreserving, the bits are as they were. */
	if (use != BLOCKS_BY_STAMP && (s32)ret < 0)
		return;
	set_range(t, use, frame->args[0], frame->args[1]);
	for (u32 i = 0; i < ALL_WINDOWS + BLOCKS; i++) {
		asm volatile("" : : : "memory");
		if (r->pfn == r->end)
			return;
		if (!r->page)
			begin_block(t, use, ret);
		if (looks && i < ALL_WINDOWS && b->order < 64) {
			look_at_window(t);
			if (!(r->page >> b->order))
				continue;
		}
		output(&t->inner);
		/* Where a block cannot be restored, the kernel gives up. */
		if (use == BLOCKS_BY_STAMP && !b->h.ret)
			return;
		r->pfn += 1ULL << r->order;
		r->page = 0;
		r->block++;
	}
	count(MISSED, 1);
}

/* The end of an outermost call. Inner ones are told by what they did to blocks. */
INLINE void end(struct task *t, u64 now, u64 ret)
{
	u32 tid = t->outer.call.h.tid;

	if (t->depth)
		return;
	if (!t->muted) {
		fill(&t->outer.call.h, t, now, ret);
		output(&t->outer);
	}
	tasks.delete(&tid);
}

/*
 * By name of the use, so that functions that touch no block get none of that code.
 */
#define ENTER_NO_BLOCK(t, adds, a, b, c, d)
#define ENTER_NAMED(t, adds, a, b, c, d)                                          \
	bpf_probe_read_kernel_str(t->outer.call.name, sizeof(t->outer.call.name), (void *)(a))
#define ENTER_BLOCK_BY_PFN(t, adds, a, b, c, d)                                   \
	block_at_entry(t, BLOCK_BY_PFN, adds, a, b, c, d)
#define ENTER_BLOCK_BY_KEY(t, adds, a, b, c, d)                                   \
	block_at_entry(t, BLOCK_BY_KEY, adds, a, b, c, d)
#define ENTER_BLOCK_BY_STAMP(t, adds, a, b, c, d)                                 \
	block_at_entry(t, BLOCK_BY_STAMP, adds, a, b, c, d)
#define ENTER_BLOCK_OF_FOLIO(t, adds, a, b, c, d) range_at_entry(t, BLOCK_OF_FOLIO, a, b)
#define ENTER_BLOCKS_OF_PAGES(t, adds, a, b, c, d) range_at_entry(t, BLOCKS_OF_PAGES, a, b)
#define ENTER_BLOCKS_OF_PHYS(t, adds, a, b, c, d) range_at_entry(t, BLOCKS_OF_PHYS, a, b)
#define ENTER_BLOCKS_BY_STAMP(t, adds, a, b, c, d) range_at_entry(t, BLOCKS_BY_STAMP, a, b)

#define LEAVE_NO_BLOCK(t, adds, now, ret)
#define LEAVE_NAMED(t, adds, now, ret)
#define LEAVE_BLOCK_BY_PFN(t, adds, now, ret) block_at_return(t, BLOCK_BY_PFN, now, ret)
#define LEAVE_BLOCK_BY_KEY(t, adds, now, ret) block_at_return(t, BLOCK_BY_KEY, now, ret)
#define LEAVE_BLOCK_BY_STAMP(t, adds, now, ret) block_at_return(t, BLOCK_BY_STAMP, now, ret)
#define LEAVE_BLOCK_OF_FOLIO(t, adds, now, ret)                                   \
	range_at_return(t, BLOCK_OF_FOLIO, adds, now, ret)
#define LEAVE_BLOCKS_OF_PAGES(t, adds, now, ret)                                  \
	range_at_return(t, BLOCKS_OF_PAGES, adds, now, ret)
#define LEAVE_BLOCKS_OF_PHYS(t, adds, now, ret)                                   \
	range_at_return(t, BLOCKS_OF_PHYS, adds, now, ret)
#define LEAVE_BLOCKS_BY_STAMP(t, adds, now, ret)                                  \
	range_at_return(t, BLOCKS_BY_STAMP, adds, now, ret)

#define AT_ENTRY(number, kind, use, adds, a, b, c, d)                             \
	do {                                                                      \
		struct task *t = enter(ctx, number, kind, a, b, c, d);            \
										  \
		if (t) {                                                          \
			ENTER_##use(t, adds, a, b, c, d);                         \
		}                                                                 \
	} while (0)

#define AT_RETURN(number, use, adds, ret)                                         \
	do {                                                                      \
		const u64 now = bpf_ktime_get_ns();                               \
		struct task *t = leave(number);                                   \
										  \
		if (t) {                                                          \
			LEAVE_##use(t, adds, now, ret);                           \
			end(t, now, ret);                                         \
		}                                                                 \
	} while (0)

#define FENTRY(name, number, kind, use, adds, a, b, c, d)                         \
	KFUNC_PROBE(name)                                                         \
	{                                                                         \
		AT_ENTRY(number, kind, use, adds, a, b, c, d);                    \
		return 0;                                                         \
	}

#define FEXIT(name, number, use, adds, ret)                                       \
	KRETFUNC_PROBE(name)                                                      \
	{                                                                         \
		AT_RETURN(number, use, adds, ret);                                \
		return 0;                                                         \
	}

#define KPROBE(name, number, kind, use, adds, a, b, c, d)                         \
	int enter_##name(struct pt_regs *ctx)                                     \
	{                                                                         \
		AT_ENTRY(number, kind, use, adds, a, b, c, d);                    \
		return 0;                                                         \
	}

#define KRETPROBE(name, number, use, adds, ret)                                   \
	int leave_##name(struct pt_regs *ctx)                                     \
	{                                                                         \
		AT_RETURN(number, use, adds, ret);                                \
		return 0;                                                         \
	}
