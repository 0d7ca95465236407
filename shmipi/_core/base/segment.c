/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/segment.h"

/* The head of a queue is a csd's index + 1 in 32 bits. */
_Static_assert((uint64_t)(SHI_MAX_CPUS + SHI_EXTRA_SLOTS) * 4 * (SHI_MAX_CPUS + SHI_CSD_SPARE) <
                   UINT32_MAX,
               "csds of all slots can be numbered");
_Static_assert(SHI_MAX_CPUS + SHI_EXTRA_SLOTS < UINT16_MAX,
               "a csd names its sender in 16 bits");

#define MiB (1ull << 20)
#define GiB (1ull << 30)

static uint64_t round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* 256 MiB each, but 16 GiB of address space for all but the guests together.  It is also
 * the room for results that nobody has read yet, so one payload may have an eighth. */
static uint64_t usual_arena(uint32_t ncpus)
{
    uint64_t bytes = 256 * MiB;
    while (bytes > 4 * MiB && bytes * (ncpus + 2) > 16 * GiB + 256 * MiB)
        bytes /= 2;
    return bytes;
}

int shi_layout_plan(struct shi_header *h, uint32_t ncpus, uint64_t arena_bytes,
                    uint64_t array_bytes)
{
    if (ncpus < 1 || ncpus > SHI_MAX_CPUS)
        return -EINVAL;
    uint32_t nslots = ncpus + SHI_EXTRA_SLOTS;
    if (!arena_bytes)
        arena_bytes = usual_arena(ncpus);
    if (!array_bytes)
        array_bytes = 64 * GiB;
    if (arena_bytes & (arena_bytes - 1))
        return -EINVAL;
    memcpy(h->magic, SHI_MAGIC, sizeof h->magic);
    h->abi = SHI_ABI;
    h->header_bytes = sizeof *h;
    h->ncpus = ncpus;
    h->csd_shift = 12;
    while ((1u << h->csd_shift) < 2 * ncpus + SHI_CSD_SPARE)
        h->csd_shift++;
    h->slot_offset = round_up(sizeof *h, SHI_PAGE);
    h->irq_offset = round_up(h->slot_offset + (uint64_t)nslots * SHI_SLOT_BYTES, SHI_PAGE);
    h->sched_offset =
        round_up(h->irq_offset + sizeof(struct shi_irq_area) + shi_line_count_bytes(ncpus) +
                     (uint64_t)SHI_NR_IRQS * shi_affinity_words(ncpus) * sizeof(uint64_t),
                 SHI_PAGE);
    h->task_offset = round_up(h->sched_offset + sizeof(struct shi_sched) +
                                  ncpus * sizeof(struct shi_rq) +
                                  shi_ntasks(ncpus) * shi_task_bytes(ncpus),
                              SHI_PAGE);
    h->region_offset = h->task_offset + shi_ntasks(ncpus) * SHI_TASK_ROOM;
    h->func_offset = round_up((uint64_t)SHI_LINE << h->csd_shift, SHI_PAGE);
    h->arena_offset =
        round_up(h->func_offset + (uint64_t)SHI_FUNCS * sizeof(struct shi_func), SHI_PAGE);
    h->arena_bytes = arena_bytes;
    h->region_bytes = h->arena_offset + arena_bytes;
    h->array_offset = round_up(h->region_offset + h->region_bytes * nslots, SHI_PAGE);
    h->array_bytes = array_bytes;
    h->total_bytes = h->array_offset + array_bytes;
    return 0;
}

uint64_t shi_layout_fixed(const struct shi_header *h)
{
    return h->task_offset;
}

int shi_segment_attach(struct shi_machine *m, void *base, uint64_t mapped, int fd)
{
    struct shi_header *h = base, plan;
    memset(m, 0, sizeof *m);
    if (mapped < sizeof *h)
        return -EINVAL;
    if (memcmp(h->magic, SHI_MAGIC, sizeof h->magic))
        return -EINVAL;
    if (h->abi != SHI_ABI || h->header_bytes != sizeof *h)
        return -EPROTO;
    /* The geometry follows from four numbers: anything else in there is damage. */
    memset(&plan, 0, offsetof(struct shi_header, machine_state));
    if (h->arena_bytes > GiB || h->array_bytes > (1ull << 42))
        return -EINVAL;
    if (shi_layout_plan(&plan, h->ncpus, h->arena_bytes, h->array_bytes))
        return -EINVAL;
    if (plan.total_bytes != h->total_bytes || plan.slot_offset != h->slot_offset ||
        plan.irq_offset != h->irq_offset || plan.sched_offset != h->sched_offset ||
        plan.task_offset != h->task_offset || plan.region_offset != h->region_offset ||
        plan.region_bytes != h->region_bytes || plan.func_offset != h->func_offset ||
        plan.arena_offset != h->arena_offset || plan.array_offset != h->array_offset ||
        plan.csd_shift != h->csd_shift || mapped < plan.total_bytes)
        return -EINVAL;
    m->base = base;
    m->header = h;
    m->total_bytes = plan.total_bytes;
    m->slot_offset = plan.slot_offset;
    m->irq_offset = plan.irq_offset;
    m->sched_offset = plan.sched_offset;
    m->task_offset = plan.task_offset;
    m->ntasks = (uint32_t)shi_ntasks(plan.ncpus);
    m->task_bytes = (uint32_t)shi_task_bytes(plan.ncpus);
    m->region_offset = plan.region_offset;
    m->region_bytes = plan.region_bytes;
    m->func_offset = plan.func_offset;
    m->arena_offset = plan.arena_offset;
    m->arena_bytes = plan.arena_bytes;
    m->array_offset = plan.array_offset;
    m->array_bytes = plan.array_bytes;
    m->ncpus = plan.ncpus;
    m->nslots = plan.ncpus + SHI_EXTRA_SLOTS;
    m->csd_shift = plan.csd_shift;
    m->csds_per_slot = 1u << plan.csd_shift;
    /* Half at most: the buddy allocator gives out halves, and the functions that a sender
     * publishes lie in the same arena. */
    m->payload_max = usual_arena(m->ncpus) / 8;
    if (m->payload_max > m->arena_bytes / 2)
        m->payload_max = m->arena_bytes / 2;
    m->ncsds = m->nslots * m->csds_per_slot;
    m->sum_key = h->sum_key;
    m->cookie = h->cookie;
    m->kick_signal = h->kick_signal;
    m->nmi_signal = h->nmi_signal;
    m->doorbell = (enum shi_doorbell)h->doorbell;
    m->kick = h->kick != 0;
    m->oversubscribed = h->oversubscribed != 0;
    m->fd = fd;
    struct stat file;
    if (fd >= 0) {
        if (fstat(fd, &file))
            return -errno;
        m->dev = file.st_dev;
        m->ino = file.st_ino;
        snprintf(m->path, sizeof m->path, "/dev/shm/shmipi.%u.%.32s", file.st_uid, h->name);
    }
    m->chip = h->chip;
    if (m->doorbell >= SHI_DB_COUNT || m->kick_signal > 64 || m->nmi_signal > 64)
        return -EINVAL;
    return 0;
}

static bool is_segment(const struct shi_machine *m, int fd)
{
    struct stat file;
    return fd >= 0 && fstat(fd, &file) == 0 && file.st_dev == m->dev && file.st_ino == m->ino;
}

int shi_machine_fd(const struct shi_machine *m)
{
    int fd;
    if (m->fd < 0 || is_segment(m, m->fd))
        return m->fd;
    /* Without the lock: others hold it, of the same open file as ours was. */
    fd = open(m->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (!is_segment(m, fd)) {
        if (fd >= 0)
            close(fd); /* another machine has the name: ours is at its end */
        return -1;
    }
    ((struct shi_machine *)m)->fd = fd; /* the one thing that changes while it is used */
    return fd;
}

void shi_machine_close(struct shi_machine *m)
{
    if (is_segment(m, m->fd))
        close(m->fd);
    m->fd = -1;
}

int shi_machine_back(const struct shi_machine *m, uint64_t offset, uint64_t length)
{
    sigset_t all, mask;
    int fd = shi_machine_fd(m);
    if (!m->ino)
        return 0; /* a native test over anonymous memory */
    if (fd < 0)
        return -EBADF;
    int err = fallocate(fd, 0, (off_t)offset, (off_t)length) ? errno : 0;
    if (err != EINTR)
        return -err;
    /* Many kernels undo a tmpfs fallocate that a signal interrupts.  One that takes longer
     * than the period of a timer (remind.h, a profiler's) would begin anew for ever, and in
     * a core section nobody stops that timer: so the second try is not interrupted. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &mask);
    do
        err = fallocate(fd, 0, (off_t)offset, (off_t)length) ? errno : 0;
    while (err == EINTR); /* SIGSTOP cannot be blocked */
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    return -err;
}

bool shi_machine_punch(const struct shi_machine *m, uint64_t offset, uint64_t length)
{
    /* By the mapping: whose file a descriptor is can change between two system calls. */
    return m->fd >= 0 && madvise(m->base + offset, length, MADV_REMOVE) == 0;
}

uint64_t shi_checksum(const struct shi_machine *m, const void *data, uint64_t length)
{
    const uint8_t *p = data;
    uint64_t h = m->sum_key ^ (length * 0x9e3779b97f4a7c15ull), w;
    while (length >= 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
        p += 8;
        length -= 8;
    }
    w = 0;
    memcpy(&w, p, length);
    h = (h ^ w) * 0xc4ceb9fe1a85ec53ull;
    return h ^ (h >> 33);
}
