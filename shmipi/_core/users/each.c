/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "smp/csd.h"
#include "smp/entry.h"
#include "users/each.h"

#define FEW 256u /* CPUs whose lists fit the stack */

static int ask(void *arg, uint32_t cpu)
{
    const struct shi_each *each = arg;
    return each->cond(each->arg, cpu);
}

static bool in_mask(const struct shi_each *each, uint32_t cpu)
{
    return !each->mask || (shi_load_full(&each->mask[cpu / 64]) >> (cpu % 64) & 1);
}

static uint32_t list_cpus(const struct shi_self *self, const struct shi_each *each,
                          uint32_t *cpus)
{
    uint32_t n = 0, cpu;
    for (cpu = 0; cpu < self->m->ncpus; cpu++)
        if (in_mask(each, cpu) && (self->host || cpu != self->id))
            cpus[n++] = cpu;
    return n;
}

/* Each csd is waited for, or left behind where the wait was interrupted. */
static int wait_for_all(struct shi_self *self, const struct shi_each *each,
                        const struct shi_many *many)
{
    uint32_t i;
    int err = 0;
    for (i = 0; i < many->queued; i++) {
        if (err) {
            if (!self->left) {
                shi_enter(self);
                shi_csd_abandon(self, many->locals[i]);
                shi_leave(self);
            }
            continue;
        }
        err = shi_call_wait(self, many->locals[i], many->cpus[i], 0, each->waiter,
                            each->waiter_arg);
        if (!err)
            shi_call_end(self, many->locals[i]);
    }
    return err;
}

static int send(struct shi_self *self, const struct shi_each *each, uint32_t *room)
{
    uint32_t n = self->m->ncpus;
    uint32_t number = (uint32_t)each->native;
    if (each->renumber && !(number = each->renumber[number]))
        return -ENOSYS;
    struct shi_call call = { .func = SHI_FUNC_NATIVE | (each->renumber ? number - 1 : number),
                             .kind = SHI_K_BYTES,
                             .length = SHI_INLINE };
    struct shi_many many = { .mask = room,
                             .cond = each->cond ? ask : NULL,
                             .cond_arg = (void *)(uintptr_t)each,
                             .waiter = each->waiter,
                             .arg = each->waiter_arg,
                             .cpus = room + n,
                             .locals = room + 2 * (size_t)n,
                             .ipis = room + 3 * (size_t)n };
    memcpy(call.value.bytes, each->info, SHI_INLINE);
    many.n = list_cpus(self, each, room);
    shi_count(self, SHI_C_calls_many);
    int err = shi_call_many(self, &many, &call, !each->nowait);
    /* After the doorbells, before the wait: it runs while the others do. */
    if (!self->host && each->local && in_mask(each, self->id) &&
        (!each->cond || each->cond(each->arg, self->id))) {
        shi_enter(self);
        each->local(each->arg);
        shi_leave(self);
    }
    int waited = each->nowait ? 0 : wait_for_all(self, each, &many);
    return err ? err : waited;
}

int shi_each_cpu_native(struct shi_self *self, const struct shi_each *each)
{
    uint32_t few[4 * FEW], *room = few;
    if (self->m->ncpus > FEW) {
        room = malloc(4 * sizeof *room * self->m->ncpus);
        if (!room)
            return -ENOMEM;
    }
    self->preempt += !self->host; /* get_cpu(): the mask is not another CPU's */
    int err = send(self, each, room);
    self->preempt -= !self->host;
    if (room != few)
        free(room);
    return err;
}
