/* SPDX-License-Identifier: MIT */
/* The doorbell `sem`: a POSIX semaphore of each CPU, opened by name. */
#include "base/sys.h"

#include <errno.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "irq/db.h"

static sem_t **sems(const struct shi_machine *m)
{
    return m->bells;
}

static void close_all(struct shi_machine *m)
{
    for (uint32_t i = 0; sems(m) && i < m->ncpus; i++) {
        if (sems(m)[i] && m->adopted)
            munmap(sems(m)[i], sizeof(sem_t));
        else if (sems(m)[i])
            sem_close(sems(m)[i]);
    }
    free(m->bells);
    m->bells = NULL;
}

static int open_all(struct shi_machine *m, const char *prefix, const int *fds)
{
    char name[128];
    (void)fds;
    m->bells = calloc(m->ncpus, sizeof(sem_t *));
    if (!m->bells)
        return -ENOMEM;
    for (uint32_t i = 0; i < m->ncpus; i++) {
        snprintf(name, sizeof name, "/%s.%u", prefix, i);
        sem_t *sem = sem_open(name, 0);
        if (sem == SEM_FAILED)
            return -errno;
        sems(m)[i] = sem;
    }
    return 0;
}

/* A named semaphore of glibc is a file with a sem_t, shared by all who map it. */
static int adopt(struct shi_machine *m, const int *fds)
{
    struct stat status;
    m->bells = calloc(m->ncpus, sizeof(sem_t *));
    if (!m->bells)
        return -ENOMEM;
    for (uint32_t i = 0; i < m->ncpus; i++) {
        if (fstat(fds[i], &status))
            return -errno;
        if (status.st_size != sizeof(sem_t)) /* beyond its end is a SIGBUS */
            return -EPROTO;
        void *at = mmap(NULL, sizeof(sem_t), PROT_READ | PROT_WRITE, MAP_SHARED, fds[i], 0);
        if (at == MAP_FAILED)
            return -errno;
        sems(m)[i] = at;
    }
    return 0;
}

static int ring(struct shi_self *self, uint32_t dst)
{
    if (sem_post(sems(self->m)[dst]))
        shi_count(self, SHI_C_doorbells_retried); /* EOVERFLOW: it is rung */
    return 0;
}

static int wait_rung(struct shi_self *self, uint32_t low, int64_t timeout_ns)
{
    sem_t *sem = sems(self->m)[self->id];
    (void)low;
    if (timeout_ns < 0)
        return sem_wait(sem) ? -errno : 0;
    struct timespec t = shi_db_absolute(CLOCK_REALTIME, timeout_ns);
    return sem_timedwait(sem, &t) ? -errno : 0;
}

static int raw_open(struct shi_raw *raw)
{
    _Static_assert(sizeof(sem_t) <= SHI_RAW_OBJECT, "there is room for it");
    return !raw->sleeper && sem_init(raw->object, 1, 0) ? -errno : 0;
}

static int raw_ring(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return sem_post(raw->object) ? -errno : 0;
}

static int raw_sleep(struct shi_raw *raw, uint32_t n)
{
    (void)n;
    return sem_wait(raw->object) ? -errno : 0;
}

static const struct shi_raw_ops raw_ops = {
    .name = "sem",
    .open = raw_open,
    .ring = raw_ring,
    .sleep = raw_sleep,
};

const struct shi_doorbell_ops shi_db_sem = {
    .name = "sem",
    .raw = &raw_ops,
    .open = open_all,
    .adopt = adopt,
    .close = close_all,
    .ring = ring,
    .wait = wait_rung,
};
