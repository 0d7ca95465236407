/* SPDX-License-Identifier: MIT */
/* What a doorbell is: a file db_NAME.c each, listed by SHI_DOORBELLS in layout.h. */
#ifndef SHI_DB_H
#define SHI_DB_H

#include <time.h>

#include "base/machine.h"
#include "irq/raw.h"

struct shi_doorbell_ops {
    const char *name;
    const struct shi_raw_ops *raw; /* its limit */
    /* It is the kick signal: to ring takes a pid, which a hazard protects, and who sleeps on
     * it has that signal blocked. */
    bool by_signal;
    /* Open those of all CPUs in this process, into m->bells.  By the names that they bear,
     * `/PREFIX.CPU`, or by one descriptor for each CPU, which stays the caller's.  NULL:
     * there is nothing beside the segment to open. */
    int (*open)(struct shi_machine *m, const char *prefix, const int *fds);
    bool by_fds; /* `open` wants `fds`, and `prefix` means nothing */
    /* The same for a guest, which comes when there are no names any more: a descriptor for
     * each CPU, which stays the caller's. */
    int (*adopt)(struct shi_machine *m, const int *fds);
    /* Close what the two have opened, also half of it. */
    void (*close)(struct shi_machine *m);
    /* The descriptor of a CPU's that another process can adopt; NULL: it has none. */
    int (*fd)(const struct shi_machine *m, uint32_t cpu);
    /* Ring a CPU's.  0, or -errno when it could not be rung: somebody else must then. */
    int (*ring)(struct shi_self *self, uint32_t dst);
    /* shi_doorbell_wait().  A token from before is a ring. */
    int (*wait)(struct shi_self *self, uint32_t low, int64_t timeout_ns);
};

#define SHI_DB_DECLARE(name) extern const struct shi_doorbell_ops shi_db_##name;
SHI_DOORBELLS(SHI_DB_DECLARE)
#undef SHI_DB_DECLARE

/* For doorbells that are descriptors: m->bells is a copy of `fds`. */
int shi_db_take_fds(struct shi_machine *m, const char *prefix, const int *fds);
int shi_db_adopt_fds(struct shi_machine *m, const int *fds);
void shi_db_drop_fds(struct shi_machine *m);
int shi_db_fd(const struct shi_machine *m, uint32_t cpu);

/* A system call failed so: a CPU whose doorbells a task has closed ends.  Returns -err. */
int shi_db_failed(const struct shi_self *self, int err);

/* Of a raw exchange: 0, or -EINVAL for a descriptor that would not let the sleeper sleep. */
int shi_raw_blocks(int fd);

static inline struct timespec shi_db_relative(int64_t ns)
{
    return (struct timespec){ .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };
}

/* For calls whose time-out is a moment. */
struct timespec shi_db_absolute(clockid_t clock, int64_t ns);

#endif
