/* SPDX-License-Identifier: MIT */
/* What doorbells share. */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "irq/db.h"

int shi_db_adopt_fds(struct shi_machine *m, const int *fds)
{
    m->bells = calloc(m->ncpus, sizeof *fds);
    if (!m->bells)
        return -ENOMEM;
    memcpy(m->bells, fds, m->ncpus * sizeof *fds);
    return 0;
}

int shi_db_take_fds(struct shi_machine *m, const char *prefix, const int *fds)
{
    (void)prefix;
    return shi_db_adopt_fds(m, fds);
}

void shi_db_drop_fds(struct shi_machine *m)
{
    free(m->bells); /* the descriptors are their maker's */
    m->bells = NULL;
}

int shi_db_fd(const struct shi_machine *m, uint32_t cpu)
{
    return ((const int *)m->bells)[cpu];
}

/*
 * A task has closed every descriptor, and so the doorbells of its machine: its CPU can
 * neither be woken nor wake another.  Its end is noticed at once, which no hang is.
 */
int shi_db_failed(const struct shi_self *self, int err)
{
    static const char text[] = "shmipi: a task closed the descriptors of its CPU's doorbells: "
                               "the CPU ends\n";
    if (err != EBADF || self->host)
        return -err;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(2); /* closed, too */
    _exit(1);
}

int shi_raw_blocks(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -errno;
    return flags & O_NONBLOCK ? -EINVAL : 0;
}

struct timespec shi_db_absolute(clockid_t clock, int64_t ns)
{
    struct timespec t;
    clock_gettime(clock, &t);
    int64_t sum = t.tv_nsec + ns;
    t.tv_sec += sum / 1000000000;
    t.tv_nsec = sum % 1000000000;
    return t;
}
