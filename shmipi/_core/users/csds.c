/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sys/mman.h>

#include "smp/entry.h"
#include "smp/sender.h"
#include "smp/smp.h"
#include "users/csds.h"

/* A mapping, not the heap: the first to send may be a handler. */
static int make_room(struct shi_self *self)
{
    if (self->csds)
        return 0;
    void *at = mmap(NULL, shi_self_csds_bytes(self->m), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return -ENOMEM;
    self->csds = at;
    return 0;
}

static int send(struct shi_self *self, uint32_t *mine, int number, uint32_t cpu)
{
    if (!*mine) {
        const struct shi_call call = { .func = SHI_FUNC_NATIVE | (uint32_t)number };
        int64_t local = shi_csd_get(self);
        if (local < 0)
            return (int)local;
        shi_csd_fill_head(self, (uint32_t)local, &call);
        *mine = (uint32_t)local + 1;
    }
    int err = shi_call_single(self, *mine - 1, SHI_CSD_ASYNC, cpu);
    return err == -EBUSY ? 0 : err;
}

int shi_csds_send(struct shi_self *self, enum shi_csds_user user, int number, uint32_t cpu)
{
    if (number < 0 || cpu >= self->m->ncpus)
        return -ENXIO;
    /* One section: a handler on top of this sends too, and would make a second csd. */
    shi_enter(self);
    int err = make_room(self);
    if (!err)
        err = send(self, &self->csds[(uint32_t)user * self->m->ncpus + cpu], number, cpu);
    shi_leave(self);
    return err;
}
