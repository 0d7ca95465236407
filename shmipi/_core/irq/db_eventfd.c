/* SPDX-License-Identifier: MIT */
/* The doorbell `eventfd`: one of each CPU, made by the host and inherited. */
#include "base/sys.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "irq/db.h"

static int ring(struct shi_self *self, uint32_t dst)
{
    const uint64_t one = 1;
    while (write(shi_db_fd(self->m, dst), &one, sizeof one) < 0) {
        shi_db_failed(self, errno);
        if (errno != EINTR)
            break;
    }
    return 0;
}

static int wait_rung(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    int fd = shi_db_fd(self->m, self->id);
    uint64_t count;
    (void)low;
    if (timeout_ns >= 0) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        struct timespec t = shi_db_relative(timeout_ns);
        int n = ppoll(&p, 1, &t, NULL);
        if (n <= 0)
            return n ? -errno : -ETIMEDOUT;
    }
    return read(fd, &count, sizeof count) < 0 ? shi_db_failed(self, errno) : 0;
}

const struct shi_doorbell_ops shi_db_eventfd = {
    .name = "eventfd",
    .by_fds = true,
    .open = shi_db_take_fds,
    .adopt = shi_db_adopt_fds,
    .close = shi_db_drop_fds,
    .fd = shi_db_fd,
    .ring = ring,
    .wait = wait_rung,
};
