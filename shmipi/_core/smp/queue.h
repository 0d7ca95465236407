/* SPDX-License-Identifier: MIT */
/*
 * call_single_queue: one lock-free list per CPU for every kind of work, any number of
 * pushers, drained whole by its owner (include/linux/llist.h has the same shape).
 *
 * The list head shares one 64-bit word with the state of the CPU.  So "is it online",
 * "was the queue empty" and "how must it be rung" are answered by the one
 * compare-and-swap that queues the csd, and a CPU cannot go to sleep, start a task or
 * go offline in between.
 */
#ifndef SHI_QUEUE_H
#define SHI_QUEUE_H

#include "base/machine.h"

enum shi_pushed {
    SHI_PUSH_COALESCED = 0, /* the queue was not empty: its first pusher rings */
    SHI_PUSH_RING = 1,      /* send the interrupt through the chip */
    SHI_PUSH_POLLS = 2,     /* the target polls: alone it needs none, the store was it */
};

/* Queue a locked csd (index through all slots).  enum shi_pushed, or -ENXIO. */
int shi_queue_push(struct shi_self *self, uint32_t dst, uint32_t index, struct shi_csd *csd);

/* Take everything off the own queue: index + 1 of the newest csd, 0 when empty. */
uint32_t shi_queue_grab(struct shi_self *self);
/* The indices of what was grabbed, newest first: how many, or 0 when there are more than
 * SHI_QUEUE_BATCH, or a damaged one among them: shi_queue_in_order then. */
#define SHI_QUEUE_BATCH 64u /* all that one sender of calls that nobody waits for has */
uint32_t shi_queue_read(struct shi_self *self, uint32_t newest,
                        uint32_t batch[SHI_QUEUE_BATCH]);
/* What was grabbed, oldest first; damaged entries are dropped and counted. */
struct shi_list shi_queue_in_order(struct shi_self *self, uint32_t newest);

/* Lists that the owner keeps of csds it has taken. */
void shi_list_append(const struct shi_machine *m, struct shi_list *list, uint32_t index);
/* UINT32_MAX when empty (or damaged: the rest is dropped and counted). */
uint32_t shi_list_pop(struct shi_self *self, struct shi_list *list);

/*
 * For tests, and for the reaper of a machine with steps: do all links hold together?  How many
 * csds, or -EBADMSG.  Of a queue that nobody drains meanwhile, `word` being its CPU's; of a
 * list, by its owner.
 */
int shi_queue_valid(const struct shi_machine *m, uint32_t cpu, uint64_t word);
int shi_list_valid(const struct shi_self *self, const struct shi_list *list);

/* Is `index` a csd that exists, is locked, and is addressed to this process of this CPU? */
static inline bool shi_csd_is_of(const struct shi_machine *m, uint32_t cpu, uint16_t gen,
                                 uint32_t index)
{
    if (index >= m->ncsds)
        return false;
    uint32_t owner = index >> m->csd_shift;
    if ((index & (m->csds_per_slot - 1)) >= shi_load_relaxed(&shi_slot(m, owner)->csd_top))
        return false;
    const struct shi_csd *csd = shi_csd(m, index);
    uint64_t lock = shi_load_acquire(&csd->lock);
    return (lock & SHI_CSD_LOCK) && (uint16_t)(lock >> SHI_CSD_DST_SHIFT) == cpu &&
           (uint16_t)(lock >> SHI_CSD_GEN_SHIFT) == gen && csd->src == owner;
}

static inline bool shi_csd_is_ours(const struct shi_self *self, uint32_t index)
{
    return shi_csd_is_of(self->m, self->id, self->gen, index);
}

#endif
