// SPDX-License-Identifier: GPL-2.0-only
/*
 * kho_trace - report each call of KHO, and each block that it touches
 *
 * Compiled by bcc. It gathers facts and decides nothing. The only kernel header is
 * the one with struct pt_regs: what is known of this kernel is passed in.
 *
 * sizes, offsets and addresses, in bytes unless they say otherwise:
 *   VMEMMAP, PAGE_STRUCT_SIZE, REFCOUNT_OFFSET, PRIVATE_OFFSET  of struct page
 *   PAGE_SHIFT_BITS, DIRECT_MAP          the page size, and where phys 0 is mapped
 *   TREE, ROOT_OFFSET                    &kho_out.radix_tree and .root in it
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
 *   arguments       how many it has
 *   kind            bit of ONLY
 *   use             enum block_use
 *   adds            whether it adds the block: then its refcounts are looked at
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

struct task {
	u32 depth;
	u32 muted;		/* nobody asked for what this task is doing */
	struct frame frames[8];	/* MAX_DEPTH, and what an index of 3 bits reaches */
	union record outer;	/* its .call */
	union record inner;	/* its .block, one at a time */
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

#define LEAVE_NO_BLOCK(t, now, ret)
#define LEAVE_NAMED(t, now, ret)
#define LEAVE_BLOCK_BY_PFN(t, now, ret) block_at_return(t, BLOCK_BY_PFN, now, ret)
#define LEAVE_BLOCK_BY_KEY(t, now, ret) block_at_return(t, BLOCK_BY_KEY, now, ret)
#define LEAVE_BLOCK_BY_STAMP(t, now, ret) block_at_return(t, BLOCK_BY_STAMP, now, ret)

#define AT_ENTRY(number, kind, use, adds, ...) AT_ENTRY_(number, kind, use, adds, __VA_ARGS__)
#define AT_ENTRY_(number, kind, use, adds, a, b, c, d)                            \
	do {                                                                      \
		struct task *t = enter(ctx, number, kind, a, b, c, d);            \
										  \
		if (t) {                                                          \
			ENTER_##use(t, adds, a, b, c, d);                         \
		}                                                                 \
	} while (0)

#define AT_RETURN(number, use, ret)                                               \
	do {                                                                      \
		const u64 now = bpf_ktime_get_ns();                               \
		struct task *t = leave(number);                                   \
										  \
		if (t) {                                                          \
			LEAVE_##use(t, now, ret);                                 \
			end(t, now, ret);                                         \
		}                                                                 \
	} while (0)

#define CTX_1 ctx[0], 0, 0, 0
#define CTX_2 ctx[0], ctx[1], 0, 0
#define CTX_3 ctx[0], ctx[1], ctx[2], 0
#define CTX_4 ctx[0], ctx[1], ctx[2], ctx[3]

#define REGS_1 PT_REGS_PARM1(ctx), 0, 0, 0
#define REGS_2 PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0, 0
#define REGS_3 PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), PT_REGS_PARM3(ctx), 0
#define REGS_4 PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), PT_REGS_PARM3(ctx), PT_REGS_PARM4(ctx)

#define FENTRY(name, number, arguments, kind, use, adds)                          \
	KFUNC_PROBE(name)                                                         \
	{                                                                         \
		AT_ENTRY(number, kind, use, adds, CTX_##arguments);               \
		return 0;                                                         \
	}

#define FEXIT(name, number, use, ret)                                             \
	KRETFUNC_PROBE(name)                                                      \
	{                                                                         \
		AT_RETURN(number, use, ret);                                      \
		return 0;                                                         \
	}

#define KPROBE(name, number, arguments, kind, use, adds)                          \
	int enter_##name(struct pt_regs *ctx)                                     \
	{                                                                         \
		AT_ENTRY(number, kind, use, adds, REGS_##arguments);              \
		return 0;                                                         \
	}

#define KRETPROBE(name, number, use)                                              \
	int leave_##name(struct pt_regs *ctx)                                     \
	{                                                                         \
		AT_RETURN(number, use, PT_REGS_RC(ctx));                          \
		return 0;                                                         \
	}
