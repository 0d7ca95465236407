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

static int raw_open(struct shi_raw *raw)
{
    struct pollfd p = { .fd = raw->fd, .events = POLLIN };
    uint64_t count;
    int err = shi_raw_blocks(raw->fd);
    while (!err && raw->sleeper && poll(&p, 1, 0) > 0)
        if (read(raw->fd, &count, sizeof count) < 0 && errno != EINTR)
            err = -errno;
    return err;
}

static int raw_ring(struct shi_raw *raw, uint32_t n)
{
    const uint64_t one = 1;
    (void)n;
    return write(raw->fd, &one, sizeof one) < 0 ? -errno : 0;
}

static int raw_sleep(struct shi_raw *raw, uint32_t n)
{
    uint64_t count;
    (void)n;
    return read(raw->fd, &count, sizeof count) < 0 ? -errno : 0;
}

static const struct shi_raw_ops raw_ops = {
    .name = "eventfd",
    .open = raw_open,
    .ring = raw_ring,
    .sleep = raw_sleep,
};

const struct shi_doorbell_ops shi_db_eventfd = {
    .name = "eventfd",
    .raw = &raw_ops,
    .by_fds = true,
    .open = shi_db_take_fds,
    .adopt = shi_db_adopt_fds,
    .close = shi_db_drop_fds,
    .fd = shi_db_fd,
    .ring = ring,
    .wait = wait_rung,
};
