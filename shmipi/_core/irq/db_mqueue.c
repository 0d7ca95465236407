/* SPDX-License-Identifier: MIT */
/* The doorbell `mqueue`: a POSIX message queue of each CPU, opened by name. */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "irq/db.h"

/* A queue's descriptor is a file's (mq_overview(7)), so that it can be handed on. */
static int *queues(const struct shi_machine *m)
{
    return m->bells;
}

static void close_all(struct shi_machine *m)
{
    for (uint32_t i = 0; queues(m) && !m->adopted && i < m->ncpus; i++)
        if (queues(m)[i] >= 0)
            mq_close(queues(m)[i]);
    shi_db_drop_fds(m);
}

static int open_all(struct shi_machine *m, const char *prefix, const int *fds)
{
    char name[128];
    (void)fds;
    m->bells = calloc(m->ncpus, sizeof(mqd_t));
    if (!m->bells)
        return -ENOMEM;
    memset(m->bells, 0xff, m->ncpus * sizeof(mqd_t));
    for (uint32_t i = 0; i < m->ncpus; i++) {
        snprintf(name, sizeof name, "/%s.%u", prefix, i);
        queues(m)[i] = mq_open(name, O_RDWR | O_CLOEXEC);
        if (queues(m)[i] < 0)
            return -errno;
    }
    return 0;
}

static int ring(struct shi_self *self, uint32_t dst)
{
    const struct timespec past = { 0, 0 };
    /* A full queue holds a token already: it will wake the target. */
    while (mq_timedsend(queues(self->m)[dst], "", 0, 0, &past)) {
        if (errno == EINTR)
            continue;
        shi_db_failed(self, errno);
        shi_count(self, SHI_C_doorbells_retried);
        break;
    }
    return 0;
}

static int wait_rung(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    mqd_t queue = queues(self->m)[self->id];
    char message[8];
    ssize_t n;
    (void)low;
    if (timeout_ns < 0) {
        n = mq_receive(queue, message, sizeof message, NULL);
    } else {
        struct timespec t = shi_db_absolute(CLOCK_REALTIME, timeout_ns);
        n = mq_timedreceive(queue, message, sizeof message, NULL, &t);
    }
    return n < 0 ? shi_db_failed(self, errno) : 0;
}

#define RAW_BYTES 256

static int raw_open(struct shi_raw *raw)
{
    struct mq_attr attr = { .mq_maxmsg = 2, .mq_msgsize = 1 };
    struct pollfd p = { .events = POLLIN };
    char message[RAW_BYTES];
    int err = 0;
    if (raw->fd >= 0) {
        err = shi_raw_blocks(raw->fd);
    } else {
        int flags = raw->sleeper ? O_RDONLY : O_WRONLY | O_CREAT | O_EXCL;
        raw->fd = mq_open(raw->name, flags | O_CLOEXEC, 0600, &attr);
        if (raw->fd < 0)
            return -errno;
        raw->opened = true;
        raw->named = !raw->sleeper;
    }
    if (!err && mq_getattr(raw->fd, &attr))
        err = -errno;
    if (!err && attr.mq_msgsize > RAW_BYTES)
        err = -EMSGSIZE;
    p.fd = raw->fd;
    while (!err && raw->sleeper && poll(&p, 1, 0) > 0)
        if (mq_receive(raw->fd, message, sizeof message, NULL) < 0 && errno != EINTR)
            err = -errno;
    return err;
}

static void raw_unlink(struct shi_raw *raw)
{
    mq_unlink(raw->name);
}

static int raw_ring(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return mq_send(raw->fd, "", 1, 0) ? -errno : 0;
}

static int raw_sleep(struct shi_raw *raw, uint32_t n)
{
    char message[RAW_BYTES];
    (void)n;
    return mq_receive(raw->fd, message, sizeof message, NULL) < 0 ? -errno : 0;
}

static const struct shi_raw_ops raw_ops = {
    .name = "mqueue",
    .by_name = true,
    .open = raw_open,
    .unlink = raw_unlink,
    .ring = raw_ring,
    .sleep = raw_sleep,
};

const struct shi_doorbell_ops shi_db_mqueue = {
    .name = "mqueue",
    .raw = &raw_ops,
    .open = open_all,
    .adopt = shi_db_adopt_fds,
    .close = close_all,
    .fd = shi_db_fd,
    .ring = ring,
    .wait = wait_rung,
};
