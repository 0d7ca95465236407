/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "smp/csd.h"
#include "smp/func.h"

#define FUNCS_PER_PAGE (SHI_PAGE / sizeof(struct shi_func))

static uint32_t new_serial(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    if (!s->next_serial) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        s->next_serial = (uint32_t)(now.tv_nsec ^ now.tv_sec << 20);
    }
    if (++s->next_serial == 0)
        s->next_serial = 1;
    return s->next_serial;
}

int64_t shi_func_publish(struct shi_self *self, const void *pickle, uint32_t length)
{
    struct shi_sender *s = &self->sender;
    int err;
    if (!s->nfree_funcs) {
        if (s->func_top == SHI_FUNCS)
            return -EMFILE;
        if (s->func_top % FUNCS_PER_PAGE == 0) {
            const struct shi_machine *m = self->m;
            err = shi_machine_back(m,
                                   m->region_offset + (uint64_t)self->id * m->region_bytes +
                                       m->func_offset + s->func_top * sizeof(struct shi_func),
                                   SHI_PAGE);
            if (err)
                return err;
        }
        s->free_funcs[s->nfree_funcs++] = s->func_top++;
        /* Release: who reads the top finds backed, zeroed entries below it. */
        shi_store_release(&self->slot->func_top, s->func_top);
    }
    int64_t at = shi_sender_alloc(self, length);
    if (at < 0)
        return at;
    memcpy(shi_arena_base(self->m, self->id) + at, pickle, length);
    uint32_t index = s->free_funcs[--s->nfree_funcs];
    struct shi_func *f = shi_func_entry(self->m, self->id, index);
    f->length = length;
    f->offset = (uint64_t)at;
    f->sum = shi_checksum(self->m, pickle, length);
    /* Release pairs with the acquire in shi_func_find; the push orders it as well. */
    shi_store_release(&f->serial, new_serial(self));
    s->funcs[index] = (struct shi_func_note){ .block = (uint64_t)at + 1 };
    return index;
}

static void func_free(struct shi_self *self, uint32_t index)
{
    struct shi_sender *s = &self->sender;
    shi_store_release(&shi_func_entry(self->m, self->id, index)->serial, 0);
    if (s->funcs[index].block)
        shi_arena_free(&s->arena, s->funcs[index].block - 1);
    s->funcs[index] = (struct shi_func_note){ 0 };
    s->free_funcs[s->nfree_funcs++] = index;
}

void shi_func_hold(struct shi_self *self, uint32_t index)
{
    self->sender.funcs[index].in_flight++;
}

void shi_func_drop(struct shi_self *self, uint32_t index)
{
    struct shi_func_note *note = &self->sender.funcs[index];
    if (--note->in_flight == 0 && note->dead)
        func_free(self, index);
}

void shi_func_retire(struct shi_self *self, uint32_t index)
{
    struct shi_func_note *note = &self->sender.funcs[index];
    note->dead = 1;
    if (note->in_flight == 0)
        func_free(self, index);
}

int shi_func_inherit(struct shi_self *self)
{
    struct shi_sender *s = &self->sender;
    uint32_t i, top = shi_load_acquire(&self->slot->func_top);
    if (top > SHI_FUNCS)
        top = SHI_FUNCS;
    for (i = 0; i < s->flight_count; i++) {
        uint32_t index = s->flight[i];
        struct shi_csd *csd = (struct shi_csd *)shi_region(self->m, self->id) + index;
        if (csd->func & SHI_FUNC_NATIVE || csd->func >= top)
            continue;
        struct shi_func_note *note = &s->funcs[csd->func];
        if (!note->in_flight) {
            struct shi_func *f = shi_func_entry(self->m, self->id, csd->func);
            int64_t at = -EINVAL;
            if (shi_sender_arena(self) == 0)
                at = shi_arena_reserve(&s->arena, f->offset, f->length);
            note->block = at < 0 ? 0 : (uint64_t)at + 1;
            note->dead = 1;
        }
        note->in_flight++;
        s->notes[index].func = csd->func + 1;
    }
    for (i = 0; i < top; i++) {
        if (s->funcs[i].in_flight)
            continue;
        shi_store_relaxed(&shi_func_entry(self->m, self->id, i)->serial, 0);
        s->free_funcs[s->nfree_funcs++] = i;
    }
    s->func_top = top;
    return 0;
}

int shi_func_find(const struct shi_machine *m, uint32_t src, uint32_t index, uint32_t serial,
                  const void **pickle, uint32_t *length, uint64_t *sum)
{
    if (src >= m->nslots || index >= SHI_FUNCS ||
        index >= shi_load_acquire(&shi_slot(m, src)->func_top))
        return -EBADMSG;
    const struct shi_func *f = shi_func_entry(m, src, index);
    if (shi_load_acquire(&f->serial) != serial || serial == 0)
        return -ENOENT;
    struct shi_ref ref = { .offset = f->offset, .length = f->length };
    *pickle = shi_payload(m, src, &ref);
    *length = ref.length;
    *sum = f->sum;
    return *pickle ? 0 : -EBADMSG;
}
