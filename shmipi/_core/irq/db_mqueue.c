/* SPDX-License-Identifier: MIT */
/* The doorbell `mqueue`: a POSIX message queue of each CPU, opened by name. */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
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

const struct shi_doorbell_ops shi_db_mqueue = {
    .name = "mqueue",
    .open = open_all,
    .adopt = shi_db_adopt_fds,
    .close = close_all,
    .fd = shi_db_fd,
    .ring = ring,
    .wait = wait_rung,
};
