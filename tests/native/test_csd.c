/* SPDX-License-Identifier: MIT */
/* Who may use a csd, for how long, and how it comes back: also from the dead. */
#include "rig.h"

#include <errno.h>
#include <fcntl.h>

#include "smp/queue.h"
#include "smp/stall.h"

static struct rig rig;

static int64_t get(struct shi_self *self)
{
    shi_enter(self);
    int64_t local = shi_csd_get(self);
    shi_leave(self);
    return local;
}

static void put(struct shi_self *self, uint32_t local)
{
    shi_enter(self);
    shi_csd_put(self, local);
    shi_leave(self);
}

static void every_csd_once(void)
{
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    uint32_t n = rig.m.csds_per_slot, i;
    uint8_t *seen = calloc(n, 1);
    CHECK(seen);
    for (i = 0; i < n; i++) {
        int64_t local = get(&rig.host);
        CHECK(local >= 0 && local < n && !seen[local]);
        seen[local] = 1;
    }
    CHECK(get(&rig.host) == -EAGAIN);
    CHECK(shi_load_acquire(&rig.host.slot->csd_top) == n);
    put(&rig.host, 17);
    CHECK(get(&rig.host) == 17);
    CHECK(get(&rig.host) == -EAGAIN);
    for (i = 0; i < n; i++)
        put(&rig.host, i);
    free(seen);
    rig_stop(&rig);
}

/* wait=0 calls: at least 64 at a time, and they come back when they were taken up. */
static void the_pool(void)
{
    uint32_t i, got = 0;
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    shi_enter(&rig.host);
    for (i = 0; i < 1000; i++) {
        int64_t local = shi_nowait_get(&rig.host);
        if (local < 0) {
            CHECK(local == -EAGAIN);
            break;
        }
        /* Locked and never queued: nobody takes it up. */
        CHECK(shi_csd_trylock(&rig.host, shi_own_csd(&rig.host, (uint32_t)local), SHI_CSD_ASYNC,
                              0) == 0);
        shi_csd_leave(&rig.host, (uint32_t)local);
        got++;
    }
    CHECK(got == SHI_NOWAIT_POOL && got >= 64);
    CHECK(shi_csd_oldest(&rig.host) != UINT32_MAX);
    shi_csd_cancel(shi_own_csd(&rig.host, shi_csd_oldest(&rig.host)));
    CHECK(shi_nowait_get(&rig.host) >= 0);
    CHECK(shi_nowait_get(&rig.host) == -EAGAIN);
    shi_leave(&rig.host);
    rig_stop(&rig);
}

/* A csd that goes from one wait=0 call to the next is told as out all the time, and is given
 * back with all that it held. */
static void from_call_to_call(void)
{
    struct shi_self *self = &rig.host;
    uint32_t i, out;
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    int64_t func = shi_func_publish(self, "pickle", 6);
    CHECK(func >= 0);
    shi_enter(self);
    for (i = 0; i < 3 * SHI_NOWAIT_POOL; i++) {
        const struct shi_call call = { .func = (uint32_t)func, .apply = SHI_A_INFO };
        uint32_t oldest = shi_csd_oldest(self);
        if (i >= SHI_NOWAIT_POOL) { /* one of them is unlocked */
            CHECK(shi_nowait_get(self) == -EAGAIN);
            shi_csd_cancel(shi_own_csd(self, oldest));
        }
        int64_t local = shi_nowait_get(self);
        CHECK(local >= 0);
        if (i >= SHI_NOWAIT_POOL)
            CHECK(local == oldest && shi_load_relaxed(&self->slot->csds_out) == out);
        out = shi_load_relaxed(&self->slot->csds_out);
        CHECK(out == (i < SHI_NOWAIT_POOL ? i + 1 : SHI_NOWAIT_POOL));
        CHECK(shi_csd_fill(self, (uint32_t)local, &call) == 0);
        CHECK(self->sender.funcs[func].in_flight == out);
        CHECK(shi_csd_trylock(self, shi_own_csd(self, (uint32_t)local), SHI_CSD_ASYNC, 0) == 0);
        shi_csd_leave(self, (uint32_t)local);
    }
    for (i = 0; i < SHI_NOWAIT_POOL; i++)
        shi_csd_cancel(shi_own_csd(self, i));
    shi_csd_collect(self);
    CHECK(!self->sender.nowait && !self->sender.funcs[func].in_flight);
    CHECK(!shi_load_relaxed(&self->slot->csds_out));
    shi_leave(self);
    rig_stop(&rig);
}

/* One payload, many users: it goes with the last. */
static void sharing(void)
{
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    struct shi_self *self = &rig.host;
    int order;
    for (order = 0; order < 2; order++) {
        shi_enter(self);
        uint32_t owner = (uint32_t)shi_csd_get(self), one = (uint32_t)shi_csd_get(self);
        uint32_t two = (uint32_t)shi_csd_get(self);
        int64_t at = shi_csd_block(self, owner, rig.m.arena_bytes);
        CHECK(at == 0);
        shi_csd_share(self, one, owner);
        shi_csd_share(self, two, owner);
        CHECK(shi_csd_block(self, (uint32_t)shi_csd_get(self), 1) == -ENOBUFS);
        if (order) { /* the sharing ends first, or last */
            shi_csd_put(self, one);
            shi_csd_put(self, two);
            CHECK(shi_csd_block(self, (uint32_t)shi_csd_get(self), 1) == -ENOBUFS);
            shi_csd_end_sharing(self, owner);
        } else {
            shi_csd_end_sharing(self, owner);
            shi_csd_put(self, two);
            CHECK(shi_csd_block(self, (uint32_t)shi_csd_get(self), 1) == -ENOBUFS);
            shi_csd_put(self, one);
        }
        uint32_t next = (uint32_t)shi_csd_get(self);
        CHECK(shi_csd_block(self, next, rig.m.arena_bytes) == 0);
        shi_csd_put(self, next);
        shi_leave(self);
    }
    rig_stop(&rig);
}

/* The reaper completes what was addressed to the dead, that generation, and no more. */
static void the_reaper(void)
{
    uint32_t locals[3], i;
    rig_boot(&rig, 2, SHI_IDLE_HALT);
    struct shi_self *self = &rig.host;
    uint16_t gen = shi_word_gen(shi_load_full(&shi_slot(&rig.m, 1)->word));
    shi_enter(self);
    for (i = 0; i < 3; i++) {
        locals[i] = (uint32_t)shi_csd_get(self);
        struct shi_csd *csd = shi_own_csd(self, locals[i]);
        CHECK(shi_csd_trylock(self, csd, SHI_CSD_SYNC, i == 2 ? 0 : 1) == 0);
        /* As a push to it would have: in hand of CPU 1; the second, of one before it. */
        uint64_t lock = shi_load_full(&csd->lock);
        uint16_t own = (uint16_t)(i == 1 ? gen - 1 : gen);
        shi_store_full(&csd->lock, lock | (uint64_t)own << SHI_CSD_GEN_SHIFT);
    }
    shi_leave(self);
    CHECK(shi_reap_complete(&rig.firmware, 1) == 1);
    uint64_t lock = shi_load_full(&shi_own_csd(self, locals[0])->lock);
    CHECK(!(lock & SHI_CSD_LOCK) && (lock & SHI_CSD_DIED));
    CHECK(shi_csd_locked(shi_own_csd(self, locals[1])));
    CHECK(shi_csd_locked(shi_own_csd(self, locals[2])));
    CHECK(shi_reap_complete(&rig.firmware, 1) == 0);
    /* Used again it is like new. */
    shi_enter(self);
    CHECK(shi_csd_trylock(self, shi_own_csd(self, locals[0]), SHI_CSD_SYNC, 0) == 0);
    lock = shi_load_full(&shi_own_csd(self, locals[0])->lock);
    CHECK((lock & SHI_CSD_LOCK) && !(lock & SHI_CSD_DIED));
    for (i = 0; i < 3; i++)
        shi_csd_cancel(shi_own_csd(self, locals[i]));
    shi_leave(self);
    rig_stop(&rig);
}

/* While somebody may be about to signal a pid, it is not given back. */
static void hazards(void)
{
    rig_boot(&rig, 2, SHI_IDLE_HALT);
    CHECK(rig_unguarded(&rig, 1));
    shi_store_full(&shi_slot(&rig.m, 0)->ringing, 2); /* CPU 0 rings CPU 1 */
    CHECK(!rig_unguarded(&rig, 1));
    CHECK(rig_unguarded(&rig, 0));
    shi_store_full(&shi_slot(&rig.m, 0)->ringing, 0);
    CHECK(rig_unguarded(&rig, 1));
    shi_store_full(&rig.host.slot->ringing, 2);
    CHECK(!rig_unguarded(&rig, 1));
    shi_store_full(&rig.host.slot->ringing, 0);
    rig_stop(&rig);
}

/* A waiter that parks and an unlock that comes at the same time: a ring, or no sleep. */
#define ROUNDS 20000

static shi_a32 turn;

static void *unlocker(void *arg)
{
    struct shi_csd *csd = arg;
    uint32_t i;
    for (i = 1; i <= ROUNDS; i++) {
        while (shi_load_acquire(&turn) != i)
            shi_cpu_relax();
        uint32_t spin = i % 50;
        while (spin--)
            shi_cpu_relax();
        shi_csd_unlock(&rig.firmware, csd);
    }
    return NULL;
}

static void parking(void)
{
    pthread_t thread;
    struct shi_wait wait;
    uint32_t i, late = 0;
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    struct shi_self *self = &rig.host;
    uint32_t local = (uint32_t)get(self);
    struct shi_csd *csd = shi_own_csd(self, local);
    shi_store_full(&turn, 0);
    CHECK(pthread_create(&thread, NULL, unlocker, csd) == 0);
    for (i = 1; i <= ROUNDS; i++) {
        shi_enter(self);
        CHECK(shi_csd_trylock(self, csd, SHI_CSD_SYNC, 0) == 0);
        shi_leave(self);
        uint64_t start = shi_now_ns();
        shi_wait_begin(self, &wait, shi_own_index(self, local), 0, 0);
        shi_store_release(&turn, i);
        while (shi_wait_sleep(self, &wait) > 0)
            ;
        shi_wait_end(self, &wait);
        late += shi_now_ns() - start > 9000000; /* the 10 ms net caught it */
    }
    CHECK(pthread_join(thread, NULL) == 0);
    /* A busy machine is late now and then; a lost ring would be the rule. */
    CHECK(late < ROUNDS / 100);
    put(self, local);
    rig_stop(&rig);
}

/* csd_unlock(): WARN_ON(!(flags & CSD_FLAG_LOCK)).  row 24 */
static void double_unlock(void)
{
    char text[256] = { 0 };
    int pipes[2], saved = dup(STDERR_FILENO);
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    struct shi_self *self = &rig.host;
    uint32_t local = (uint32_t)get(self);
    struct shi_csd *csd = shi_own_csd(self, local);
    CHECK(pipe2(pipes, O_NONBLOCK) == 0 && dup2(pipes[1], STDERR_FILENO) >= 0);
    CHECK(shi_csd_trylock(self, csd, SHI_CSD_SYNC, 0) == 0);
    shi_csd_unlock(self, csd);
    CHECK(read(pipes[0], text, sizeof text - 1) < 0 && errno == EAGAIN);
    shi_csd_unlock(self, csd);
    CHECK(read(pipes[0], text, sizeof text - 1) > 0);
    CHECK(dup2(saved, STDERR_FILENO) >= 0);
    CHECK(strstr(text, "WARNING: csd: CSD") && strstr(text, "nobody had locked it"));
    CHECK(!shi_csd_locked(csd));
    close(pipes[0]);
    close(pipes[1]);
    close(saved);
    put(self, local);
    rig_stop(&rig);
}

/* Is it due `ns` after the last message, and not before?  (As if it had been so long ago.) */
static bool due_after(struct shi_stall *stall, const struct shi_csd *csd, uint64_t ns)
{
    stall->said_ns = shi_now_ns() - (ns - 50000000);
    if (shi_stall_due(&rig.host, stall, csd))
        return false;
    stall->said_ns = shi_now_ns() - ns;
    return shi_stall_due(&rig.host, stall, csd);
}

/* csd_lock_wait_toolong: the first after csd_lock_timeout; then each after one timeout more
 * than the one before, times ilog2(CPUs online) / 2 + 1. */
static void back_off(void)
{
    const uint64_t second = 1000000000;
    uint32_t cpu;
    rig_quiet(&rig, 8);
    for (cpu = 0; cpu < 8; cpu++)
        rig_set_state(&rig, cpu, SHI_HALTED);
    shi_store_relaxed(&rig.m.header->csd_lock_timeout, 1000);
    struct shi_stall stall = { 0 };
    uint32_t local = (uint32_t)get(&rig.host);
    struct shi_csd *csd = shi_own_csd(&rig.host, local);
    CHECK(shi_csd_trylock(&rig.host, csd, SHI_CSD_SYNC, 0) == 0);
    CHECK(!shi_stall_due(&rig.host, &stall, csd));
    CHECK(due_after(&stall, csd, second));
    CHECK(due_after(&stall, csd, 2 * 2 * second)); /* ilog2(8) / 2 + 1 */
    CHECK(due_after(&stall, csd, 2 * 3 * second));
    for (cpu = 3; cpu < 8; cpu++) /* three are left: ilog2(3) / 2 + 1, of the next interval */
        rig_set_state(&rig, cpu, SHI_OFFLINE);
    CHECK(due_after(&stall, csd, 2 * 4 * second));
    CHECK(due_after(&stall, csd, 5 * second));
    CHECK(stall.messages == 5 && shi_stall_any(&rig.m));
    shi_stall_over(&rig.host, &stall);
    CHECK(!shi_stall_any(&rig.m));
    shi_csd_cancel(csd);
    put(&rig.host, local);
    rig_unquiet(&rig);
}

int main(void)
{
    every_csd_once();
    the_pool();
    from_call_to_call();
    sharing();
    the_reaper();
    hazards();
    parking();
    double_unlock();
    back_off();
    return 0;
}
