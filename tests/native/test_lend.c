/* SPDX-License-Identifier: MIT */
/* Results that CPUs lend: read whole, each by its own sender, and given back. */
#include "rig.h"

#include "smp/lend.h"
#include "smp/payload.h"
#include "smp/queue.h"

#define SENDERS 6
#define CSDS 4096u /* of each, in so small a machine (base/segment.c) */
#define ROUNDS 1500
#define MOST (160u << 10) /* a CPU may lend three of these */

static struct rig rig;
static uint32_t late, waits;

/* What a CPU has no room for.  Who has given a call up makes the next one while the CPU is kept
 * from its core, so there may be as many as the senders have csds. */
static struct {
    uint32_t csd[CSDS];
} pending[RIG_CPUS];

static uint64_t length_of(uint64_t seed)
{
    return (seed % 3 ? seed * 7919 % MOST : seed * 7919 % 3000) / 8 * 8 + 8;
}

static int lend(struct shi_self *self, struct shi_csd *csd)
{
    static __thread uint64_t words[MOST / 8 + 1];
    uint64_t seed = csd->value.u, length = length_of(seed), i;
    for (i = 0; i < length / 8; i++)
        words[i] = seed ^ i;
    shi_enter(self);
    int err = shi_lend(self, csd, SHI_S_DONE, words, length);
    shi_leave(self);
    return err;
}

static void send_pending(struct shi_self *self)
{
    uint32_t n = 0, i;
    shi_lend_starve(self, true);
    while (n < self->unsent) {
        struct shi_csd *csd = shi_csd(self->m, pending[self->id].csd[n]);
        int err = shi_load_relaxed(&csd->lock) & SHI_CSD_LEFT ? 0 : lend(self, csd);
        if (err) {
            CHECK(err == -ENOBUFS && self->sender.nloans);
            break;
        }
        shi_csd_unlock(self, csd);
        n++;
    }
    self->unsent -= n;
    for (i = 0; i < self->unsent; i++)
        pending[self->id].csd[i] = pending[self->id].csd[n + i];
    if (!self->unsent)
        shi_lend_starve(self, false);
}

static void answer(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_csd(self->m, index);
    if (!self->unsent && !lend(self, csd)) {
        shi_csd_unlock(self, csd);
        return;
    }
    CHECK(self->unsent < CSDS);
    pending[self->id].csd[self->unsent++] = index;
    send_pending(self);
}

static void deferred(struct shi_self *self)
{
    uint32_t index;
    if (self->unsent)
        send_pending(self);
    while ((index = shi_list_pop(self, &self->deferred)) != UINT32_MAX)
        answer(self, index);
}

/* Of a Python function, that is not by number. */
static struct shi_call message(uint64_t seed)
{
    return (struct shi_call){ .kind = SHI_K_INT,
                              .apply = SHI_A_INFO | SHI_A_INLINE_FUNC,
                              .value.u = seed };
}

/* One call; given up after `ns`, if that is not 0. */
static void call(struct shi_self *self, uint32_t dst, uint64_t seed, uint64_t ns)
{
    const struct shi_call it = message(seed);
    int64_t local = shi_call_post(self, &it, SHI_CSD_SYNC, dst);
    CHECK(local >= 0);
    uint64_t start = shi_now_ns();
    int rc = shi_call_wait(self, (uint32_t)local, dst, ns ? start + ns : 0, NULL, NULL);
    __atomic_fetch_add(&waits, 1, __ATOMIC_RELAXED);
    if (shi_now_ns() - start > 9000000)
        __atomic_fetch_add(&late, 1, __ATOMIC_RELAXED);
    if (rc) {
        CHECK(rc == -ETIMEDOUT && ns);
        return;
    }
    const struct shi_csd *csd = shi_own_csd(self, (uint32_t)local);
    struct shi_ref ref = csd->value.ref;
    CHECK(shi_load_relaxed(&csd->status) == (SHI_S_DONE | SHI_S_LENT));
    CHECK(csd->kind == SHI_K_PICKLE && ref.cpu == dst && ref.length == length_of(seed));
    const uint64_t *words = shi_payload(self->m, dst, &ref);
    CHECK(words);
    uint64_t i;
    for (i = 0; i < ref.length / 8; i++)
        CHECK(words[i] == (seed ^ i));
    shi_call_end(self, (uint32_t)local);
}

static void *sender(void *arg)
{
    uint64_t seed = (uint64_t)(uintptr_t)arg * 1000003, i;
    for (i = 0; i < ROUNDS; i++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        /* Some do not wait for it: what they were lent comes back as well. */
        call(&rig.host, seed >> 33 & 1, seed >> 40, i % 5 ? 0 : 1 + (seed >> 34) % 60000);
    }
    return NULL;
}

/* A CPU has lent a result, another waits for room, and the sender of the first goes away
 * before the unlock: nobody will tell the CPU that there is room, so it knows by itself. */
static uint32_t stage, starved, loans;

static void reach(uint32_t now, uint32_t next)
{
    __atomic_store_n(&stage, now, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&stage, __ATOMIC_SEQ_CST) != next)
        sched_yield();
}

static void answer_too_late(struct shi_self *self, uint32_t index)
{
    struct shi_csd *csd = shi_csd(self->m, index);
    CHECK(lend(self, csd) == 0);
    shi_lend_starve(self, true);
    reach(1, 2);
    shi_csd_unlock(self, csd);
    starved = shi_load_full(&self->slot->starved);
    loans = self->sender.nloans;
    shi_lend_starve(self, false);
    reach(3, 4);
}

static void the_sender_left(void)
{
    rig_run = answer_too_late;
    rig_boot(&rig, 1, SHI_IDLE_HALT);
    struct shi_self *self = &rig.host;
    const struct shi_call it = message(7);
    int64_t local = shi_call_post(self, &it, SHI_CSD_SYNC, 0);
    CHECK(local >= 0);
    while (__atomic_load_n(&stage, __ATOMIC_SEQ_CST) != 1)
        sched_yield();
    shi_enter(self);
    shi_csd_abandon(self, (uint32_t)local);
    shi_leave(self);
    reach(2, 3);
    CHECK(loans == 0);
    CHECK(starved == SHI_ST_LOOK);
    __atomic_store_n(&stage, 4, __ATOMIC_SEQ_CST);
    rig_stop(&rig);
}

int main(void)
{
    pthread_t thread[SENDERS];
    uintptr_t i;
    uint64_t whole = 3;
    the_sender_left();
    rig_run = answer;
    rig_deferred = deferred;
    rig_boot(&rig, 2, SHI_IDLE_HALT);
    for (i = 0; i < SENDERS; i++)
        CHECK(pthread_create(&thread[i], NULL, sender, (void *)(i + 1)) == 0);
    for (i = 0; i < SENDERS; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    /* Nobody holds anything: the most that one may lend fits, again and again. */
    while (length_of(whole) < MOST - 4096 || whole % 3 == 0)
        whole++;
    for (i = 0; i < 20; i++)
        call(&rig.host, i % 2, whole, 0);
    /* A lost ring is made good after 10 ms: on a busy machine now and then, not always. */
    CHECK(late < waits / 4);
    rig_stop(&rig);
    return 0;
}
