/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include "irq/doorbell.h"

const struct shi_doorbell_ops *const shi_doorbells[SHI_DB_COUNT] = {
#define X(name) &shi_db_##name,
    SHI_DOORBELLS(X)
#undef X
};

int shi_doorbell_open(struct shi_machine *m, const char *prefix, const int *fds)
{
    const struct shi_doorbell_ops *ops = shi_doorbell_of(m);
    int err = ops->open ? ops->open(m, prefix, fds) : 0;
    if (err)
        shi_doorbell_close(m);
    return err;
}

int shi_doorbell_adopt(struct shi_machine *m, const int *fds)
{
    const struct shi_doorbell_ops *ops = shi_doorbell_of(m);
    m->adopted = true;
    int err = ops->adopt ? ops->adopt(m, fds) : 0;
    if (err)
        shi_doorbell_close(m);
    return err;
}

void shi_doorbell_close(struct shi_machine *m)
{
    const struct shi_doorbell_ops *ops = shi_doorbell_of(m);
    if (ops->close)
        ops->close(m);
}

int shi_doorbell_ring(struct shi_self *self, uint32_t dst)
{
    shi_count(self, SHI_C_doorbells_sent);
    return shi_doorbell_of(self->m)->ring(self, dst);
}

int shi_doorbell_wait(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    return shi_doorbell_of(self->m)->wait(self, low, timeout_ns);
}
