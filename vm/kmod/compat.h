/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What older kernels lack, or have otherwise
 *
 * kho_exercise.c is written for the newest kernel. The Makefile looks into the
 * headers of the kernel that it builds for, and defines:
 *
 *   HAVE_KHO_CHUNKS      a header has the structures of preserved vmalloc areas.
 *   HAVE_KHO_UNPRESERVE  what was preserved can be unpreserved. Up to 6.18, KHO only
 *                        drops everything, when its finalization is aborted.
 *   HAVE_KHO_NOTIFIERS   a subtree is an FDT, and a notifier adds it when KHO is
 *                        finalized: up to 6.18. Later a subtree is any blob, and is
 *                        added at any time.
 */

#ifndef KHO_EXERCISE_COMPAT_H
#define KHO_EXERCISE_COMPAT_H

#include <linux/kexec_handover.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/slab.h>
#include <linux/string.h>

#ifdef HAVE_KHO_CHUNKS
#include <linux/kho/abi/kexec_handover.h>
#else
struct kho_vmalloc_chunk {
	struct {
		DECLARE_KHOSER_PTR(next, struct kho_vmalloc_chunk *);
	} hdr;
	phys_addr_t phys[PAGE_SIZE / sizeof(phys_addr_t) - 1];
};
#endif

#ifdef HAVE_KHO_UNPRESERVE
#define CAN_UNPRESERVE true
#else
#define CAN_UNPRESERVE false

/* What the module lets go stays preserved. */

static inline void kho_unpreserve_pages(struct page *page, unsigned long nr_pages)
{
}

static inline void kho_unpreserve_folio(struct folio *folio)
{
}

static inline void kho_unpreserve_vmalloc(struct kho_vmalloc *preservation)
{
}

static inline void *kho_alloc_preserve(size_t size)
{
	struct folio *folio = folio_alloc(GFP_KERNEL | __GFP_ZERO, get_order(size));
	int err;

	if (!folio)
		return ERR_PTR(-ENOMEM);

	err = kho_preserve_folio(folio);
	if (!err)
		return folio_address(folio);
	folio_put(folio);

	return ERR_PTR(err);
}

/* Of memory in which nobody is interested any more. */
static inline void kho_unpreserve_free(void *memory)
{
	folio_put(virt_to_folio(memory));
}
#endif

/*
 * Subtrees
 *
 * A blob is one preserved page. prepare_blob() makes it something that this kernel
 * takes for a subtree; publish_blob() takes it as it is. publish_record() and
 * find_record() are about a preserved page that may hold anything.
 */
#ifndef HAVE_KHO_NOTIFIERS

static inline void prepare_blob(void *blob)
{
}

static inline int publish_blob(const char *name, void *blob)
{
	return kho_add_subtree(name, blob, PAGE_SIZE);
}

static inline void withdraw_blob(void *blob)
{
	kho_remove_subtree(blob);
}

static inline int find_blob(const char *name, phys_addr_t *phys)
{
	return kho_retrieve_subtree(name, phys, NULL);
}

static inline int publish_record(const char *name, void *record)
{
	return kho_add_subtree(name, record, PAGE_SIZE);
}

static inline int find_record(const char *name, phys_addr_t *phys)
{
	return kho_retrieve_subtree(name, phys, NULL);
}

static inline int start_publishing(void)
{
	return 0;
}

static inline void stop_publishing(void)
{
}

#else /* HAVE_KHO_NOTIFIERS */

/* An FDT with one property. Modules cannot call libfdt. */
struct one_property {
	__be32 magic;
	__be32 size;
	__be32 structs;			/* offsets: of root */
	__be32 strings;			/* of name */
	__be32 reservations;		/* of no_reservation */
	__be32 version;
	__be32 compatible_version;
	__be32 processor;
	__be32 strings_size;
	__be32 structs_size;
	__be64 no_reservation[2];
	__be32 root;
	__be32 root_name;
	__be32 property;
	__be32 value_size;
	__be32 value_name;
	u64 value;			/* in the processor's order, as KHO has it */
	__be32 end_of_root;
	__be32 end;
	char name[8];
} __packed;

#define OFFSET(member) cpu_to_be32(offsetof(struct one_property, member))

static const struct one_property one_property = {
	.magic = cpu_to_be32(0xd00dfeed),
	.size = cpu_to_be32(sizeof(struct one_property)),
	.structs = OFFSET(root),
	.strings = OFFSET(name),
	.reservations = OFFSET(no_reservation),
	.version = cpu_to_be32(17),
	.compatible_version = cpu_to_be32(16),
	.strings_size = cpu_to_be32(sizeof_field(struct one_property, name)),
	.structs_size = cpu_to_be32(offsetof(struct one_property, name) -
				    offsetof(struct one_property, root)),
	.root = cpu_to_be32(1),
	.property = cpu_to_be32(3),
	.value_size = cpu_to_be32(sizeof(u64)),
	.end_of_root = cpu_to_be32(2),
	.end = cpu_to_be32(9),
	.name = "address",
};

static void describe(void *blob, phys_addr_t phys)
{
	struct one_property *fdt = blob;

	*fdt = one_property;
	fdt->value = phys;
}

static void prepare_blob(void *blob)
{
	describe(blob, virt_to_phys(blob));
}

struct subtree {
	struct list_head node;
	char name[48];
	void *blob;
};

static DEFINE_MUTEX(subtrees_lock);
static LIST_HEAD(subtrees);

static int publish_blob(const char *name, void *blob)
{
	struct subtree *s = kzalloc(sizeof(*s), GFP_KERNEL);

	if (!s)
		return -ENOMEM;
	strscpy(s->name, name);
	s->blob = blob;

	guard(mutex)(&subtrees_lock);
	list_add_tail(&s->node, &subtrees);

	return 0;
}

/* Too late for the FDT of a KHO that is finalized. */
static void withdraw_blob(void *blob)
{
	struct subtree *s, *next;

	guard(mutex)(&subtrees_lock);

	list_for_each_entry_safe(s, next, &subtrees, node) {
		if (!blob || s->blob == blob) {
			list_del(&s->node);
			kfree(s);
		}
	}
}

static int find_blob(const char *name, phys_addr_t *phys)
{
	return kho_retrieve_subtree(name, phys);
}

static int publish_record(const char *name, void *record)
{
	void *fdt = kho_alloc_preserve(PAGE_SIZE);
	int err;

	if (IS_ERR(fdt))
		return PTR_ERR(fdt);
	describe(fdt, virt_to_phys(record));

	err = publish_blob(name, fdt);
	if (err)
		kho_unpreserve_free(fdt);

	return err;
}

/* Keeps the FDT: KHO's debugfs shows it. */
static int find_record(const char *name, phys_addr_t *phys)
{
	struct one_property found, wanted = one_property;
	struct folio *folio;
	phys_addr_t fdt;
	int err;

	err = kho_retrieve_subtree(name, &fdt);
	if (err)
		return err;
	folio = kho_restore_folio(fdt);
	if (!folio)
		return -EIO;

	found = *(struct one_property *)folio_address(folio);
	wanted.value = found.value;
	if (memcmp(&found, &wanted, sizeof(found)))
		return -EPROTO;
	*phys = found.value;

	return 0;
}

/* All that this kernel has preserved is preserved no more. */
static void forget(void);

static int finalized_or_aborted(struct notifier_block *nb, unsigned long event,
				void *serialization)
{
	struct subtree *s;
	int err = 0;

	if (event == KEXEC_KHO_ABORT) {
		withdraw_blob(NULL);
		forget();
		return NOTIFY_OK;
	}

	guard(mutex)(&subtrees_lock);

	list_for_each_entry(s, &subtrees, node)
		err = err ?: kho_add_subtree(serialization, s->name, s->blob);

	return notifier_from_errno(err);
}

static struct notifier_block finalization = {
	.notifier_call = finalized_or_aborted,
};

static int start_publishing(void)
{
	return register_kho_notifier(&finalization);
}

static void stop_publishing(void)
{
	unregister_kho_notifier(&finalization);
}

#endif /* HAVE_KHO_NOTIFIERS */

#endif
