// SPDX-License-Identifier: GPL-2.0-only
/*
 * kho_trace - report each call of KHO, and each block that it touches; or how many there were of
 * each kind
 *
 * Compiled by bcc. It gathers facts and decides nothing. The only kernel header is
 * the one with struct pt_regs: what is known of this kernel is passed in.
 *
 * sizes, offsets and addresses, in bytes unless they say otherwise:
 *   VMEMMAP, PAGE_STRUCT_SIZE, REFCOUNT_OFFSET, PRIVATE_OFFSET, FLAGS_OFFSET  of struct page
 *   COMPOUND_OFFSET, PAGE_TYPE_OFFSET    likewise
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
 *   STAMP_TYPE_SHIFT                     bit of the type in it; 64: none
 *   PRESERVE_PAGES, RESTORE_PAGES        numbers of kho_preserve_pages() and kho_restore_pages()
 *   HUGETLB_TYPE, OPTIMIZED, OWN_PAGES   PGTY_hugetlb; HPG_vmemmap_optimized as a mask of
 *                                        folio->private, 0: there is none; the struct pages that such a
 *                                        folio has for itself
 *   MAY_GOTO                             whether the kernel has that instruction
 * and what the user asked for:
 *   RING_PAGES                           size of the ring buffer
 *   STACK_FRAMES                         kernel stack frames kept of each call
 *   ONLY                                 bit mask of the kinds of outermost calls
 *   WANTED_TGID, WANTED_COMM             other tasks are left alone
 *   KINDS                                how many kinds of calls are counted, and how many kinds of
 *                                        blocks; 0: each call and each block is told by itself
 *   MIN_ORDER                            where they are counted: blocks of a lower order, and calls
 *                                        that touch no others, are left alone
 *
 * The functions to trace follow behind the last line: FENTRY() and FEXIT(), or KPROBE()
 * and KRETPROBE(), of each, with
 *   name, number    of the function, in khoscope/facts/calls.py
 *   kind            bit of ONLY
 *   use             enum block_use
 *   adds            whether it adds blocks: then their refcounts are looked at
 *   a, b, c, d      where its arguments are
 *   ret             where its result is; 0 if it has none
 *   is_pointer      whether its result is a pointer: NULL says that it failed
 *   asked           how many pages it was asked for: PAGES_…
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

/* What is done to a block. */
enum action {
	NONE,
	ADD,
	DELETE,
	RESTORE,
	ACTIONS,
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

/* struct pages are read by so many at once; where not all of a block are, so many times. */
#define WINDOW_ORDER 4
#define WINDOWS_ORDER 6
#define WINDOW (1 << WINDOW_ORDER)
#define WINDOWS (1 << WINDOWS_ORDER)

/* A range of less than 2^24 pages is cut into no more blocks; of all, so many windows are read. */
#define BLOCKS 48
#define WINDOWS_OF_RANGE (1 << 16)

/*
 * The verifier walks a loop as often as it can be walked, and forgets what it knows of one that is
 * long: of a range, windows are looked at in two goes. A loop with a may_goto (since linux 6.9) may
 * end at any time, and is walked until nothing new is seen, which takes two or three times. For
 * that, how often it has been walked must decide nothing, unless that is kept in memory.
 */
#if MAY_GOTO
/* All pages of a block up to this order are looked at. */
#define WHOLE_ORDER 18
/* The instruction is spelt out for compilers that do not know it. */
#define GOES_ON(done, times)                                                      \
	({                                                                        \
		__label__ _end, _go_on;                                           \
		int _goes_on = 1;                                                 \
										  \
		asm volatile goto("1: .byte 0xe5; .byte 0;"                       \
				  ".long ((%l[_end] - 1b - 8) / 8) & 0xffff; .short 0" \
				  : : : : _end);                                  \
		goto _go_on;                                                      \
	_end:                                                                     \
		_goes_on = 0;                                                     \
	_go_on:                                                                   \
		_goes_on;                                                         \
	})
#else
#define WHOLE_ORDER (WINDOW_ORDER + WINDOWS_ORDER)
#define WINDOWS_AT_ONCE 40
#define GOES_ON(done, times) ((done) < (times))
#endif

/* An outermost call. */
struct call {
	u64 call;		/* names it */
	u64 enter;		/* ktime in ns */
	u64 leave;
	u64 args[4];
	u64 ret;
	u32 tid;
	u32 tgid;
	u8 function;
	u8 has_returned;
	u8 has_block;		/* whether a struct touch follows */
	u8 spare[5];
	char comm[16];
	u64 blocks;		/* that were touched */
	u64 pages;		/* that were asked for */
	u64 stack[STACK_FRAMES];
};

/* What was done to a block. */
struct touch {
	u64 args[2];		/* of the function from which that was called, or of that itself */
	u64 ret;
	u64 pfn;
	u64 key;
	u64 private;		/* of the first page; at entry, if the block is restored */
	u64 flags;		/* of the first page */
	u64 compound;		/* of the first page: the word that tells a tail */
	u64 compound_behind;	/* the same of the second page */
	u32 refcount;		/* of the first page */
	u32 page_type;		/* of the first page */
	u32 order;
	u32 looked;		/* pages whose refcount was read */
	u32 unread;		/* pages whose refcount could not be read */
	u32 zeros, ones;	/* pages with refcount 0 and 1, the first one included */
	u32 odd;		/* first page behind the second with another refcount; 0: none */
	u8 before, after;	/* enum bit */
	u8 function;
	u8 outer;		/* function from which this one was called; 255: none */
	u8 as_folio;		/* kho_restore_page(…, is_folio) */
	u8 compound_order;	/* lowest byte of the second page's flags */
	u8 spare[2];
};

/*
 * What goes through the ring buffer. Most calls touch one block: that goes with the call. Of others,
 * each but the last goes ahead, with as much of its call as is known by then. All have one size, so
 * that a buffer full of them is an array.
 */
struct record {
	struct call call;
	union {
		struct touch touch;
		char name[32];	/* of a subtree */
	};
};

/* A block that something is being done to. */
struct block {
	u64 args[2];
	u64 outer_args[2];
	u64 ret;
	u64 pfn;
	u64 key;
	u64 stamp;		/* page->private at entry */
	u32 order;
	u8 before, after;
	u8 function, outer;
	u32 looked;
	u32 unread;
	u32 zeros, ones;
	u64 odd;
	u64 own;		/* pages of it that share their struct pages with no others */
	u8 pages[2 * PAGE_STRUCT_SIZE];
};

/* What is told: of one call or block, or of all of a kind. */
struct sum {
	u64 count;
	u64 pages;		/* that all these calls were asked for */
	struct record record;	/* of the first one */
};

/*
 * Calls, and blocks, that differ in nothing but addresses, times and tasks count as one kind: the
 * first of them says all that is to be known of the others. The rules in khoscope/checks look at
 * nothing that is not in here.
 */
struct call_kind {
	u64 client;		/* hash of the stack */
	u64 ret;		/* of a pointer, whether it is one */
	u8 function;
	u8 latency;		/* bits of the whole microseconds */
	u8 touched;		/* whether it touched a block */
	u8 spare[5];
};

struct block_kind {
	u64 client;
	u64 ret;
	u32 page_type;		/* of the first page; 0: it is a count of mappings */
	u8 function;
	u8 outer;		/* function from which that was called */
	u8 as_folio;		/* its second argument */
	u8 order;		/* as it is stored, or stamped */
	u8 type;		/* likewise */
	u8 asked;		/* order by the arithmetic of the caller */
	u8 before, after;	/* enum bit */
	u8 first, last;		/* places of the first and the last page, see struct places */
	u8 head;		/* refcount of the first page: 0 or less, 1, or 2 and more */
	u8 pattern;		/* PATTERN_… */
	u8 compound;		/* COMPOUND_… */
	u8 compound_order;
	u8 spare[6];
};

#define PATTERN_ZEROS		1	/* all others have refcount 0 */
#define PATTERN_NO_ZEROS	2	/* none of them */
#define PATTERN_ONES		4	/* all others have refcount 1 */
#define PATTERN_LOOKED		8	/* some refcount was read */
#define PATTERN_UNREAD		16	/* some could not be read */
#define PATTERN_SAMPLED		32	/* of some, nobody tried */

#define COMPOUND_HEAD		1	/* the first page says that it begins a compound page */
#define COMPOUND_TAIL		2	/* it says that it is in the middle of one */
#define COMPOUND_MORE		4	/* the second page says so */
#define COMPOUND_OWN		8	/* of that which begins with the first page */

/*
 * Addresses at which what there is to say of a block may change: where RAM, scratch areas and so on
 * begin and end, in order, and 2^63 - 1 behind the last.
 */
#define PLACES_LOG2 8
#define PLACES (1 << PLACES_LOG2)
struct places {
	u64 border[PLACES];
	u8 ordinary[PLACES];	/* whether memory behind so many borders is RAM and nothing else */
};

struct frame {
	u64 enter;
	u64 args[4];
	u64 function;
};

/* Blocks of the range that a call names, one by one. */
struct named_range {
	u64 a, b;		/* arguments of the call */
	u64 pfn;		/* where the next one begins */
	u64 end;
	u64 page;		/* of it, the next to be looked at */
	u64 step;		/* pages from one window to the next */
	u32 order;		/* as the call cuts it off */
	u32 looks;		/* order of what is to be looked at of it */
	u32 block;		/* its number */
	u32 windows;		/* of all blocks, that were looked at */
	u64 stamps[64];		/* page->private at entry, of each block */
	u8 before[64];		/* enum bit, at entry */
};

struct task {
	u32 depth;
	u32 muted;		/* nobody asked for what this task is doing */
	u32 made, lost;		/* events that are not counted yet */
	struct frame frames[8];	/* MAX_DEPTH, and what an index of 3 bits reaches */
	struct sum told;
	struct block block;	/* one at a time */
	char name[32];		/* of a subtree */
#if KINDS
	u64 client;
	u64 touched[ACTIONS];	/* pages, by what was done to them */
	u32 whole;		/* something was odd: the rest of it is told by itself */
	u32 apart;		/* and the kinds of it do not say all of it */
	u32 high;		/* it touched a block of MIN_ORDER or above */
	struct call_kind call_kind;
	struct block_kind block_kind;
#endif
	struct named_range range;
	u64 number;
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

#if KINDS
/*
 * An entry stays until the trace ends: whoever took one out could not know who is just about to
 * count in it. So what is read there only grows, and nothing of it is lost.
 */
BPF_TABLE("hash", struct call_kind, struct sum, call_kinds, KINDS);
BPF_TABLE("hash", struct block_kind, struct sum, block_kinds, KINDS);
BPF_ARRAY(places, struct places, 1);
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE void count(int what, u64 times)
{
	u64 *counter = counters.lookup(&what);

	if (counter)
		*counter += times;
}

/* 0: there was room for it. */
INLINE u64 output(struct task *t)
{
	return events.ringbuf_output(&t->told.record, sizeof(t->told.record), 0);
}

/*
 * The verifier walks both sides of each branch, so the loops over pages have none: 1 if
 * a is less than b, both less than 2^63, else 0. OPAQUE() keeps the compiler from finding
 * out that this is a comparison.
 */
#define OPAQUE(variable) asm volatile("" : "+r"(variable))
#define LESS(a, b)                                                                \
	({                                                                        \
		u64 _difference = (u64)(a) - (u64)(b);                            \
										  \
		OPAQUE(_difference);                                              \
		_difference >>= 63;                                               \
		OPAQUE(_difference);                                              \
		_difference;                                                      \
	})
#define IS_ZERO(a) LESS(a, 1)
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
 * How many pages of a block are to be looked at: the tails of an optimised hugetlb folio share their
 * struct pages (HVO, mm/hugetlb_vmemmap.c), which say nothing of any of them.
 */
INLINE u64 own_pages(struct block *b, u32 order)
{
	const u64 all = 1ULL << order;
#if OPTIMIZED
	const u8 *second = b->pages + PAGE_STRUCT_SIZE;
	const u64 type = *(u32 *)(b->pages + PAGE_TYPE_OFFSET) >> 24;
	const u64 compound = *(u64 *)(second + FLAGS_OFFSET) & 0xff;
	u64 shares = *(u64 *)(b->pages + PRIVATE_OFFSET) & OPTIMIZED;

	shares = LESS(0, shares) & IS_ZERO(type ^ HUGETLB_TYPE) & (1 - LESS(compound, order));
	return all ^ ((all ^ OWN_PAGES) & -shares);
#else
	return all;
#endif
}

/*
 * Count the refcounts of a block, its first page included.
 *
 * The sums are kept in memory, of which the verifier does not know the value: else it
 * would tell apart all that may come out of each window.
 */
INLINE void look(struct task *t)
{
	struct block *b = &t->block;
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
	b->own = own_pages(b, order);

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
	t->step = order <= WHOLE_ORDER ? WINDOW : 1ULL << (order - WINDOWS_ORDER);
	asm volatile("" : : : "memory");

	for (u64 w = 0; GOES_ON(w, WINDOWS); w++) {
		u64 at = w * t->step;

		if (at >= b->own)
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

/*
 * The verifier knows the types of what fentry is given, and lets nobody calculate with
 * pointers; of what was in memory it does not know.
 */
INLINE u64 as_number(struct task *t, u64 argument)
{
	t->number = argument;
	asm volatile("" : : : "memory");

	return t->number;
}

INLINE u64 pfn_of(u64 page)
{
	return (page - VMEMMAP) / PAGE_STRUCT_SIZE;
}

INLINE u64 page_at(u64 pfn)
{
	return VMEMMAP + pfn * PAGE_STRUCT_SIZE;
}

INLINE u64 key_of(u64 pfn, u32 order)
{
	return 1ULL << ((ORDER_0_LOG2 - order) & 63) | pfn >> (order & 63);
}

/* 1 if @value is not 0, else 0; with no branch, see LESS(). */
INLINE u64 is_any(u64 value)
{
	u64 negative = -value;

	OPAQUE(negative);
	value = (value | negative) >> 63;
	OPAQUE(value);

	return value;
}

#if ORDERS
/* Levels of the xarray of orders, and of that of bitmaps: addresses have 52 bits at most. */
#define ORDER_LEVELS ((6 + XA_CHUNK_LOG2 - 1) / XA_CHUNK_LOG2)
#define PHYS_LEVELS                                                               \
	((52 - PAGE_SHIFT_BITS - PRESERVE_LOG2 + XA_CHUNK_LOG2 - 1) / XA_CHUNK_LOG2)
/* Internal entries up to here are no nodes (xa_is_node()). */
#define XA_NOT_A_NODE 4096
/* No entry of KHO's: not readable, or moving. */
#define XA_UNKNOWN 1

/* xa_load(), with no lock and no branch. */
INLINE u64 entry_at(u64 xarray, u64 index, const int levels)
{
	u64 entry = 0, bad;

	bad = is_any(bpf_probe_read_kernel(&entry, sizeof(entry), (void *)(xarray + XA_HEAD)));

#pragma unroll
	for (int level = 0; level < levels; level++) {
		u64 inside, next = 0, slot, failed;
		u8 shift = 0;

		inside = IS_ZERO((entry & 3) ^ 2) & LESS(XA_NOT_A_NODE / 2, entry >> 1);
		failed = bpf_probe_read_kernel(&shift, sizeof(shift),
					       (void *)(entry - 2 + XA_SHIFT));
		slot = index >> (shift & 63);
		failed |= bpf_probe_read_kernel(&next, sizeof(next),
						(void *)(entry - 2 + XA_SLOTS + 8 * slot));
		/* Nothing is behind the last slot of the first node. */
		next &= is_any(slot >> XA_CHUNK_LOG2) - 1;
		bad |= inside & is_any(failed);
		entry ^= (entry ^ next) & -inside;
		index &= ((1ULL << (shift & 63)) - 1) | (inside - 1);
	}
	/* Only nodes have entries for anything but index 0. */
	entry &= is_any(index) - 1;
	entry ^= (entry ^ XA_UNKNOWN) & -bad;

	return entry;
}

/* Is the block's bit set in KHO's bitmaps? As __kho_preserve_order() finds it. */
INLINE u8 bit_in_bitmaps(u64 pfn, u32 order)
{
	const u64 high = pfn >> (order & 63);
	const u64 offset = (high & ((1ULL << PRESERVE_LOG2) - 1)) >> 3;
	u64 of_order, bitmap, there, unknown;
	u8 byte = 0;

	of_order = entry_at(ORDERS, order, ORDER_LEVELS);
	bitmap = entry_at(of_order + PHYS_BITS, high >> PRESERVE_LOG2, PHYS_LEVELS);
	there = is_any(of_order) & is_any(bitmap);
	unknown = is_any(bpf_probe_read_kernel(&byte, sizeof(byte), (void *)(bitmap + offset)));
	unknown |= is_any(of_order & 3) | is_any(bitmap & 3);
	unknown &= there;

	return ((byte >> (high & 7)) & there & (1 ^ unknown)) | unknown << 1;
}
#else
INLINE u8 bit_in_bitmaps(u64 pfn, u32 order)
{
	return BIT_UNKNOWN;
}
#endif

/* folio_order() */
INLINE u32 order_of(u64 folio)
{
	u64 flags = 0;

	if (bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(folio + FLAGS_OFFSET)) ||
	    !(flags >> HEAD_BIT & 1))
		return 0;
	/* The second page has it. */
	folio += PAGE_STRUCT_SIZE;
	bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(folio + FLAGS_OFFSET));

	return flags & 0xff & 63;
}

/* The block that a call is about to add, to delete or to restore. */
INLINE void
name_block(struct task *t, int use, u64 a, u64 b, u64 c, u64 d)
{
	struct block *block = &t->block;

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

	if (use == BLOCK_OF_FOLIO) {
		a = as_number(t, a);
		block->pfn = pfn_of(a);
		block->order = order_of(a);
		block->key = key_of(block->pfn, block->order);
		block->before = bit_in_bitmaps(block->pfn, block->order);
		return;
	}

	/* Others have trees of the same kind, whose keys are no blocks. */
	if (a != TREE)
		return;

	if (use == BLOCK_BY_PFN) {
		block->pfn = b;
		block->order = (u32)c;
		block->key = key_of(b, block->order);
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
	struct block *block = &t->block;
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

/* Go to the first block of the range that the call names. */
INLINE void set_range(struct task *t, int use)
{
	struct named_range *r = &t->range;
	u64 pages = r->b;

	r->pfn = use == BLOCKS_OF_PAGES ? pfn_of(r->a) : r->a >> PAGE_SHIFT_BITS;
	if (use == BLOCKS_OF_PHYS)
		pages >>= PAGE_SHIFT_BITS;
	r->end = r->pfn + pages;
	r->block = 0;
	r->windows = 0;
}

/*
 * The order of the next block of a range, as KHO cuts it off:
 * min(count_trailing_zeros(pfn), ilog2(end - pfn)).
 */
INLINE u32 order_at(u64 pfn, u64 left)
{
	u64 size = pfn & -pfn;

	/* Nothing is too large to begin at pfn 0. */
	size |= IS_ZERO(pfn) << 62;
	size += (left - size) & -LESS(left, size);

	return highest_bit(size);
}

INLINE u32 next_order(struct named_range *r)
{
	return order_at(r->pfn, r->end - r->pfn);
}

/* Which blocks of a range are preserved. */
INLINE void look_for_bits(struct task *t, int use)
{
	struct named_range *r = &t->range;

	set_range(t, use);
	for (u32 i = 0; i < BLOCKS; i++) {
		u32 order;

		asm volatile("" : : : "memory");
		if (r->pfn == r->end)
			break;
		order = next_order(r);
		r->before[i] = bit_in_bitmaps(r->pfn, order);
		r->pfn += 1ULL << order;
	}
}

/* The stamps of a range, which restoring takes away. */
INLINE void look_for_stamps(struct task *t)
{
	struct named_range *r = &t->range;

	set_range(t, BLOCKS_BY_STAMP);
	for (u32 i = 0; i < BLOCKS; i++) {
		asm volatile("" : : : "memory");
		if (r->pfn == r->end)
			break;
		r->stamps[i] = 0;
		bpf_probe_read_kernel(&r->stamps[i], sizeof(r->stamps[i]),
				      (void *)(page_at(r->pfn) + PRIVATE_OFFSET));
		r->pfn += 1ULL << next_order(r);
	}
}

/* What can be known of the blocks of a range only before something becomes of them. */
INLINE void range_at_entry(struct task *t, int use, u64 a, u64 b)
{
	t->range.a = as_number(t, a);
	t->range.b = b;
	if (use == BLOCKS_BY_STAMP)
		look_for_stamps(t);
	else
		look_for_bits(t, use);
}

/* The next block of a range, and what became of it. */
INLINE void begin_block(struct task *t, int use, u64 ret)
{
	struct block *b = &t->block;
	struct named_range *r = &t->range;
	const u32 number = r->block & 63;
	const u64 page = page_at(r->pfn);
	u64 private = 0, stamped, restored, excess;

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
	b->own = 1ULL << (b->order & 63);
	r->page = 0;
	bpf_probe_read_kernel(b->pages, PAGE_STRUCT_SIZE, (void *)page);
	bpf_probe_read_kernel(b->pages + PAGE_STRUCT_SIZE, PAGE_STRUCT_SIZE,
			      (void *)(page + PAGE_STRUCT_SIZE));

	if (use == BLOCKS_BY_STAMP) {
		b->stamp = r->stamps[number];
		bpf_probe_read_kernel(&private, sizeof(private),
				      (void *)(page + PRIVATE_OFFSET));
		stamped = 1 - is_any((b->stamp >> STAMP_MAGIC_SHIFT) ^ STAMP_MAGIC);
		/* Of a call that failed, some blocks may be restored all the same. */
		restored = stamped & (is_any(ret) | is_any(private ^ b->stamp));
		b->order = NO_ORDER ^ ((NO_ORDER ^ (b->stamp & STAMP_ORDER_MASK)) & -stamped);
		b->ret = page & -restored;
	} else {
		b->key = key_of(b->pfn, b->order);
		b->before = r->before[number];
		b->after = bit_in_bitmaps(b->pfn, b->order);
	}

	/* As in look(); of what has no sane order, the first page. */
	r->looks = b->order & -LESS(b->order, 64);
	excess = r->looks - (WINDOW_ORDER + WINDOWS_ORDER);
	excess &= -LESS(WHOLE_ORDER, r->looks);
	r->step = (u64)WINDOW << (excess & 63);
}

/* What look() does for one window, also of a block that is smaller, and with no branch. */
INLINE void look_at_window(struct task *t)
{
	struct block *b = &t->block;
	struct named_range *r = &t->range;
	const u64 second = REFS(b->pages, 1);
	const u64 at = r->page;
	u64 last = (1ULL << (r->looks & 63)) - 1;
	u64 zeros = 0, ones = 0, odd = 0, unread;

	r->page += r->step;
	OPAQUE(last);
	last &= WINDOW - 1;
	unread = is_any(bpf_probe_read_kernel(t->window, (last + 1) * PAGE_STRUCT_SIZE,
					      (void *)page_at(b->pfn + at)));
#pragma unroll
	for (u32 i = 0; i < WINDOW; i++) {
		const u64 refs = REFS(t->window, i);
		const u64 ignored = LESS(last, i) | unread;
		u64 other = (refs ^ second) & (ignored - 1);

		/* The first page of all is no tail. */
		if (i == 0)
			other &= -LESS(0, at);
		ADD_PAGE(zeros, ones, odd, refs | ignored << 32, at + i, other);
	}
	b->unread += (last + 1) & -unread;
	b->looked += (last + 1) & (unread - 1);
	b->zeros += zeros;
	b->ones += ones;
	b->odd |= odd & (is_any(b->odd) - 1);
}

INLINE int is_wanted(struct task *t, int kind)
{
	if (!(ONLY & kind))
		return 0;
#ifdef WANTED_TGID
	if (t->told.record.call.tgid != WANTED_TGID)
		return 0;
#endif
#ifdef WANTED_COMM
	const char wanted[16] = WANTED_COMM;

#pragma unroll
	for (int i = 0; i < 16; i++)
		if (t->told.record.call.comm[i] != wanted[i])
			return 0;
#endif
	return 1;
}

#if KINDS
/* Hash of the stack. */
INLINE u64 client_of(struct call *call)
{
	u64 hash = 0;

#pragma unroll
	for (int i = 0; i < STACK_FRAMES; i++) {
		hash = (hash ^ call->stack[i]) * 0x9e3779b97f4a7c15ULL;
		hash ^= hash >> 32;
	}

	return hash;
}
#endif

/*
 * Tell what is in the record; each of a call and a block in it is an event. Whether there is a block
 * is a number here, as branches double what the verifier goes through.
 */
INLINE void tell_record(struct task *t)
{
	struct call *c = &t->told.record.call;
	const u64 told = c->has_block + c->has_returned;

	t->lost += told & -is_any(output(t));
	c->has_block = 0;
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
		/* Of a call whose return was missed. */
		if (!KINDS && t->told.record.call.has_block)
			tell_record(t);
		t->told.record.call.call = now << 12 | (bpf_get_smp_processor_id() & 0xfff);
		t->told.record.call.tid = tid;
		t->told.record.call.tgid = id >> 32;
		bpf_get_current_comm(t->told.record.call.comm, sizeof(t->told.record.call.comm));
		t->muted = !is_wanted(t, kind);
		if (!t->muted)
			bpf_get_stack(ctx, t->told.record.call.stack, sizeof(t->told.record.call.stack), 0);
#if KINDS
		t->client = client_of(&t->told.record.call);
#endif
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

INLINE void fill_call(struct task *t, u64 now, u64 ret)
{
	struct call *c = &t->told.record.call;
	struct frame *frame = &t->frames[0];

	c->enter = frame->enter;
	c->leave = now;
	c->args[0] = frame->args[0];
	c->args[1] = frame->args[1];
	c->args[2] = frame->args[2];
	c->args[3] = frame->args[3];
	c->ret = ret;
	c->function = frame->function;
	c->has_returned = 1;
}

INLINE void fill_block(struct task *t, u64 ret)
{
	struct frame *frame = &t->frames[t->depth & 7];

	t->block.args[0] = frame->args[0];
	t->block.args[1] = frame->args[1];
	t->block.ret = ret;
	t->block.function = frame->function;
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

/* What is done to a block by a function that uses it so. */
#define ACTION(use, adds)                                                         \
	((adds) ? ADD : (use) == BLOCK_BY_STAMP || (use) == BLOCKS_BY_STAMP ? RESTORE : DELETE)

/* A block, as it is told; of a stack of calls, the arguments of the one that has called for it. */
INLINE void keep_block(struct task *t, const int use, const int adds)
{
	struct block *b = &t->block;
	struct touch *k = &t->told.record.touch;
	const u8 *first = b->pages, *second = b->pages + PAGE_STRUCT_SIZE;
	const u64 own = 1 - is_any(b->outer ^ NO_FUNCTION);

	k->args[0] = b->outer_args[0] ^ ((b->outer_args[0] ^ b->args[0]) & -own);
	k->args[1] = b->outer_args[1] ^ ((b->outer_args[1] ^ b->args[1]) & -own);
	k->ret = b->ret;
	k->pfn = b->pfn;
	k->key = b->key;
	k->private = ACTION(use, adds) == RESTORE ? b->stamp : *(u64 *)(first + PRIVATE_OFFSET);
	k->flags = *(u64 *)(first + FLAGS_OFFSET);
	k->compound = *(u64 *)(first + COMPOUND_OFFSET);
	k->compound_behind = *(u64 *)(second + COMPOUND_OFFSET);
	k->refcount = REFS(first, 0);
	k->page_type = *(u32 *)(first + PAGE_TYPE_OFFSET);
	k->order = b->order;
	k->looked = b->looked;
	k->unread = b->unread;
	k->zeros = b->zeros;
	k->ones = b->ones;
	k->odd = b->odd | -is_any(b->odd >> 32);
	k->before = b->before;
	k->after = b->after;
	k->function = b->function;
	k->outer = b->outer;
	k->as_folio = use == BLOCK_BY_STAMP && (b->args[1] & 0xff);
	k->compound_order = *(u64 *)(second + FLAGS_OFFSET);
}

#if KINDS
/* The order of the block by the arithmetic of the function that has called for it. */
INLINE u32 order_asked(struct task *t, const int use, const int adds)
{
	struct block *b = &t->block;
	u64 first, left, known;

	if (use == BLOCKS_OF_PAGES || use == BLOCKS_BY_STAMP)
		return t->range.order;
	if (use == BLOCK_BY_STAMP) {
		first = b->outer_args[0] >> PAGE_SHIFT_BITS;
		known = 1 - is_any(b->outer ^ RESTORE_PAGES);
	} else if (adds && use != BLOCK_OF_FOLIO && use != BLOCKS_OF_PHYS) {
		first = pfn_of(b->outer_args[0]);
		known = 1 - is_any(b->outer ^ PRESERVE_PAGES);
	} else {
		return NO_ORDER;
	}
	left = first + b->outer_args[1] - b->pfn;
	known &= is_any(left) & (1 - is_any(left >> 52));
	left = 1 ^ ((1 ^ left) & -known);

	return NO_ORDER ^ ((NO_ORDER ^ order_at(b->pfn, left)) & -known);
}

/* How many borders lie at or below an address. */
INLINE u32 place_of(struct places *p, u64 phys)
{
	u32 place = 0;

	phys &= ~0ULL >> 1;
#pragma unroll
	for (int step = PLACES / 2; step; step /= 2)
		place += step * (1 - LESS(phys, p->border[(place + step - 1) & (PLACES - 1)]));

	return place & (PLACES - 1);
}

/*
 * The refcounts of a block, as its kind has them, and what else its first page says; 1 if there
 * is something about them that no healthy block has.
 */
INLINE u64 describe_pages(struct task *t, u32 order)
{
	struct block *b = &t->block;
	struct block_kind *k = &t->block_kind;
	u8 *second_page = b->pages + PAGE_STRUCT_SIZE;
	const u64 looked = b->looked, some = is_any(looked);
	const u64 seen = is_any(looked | b->unread), tails = looked - some;
	const u64 refs = REFS(b->pages, 0), negative = refs >> 31;
	const u64 compound = *(u64 *)(b->pages + COMPOUND_OFFSET);
	const u64 leads = *(u64 *)(second_page + COMPOUND_OFFSET);
	const u64 head = *(u64 *)(b->pages + FLAGS_OFFSET) >> HEAD_BIT & 1;
	const u64 behind = *(u64 *)(second_page + FLAGS_OFFSET) & 0xff;
	const u64 word = *(u32 *)(b->pages + PAGE_TYPE_OFFSET);
	u64 zeros = b->zeros, ones = b->ones, all_zeros, no_zeros, all_ones, sampled, odd;

	/* Without the first page, which may have changed in between. */
	zeros -= some & IS_ZERO(refs) & is_any(zeros);
	zeros -= LESS(tails, zeros);
	ones -= some & IS_ZERO(refs ^ 1) & is_any(ones);
	ones -= LESS(tails - zeros, ones);
	all_zeros = 1 - is_any(zeros ^ tails);
	no_zeros = 1 - is_any(zeros);
	all_ones = 1 - is_any(ones ^ tails);
	sampled = LESS(looked + b->unread, b->own & -LESS(order, 64));
	k->pattern = (all_zeros * PATTERN_ZEROS | no_zeros * PATTERN_NO_ZEROS |
		      all_ones * PATTERN_ONES | some * PATTERN_LOOKED |
		      is_any(b->unread) * PATTERN_UNREAD | sampled * PATTERN_SAMPLED) & -seen;
	k->head = (is_any(refs) + is_any(refs >> 1)) & -(1 - negative) & -seen;
	k->page_type = word & -(word >> 31) & -seen;
	k->compound = (head * COMPOUND_HEAD | (compound & 1) * COMPOUND_TAIL |
		       (leads & 1) * COMPOUND_MORE |
		       (1 - is_any(leads ^ 1 ^ page_at(b->pfn))) * COMPOUND_OWN) & -seen;
	k->compound_order = behind & -(head & (1 ^ (compound & 1)) & seen);

	odd = 1 - (all_zeros | (no_zeros & all_ones));
	odd |= is_any(b->unread) | (compound & 1) | (1 - is_any(refs)) | negative;
	odd |= head & is_any(behind ^ order);
	odd |= word >> 31 & is_any(word >> 24 ^ 0xff);

	return odd & seen;
}

/* The kind of a block, and whether no healthy call does that. */
INLINE void describe_block(struct task *t, struct places *p, const int use, const int adds)
{
	const int action = ACTION(use, adds);
	struct block *b = &t->block;
	struct block_kind *k = &t->block_kind;
	u64 plain = b->key & ~0ULL >> (64 - STORED_BITS), type = 0;
	u64 phys, ret, failed, odd, apart;
	u32 order, first, last, asked;

#if TYPE_SHIFT < 64
	plain &= ~(1ULL << TYPE_SHIFT);
#endif
	if (action == RESTORE) {
		order = NO_ORDER ^ ((NO_ORDER ^ b->order) & -LESS(b->order, 64));
		phys = b->pfn << PAGE_SHIFT_BITS;
#if STAMP_TYPE_SHIFT < 64
		type = b->stamp >> STAMP_TYPE_SHIFT & 1;
#endif
		ret = is_any(b->ret);
		failed = 1 - ret;
		odd = 1 - LESS(order, 64);
	} else {
		order = (ORDER_0_LOG2 - highest_bit(plain)) & 0xff;
		order |= NO_ORDER & (is_any(plain) - 1);
		phys = plain << ((order + PAGE_SHIFT_BITS) & 63);
#if TYPE_SHIFT < 64
		type = b->key >> TYPE_SHIFT & 1;
#endif
		ret = (s64)(s32)b->ret;
		failed = ret >> 63;
		odd = 1 - is_any(b->before ^ (adds ? BIT_SET : BIT_CLEAR));
	}
	asked = order_asked(t, use, adds);
	first = place_of(p, phys);
	last = place_of(p, phys + (1ULL << ((order + PAGE_SHIFT_BITS) & 63)) - 1);
	k->client = t->client;
	k->ret = ret;
	k->function = b->function;
	k->outer = b->outer;
	k->as_folio = is_any(b->args[1] & 0xff) & (use == BLOCK_BY_STAMP);
	k->order = order;
	k->type = type;
	k->asked = asked;
	k->before = b->before;
	k->after = b->after;
	k->first = first;
	k->last = last;
	odd |= describe_pages(t, order);
	odd |= failed | is_any(first ^ last) | (1 - (p->ordinary[first] & 1));
	t->touched[action] += 1ULL << (order & 63) & -LESS(order, 64);
	t->told.record.call.blocks++;
	/* The kernel has cut it off elsewhere: where, and what lies behind it, is in no kind. */
	apart = is_any(asked ^ NO_ORDER) & is_any(asked ^ order) & is_any(order ^ NO_ORDER);
	t->apart |= apart;
	t->whole |= apart | odd;
}

INLINE void count_block(struct task *t)
{
	struct sum *sum = block_kinds.lookup(&t->block_kind);

	if (!sum) {
		block_kinds.insert(&t->block_kind, &t->told);
		sum = block_kinds.lookup(&t->block_kind);
	}
	if (sum)
		__sync_fetch_and_add(&sum->count, 1);
	else
		t->lost++;
}

INLINE void count_call(struct task *t)
{
	struct sum *sum = call_kinds.lookup(&t->call_kind);

	if (!sum) {
		call_kinds.insert(&t->call_kind, &t->told);
		sum = call_kinds.lookup(&t->call_kind);
	}
	if (sum) {
		__sync_fetch_and_add(&sum->count, 1);
		__sync_fetch_and_add(&sum->pages, t->told.record.call.pages);
	} else {
		t->lost++;
	}
}

/*
 * What no healthy call does is told by itself, as long as there is room. 0: there was none, and it
 * is to be counted; if no kind says all of it, it is lost.
 */
INLINE u64 told_whole(struct task *t)
{
	if (!output(t))
		return 1;
	t->lost += t->apart;

	return t->apart;
}

INLINE void tell_block(struct task *t, struct places *p, const int use, const int adds)
{
	/* Other trees have keys that do not stand for blocks. */
	if (ACTION(use, adds) != RESTORE && t->block.order == NO_ORDER)
		return;
	describe_block(t, p, use, adds);
#if MIN_ORDER
	if (t->block_kind.order < MIN_ORDER)
		return;
	t->high = 1;
#endif
	t->made++;
	keep_block(t, use, adds);
	t->told.record.call.has_block = 1;
	if (!t->whole || !told_whole(t))
		count_block(t);
	t->told.record.call.has_block = 0;
}

INLINE void tell_call(struct task *t, u64 ret, const int is_pointer, u64 pages)
{
	struct call_kind *k = &t->call_kind;
	struct call *c = &t->told.record.call;
	const u64 us = (c->leave - c->enter) / 1000;
	const u64 failed = is_pointer ? 1 - is_any(ret) : (u64)(s64)(s32)ret >> 63;

#if MIN_ORDER
	if (!failed && !t->high)
		return;
#endif
	c->pages = pages;
	k->client = t->client;
	k->ret = is_pointer ? is_any(ret) : (s64)(s32)ret;
	k->function = c->function;
	k->latency = is_any(us) + highest_bit(us);
	k->touched = is_any(c->blocks);
	t->made++;
	if ((failed | t->whole) && told_whole(t))
		return;
	count_call(t);
}
#else
INLINE void tell_block(struct task *t, struct places *p, const int use, const int adds)
{
	t->made++;
	if (t->told.record.call.has_block)
		tell_record(t);
	keep_block(t, use, adds);
	t->told.record.call.has_block = 1;
}

INLINE void tell_call(struct task *t, u64 ret, const int is_pointer, u64 pages)
{
	t->made++;
	tell_record(t);
}
#endif

INLINE void count_told(struct task *t)
{
	count(MADE, t->made);
	count(LOST, t->lost);
	t->made = 0;
	t->lost = 0;
}

INLINE struct places *known_places(void)
{
#if KINDS
	int zero = 0;

	return places.lookup(&zero);
#else
	return 0;
#endif
}

INLINE void block_at_return(struct task *t, int use, int adds, u64 now, u64 ret)
{
	struct block *block = &t->block;
	struct places *p = known_places();

	if (t->muted || (KINDS && !p))
		return;
	fill_block(t, ret);
	if (use == BLOCK_BY_STAMP) {
		if (block->order < 64)
			look(t);
	} else if (use == BLOCK_OF_FOLIO) {
		/* As in range_at_return(). */
		if ((s32)ret < 0)
			return;
		block->after = bit_in_bitmaps(block->pfn, block->order);
	} else if (block->key) {
		block->after = bit_in_tree(block->key);
	}
	tell_block(t, p, use, adds);
	count_told(t);
}

/*
 * Tell of the next blocks of a range; one window is looked at in each step, of all blocks one
 * after the other: a loop in a loop would be too much for the verifier.
 */
INLINE void
tell(struct task *t, struct places *p, int use, int adds, u64 ret, const int looks, const u32 steps)
{
	struct named_range *r = &t->range;

	for (u32 i = 0; looks ? GOES_ON(i, steps) : i < steps; i++) {
		asm volatile("" : : : "memory");
		if (r->pfn == r->end)
			break;
		if (looks) {
			if (r->windows++ == WINDOWS_OF_RANGE)
				break;
			look_at_window(t);
			if (!(r->page >> (r->looks & 63)))
				continue;
		}
		tell_block(t, p, use, adds);
		r->block++;
		r->pfn += 1ULL << r->order;
		/* Where a block cannot be restored, the kernel gives up. */
		if (use == BLOCKS_BY_STAMP)
			r->pfn += (r->end - r->pfn) & (is_any(t->block.ret) - 1);
		asm volatile("" : : : "memory");
		begin_block(t, use, ret);
	}
	asm volatile("" : : : "memory");
}

/*
 * Tell of all blocks of a range, when the call returns that names it. KHO sets and clears bits,
 * and touches no page, so the pages of those that were preserved are what they were before.
 */
INLINE void
range_at_return(struct task *t, int use, int adds, u64 now, u64 ret)
{
	struct named_range *r = &t->range;
	struct places *p = known_places();

	if (t->muted || (KINDS && !p))
		return;
	/* Of restoring, it is a pointer. */
	ret = as_number(t, ret);
	fill_block(t, ret);
	t->block.outer = NO_FUNCTION;
	/* If it fails, KHO undoes what it has done. */
	if (use != BLOCKS_BY_STAMP && (s32)ret < 0)
		return;
	set_range(t, use);
	begin_block(t, use, ret);
	if (adds || use == BLOCKS_BY_STAMP) {
#if MAY_GOTO
		tell(t, p, use, adds, ret, 1, WINDOWS_OF_RANGE);
#else
		tell(t, p, use, adds, ret, 1, WINDOWS_AT_ONCE);
		tell(t, p, use, adds, ret, 1, WINDOWS_AT_ONCE);
#endif
	}
	/* For more there is no time. */
	tell(t, p, use, adds, ret, 0, BLOCKS);
	count_told(t);
	if (r->pfn != r->end)
		count(MISSED, 1);
}

/* The name is told where a block would be. */
INLINE void name_at_return(struct task *t)
{
	if (t->depth || t->muted)
		return;
	if (!KINDS && t->told.record.call.has_block)
		tell_record(t);
	__builtin_memcpy(t->told.record.name, t->name, sizeof(t->name));
}

/* The end of an outermost call. Inner ones are told by what they did to blocks. */
INLINE void end(struct task *t, u64 now, u64 ret, const int is_pointer, u64 asked)
{
	u32 tid = t->told.record.call.tid;

	if (t->depth)
		return;
	if (!t->muted) {
		/* Of restoring, it is a pointer. */
		ret = as_number(t, ret);
		fill_call(t, now, ret);
		tell_call(t, ret, is_pointer, asked);
		count_told(t);
	}
	tasks.delete(&tid);
}

/* How many pages the outermost call was asked for, by one of its arguments, or what it has done. */
#if KINDS
#define PAGES_COUNTED(i) (t->frames[0].args[i])
#define PAGES_OF_ORDER(i)                                                         \
	(1ULL << ((t->frames[0].args[i] | -is_any(t->frames[0].args[i] & 0xc0)) & 63))
#define PAGES_OF_SIZE(i)                                                          \
	(((t->frames[0].args[i] & -is_any(~t->frames[0].args[i])) +               \
	  (1ULL << PAGE_SHIFT_BITS) - 1) >> PAGE_SHIFT_BITS)
#define PAGES_TOUCHED(action) (t->touched[action])
#else
/* Who is told each call and each block needs nobody to count. */
#define PAGES_COUNTED(i) 0
#define PAGES_OF_ORDER(i) 0
#define PAGES_OF_SIZE(i) 0
#define PAGES_TOUCHED(action) 0
#endif

/*
 * By name of the use, so that functions that touch no block get none of that code.
 */
#define ENTER_NO_BLOCK(t, adds, a, b, c, d)
#define ENTER_NAMED(t, adds, a, b, c, d)                                          \
	bpf_probe_read_kernel_str(t->name, sizeof(t->name), (void *)(a))
#define ENTER_BLOCK_BY_PFN(t, adds, a, b, c, d)                                   \
	block_at_entry(t, BLOCK_BY_PFN, adds, a, b, c, d)
#define ENTER_BLOCK_BY_KEY(t, adds, a, b, c, d)                                   \
	block_at_entry(t, BLOCK_BY_KEY, adds, a, b, c, d)
#define ENTER_BLOCK_BY_STAMP(t, adds, a, b, c, d)                                 \
	block_at_entry(t, BLOCK_BY_STAMP, adds, a, b, c, d)
#define ENTER_BLOCK_OF_FOLIO(t, adds, a, b, c, d)                                 \
	block_at_entry(t, BLOCK_OF_FOLIO, adds, a, b, c, d)
#define ENTER_BLOCKS_OF_PAGES(t, adds, a, b, c, d) range_at_entry(t, BLOCKS_OF_PAGES, a, b)
#define ENTER_BLOCKS_OF_PHYS(t, adds, a, b, c, d) range_at_entry(t, BLOCKS_OF_PHYS, a, b)
#define ENTER_BLOCKS_BY_STAMP(t, adds, a, b, c, d) range_at_entry(t, BLOCKS_BY_STAMP, a, b)

#define LEAVE_NO_BLOCK(t, adds, now, ret)
#define LEAVE_NAMED(t, adds, now, ret) name_at_return(t)
#define LEAVE_BLOCK_BY_PFN(t, adds, now, ret)                                     \
	block_at_return(t, BLOCK_BY_PFN, adds, now, ret)
#define LEAVE_BLOCK_BY_KEY(t, adds, now, ret)                                     \
	block_at_return(t, BLOCK_BY_KEY, adds, now, ret)
#define LEAVE_BLOCK_BY_STAMP(t, adds, now, ret)                                   \
	block_at_return(t, BLOCK_BY_STAMP, adds, now, ret)
#define LEAVE_BLOCK_OF_FOLIO(t, adds, now, ret)                                   \
	block_at_return(t, BLOCK_OF_FOLIO, adds, now, ret)
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

#define AT_RETURN(number, use, adds, ret, is_pointer, asked)                      \
	do {                                                                      \
		const u64 now = bpf_ktime_get_ns();                               \
		struct task *t = leave(number);                                   \
										  \
		if (t) {                                                          \
			LEAVE_##use(t, adds, now, ret);                           \
			end(t, now, ret, is_pointer, asked);                      \
		}                                                                 \
	} while (0)

#define FENTRY(name, number, kind, use, adds, a, b, c, d)                         \
	KFUNC_PROBE(name)                                                         \
	{                                                                         \
		AT_ENTRY(number, kind, use, adds, a, b, c, d);                    \
		return 0;                                                         \
	}

#define FEXIT(name, number, use, adds, ret, is_pointer, asked)                    \
	KRETFUNC_PROBE(name)                                                      \
	{                                                                         \
		AT_RETURN(number, use, adds, ret, is_pointer, asked);             \
		return 0;                                                         \
	}

#define KPROBE(name, number, kind, use, adds, a, b, c, d)                         \
	int enter_##name(struct pt_regs *ctx)                                     \
	{                                                                         \
		AT_ENTRY(number, kind, use, adds, a, b, c, d);                    \
		return 0;                                                         \
	}

#define KRETPROBE(name, number, use, adds, ret, is_pointer, asked)                \
	int leave_##name(struct pt_regs *ctx)                                     \
	{                                                                         \
		AT_RETURN(number, use, adds, ret, is_pointer, asked);             \
		return 0;                                                         \
	}
