/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <sched.h>
#include <string.h>

#include "base/clock.h"
#include "base/native.h"
#include "base/rules.h"
#include "smp/entry.h"
#include "users/each.h"
#include "users/membarrier.h"

/* include/linux/sched/mm.h: of an mm, and of the run queue of who runs in it. */
#define PRIVATE_READY (1u << 0)
#define PRIVATE (1u << 1)
#define GLOBAL_READY (1u << 2)
#define GLOBAL (1u << 3)
#define SYNC_CORE_READY (1u << 4)
#define SYNC_CORE (1u << 5)
#define RSEQ_READY (1u << 6)
#define RSEQ (1u << 7)

#define COMMANDS                                                                               \
    (SHI_MB_GLOBAL_EXPEDITED | SHI_MB_REGISTER_GLOBAL_EXPEDITED | SHI_MB_PRIVATE_EXPEDITED |   \
     SHI_MB_REGISTER_PRIVATE_EXPEDITED | SHI_MB_PRIVATE_EXPEDITED_SYNC_CORE |                  \
     SHI_MB_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE | SHI_MB_PRIVATE_EXPEDITED_RSEQ |             \
     SHI_MB_REGISTER_PRIVATE_EXPEDITED_RSEQ | SHI_MB_GET_REGISTRATIONS)

/* ---- what the others are interrupted for ---------------------------------------------- */

void shi_sync_core(void)
{
#if defined(__x86_64__)
    uint32_t eax = 0, ebx, ecx = 0, edx;
    __asm__ __volatile__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx)::"memory");
#elif defined(__aarch64__)
    __asm__ __volatile__("dsb ish\n\tisb" ::: "memory");
#endif
    shi_fence_full();
}

static void ipi_mb(void *info)
{
    (void)info;
    shi_fence_full(); /* "IPIs should be serializing but paranoid" */
}

static void ipi_sync_core(void *info)
{
    struct shi_self *self = shi_this_cpu();
    struct shi_tlb_cpu *row = self ? shi_tlb_row(self) : NULL;
    (void)info;
    shi_fence_full();
    shi_sync_core();
    if (row)
        shi_tlb_event(row, SHI_TE_sync_core, 1);
}

static void ipi_rseq(void *info)
{
    struct shi_self *self = shi_this_cpu();
    struct shi_tlb_cpu *row = self ? shi_tlb_row(self) : NULL;
    (void)info;
    shi_fence_full();
    if (row && !shi_rule_off(self->m, SHI_RULE_membarrier_rseq))
        shi_fetch_add_full(&row->rseq, 1); /* rseq_preempt(current) */
}

void shi_membarrier_online(struct shi_self *self)
{
    struct shi_tlb_cpu *row = shi_tlb_row(self);
    if (row)
        shi_fetch_add_full(&row->rseq, 1);
}

static void ipi_sync_rq_state(void *info)
{
    struct shi_self *self = shi_this_cpu();
    struct shi_tlb_cpu *row = self ? shi_tlb_row(self) : NULL;
    struct shi_vm_view v;
    uint32_t mm;
    memcpy(&mm, info, sizeof mm);
    if (!row || mm >= SHI_MMS || shi_load_relaxed(&row->mm) != mm || !shi_vm_view(self->m, &v))
        return;
    shi_store_relaxed(&row->membarrier_state, shi_load_full(&v.mms[mm].membarrier_state));
    shi_fence_full();
}

static int mb_handler, sync_core_handler, rseq_handler, state_handler;

void shi_membarrier_handlers(void)
{
    if (mb_handler)
        return;
    mb_handler = shi_native_register("membarrier_ipi_mb", ipi_mb);
    sync_core_handler = shi_native_register("membarrier_ipi_sync_core", ipi_sync_core);
    rseq_handler = shi_native_register("membarrier_ipi_rseq", ipi_rseq);
    state_handler = shi_native_register("membarrier_ipi_sync_rq_state", ipi_sync_rq_state);
}

/* ---- whom ------------------------------------------------------------------------------- */

struct call {
    struct shi_self *self;
    struct shi_vm_view v;
    const struct shi_flusher *by;
    uint32_t mm; /* current->mm */
    uint32_t users, online;
    shi_a64 mask[SHI_MAX_CPUS / 64];
};

/* Does a task of the mm run there?  (rq->curr->mm; 0: of any)  What a dead process has left in
 * its row does not count. */
static bool runs(const struct call *call, uint32_t cpu, uint32_t mm)
{
    const struct shi_tlb_cpu *row = &call->v.cpus[cpu];
    uint64_t w = shi_load_full(&shi_slot(call->self->m, cpu)->word);
    uint32_t current = shi_load_full(&row->mm);
    return shi_word_state(w) != SHI_DEAD &&
           (uint16_t)shi_load_full(&row->gen) == shi_word_gen(w) && current &&
           (!mm || current == mm);
}

static bool is_online(const struct call *call, uint32_t cpu)
{
    return shi_word_online(shi_load_full(&shi_slot(call->self->m, cpu)->word));
}

/* mm_users and num_online_cpus.  After a full barrier: who begins to use the mm later than this
 * look has one behind it (shi_mm_use), so it sees what the caller has done. */
static void count(struct call *call)
{
    uint32_t cpu;
    shi_fence_full();
    call->users = call->online = 0;
    for (cpu = 0; cpu < call->self->m->ncpus; cpu++) {
        call->users += runs(call, cpu, call->mm);
        call->online += is_online(call, cpu);
    }
}

static void choose(struct call *call, uint32_t mm, uint32_t state)
{
    uint32_t cpu, i;
    for (i = 0; i < call->v.mask_words; i++)
        shi_store_relaxed(&call->mask[i], 0);
    for (cpu = 0; cpu < call->self->m->ncpus; cpu++)
        if (is_online(call, cpu) && runs(call, cpu, mm) &&
            (shi_load_full(&call->v.cpus[cpu].membarrier_state) & state) == state)
            shi_store_relaxed(&call->mask[cpu / 64],
                              shi_load_relaxed(&call->mask[cpu / 64]) | 1ull << (cpu % 64));
}

static void here_sync_core(void *arg)
{
    (void)arg;
    ipi_sync_core(NULL);
}

static void here_rseq(void *arg)
{
    (void)arg;
    ipi_rseq(NULL);
}

static void here_state(void *arg)
{
    struct call *call = arg;
    ipi_sync_rq_state(&call->mm);
}

static int send(struct call *call, int handler, void (*local)(void *))
{
    unsigned char info[SHI_INLINE] = { 0 };
    struct shi_each each = { .native = handler,
                             .renumber = call->by->renumber,
                             .info = info,
                             .mask = call->mask,
                             .local = local,
                             .arg = call,
                             .waiter = call->by->waiter,
                             .waiter_arg = call->by->arg };
    memcpy(info, &call->mm, sizeof call->mm);
    return shi_each_cpu_native(call->self, &each);
}

/* ---- the commands ------------------------------------------------------------------------- */

static int global_expedited(struct call *call)
{
    count(call);
    if (call->online == 1)
        return 0;
    choose(call, 0, GLOBAL);
    int err = send(call, mb_handler, NULL);
    shi_fence_full();
    return err;
}

/* A broken rule: the last of those that are chosen, but for the caller, is forgotten. */
static void skip_last(struct call *call)
{
    uint32_t cpu;
    for (cpu = call->self->m->ncpus; cpu--;) {
        uint64_t word = shi_load_relaxed(&call->mask[cpu / 64]), bit = 1ull << (cpu % 64);
        if (word & bit && (call->self->host || cpu != call->self->id)) {
            shi_store_relaxed(&call->mask[cpu / 64], word & ~bit);
            return;
        }
    }
}

/* `ready`: which registration it takes; `cpu` < 0: all. */
static int private_expedited(struct call *call, uint32_t ready, int64_t cpu)
{
    bool core = ready == SYNC_CORE_READY;
    int handler = core ? sync_core_handler : ready == RSEQ_READY ? rseq_handler : mb_handler;
    if (!(shi_load_full(&call->v.mms[call->mm].membarrier_state) & ready) &&
        !shi_rule_off(call->self->m, SHI_RULE_membarrier_registered))
        return -EPERM;
    count(call);
    if (!core && (call->users == 1 || call->online == 1))
        return 0;
    choose(call, call->mm, 0);
    if (cpu >= 0) { /* one: silently none if it is offline, or runs something else */
        bool chosen = cpu < call->self->m->ncpus &&
                      (shi_load_relaxed(&call->mask[cpu / 64]) >> (cpu % 64) & 1);
        uint32_t i;
        if (!chosen)
            return 0;
        for (i = 0; i < call->v.mask_words; i++)
            shi_store_relaxed(&call->mask[i], i == cpu / 64 ? 1ull << (cpu % 64) : 0);
    }
    if (shi_rule_off(call->self->m, SHI_RULE_membarrier_ipi))
        skip_last(call);
    /* smp_call_function_many() skips the caller, whose fence is below; not SYNC_CORE, where
     * another task of the mm may run here next, and not a CPU that was named. */
    int err = send(call, handler,
                   core                              ? here_sync_core
                   : cpu >= 0 && ready == RSEQ_READY ? here_rseq
                                                     : NULL);
    shi_fence_full();
    return err;
}

/* sync_runqueues_membarrier_state() */
static int sync_runqueues(struct call *call)
{
    count(call);
    if (call->users == 1 || call->online == 1) {
        ipi_sync_rq_state(&call->mm);
        return 0;
    }
    choose(call, call->mm, 0);
    return send(call, state_handler, here_state);
}

static int enroll(struct call *call, uint32_t state, uint32_t ready)
{
    shi_a32 *of = &call->v.mms[call->mm].membarrier_state;
    if (shi_load_full(of) & ready)
        return 0;
    shi_fetch_or_full(of, state);
    int err = sync_runqueues(call);
    if (!err)
        shi_fetch_or_full(of, ready);
    return err;
}

static int registrations(const struct call *call)
{
    static const struct {
        uint32_t state, cmd;
    } all[] = {
        { GLOBAL | GLOBAL_READY, SHI_MB_REGISTER_GLOBAL_EXPEDITED },
        { PRIVATE | PRIVATE_READY, SHI_MB_REGISTER_PRIVATE_EXPEDITED },
        { SYNC_CORE | SYNC_CORE_READY, SHI_MB_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE },
        { RSEQ | RSEQ_READY, SHI_MB_REGISTER_PRIVATE_EXPEDITED_RSEQ },
    };
    uint32_t state = shi_load_full(&call->v.mms[call->mm].membarrier_state), mask = 0, i;
    for (i = 0; i < sizeof all / sizeof *all; i++)
        if (state & all[i].state) {
            mask |= all[i].cmd;
            state &= ~all[i].state;
        }
    return (int)mask;
}

int shi_membarrier(struct shi_self *self, uint32_t cmd, uint32_t flags, uint32_t cpu,
                   bool global, const struct shi_flusher *by)
{
    struct call call;
    bool named = cmd == SHI_MB_PRIVATE_EXPEDITED_RSEQ && flags == SHI_MB_FLAG_CPU;
    if (flags && !named)
        return -EINVAL;
    if (cmd == SHI_MB_QUERY)
        return COMMANDS | (global ? SHI_MB_GLOBAL : 0);
    if (cmd & (cmd - 1) || !(cmd & COMMANDS))
        return -EINVAL;
    call.self = self;
    call.by = by;
    call.mm = shi_mm_current(self);
    if (!call.mm || !shi_vm_view(self->m, &call.v))
        return -ESRCH;
    switch (cmd) {
    case SHI_MB_GLOBAL_EXPEDITED:
        return global_expedited(&call);
    case SHI_MB_REGISTER_GLOBAL_EXPEDITED:
        return enroll(&call, GLOBAL, GLOBAL_READY);
    case SHI_MB_PRIVATE_EXPEDITED:
        return private_expedited(&call, PRIVATE_READY, -1);
    case SHI_MB_REGISTER_PRIVATE_EXPEDITED:
        return enroll(&call, PRIVATE, PRIVATE_READY);
    case SHI_MB_PRIVATE_EXPEDITED_SYNC_CORE:
        return private_expedited(&call, SYNC_CORE_READY, -1);
    case SHI_MB_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE:
        return enroll(&call, PRIVATE | SYNC_CORE, SYNC_CORE_READY);
    case SHI_MB_PRIVATE_EXPEDITED_RSEQ:
        return private_expedited(&call, RSEQ_READY, named ? (int64_t)cpu : -1);
    case SHI_MB_REGISTER_PRIVATE_EXPEDITED_RSEQ:
        return enroll(&call, PRIVATE | RSEQ, RSEQ_READY);
    default:
        return registrations(&call);
    }
}

/* ---- restartable sequences ------------------------------------------------------------------- */

uint32_t shi_rseq_begin(struct shi_self *self)
{
    struct shi_tlb_cpu *row = shi_tlb_row(self);
    return row ? shi_load_full(&row->rseq) : 0;
}

bool shi_rseq_commit(struct shi_self *self, uint32_t begun, shi_a64 *where, uint64_t value)
{
    struct shi_tlb_cpu *row = shi_tlb_row(self);
    shi_enter(self); /* an interrupt comes before the look or after the store */
    bool whole = row && shi_load_relaxed(&row->rseq) == begun;
    if (whole)
        shi_store_relaxed(where, value);
    shi_leave(self);
    return whole;
}

/* ---- the store-buffer litmus test -------------------------------------------------------------- */

#define STALL_NS 20000000ull
#define ALONE_NS 100000ull /* then the core may be what the other side waits for */
#define LOOKS 256u

/* Spin until the other side is in `round`.  False: it does not come. */
static bool meet(const shi_a64 *other, uint64_t round)
{
    uint64_t end = 0;
    uint32_t i = 0;
    while (shi_load_acquire(other) < round)
        if (++i % LOOKS == 0) {
            uint64_t now = shi_now_ns();
            if (!end)
                end = now + STALL_NS;
            else if (now > end)
                return false;
            else if (now > end - STALL_NS + ALONE_NS)
                sched_yield();
        }
    return true;
}

/* So that the two meet now a little earlier and now a little later. */
static void vary(uint64_t round)
{
    uint64_t i;
    for (i = round * 7 % 61; i; i--)
        shi_signal_fence();
}

/* Behind all that either side has done before: they meet again however one has left. */
static uint64_t next_round(const struct shi_litmus *l)
{
    uint64_t fast = shi_load_full(&l->fast), slow = shi_load_full(&l->slow);
    return 1 + (fast > slow ? fast : slow);
}

uint64_t shi_litmus_fast(struct shi_self *self, struct shi_litmus *l, uint64_t rounds)
{
    uint64_t first = next_round(l), round;
    (void)self;
    for (round = first; round < first + rounds; round++) {
        shi_store_release(&l->fast, round);
        if (!meet(&l->slow, round))
            break;
        shi_store_relaxed(&l->x, 1);
        shi_signal_fence(); /* barrier(): for the compiler alone */
        uint64_t r1 = shi_load_relaxed(&l->y);
        shi_store_relaxed(&l->r1, r1);
        shi_store_release(&l->done, round);
    }
    return round - first;
}

int64_t shi_litmus_slow(struct shi_self *self, struct shi_litmus *l, uint64_t rounds,
                        uint32_t cmd, uint64_t *both_zero, const struct shi_flusher *by)
{
    uint64_t first = next_round(l), round;
    int err;
    *both_zero = 0;
    for (round = first; round < first + rounds; round++) {
        shi_store_relaxed(&l->x, 0);
        shi_store_relaxed(&l->y, 0);
        shi_store_release(&l->slow, round);
        if (!meet(&l->fast, round))
            break;
        vary(round);
        shi_store_relaxed(&l->y, 1);
        if (!cmd)
            shi_fence_full();
        else if ((err = shi_membarrier(self, cmd, 0, 0, false, by)))
            return err;
        uint64_t r2 = shi_load_relaxed(&l->x);
        if (!meet(&l->done, round))
            break;
        *both_zero += !r2 && !shi_load_relaxed(&l->r1);
    }
    return (int64_t)(round - first);
}
