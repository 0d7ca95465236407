/* SPDX-License-Identifier: MIT */
/*
 * The doorbell `pipe`: one of each CPU, made by the host and inherited, as one descriptor
 * for both directions.  So whoever rings is a reader too, and never gets a SIGPIPE.  It does
 * not block: a pipe that is full holds tokens already, and to wait for room in it would
 * make a ringer wait for a CPU that is stopped.
 */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "irq/db.h"

#define TOKENS 4096 /* a pipe of one page: they are all taken at once */

/* Sleep until there are tokens, and take them.  0 or -errno. */
static int take(int fd, const struct timespec *timeout)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };
    char tokens[TOKENS];
    int n = ppoll(&p, 1, timeout, NULL);
    if (n <= 0)
        return n ? -errno : -ETIMEDOUT;
    return read(fd, tokens, sizeof tokens) < 0 && errno != EAGAIN ? -errno : 0;
}

static int ring(struct shi_self *self, uint32_t dst)
{
    while (write(shi_db_fd(self->m, dst), "", 1) < 0) {
        if (errno == EINTR)
            continue;
        shi_db_failed(self, errno);
        shi_count(self, SHI_C_doorbells_retried); /* EAGAIN: it is rung */
        break;
    }
    return 0;
}

static int wait_rung(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    struct timespec t = shi_db_relative(timeout_ns);
    int err = take(shi_db_fd(self->m, self->id), timeout_ns < 0 ? NULL : &t);
    (void)low;
    return shi_db_failed(self, -err);
}

/* A named one, which lies where the machine does until both sides have it open. */
static void raw_path(const struct shi_raw *raw, char *path, size_t size)
{
    snprintf(path, size, "/dev/shm%s", raw->name);
}

static int raw_open(struct shi_raw *raw)
{
    struct timespec now = { 0, 0 };
    char path[128];
    int err = 0;
    if (raw->fd < 0) {
        raw_path(raw, path, sizeof path);
        if (!raw->sleeper && mkfifo(path, 0600))
            return -errno;
        raw->named = !raw->sleeper;
        raw->fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
        if (raw->fd < 0)
            return -errno;
        raw->opened = true;
    }
    while (raw->sleeper && (err = take(raw->fd, &now)) == 0)
        ;
    return err == -ETIMEDOUT ? 0 : err;
}

static void raw_unlink(struct shi_raw *raw)
{
    char path[128];
    raw_path(raw, path, sizeof path);
    unlink(path);
}

static int raw_ring(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return write(raw->fd, "", 1) < 0 ? -errno : 0;
}

static int raw_sleep(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return take(raw->fd, NULL);
}

static const struct shi_raw_ops raw_ops = {
    .name = "pipe",
    .by_name = true,
    .open = raw_open,
    .unlink = raw_unlink,
    .ring = raw_ring,
    .sleep = raw_sleep,
};

const struct shi_doorbell_ops shi_db_pipe = {
    .name = "pipe",
    .raw = &raw_ops,
    .by_fds = true,
    .open = shi_db_take_fds,
    .adopt = shi_db_adopt_fds,
    .close = shi_db_drop_fds,
    .fd = shi_db_fd,
    .ring = ring,
    .wait = wait_rung,
};
