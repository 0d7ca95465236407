/* SPDX-License-Identifier: MIT */
/*
 * How long a sender leaves its csd to a CPU that polls: learnt for each target and kind of
 * function, by calls that are sent alone and waited for; and in the meantime the sender's own
 * queue is served.
 */
#include "rig.h"

#include "smp/queue.h"
#include "smp/smp.h"

#define CALLS 3000

static struct rig rig;

static uint32_t learnt(uint32_t dst, uint32_t func)
{
    return shi_load_relaxed(shi_patience(&rig.host, dst, shi_patience_kind(func)));
}

static int64_t post(struct shi_self *self, uint32_t dst, uint32_t func, uint64_t type)
{
    const struct shi_call call = { .func = func | SHI_FUNC_NATIVE, .apply = SHI_A_INFO };
    int64_t local;
    uint32_t busy;
    while ((local = shi_call_post(self, &call, type, dst)) == -EAGAIN)
        CHECK(shi_call_room(self, NULL, NULL, &busy) == 0);
    CHECK(local >= 0);
    return local;
}

static void call(struct shi_self *self, uint32_t dst, uint32_t func)
{
    uint32_t local = (uint32_t)post(self, dst, func, SHI_CSD_SYNC);
    CHECK(shi_call_wait(self, local, dst, 0, NULL, NULL) == 0);
    CHECK(shi_load_relaxed(&shi_own_csd(self, local)->status) == SHI_S_DONE);
    shi_call_end(self, local);
    CHECK(self->sender.notes[local].polled == 0); /* not the next one's */
}

/* A handler that takes longer than any patience. */
static void slow(void *info)
{
    uint64_t from = shi_now_ns();
    (void)info;
    while (shi_now_ns() - from < 20000)
        ;
}

static void by_target_and_function(uint32_t noop, uint32_t late)
{
    uint32_t i;
    CHECK((noop & 1) != (late & 1)); /* of two kinds */
    for (i = 0; i < CALLS; i++)
        call(&rig.host, 0, late);
    /* One that stood still meanwhile finds the answer there, which is a round less. */
    for (i = 0; i < CALLS && learnt(0, late | SHI_FUNC_NATIVE) < SHI_PATIENCE_MAX; i++)
        call(&rig.host, 0, late);
    /* Longer each time, and no longer than it may be: a slow call takes that anyway. */
    CHECK(learnt(0, late | SHI_FUNC_NATIVE) >= SHI_PATIENCE_MAX);
    CHECK(learnt(0, late | SHI_FUNC_NATIVE) <= SHI_PATIENCE_MAX + 16);
    CHECK(learnt(0, noop | SHI_FUNC_NATIVE) == 0);
    CHECK(learnt(1, late | SHI_FUNC_NATIVE) == 0);
    CHECK(learnt(0, late) == 0); /* a Python function of that number */
    /* Sooner by a round each time that the answer was there. */
    shi_a16 *patience = shi_patience(&rig.host, 1, shi_patience_kind(noop | SHI_FUNC_NATIVE));
    for (i = 0; i < CALLS; i++) {
        shi_store_relaxed(patience, SHI_PATIENCE_MAX);
        call(&rig.host, 1, noop);
        uint32_t now = shi_load_relaxed(patience);
        CHECK(now == SHI_PATIENCE_MAX || now == SHI_PATIENCE_MAX - 1);
    }
    /* What nobody waits for, or is waited for later, is no answer that is near. */
    shi_store_relaxed(patience, 7);
    for (i = 0; i < 200; i++)
        (void)post(&rig.host, 1, noop, SHI_CSD_ASYNC);
    uint32_t local = (uint32_t)post(&rig.host, 1, noop, SHI_CSD_SYNC | SHI_CSD_PARKED);
    CHECK(rig.host.sender.notes[local].polled == 0);
    CHECK(shi_call_wait(&rig.host, local, 1, 0, NULL, NULL) == 0);
    shi_call_end(&rig.host, local);
    CHECK(shi_load_relaxed(patience) == 7);
}

/* Nor is that of a CPU that has to be woken. */
static void halted(uint32_t noop)
{
    uint32_t i;
    for (i = 0; i < 20; i++) {
        while (shi_word_state(shi_load_relaxed(&shi_slot(&rig.m, 1)->word)) != SHI_HALTED)
            sched_yield();
        call(&rig.host, 1, noop);
    }
    CHECK(learnt(1, noop | SHI_FUNC_NATIVE) == 0);
}

/* Two CPUs call each other, each time with all the patience there is: each serves the other
 * meanwhile, or both would wait for ever. */
static uint32_t quick;
static shi_a32 done;

static void cross(struct shi_self *self)
{
    uint32_t index, dst = 1 - self->id, i;
    while ((index = shi_list_pop(self, &self->deferred)) != UINT32_MAX)
        shi_csd_unlock(self, shi_csd(self->m, index));
    for (i = 0; i < CALLS; i++) {
        shi_store_relaxed(shi_patience(self, dst, shi_patience_kind(quick | SHI_FUNC_NATIVE)),
                          SHI_PATIENCE_MAX);
        call(self, dst, quick);
    }
    shi_fetch_add_full(&done, 1);
}

static void crossed(void)
{
    const struct shi_call begin = { .func = 1, .apply = SHI_A_INFO }; /* no native one */
    uint32_t cpu;
    for (cpu = 0; cpu < 2; cpu++)
        CHECK(shi_call_post(&rig.host, &begin, SHI_CSD_ASYNC, cpu) >= 0);
    while (shi_load_acquire(&done) < 2)
        sched_yield();
}

int main(void)
{
    shi_native_init();
    uint32_t noop = (uint32_t)shi_native_find("noop");
    int late = shi_native_register("slow", slow);
    while (((uint32_t)late & 1) == (noop & 1))
        late = shi_native_register("slow again", slow);
    quick = noop;
    rig_deferred = cross;
    rig_boot(&rig, 2, SHI_IDLE_POLL);
    by_target_and_function(noop, (uint32_t)late);
    crossed();
    rig_stop(&rig);
    rig_boot(&rig, 2, SHI_IDLE_HALT);
    halted(noop);
    rig_stop(&rig);
    return 0;
}
