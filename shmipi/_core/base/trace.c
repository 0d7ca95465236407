/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <string.h>

#include "base/trace.h"

const char *const shi_trace_names[SHI_T_COUNT] = { "none",
#define X(name) #name,
                                                   SHI_TRACE_EVENTS(X)
#undef X
};

_Thread_local struct shi_trace_said shi_trace_thread;

/* ---- where they are --------------------------------------------------------------- */

static bool is_size(uint64_t records)
{
    return records >= 2 && records <= SHI_TRACE_MOST && !(records & (records - 1));
}

uint64_t shi_trace_bytes(const struct shi_machine *m, uint32_t records)
{
    if (!is_size(records))
        return 0;
    return sizeof(struct shi_trace_area) +
           m->nslots *
               (sizeof(struct shi_trace_head) + records * sizeof(struct shi_trace_record));
}

/* From one look at where they are: they may be replaced at any moment. */
static struct shi_trace_area *area_at(const struct shi_machine *m, uint64_t at)
{
    const struct shi_trace_area *area = shi_user_at(m, at, sizeof(struct shi_trace_area));
    uint64_t bytes = area ? shi_trace_bytes(m, area->records) : 0;
    return bytes ? shi_user_at(m, at, bytes) : NULL;
}

struct shi_trace_area *shi_trace_area(const struct shi_machine *m)
{
    /* Acquire pairs with the release of who has made the rings. */
    return area_at(m, shi_load_acquire(&m->header->users[SHI_USER_trace]));
}

struct shi_trace_head *shi_trace_head(const struct shi_trace_area *area, uint32_t id)
{
    return (struct shi_trace_head *)(area + 1) + id;
}

struct shi_trace_record *shi_trace_ring(const struct shi_machine *m,
                                        const struct shi_trace_area *area, uint32_t id)
{
    return (struct shi_trace_record *)shi_trace_head(area, m->nslots) +
           (uint64_t)id * area->records;
}

/* ---- writing ---------------------------------------------------------------------- */

/* Whoever had this slot before has finished what it ever will. */
static void take_over(struct shi_self *self, struct shi_trace_head *head)
{
    uint32_t owner = self->gen + 1u;
    if (shi_load_relaxed(&head->owner) == owner)
        return;
    shi_store_relaxed(&head->born, shi_load_relaxed(&head->head));
    shi_store_release(&head->owner, owner);
}

/* A signal's handler may come in between and do the same. */
static bool find_ring(struct shi_self *self, uint64_t at)
{
    struct shi_trace_area *area = area_at(self->m, at);
    if (!area)
        return false;
    self->ring.area = area;
    self->ring.head = shi_trace_head(area, self->id);
    self->ring.records = shi_trace_ring(self->m, area, self->id);
    self->ring.mask = area->records - 1;
    take_over(self, self->ring.head);
    shi_signal_fence();
    self->ring.at = at;
    return true;
}

static uint8_t flags_of(const struct shi_self *self)
{
    if (self->host)
        return SHI_TF_TASK;
    return (uint8_t)((self->irqs_off || self->in_core ? SHI_TF_IRQS_OFF : 0) |
                     (self->in_irq ? SHI_TF_HARDIRQ : 0) |
                     (shi_in_serving_softirq(self) ? SHI_TF_SOFTIRQ : 0) |
                     (self->in_nmi ? SHI_TF_NMI : 0) |
                     (self->in_task || self->current ? SHI_TF_TASK : 0));
}

void shi_trace_write(struct shi_self *self, enum shi_trace_event event, uint32_t cpu,
                     uint32_t csd, uint32_t func, uint32_t arg, uint64_t stamp)
{
    if (self->left)
        return; /* the ring is another's by now */
    /* Acquire pairs with the release of who has made the rings. */
    uint64_t area = shi_load_acquire(&self->m->header->users[SHI_USER_trace]), at;
    if (__builtin_expect(!area || area != self->ring.at, 0) && !find_ring(self, area))
        return;
    struct shi_trace_head *head = self->ring.head;
    if (__builtin_expect(shi_load_relaxed(&self->ring.area->lossless), 0)) {
        at = shi_load_relaxed(&head->head);
        do {
            /* Acquire pairs with the reader's release: it has copied what stood there. */
            if (at - shi_load_acquire(&head->tail) > self->ring.mask) {
                shi_fetch_add_relaxed(&head->dropped, 1);
                return;
            }
        } while (!(self->host ? shi_cas_weak_full(&head->head, &at, at + 1)
                              : shi_local_cas(&head->head, &at, at + 1)));
    } else if (self->host) {
        at = shi_fetch_add_relaxed(&head->head, 1); /* its threads share the ring */
    } else {
        at = shi_local_fetch_add(&head->head, 1); /* the kick handler may trace in between */
    }
    struct shi_trace_record *r = &self->ring.records[at & self->ring.mask];
    /* A number that no reader looks for here, before anything of the record changes: who
     * copies the old one meanwhile sees it when he looks again. */
    shi_store_relaxed(&r->seq, (uint32_t)at);
    shi_fence_release();
    r->stamp = stamp ? stamp : shi_stamp();
    r->event = (uint8_t)event;
    r->flags = flags_of(self);
    r->cpu = (uint16_t)cpu;
    r->csd = csd;
    r->func = func;
    r->arg = arg;
    r->site = shi_trace_said(self)->site;
    /* Release pairs with the reader's acquire: whole. */
    shi_store_release(&r->seq, (uint32_t)at + 1);
}

void shi_trace_mask(struct shi_self *self, const uint32_t *cpus, uint32_t n, uint32_t writes,
                    uint32_t line)
{
    uint32_t i, words = 0, last = UINT32_MAX;
    for (i = 0; i < n; i++)
        if (cpus[i] / 64 != last) {
            last = cpus[i] / 64;
            words++;
        }
    shi_trace_write(self, SHI_T_ipi_send_cpumask, n, words, writes, line, 0);
    for (i = 0; i < n && SHI_TRACING(self, cpumask);) {
        uint64_t mask = 0;
        for (last = cpus[i] / 64; i < n && cpus[i] / 64 == last; i++)
            mask |= 1ull << cpus[i] % 64;
        shi_trace_write(self, SHI_T_cpumask, last * 64, last * 64, (uint32_t)mask,
                        (uint32_t)(mask >> 32), 0);
    }
}

uint32_t shi_trace_name(struct shi_self *self, const char *text, size_t length)
{
    struct shi_trace_area *area = self->left ? NULL : shi_trace_area(self->m);
    if (!area || shi_load_relaxed(&area->nnames) >= SHI_TRACE_NAMES)
        return 0;
    uint32_t i = shi_fetch_add_relaxed(&area->nnames, 1);
    if (i >= SHI_TRACE_NAMES)
        return 0;
    struct shi_trace_name *name = &area->names[i];
    if (length > sizeof name->text) { /* the end of a path tells more than its begin */
        text += length - sizeof name->text;
        length = sizeof name->text;
    }
    memcpy(name->text, text, length);
    /* Release: who finds the length finds the text. */
    shi_store_release(&name->length, (uint32_t)length);
    return i + 1;
}

/* ---- reading ---------------------------------------------------------------------- */

/* Will nobody finish this one any more? */
static bool abandoned(const struct shi_machine *m, const struct shi_trace_head *head,
                      uint32_t id, uint64_t at)
{
    if (at < shi_load_acquire(&head->born))
        return true;
    return id < m->ncpus &&
           shi_word_state(shi_load_acquire(&shi_slot(m, id)->word)) == SHI_DEAD;
}

uint32_t shi_trace_take(const struct shi_machine *m, struct shi_trace_area *area, uint32_t id,
                        uint64_t from, struct shi_trace_record *to, uint32_t room, bool final,
                        struct shi_trace_read *read)
{
    struct shi_trace_head *head = shi_trace_head(area, id);
    struct shi_trace_record *ring = shi_trace_ring(m, area, id), *r;
    uint64_t size = area->records, end = shi_load_acquire(&head->head);
    uint32_t n = 0;
    *read = (struct shi_trace_read){ .next = from };
    while (read->next < end && n < room) {
        if (end - read->next > size) { /* overwritten before we came */
            read->lost += end - size - read->next;
            read->next = end - size;
        }
        r = &ring[read->next & (size - 1)];
        uint32_t want = (uint32_t)read->next + 1;
        /* Acquire pairs with the writer's release: the record is whole. */
        if (shi_load_acquire(&r->seq) == want) {
            memcpy(&to[n], r, sizeof *r);
            /* The copy first, the second look after it: a writer that changed a field
             * before we copied it had changed the number before that. */
            shi_fence_acquire();
            if (shi_load_relaxed(&r->seq) == want)
                n++;
            else
                read->lost++;
            read->next++;
            continue;
        }
        end = shi_load_acquire(&head->head);
        if (end - read->next > size)
            continue; /* overwritten just now */
        if (!final && !abandoned(m, head, id, read->next))
            break; /* it is being written */
        read->next++;
        read->lost++;
        read->torn++;
    }
    return n;
}
