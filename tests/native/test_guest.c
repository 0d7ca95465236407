/* SPDX-License-Identifier: MIT */
/* Guests: hosts that come to a machine that runs, call at the same time, die, and are
 * followed by others in their slots. */
#include "rig.h"

#include <errno.h>

#include "base/trace.h"

#define TURNS 20
#define CALLS 50
#define HOSTS 3

static struct rig rig;
static pthread_mutex_t firmware = PTHREAD_MUTEX_INITIALIZER; /* which has one thread */

static struct shi_self *admit(uint32_t slot)
{
    struct shi_self *self = calloc(1, sizeof *self);
    CHECK(self);
    pthread_mutex_lock(&firmware);
    shi_guest_admit(&rig.firmware, slot, 1);
    pthread_mutex_unlock(&firmware);
    CHECK(shi_self_init(self, &rig.m, slot) == 0);
    CHECK(self->host && self->guest && self->gen);
    return self;
}

/* It dies: what it has in private memory goes with it. */
static void die(struct shi_self *self)
{
    uint32_t slot = self->id;
    shi_self_fini(self);
    free(self);
    pthread_mutex_lock(&firmware);
    shi_guest_bury(&rig.firmware, slot);
    pthread_mutex_unlock(&firmware);
}

static void *host(void *arg)
{
    uint32_t slot = (uint32_t)(uintptr_t)arg, count = (uint32_t)shi_native_find("count");
    uint32_t turn, i;
    for (turn = 0; turn < TURNS; turn++) {
        struct shi_self *self = admit(slot);
        for (i = 0; i < CALLS; i++)
            CHECK(rig_call(self, i % rig.ncpus, count, rig.m.array_offset, SHI_K_POINTER) == 0);
        die(self);
    }
    return NULL;
}

static void hosts_call_and_are_followed_by_others(void)
{
    pthread_t thread[HOSTS];
    uint32_t i;
    rig_boot(&rig, 2, SHI_IDLE_HALT);
    for (i = 0; i < HOSTS; i++)
        CHECK(pthread_create(&thread[i], NULL, host,
                             (void *)(uintptr_t)(shi_first_guest(&rig.m) + i)) == 0);
    for (i = 0; i < HOSTS; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    CHECK(shi_load_acquire((shi_a64 *)(rig.m.base + rig.m.array_offset)) ==
          HOSTS * TURNS * CALLS);
    for (i = 0; i < HOSTS; i++)
        CHECK(shi_guest_clear(&rig.firmware, shi_first_guest(&rig.m) + i) == 0);
    rig_stop(&rig);
}

static void what_was_never_pushed_is_free_again(void)
{
    uint32_t slot;
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    slot = shi_first_guest(&rig.m);
    struct shi_self *self = admit(slot);
    int64_t local = shi_csd_get(self);
    CHECK(local >= 0);
    CHECK(shi_csd_trylock(self, shi_own_csd(self, (uint32_t)local), SHI_CSD_SYNC, 0) == 0);
    die(self);
    CHECK(shi_guest_clear(&rig.firmware, slot) == 0);
    self = admit(slot);
    CHECK(self->sender.nfree == self->sender.csd_top && !self->sender.flight_count);
    CHECK(!shi_csd_locked(shi_own_csd(self, (uint32_t)local)));
    die(self);
    rig_stop(&rig);
}

/* What a thread of a host that has left is about to say is not in the next one's ring. */
static void who_has_left_says_nothing_more(void)
{
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    uint32_t slot = shi_first_guest(&rig.m);
    struct shi_self *self = admit(slot);
    struct shi_trace_area *area = rig_trace(&rig, 2);
    SHI_TRACE(self, call_begin, 0, 0, 0, 0);
    struct shi_trace_record *ring = shi_trace_ring(&rig.m, area, slot);
    CHECK(ring->event == SHI_T_call_begin && ring->seq == 1);
    CHECK(shi_self_leave(self) == 0);
    SHI_TRACE(self, call_end, 0, 0, 0, 0);
    CHECK(ring->event == SHI_T_call_begin && ring[1].seq == 0);
    die(self);
    rig_stop(&rig);
}

/* A function that the CPU is in until it is told otherwise. */
static shi_a32 inside, go_on;

static void held_up(struct shi_self *self, uint32_t index)
{
    shi_store_full(&inside, 1);
    while (!shi_load_full(&go_on))
        shi_cpu_relax();
    shi_csd_unlock(self, shi_csd(self->m, index));
}

static int64_t queue_held_up(struct shi_self *self)
{
    shi_enter(self);
    int64_t local = shi_csd_get(self);
    CHECK(local >= 0);
    shi_own_csd(self, (uint32_t)local)->func = 0;
    CHECK(shi_call_single(self, (uint32_t)local, SHI_CSD_SYNC, 0) == 0);
    shi_leave(self);
    return local;
}

static void what_is_queued_stays_with_the_slot(void)
{
    uint32_t slot;
    rig_run = held_up;
    shi_store_full(&inside, 0);
    shi_store_full(&go_on, 0);
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    slot = shi_first_guest(&rig.m);
    struct shi_self *self = admit(slot);
    int64_t local = queue_held_up(self), behind = queue_held_up(self);
    struct shi_csd *csd = shi_own_csd(self, (uint32_t)local);
    while (!shi_load_full(&inside))
        shi_cpu_relax();
    die(self);
    CHECK(shi_load_acquire(&csd->lock) & SHI_CSD_LEFT); /* its result is not wanted */
    CHECK(shi_guest_clear(&rig.firmware, slot) == 2);
    self = admit(slot);
    CHECK(self->sender.flight_count == 2 && shi_csd_get(self) != local &&
          shi_csd_get(self) != behind);
    CHECK(shi_reap_orphans(&rig.firmware, slot) == 2);
    shi_store_full(&go_on, 1);
    while (shi_csd_locked(csd) || shi_csd_locked(shi_own_csd(self, (uint32_t)behind)))
        shi_cpu_relax();
    CHECK(shi_reap_orphans(&rig.firmware, slot) == 0);
    shi_csd_collect(self);
    CHECK(!self->sender.flight_count);
    die(self);
    CHECK(shi_guest_clear(&rig.firmware, slot) == 0);
    rig_run = NULL;
    rig_stop(&rig);
}

/* Killed between the lock word's generation and the swap of the queue's head. */
static struct shi_csd *aim(struct shi_self *self)
{
    int64_t local = shi_csd_get(self);
    CHECK(local >= 0);
    struct shi_csd *csd = shi_own_csd(self, (uint32_t)local);
    CHECK(shi_csd_trylock(self, csd, SHI_CSD_SYNC, 0) == 0);
    uint64_t gen = shi_word_gen(shi_load_relaxed(&shi_slot(&rig.m, 0)->word));
    shi_fetch_or_full(&csd->lock, gen << SHI_CSD_GEN_SHIFT);
    return csd;
}

static void come_home(uint32_t slot)
{
    uint32_t looks;
    for (looks = 0; shi_reap_orphans(&rig.firmware, slot); looks++) {
        CHECK(looks < 5000);
        usleep(1000);
    }
}

static void what_was_aimed_and_never_queued_comes_home(enum shi_idle idle)
{
    uint32_t slot, heir;
    for (heir = 0; heir < 2; heir++) {
        rig_run = held_up;
        shi_store_full(&inside, 0);
        shi_store_full(&go_on, 0);
        rig_boot(&rig, 1, idle);
        slot = shi_first_guest(&rig.m);
        struct shi_self *self = admit(slot);
        queue_held_up(self);
        while (!shi_load_full(&inside))
            shi_cpu_relax();
        struct shi_csd *csd = aim(self);
        CHECK(shi_reap_orphans(&rig.firmware, slot) == 0 && shi_csd_locked(csd)); /* alive */
        die(self);
        /* The CPU could have it in hand. */
        CHECK(shi_guest_clear(&rig.firmware, slot) == 2 && shi_csd_locked(csd));
        if (heir) {
            self = admit(slot);
            CHECK(self->sender.flight_count == 2);
        }
        shi_store_full(&go_on, 1);
        come_home(slot);
        CHECK(!shi_csd_locked(csd));
        if (heir) {
            shi_csd_collect(self);
            CHECK(!self->sender.flight_count && self->sender.nfree == self->sender.csd_top);
            die(self);
        }
        CHECK(shi_guest_clear(&rig.firmware, slot) == 0);
        rig_run = NULL;
        rig_stop(&rig);
    }
}

static void the_locks_of_the_dead_are_free(void)
{
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    shi_a64 *lock = &rig.m.header->array_lock;
    struct shi_self *self = admit(shi_first_guest(&rig.m));
    CHECK(shi_lock_try(self, lock) == 0);
    CHECK(shi_lock_try(self, lock) == -EAGAIN);
    CHECK(shi_lock_try(&rig.host, lock) == -EAGAIN);
    die(self);
    CHECK(shi_lock_try(&rig.host, lock) == 0);
    shi_lock_release(&rig.host, lock);
    CHECK(shi_load_acquire(lock) == 0);
    rig_stop(&rig);
}

int main(void)
{
    who_has_left_says_nothing_more();
    hosts_call_and_are_followed_by_others();
    what_was_never_pushed_is_free_again();
    what_is_queued_stays_with_the_slot();
    what_was_aimed_and_never_queued_comes_home(SHI_IDLE_HALT);
    what_was_aimed_and_never_queued_comes_home(SHI_IDLE_POLL);
    the_locks_of_the_dead_are_free();
    return 0;
}
