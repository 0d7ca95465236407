/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/event.h"

static long futex(shi_a32 *word, int op, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

void shi_event_wake(shi_a32 *event)
{
    futex(event, FUTEX_WAKE, INT_MAX, NULL);
}

void shi_event_ring(shi_a32 *event)
{
    shi_fetch_add_full(event, 1);
    shi_event_wake(event);
}

int shi_event_wait(shi_a32 *event, uint32_t seen, int64_t timeout_ns)
{
    struct timespec t = { .tv_sec = timeout_ns / 1000000000,
                          .tv_nsec = timeout_ns % 1000000000 };
    if (futex(event, FUTEX_WAIT, seen, timeout_ns < 0 ? NULL : &t) == 0 || errno == EAGAIN)
        return 0;
    return -errno;
}
