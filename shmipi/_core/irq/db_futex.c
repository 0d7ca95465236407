/* SPDX-License-Identifier: MIT */
/* The doorbell `futex`: the low half of the CPU's own state word. */
#include "base/sys.h"

#include "base/event.h"
#include "irq/db.h"

/* The low half of a slot's word (little-endian: sys.h insists). */
static shi_a32 *low_half(struct shi_slot *slot)
{
    return (shi_a32 *)(void *)&slot->word;
}

static int ring(struct shi_self *self, uint32_t dst)
{
    shi_event_wake(low_half(shi_slot(self->m, dst)));
    return 0;
}

static int wait_rung(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    return shi_event_wait(low_half(self->slot), low, timeout_ns);
}

const struct shi_doorbell_ops shi_db_futex = {
    .name = "futex",
    .ring = ring,
    .wait = wait_rung,
};
