/* SPDX-License-Identifier: MIT */
/* A small machine over anonymous memory whose CPUs are threads: for tests of the core
 * without Python, and for ThreadSanitizer, which cannot see across processes. */
#ifndef RIG_H
#define RIG_H

#include "base/sys.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/machine.h"
#include "base/native.h"
#include "base/trace.h"
#include "irq/flows.h"
#include "irq/chip.h"
#include "smp/cpu.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/idle.h"
#include "smp/ksoftirqd.h"
#include "smp/queue.h"
#include "smp/reap.h"
#include "smp/sched.h"
#include "smp/sender.h"
#include "smp/smp.h"
#include "smp/wait.h"

#define CHECK(what)                                                                            \
    do {                                                                                       \
        if (!(what)) {                                                                         \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);                         \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

#define RIG_CPUS 8

struct rig {
    struct shi_machine m;
    struct shi_self host, firmware, cpu[RIG_CPUS];
    pthread_t thread[RIG_CPUS];
    uint32_t ncpus;
};

static struct rig *rig_now;
/* What stands for the interpreter on the CPUs, if a test needs one. */
static void (*rig_run)(struct shi_self *self, uint32_t csd);
static void (*rig_deferred)(struct shi_self *self);
static __thread uint32_t rig_id; /* of the CPU that this thread is */

/* The local APIC's system vectors. */
static inline void rig_chip(struct shi_chip *chip)
{
    strcpy(chip->name, "apic");
    chip->flow = SHI_FLOW_VECTOR;
    chip->nlines = 256;
    chip->call_single = 0xfb;
    chip->call = 0xfc;
    chip->reschedule = 0xfd;
    chip->nmi = SHI_NO_LINE;
    chip->group = 1;
    chip->siblings = 1;
    memset(chip->row, 0xff, sizeof chip->row);
    chip->use[0xfb] = SHI_USE_CALL_SINGLE;
    chip->use[0xfc] = SHI_USE_CALL;
    chip->use[0xfd] = SHI_USE_RESCHEDULE;
}

static void *rig_cpu(void *arg)
{
    uint32_t id = (uint32_t)(uintptr_t)arg;
    struct shi_self *self = &rig_now->cpu[id];
    rig_id = id;
    CHECK(shi_self_init(self, &rig_now->m, id) == 0);
    CHECK(shi_self_online(self) == 0);
    self->hooks.run = rig_run;
    self->inline_python = rig_run != NULL;
    enum shi_idle_why why;
    while ((why = shi_idle(self)) != SHI_IDLE_STOP)
        if (why == SHI_IDLE_PYTHON && rig_deferred)
            rig_deferred(self);
    shi_self_fini(self);
    return NULL;
}

static inline void rig_boot_chip(struct rig *r, uint32_t ncpus, enum shi_idle idle,
                                 const struct shi_chip *chip)
{
    struct shi_header *plan = calloc(1, sizeof *plan);
    uint32_t i;
    memset(r, 0, sizeof *r);
    rig_now = r;
    r->ncpus = ncpus;
    shi_native_init();
    shi_sched_init();
    shi_ksoftirqd_init();
    CHECK(shi_layout_plan(plan, ncpus, 1 << 20, 1 << 20) == 0);
    plan->chip = *chip;
    plan->doorbell = SHI_DB_futex;
    plan->kick_signal = 40;
    plan->nmi_signal = 41;
    plan->oversubscribed = 1;
    CHECK(shi_clock_calibrate(&plan->clock) == 0);
    void *base = mmap(NULL, plan->total_bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(base != MAP_FAILED);
    memcpy(base, plan, sizeof *plan);
    CHECK(shi_machine_attach(&r->m, base, plan->total_bytes, -1) == 0);
    free(plan);
    shi_store_relaxed(&r->m.header->array_used, SHI_PAGE); /* for handlers to point at */
    for (i = 0; chip->per_cpu && i < ncpus; i++) {         /* as a chip's prepare() does */
        shi_store_relaxed(&shi_irq_area(&r->m)->route[chip->call + i], i + 1);
        shi_store_relaxed(&shi_irq_area(&r->m)->route[chip->reschedule + i], i + 1);
    }
    CHECK(shi_self_init(&r->host, &r->m, ncpus) == 0);
    CHECK(shi_self_init(&r->firmware, &r->m, ncpus + 1) == 0);
    for (i = 0; i < ncpus; i++) {
        shi_reap_reset(&r->firmware, i);
        shi_store_relaxed(&shi_slot(&r->m, i)->idle, idle);
        CHECK(pthread_create(&r->thread[i], NULL, rig_cpu, (void *)(uintptr_t)i) == 0);
    }
    for (i = 0; i < ncpus; i++)
        while (!shi_word_online(shi_load_acquire(&shi_slot(&r->m, i)->word)))
            shi_cpu_relax();
}

static inline void rig_boot(struct rig *r, uint32_t ncpus, enum shi_idle idle)
{
    struct shi_chip chip;
    memset(&chip, 0, sizeof chip);
    rig_chip(&chip);
    rig_boot_chip(r, ncpus, idle, &chip);
}

static inline void rig_stop(struct rig *r)
{
    uint32_t i;
    shi_reap_stop_all(&r->firmware);
    for (i = 0; i < r->ncpus; i++)
        CHECK(pthread_join(r->thread[i], NULL) == 0);
    shi_self_fini(&r->host);
    shi_self_fini(&r->firmware);
    CHECK(munmap(r->m.base, r->m.total_bytes) == 0);
}

/* smp_call_function_single(dst, native, value, wait=1): 0 or -errno. */
static inline int rig_call(struct shi_self *self, uint32_t dst, uint32_t native, uint64_t value,
                           enum shi_kind kind)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | native,
                                   .kind = (uint8_t)kind,
                                   .value.u = value };
    int64_t local = shi_call_post(self, &call, SHI_CSD_SYNC, dst);
    if (local < 0)
        return (int)local;
    int err = shi_call_wait(self, (uint32_t)local, dst, 0, NULL, NULL);
    if (err)
        return err;
    CHECK(shi_load_relaxed(&shi_own_csd(self, (uint32_t)local)->status) == SHI_S_DONE);
    shi_call_end(self, (uint32_t)local);
    return 0;
}

/* Trace rings, and everything is recorded. */
static inline struct shi_trace_area *rig_trace(struct rig *r, uint32_t records)
{
    uint64_t bytes = shi_trace_bytes(&r->m, records), at = r->m.array_offset + SHI_PAGE;
    struct shi_trace_area *area = (struct shi_trace_area *)(r->m.base + at);
    CHECK(bytes && SHI_PAGE + bytes <= r->m.array_bytes);
    area->records = records;
    shi_store_release(&r->m.header->array_used, SHI_PAGE + bytes);
    shi_store_release(&r->m.header->users[SHI_USER_trace], at);
    shi_store_release(&r->m.header->tracing, ~0ull);
    return area;
}

/* ---- a machine at rest ------------------------------------------------------------ */

/* A machine whose CPUs nobody runs: the test is the owner of their queues. */
static inline void rig_quiet(struct rig *r, uint32_t ncpus)
{
    uint32_t i;
    struct shi_header *plan = calloc(1, sizeof *plan);
    CHECK(plan);
    memset(r, 0, sizeof *r);
    rig_now = r;
    r->ncpus = ncpus;
    shi_native_init();
    shi_sched_init();
    shi_ksoftirqd_init();
    CHECK(shi_layout_plan(plan, ncpus, 1 << 20, 1 << 20) == 0);
    rig_chip(&plan->chip);
    plan->doorbell = SHI_DB_futex;
    plan->kick_signal = 40;
    CHECK(shi_clock_calibrate(&plan->clock) == 0);
    void *base = mmap(NULL, plan->total_bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(base != MAP_FAILED);
    memcpy(base, plan, sizeof *plan);
    CHECK(shi_machine_attach(&r->m, base, plan->total_bytes, -1) == 0);
    free(plan);
    shi_store_relaxed(&r->m.header->steps, 1); /* so that the reaper looks at queues */
    CHECK(shi_self_init(&r->host, &r->m, ncpus) == 0);
    CHECK(shi_self_init(&r->firmware, &r->m, ncpus + 1) == 0);
    for (i = 0; i < ncpus; i++) {
        shi_reap_reset(&r->host, i);
        CHECK(shi_self_init(&r->cpu[i], &r->m, i) == 0);
    }
}

static inline void rig_unquiet(struct rig *r)
{
    uint32_t i;
    for (i = 0; i < r->ncpus; i++)
        shi_self_fini(&r->cpu[i]);
    shi_self_fini(&r->host);
    shi_self_fini(&r->firmware);
    CHECK(munmap(r->m.base, r->m.total_bytes) == 0);
}

static inline void rig_set_state(struct rig *r, uint32_t cpu, enum shi_state state)
{
    shi_a64 *word = &shi_slot(&r->m, cpu)->word;
    shi_store_full(word, shi_word_with(shi_load_full(word), state));
}

/* Does no live slot signal this CPU any more?  Then its pid may be given up. */
static inline bool rig_unguarded(struct rig *r, uint32_t cpu)
{
    uint32_t s;
    for (s = 0; s < r->m.nslots; s++)
        if (shi_reap_guards(&r->firmware, s) == cpu + 1)
            return false;
    return true;
}

/* Fill, lock and push a csd of the host: what push says, its index in *local. */
static inline int rig_push(struct rig *r, uint32_t dst, uint64_t type, uint32_t *local)
{
    shi_enter(&r->host);
    int64_t got = shi_csd_get(&r->host);
    CHECK(got >= 0);
    struct shi_csd *csd = shi_own_csd(&r->host, (uint32_t)got);
    memset((char *)csd + 16, 0, sizeof *csd - 16);
    csd->func = SHI_FUNC_NATIVE;
    CHECK(shi_csd_trylock(&r->host, csd, type, dst) == 0);
    CHECK(shi_csd_trylock(&r->host, csd, type, dst) == -EBUSY);
    int rc = shi_queue_push(&r->host, dst, shi_own_index(&r->host, (uint32_t)got), csd);
    if (rc < 0) {
        shi_csd_cancel(csd);
        CHECK(!shi_csd_locked(csd));
        shi_csd_put(&r->host, (uint32_t)got);
    }
    shi_leave(&r->host);
    *local = (uint32_t)got;
    return rc;
}

#endif
