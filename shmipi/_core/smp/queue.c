/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "smp/queue.h"
#include "base/step.h"
#include "base/trace.h"

static int coalesced(struct shi_self *self, uint32_t dst, uint32_t index)
{
    shi_count(self, SHI_C_coalesced);
    SHI_TRACE(self, csd_coalesced, dst, index + 1, 0, 0);
    return SHI_PUSH_COALESCED;
}

int shi_queue_push(struct shi_self *self, uint32_t dst, uint32_t index, struct shi_csd *csd)
{
    struct shi_slot *target = shi_slot(self->m, dst);
    uint64_t lock = shi_load_relaxed(&csd->lock) & ~(0xffffull << SHI_CSD_GEN_SHIFT);
    SHI_STEP(self, push);
    /* The call stands in a trace before what its target does, which may be sooner than us. */
    uint64_t stamp = 0;
    if (SHI_TRACING_ANY(self, SHI_TRACE_BIT(queue_push) | SHI_TRACE_BIT(csd_queue_cpu))) {
        stamp = shi_stamp();
        if (SHI_TRACING(self, queue_push))
            shi_trace_write(self, SHI_T_queue_push, dst, index + 1, csd->func, 0, stamp);
    }
    /*
     * The first try is a guess, not a load: polling with an empty queue.  Right or
     * wrong it brings the line in to be written, where a load would bring it in to be
     * read and the swap would have to ask for it again.
     */
    uint64_t w = (uint64_t)SHI_POLLING |
                 (uint64_t)(uint16_t)shi_load_relaxed(&target->generation) << SHI_W_GEN_SHIFT,
             next;
    if (self->sender.behind == dst + 1) {
        /* Where the last one stood behind others this one most likely does: the word as it is. */
        shi_prefetch_write(&target->word);
        w = shi_load_relaxed(&target->word);
    }
    do {
        if (!shi_word_online(w))
            return -ENXIO;
        shi_store_relaxed(&csd->next, shi_word_head(w));
        /* The generation comes from the very word that is swapped: this csd cannot
         * end up with a CPU that took the slot over in between.  Release: who finds it
         * (shi_reap_orphans) finds whose the csd is. */
        shi_store_release(&csd->lock, lock | (uint64_t)shi_word_gen(w) << SHI_CSD_GEN_SHIFT);
        SHI_STEP(self, aim);
        next = (w & SHI_W_LOW) | (uint64_t)(index + 1) << SHI_W_HEAD_SHIFT;
        /* Full: releases the csd's fields to the drain's read-modify-write. */
    } while (!shi_cas_weak_full(&target->word, &w, next));
    SHI_STEP(self, pushed);
    shi_count(self, SHI_C_csd_queued);
    if (SHI_TRACING(self, csd_queue_cpu) && stamp)
        shi_trace_write(self, SHI_T_csd_queue_cpu, dst, index + 1,
                        shi_trace_func(self, csd->func), 0, stamp);
    if (w & SHI_W_ASKED && shi_word_state(w) == SHI_RUNNING) {
        /* Python csds there wait for the interpreter, which will look at the queue:
         * one more needs no kick.  A native one does, whatever it stands behind. */
        if (csd->func & SHI_FUNC_NATIVE && !(w & SHI_W_KICKED))
            return SHI_PUSH_RING;
        return coalesced(self, dst, index);
    }
    self->sender.behind = shi_word_head(w) ? dst + 1 : 0;
    if (shi_word_head(w))
        return coalesced(self, dst, index);
    return shi_word_state(w) == SHI_POLLING ? SHI_PUSH_POLLS : SHI_PUSH_RING;
}

uint32_t shi_queue_grab(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    uint32_t newest = shi_word_head(shi_load_relaxed(&self->slot->word));
    if (newest && newest <= m->ncsds)
        shi_prefetch_write(shi_csd(m, newest - 1)); /* comes along with the word below */
    /*
     * Full, and the acquire side of every push on the list.  PENDING stays for the flow
     * handler, NEED_RESCHED for who schedules.
     */
    uint64_t w = shi_fetch_and_full(&self->slot->word, SHI_W_LOW);
    SHI_STEP(self, drain);
    SHI_TRACE(self, flush, self->id, shi_word_head(w), 0, 0);
    return shi_word_head(w);
}

/*
 * Of a sender that keeps sending the csds are neighbours, taken in turn: after two of them the
 * lines of those before come in while these are looked at, which a walk from link to link
 * would wait for one after the other.  To write: each is unlocked soon.
 */
#define AHEAD 16u

uint32_t shi_queue_read(struct shi_self *self, uint32_t at, uint32_t batch[SHI_QUEUE_BATCH])
{
    const struct shi_machine *m = self->m;
    uint32_t n = 0;
    while (at) {
        uint32_t index = at - 1;
        if (n == SHI_QUEUE_BATCH || !shi_csd_is_ours(self, index))
            return 0;
        uint32_t older = shi_load_relaxed(&shi_csd(m, index)->next);
        batch[n++] = index;
        if (older == index && index >= AHEAD)
            shi_prefetch_write(shi_csd(m, index - AHEAD));
        at = older;
    }
    return n;
}

struct shi_list shi_queue_in_order(struct shi_self *self, uint32_t at)
{
    const struct shi_machine *m = self->m;
    struct shi_list list = { 0, 0, 0 };
    while (at) {
        uint32_t index = at - 1;
        if (!shi_csd_is_ours(self, index) || list.count == m->ncsds) {
            shi_count(self, SHI_C_corrupt);
            shi_store_release(&self->slot->damaged, 1);
            break; /* nothing behind a damaged entry can be believed */
        }
        struct shi_csd *csd = shi_csd(m, index);
        uint32_t older = shi_load_relaxed(&csd->next);
        /* Newest first becomes oldest first: put each before what we have. */
        shi_store_relaxed(&csd->next, list.head);
        list.head = at;
        if (!list.tail)
            list.tail = at;
        list.count++;
        at = older;
    }
    return list;
}

void shi_list_append(const struct shi_machine *m, struct shi_list *list, uint32_t index)
{
    shi_store_relaxed(&shi_csd(m, index)->next, 0);
    if (list->tail)
        shi_store_relaxed(&shi_csd(m, list->tail - 1)->next, index + 1);
    else
        list->head = index + 1;
    list->tail = index + 1;
    list->count++;
}

uint32_t shi_list_pop(struct shi_self *self, struct shi_list *list)
{
    if (!list->head)
        return UINT32_MAX;
    uint32_t index = list->head - 1;
    if (!list->count || !shi_csd_is_ours(self, index)) {
        shi_count(self, SHI_C_corrupt);
        shi_store_release(&self->slot->damaged, 1);
        *list = (struct shi_list){ 0, 0, 0 };
        return UINT32_MAX;
    }
    list->head = shi_load_relaxed(&shi_csd(self->m, index)->next);
    list->count--;
    if (!list->head)
        *list = (struct shi_list){ 0, 0, 0 };
    return index;
}

/* ---- do they hold together? ------------------------------------------------------- */

/* Follow links from `at`: how many csds, the last in *tail; -EBADMSG for one that is not this
 * CPU's, and for a circle: longer than there are csds. */
static int follow(const struct shi_machine *m, uint32_t cpu, uint16_t gen, uint32_t at,
                  uint32_t *tail)
{
    uint32_t count = 0;
    for (*tail = 0; at; at = shi_load_relaxed(&shi_csd(m, at - 1)->next)) {
        if (!shi_csd_is_of(m, cpu, gen, at - 1) || count == m->ncsds)
            return -EBADMSG;
        *tail = at;
        count++;
    }
    return (int)count;
}

int shi_queue_valid(const struct shi_machine *m, uint32_t cpu, uint64_t word)
{
    uint32_t tail;
    return follow(m, cpu, shi_word_gen(word), shi_word_head(word), &tail);
}

int shi_list_valid(const struct shi_self *self, const struct shi_list *list)
{
    uint32_t tail;
    int count = follow(self->m, self->id, self->gen, list->head, &tail);
    if (count < 0 || (uint32_t)count != list->count || tail != list->tail)
        return -EBADMSG;
    return count;
}
