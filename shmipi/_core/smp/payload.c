/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "smp/payload.h"

int shi_sender_arena(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    if (self->sender.arena.m)
        return 0;
    uint64_t at = m->region_offset + (uint64_t)self->id * m->region_bytes + m->arena_offset;
    return shi_arena_init(&self->sender.arena, m, at, m->arena_bytes);
}

void *shi_payload(const struct shi_machine *m, uint32_t src, const struct shi_ref *ref)
{
    if (src >= m->nslots || ref->length > m->arena_bytes ||
        ref->offset > m->arena_bytes - ref->length)
        return NULL;
    return shi_arena_base(m, src) + ref->offset;
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
