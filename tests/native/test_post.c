/* SPDX-License-Identifier: MIT */
/* The three steps of a call, and of a call to many: what they take, and what they leave. */
#include "rig.h"

#include "smp/lend.h"
#include "smp/payload.h"

static struct rig rig;

/* Core sections of the host: its mutex.  The linker puts these in the place of all calls of
 * it (dlsym() would find no real one in a program without a dynamic linker, and a sanitizer
 * has its own). */
/* LINK: -Wl,--wrap=pthread_mutex_lock */
static __thread uint32_t sections;

int __real_pthread_mutex_lock(pthread_mutex_t *mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t *mutex);

int __wrap_pthread_mutex_lock(pthread_mutex_t *mutex)
{
    if (mutex == &rig.host.lock)
        sections++;
    return __real_pthread_mutex_lock(mutex);
}

static uint32_t in_use(const struct shi_self *self)
{
    return self->sender.csd_top - self->sender.nfree;
}

/* Those that nobody waits for, once their targets have taken them up. */
static void all_come_back(struct shi_self *self)
{
    while (in_use(self)) {
        shi_enter(self);
        shi_csd_collect(self);
        shi_leave(self);
        sched_yield();
    }
}

static const struct shi_call noop = { .func = SHI_FUNC_NATIVE, .apply = SHI_A_INFO };

static struct shi_call with_payload(const void *data, uint64_t bytes)
{
    return (struct shi_call){ .func = SHI_FUNC_NATIVE,
                              .kind = SHI_K_PICKLE,
                              .apply = SHI_A_INFO,
                              .payload = data,
                              .bytes = bytes };
}

/* One section to post, one to end; nobody waits: the first alone. */
static void sections_of_a_call(void)
{
    struct shi_self *self = &rig.host;
    uint32_t fewest = UINT32_MAX, i;
    CHECK(rig_call(self, 0, 0, 0, SHI_K_NONE) == 0);
    uint64_t end = shi_now_ns() + 30000000000u;
    /* A wait that lasts rings again, which takes a section: until there was one that did not. */
    for (i = 0; i < 5 || (fewest > 2 && shi_now_ns() < end); i++) {
        sections = 0;
        CHECK(rig_call(self, 1, 0, 0, SHI_K_NONE) == 0);
        CHECK(sections >= 2);
        fewest = sections < fewest ? sections : fewest;
    }
    CHECK(fewest == 2);
    sections = 0;
    CHECK(shi_call_post(self, &noop, SHI_CSD_ASYNC, 1) >= 0);
    CHECK(sections == 1);
    all_come_back(self);
}

static void a_failed_post_leaves_nothing(void)
{
    struct shi_self *self = &rig.host;
    static uint8_t data[1 << 20];
    const struct shi_call large = with_payload(data, sizeof data);
    CHECK(shi_call_post(self, &noop, SHI_CSD_SYNC, rig.ncpus) == -ENXIO);
    CHECK(shi_call_post(self, &large, SHI_CSD_SYNC, rig.ncpus) == -ENXIO);
    /* The arena has room for one of these: not a second time, and once more after it. */
    int64_t first = shi_call_prepare(self, &large);
    CHECK(first >= 0);
    CHECK(shi_call_post(self, &large, SHI_CSD_SYNC, 0) == -ENOBUFS);
    CHECK(shi_call_prepare(self, &large) == -ENOBUFS);
    CHECK(in_use(self) == 1);
    shi_call_end(self, (uint32_t)first);
    first = shi_call_prepare(self, &large);
    CHECK(first >= 0);
    shi_call_end(self, (uint32_t)first);
    CHECK(in_use(self) == 0);
}

/* A CPU in a handler that takes its time: it takes nothing up, and leaves its word alone. */
static uint32_t hold_number, holding;

static void hold(void *info)
{
    (void)info;
    __atomic_store_n(&holding, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&holding, __ATOMIC_SEQ_CST))
        sched_yield();
}

static void hold_up(uint32_t cpu)
{
    const struct shi_call call = { .func = SHI_FUNC_NATIVE | hold_number, .apply = SHI_A_INFO };
    CHECK(shi_call_post(&rig.host, &call, SHI_CSD_ASYNC, cpu) >= 0);
    while (!__atomic_load_n(&holding, __ATOMIC_SEQ_CST))
        sched_yield();
}

static void let_it_go_on(void)
{
    __atomic_store_n(&holding, 0, __ATOMIC_SEQ_CST);
}

static void set_state(uint32_t cpu, enum shi_state state)
{
    shi_a64 *word = &shi_slot(&rig.m, cpu)->word;
    uint64_t w = shi_load_relaxed(word);
    while (!shi_cas_full(word, &w, shi_word_with(w, state)))
        ;
}

static int only_even(void *arg, uint32_t cpu)
{
    (*(uint32_t *)arg)++;
    return cpu % 2 == 0;
}

static int not_at_two(void *arg, uint32_t cpu)
{
    (void)arg;
    return cpu == 2 ? -EINTR : 1;
}

static void many(void)
{
    struct shi_self *self = &rig.host;
    static const uint32_t all[] = { 0, 1, 2, 3 };
    static const char text[] = "one payload for all of them";
    uint32_t room[12], asked = 0, i;
    struct shi_many it = {
        .mask = all, .n = 4, .cpus = room, .locals = room + 4, .ipis = room + 8
    };
    /* A section for each CPU, one for the doorbells. */
    sections = 0;
    CHECK(shi_call_many(self, &it, &noop, true) == 0 && it.queued == 4);
    CHECK(sections == 5);
    for (i = 0; i < it.queued; i++) {
        CHECK(it.cpus[i] == i);
        CHECK(shi_call_wait(self, it.locals[i], it.cpus[i], 0, NULL, NULL) == 0);
        shi_call_end(self, it.locals[i]);
    }
    CHECK(in_use(self) == 0);
    /* One payload, which goes with the last that shares it. */
    const struct shi_call shared = with_payload(text, sizeof text);
    CHECK(shi_call_many(self, &it, &shared, true) == 0 && it.queued == 4);
    const struct shi_ref ref = shi_own_csd(self, it.locals[0])->value.ref;
    for (i = 0; i < it.queued; i++) {
        const struct shi_csd *csd = shi_own_csd(self, it.locals[i]);
        CHECK(csd->value.ref.offset == ref.offset);
        CHECK(shi_call_wait(self, it.locals[i], it.cpus[i], 0, NULL, NULL) == 0);
        CHECK(strcmp(shi_payload(&rig.m, self->id, &csd->value.ref), text) == 0);
        CHECK(in_use(self) == 5 - i); /* the payload's own csd is one */
        shi_call_end(self, it.locals[i]);
    }
    CHECK(in_use(self) == 0);
    /* Who is not online is skipped, unasked; who is not wanted, asked once. */
    it.cond = only_even;
    it.cond_arg = &asked;
    hold_up(2);
    set_state(2, SHI_OFFLINE);
    CHECK(shi_call_many(self, &it, &noop, true) == 0);
    set_state(2, SHI_POLLING);
    let_it_go_on();
    CHECK(asked == 3 && it.queued == 1 && it.cpus[0] == 0);
    CHECK(shi_call_wait(self, it.locals[0], 0, 0, NULL, NULL) == 0);
    shi_call_end(self, it.locals[0]);
    all_come_back(self);
    /* An error ends it; what was queued is rung and stands. */
    it.cond = not_at_two;
    CHECK(shi_call_many(self, &it, &shared, true) == -EINTR && it.at == 2 && it.queued == 2);
    for (i = 0; i < it.queued; i++) {
        CHECK(shi_call_wait(self, it.locals[i], it.cpus[i], 0, NULL, NULL) == 0);
        shi_call_end(self, it.locals[i]);
    }
    CHECK(in_use(self) == 0);
}

struct seen {
    uint32_t begun, turns, gone, back, ended;
    int stop_after;
};

static void begin(void *arg)
{
    ((struct seen *)arg)->begun++;
}

static int turn(void *arg, uint32_t dst, int why)
{
    struct seen *s = arg;
    CHECK(s->begun == 1 && s->gone == s->back && why > 0 && dst == 0);
    return (int)++s->turns == s->stop_after ? -EINTR : 0;
}

static void *let_go(void *arg)
{
    struct seen *s = arg;
    s->gone++;
    return &s->gone;
}

static void take_back(void *arg, void *gone)
{
    struct seen *s = arg;
    CHECK(gone == &s->gone && ++s->back == s->gone);
}

static void end(void *arg)
{
    ((struct seen *)arg)->ended++;
}

static const struct shi_waiter waiter = { .hold_ns = 1000,
                                          .begin = begin,
                                          .turn = turn,
                                          .let_go = let_go,
                                          .take_back = take_back,
                                          .end = end };

/* CPU 0 takes nothing up: what ends a wait is its waiter, or its clock. */
static void waits_that_end_early(void)
{
    struct shi_self *self = &rig.host;
    struct seen s = { .stop_after = 3 };
    hold_up(0);
    int64_t one = shi_call_post(self, &noop, SHI_CSD_SYNC, 0);
    int64_t two = shi_call_post(self, &noop, SHI_CSD_SYNC, 0);
    CHECK(one >= 0 && two >= 0 && in_use(self) == 3);
    CHECK(shi_call_wait(self, (uint32_t)one, 0, 0, &waiter, &s) == -EINTR);
    CHECK(s.turns == 3 && s.gone == 2 && s.back == 2 && s.ended == 1);
    CHECK(shi_call_wait(self, (uint32_t)two, 0, shi_now_ns() + 2000000, NULL, NULL) ==
          -ETIMEDOUT);
    CHECK(in_use(self) == 3); /* left behind: the queue has them */
    let_it_go_on();
    all_come_back(self);
}

/* More than the pool has: whoever waits for room gets it, and no csd is lost. */
static void a_flood(void)
{
    struct shi_self *self = &rig.host;
    uint32_t dst = 0, i;
    for (i = 0; i < 20000; i++) {
        while (shi_call_post(self, &noop, SHI_CSD_ASYNC, i % rig.ncpus) == -EAGAIN)
            CHECK(shi_call_room(self, NULL, NULL, &dst) == 0);
        CHECK(self->sender.nowait <= SHI_NOWAIT_POOL);
    }
    all_come_back(self);
    CHECK(self->sender.nowait == 0);
    /* Nothing in flight is anybody's: there is nothing to wait for. */
    CHECK(shi_call_room(self, NULL, NULL, &dst) == -EAGAIN);
}

static void *one_of_three(void *arg)
{
    static const char text[] = "a payload";
    const struct shi_call payload = with_payload(text, sizeof text);
    uint32_t dst, i;
    (void)arg;
    for (i = 0; i < 6000; i++) {
        const struct shi_call *call = i % 7 ? &noop
                                            : &payload; /* that csd is put, and got anew */
        while (shi_call_post(&rig.host, call, SHI_CSD_ASYNC, i % rig.ncpus) == -EAGAIN)
            CHECK(shi_call_room(&rig.host, NULL, NULL, &dst) == 0);
        if (i % 5 == 0)
            CHECK(rig_call(&rig.host, i % rig.ncpus, 0, 0, SHI_K_NONE) == 0);
    }
    return NULL;
}

/* Threads of the host share the pool: one waits for a csd that another is using again. */
static void a_flood_of_three_threads(void)
{
    pthread_t others[2];
    uint32_t i;
    for (i = 0; i < 2; i++)
        CHECK(pthread_create(&others[i], NULL, one_of_three, NULL) == 0);
    one_of_three(NULL);
    for (i = 0; i < 2; i++)
        CHECK(pthread_join(others[i], NULL) == 0);
    all_come_back(&rig.host);
    CHECK(rig.host.sender.nowait == 0);
}

/* One CPU takes nothing up: the calls to others find room all the same. */
static void a_flood_past_one_that_is_held_up(void)
{
    struct shi_self *self = &rig.host;
    uint64_t until = shi_now_ns() + 20000000000u;
    uint32_t dst = 0, waits = 0, i;
    int64_t locals[2 * SHI_NOWAIT_POOL];
    for (i = 0; i < 2 * SHI_NOWAIT_POOL; i++) /* the pool is what there is too few of */
        CHECK((locals[i] = shi_call_prepare(self, &noop)) >= 0);
    while (i)
        shi_call_end(self, (uint32_t)locals[--i]);
    hold_up(0);
    for (i = 0; i <= SHI_NOWAIT_POOL / 2; i++) /* one half the pool behind the oldest too */
        CHECK(shi_call_post(self, &noop, SHI_CSD_ASYNC, 0) >= 0);
    for (i = 0; i < 2000; i++)
        while (shi_call_post(self, &noop, SHI_CSD_ASYNC, 1 + i % 3) == -EAGAIN) {
            CHECK(shi_call_room(self, NULL, NULL, &dst) == 0);
            CHECK(shi_now_ns() < until);
            waits++;
        }
    CHECK(waits > 0); /* in vain, before the others were looked at */
    CHECK(in_use(self) >= SHI_NOWAIT_POOL / 2 + 1); /* and they are still there */
    let_it_go_on();
    all_come_back(self);
    CHECK(self->sender.room_looks == 0); /* for one that is unlocked now */
}

int main(void)
{
    shi_native_init();
    hold_number = (uint32_t)shi_native_register("hold", hold);
    rig_boot(&rig, 4, SHI_IDLE_HALT);
    sections_of_a_call();
    a_failed_post_leaves_nothing();
    many();
    waits_that_end_early();
    a_flood();
    a_flood_past_one_that_is_held_up();
    a_flood_of_three_threads();
    rig_stop(&rig);
    return 0;
}
