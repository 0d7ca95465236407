/* SPDX-License-Identifier: MIT */
/* The doorbell `futex`: the low half of the CPU's own state word. */
#include "base/sys.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

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

/* As base/event.c, but for one sleeper. */
static long futex(shi_a32 *word, int op, uint32_t value)
{
    return syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

static int raw_ring(struct shi_raw *raw, uint32_t n)
{
    shi_store_release(raw->word, n); /* pairs with the acquire in raw_sleep() */
    return futex(raw->word, FUTEX_WAKE, 1) < 0 ? -errno : 0;
}

static int raw_sleep(struct shi_raw *raw, uint32_t n)
{
    while (shi_load_acquire(raw->word) != n)
        if (futex(raw->word, FUTEX_WAIT, n - 1) && errno != EAGAIN)
            return -errno;
    return 0;
}

static const struct shi_raw_ops raw_ops = {
    .name = "futex",
    .ring = raw_ring,
    .sleep = raw_sleep,
};

const struct shi_doorbell_ops shi_db_futex = {
    .name = "futex",
    .raw = &raw_ops,
    .ring = ring,
    .wait = wait_rung,
};
