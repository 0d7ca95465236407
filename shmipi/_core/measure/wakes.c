/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "base/clock.h"
#include "measure/bench.h"
#include "measure/wakes.h"
#include "smp/sched.h"

#define LOOK_ROUND 4096u

static int steppers[2];

/* What lies at an offset that stands in shared memory: of an array, or NULL. */
static void *part(const struct shi_machine *m, uint64_t at, uint64_t nbytes)
{
    uint64_t end = shi_array_end(m);
    if (at % sizeof(uint64_t) || at < m->array_offset || at > end || nbytes > end - at)
        return NULL;
    return m->base + at;
}

/* ---- tasks ------------------------------------------------------------------------ */

static enum shi_ran sleeper_step(struct shi_self *self, uint64_t id, uint64_t at)
{
    shi_a64 *count = part(self->m, at, sizeof *count);
    /* First: who sees the count may wake it again at once, and who stops it does so once. */
    shi_set_current_state(self, id, SHI_TASK_INTERRUPTIBLE);
    if (!count || shi_kthread_should_stop(self, id))
        return SHI_RAN_EXIT;
    shi_store_release(count, shi_load_relaxed(count) + 1);
    return SHI_RAN_SLEEP;
}

static enum shi_ran player_step(struct shi_self *self, uint64_t id, uint64_t at)
{
    struct shi_game *game = part(self->m, at, sizeof *game);
    shi_set_current_state(self, id, SHI_TASK_INTERRUPTIBLE);
    if (!game || shi_kthread_should_stop(self, id))
        return SHI_RAN_EXIT;
    uint32_t me = id == shi_load_relaxed(&game->task[1]);
    /* Acquire: with its turn come the other's stores. */
    uint64_t left = shi_load_relaxed(&game->left);
    if (shi_load_acquire(&game->turn) != me || !left)
        return SHI_RAN_SLEEP;
    if (!shi_load_relaxed(&game->began_ns))
        shi_store_relaxed(&game->began_ns, shi_now_ns());
    if (left == 1)
        shi_store_relaxed(&game->ended_ns, shi_now_ns());
    shi_store_release(&game->left, left - 1);
    shi_store_release(&game->turn, !me);
    shi_wake_up_process(self, shi_load_relaxed(&game->task[!me]));
    return SHI_RAN_SLEEP;
}

void shi_wakes_register(void)
{
    steppers[SHI_BENCH_SLEEPER] = shi_stepper_register("bench_sleeper", sleeper_step);
    steppers[SHI_BENCH_PLAYER] = shi_stepper_register("bench_player", player_step);
}

int64_t shi_bench_task(struct shi_self *self, enum shi_bench_task kind, uint32_t cpu,
                       uint64_t at)
{
    static const char *const names[] = { "bench/sleeper", "bench/player" };
    uint64_t nbytes = kind == SHI_BENCH_PLAYER ? sizeof(struct shi_game) : sizeof(shi_a64);
    if (!part(self->m, at, nbytes))
        return -EINVAL;
    return shi_kthread_create(self, names[kind], steppers[kind], at, (int)cpu, 0);
}

/* ---- and who wakes them ------------------------------------------------------------ */

static int look(const struct shi_self *self, uint32_t dst, uint64_t deadline_ns)
{
    if (shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING)
        return -ECANCELED;
    if (!shi_word_online(shi_load_relaxed(&shi_slot(self->m, dst)->word)))
        return -ENXIO;
    return shi_now_ns() >= deadline_ns ? -ETIMEDOUT : 0;
}

/* Its last step has ended. */
static int await_sleep(const struct shi_self *self, const struct shi_bench_wakes *b)
{
    uint32_t i;
    for (;;) {
        for (i = 0; i < LOOK_ROUND; i++) {
            uint64_t w;
            if (!shi_task_find(self->m, b->task, &w) || shi_tw_state(w) == SHI_TASK_DEAD)
                return -ESRCH;
            if (shi_tw_state(w) == SHI_TASK_INTERRUPTIBLE && !(w & SHI_TW_ON_CPU))
                return 0;
        }
        int err = look(self, b->dst, b->deadline_ns);
        if (err)
            return err;
    }
}

static int await_step(const struct shi_self *self, const struct shi_bench_wakes *b,
                      const shi_a64 *count, uint64_t seen)
{
    uint32_t i;
    for (;;) {
        for (i = 0; i < LOOK_ROUND; i++)
            if (shi_load_acquire(count) != seen)
                return 0;
        int err = look(self, b->dst, b->deadline_ns);
        if (err)
            return err;
    }
}

int shi_bench_wakes(struct shi_self *self, struct shi_bench_wakes *b)
{
    const shi_a64 *count = part(self->m, b->at, sizeof *count);
    uint32_t i;
    if (!count || b->dst >= self->m->ncpus || b->dst == self->id)
        return -EINVAL;
    for (i = 0; i < b->warmup + b->calls; i++) {
        int err = await_sleep(self, b);
        int64_t missed =
            err ? err : shi_bench_await(self, b->dst, b->state, b->gap_ns, b->deadline_ns);
        if (missed < 0)
            return (int)missed;
        uint64_t seen = shi_load_relaxed(count), from = shi_stamp();
        int rc = shi_wake_up_process(self, b->task);
        err = rc < 0 ? rc : await_step(self, b, count, seen);
        uint64_t took = shi_stamp() - from;
        if (err)
            return err;
        if (i >= b->warmup)
            shi_hist_record(b->took, shi_stamp_to_ns(took));
    }
    return 0;
}
