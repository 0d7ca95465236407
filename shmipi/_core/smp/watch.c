/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <stdlib.h>

#include "base/clock.h"
#include "base/event.h"
#include "irq/chip.h"
#include "smp/entry.h"
#include "smp/watch.h"

#define SLOWEST 13u /* looks between two rings of a CPU that does nothing: 1 << 13, 80 s */

struct shi_watch {
    uint32_t next;                      /* CPU that the next look begins with */
    uint32_t coproc_event[SHI_NCOPROC]; /* of those whose line was pending */
    uint8_t coproc_pending[SHI_NCOPROC];
    struct shi_watched {
        uint64_t progress;
        uint32_t generation;
        uint16_t wait; /* looks until it may be rung again */
        uint8_t rung;  /* times it was, without progress */
        uint8_t stranded;
    } cpu[];
};

struct shi_watch *shi_watch_new(const struct shi_machine *m)
{
    return calloc(1, sizeof(struct shi_watch) + m->ncpus * sizeof(struct shi_watched));
}

uint64_t shi_watch_progress(const struct shi_slot *slot)
{
    /* Not kicks_received: a kick that finds interrupts off is taken, and nothing is done. */
    static const uint8_t done[] = {
        SHI_C_csd_sync,           SHI_C_csd_async,   SHI_C_native_run,
        SHI_C_python_run,         SHI_C_tasks_run,   SHI_C_halts,
        SHI_C_doorbells_received, SHI_C_irq_resched, SHI_C_irq_call,
        SHI_C_irq_call_single,    SHI_C_irq_handled, SHI_C_irq_other,
        SHI_C_irq_spurious,       SHI_C_nmi,
    };
    uint64_t sum = 0;
    uint32_t ctx, i;
    for (ctx = 0; ctx < SHI_NCTX; ctx++)
        for (i = 0; i < sizeof done; i++)
            sum += shi_load_relaxed(&slot->counters[ctx][done[i]]);
    return sum;
}

/* Has it something that it may never look at, unless it is rung? */
static bool stranded(const struct shi_machine *m, uint32_t cpu)
{
    struct shi_slot *slot = shi_slot(m, cpu);
    uint64_t w = shi_load_full(&slot->word);
    enum shi_state state = shi_word_state(w);
    uint32_t nmi = shi_load_relaxed(&slot->pic.nmi);
    if (!shi_word_online(w))
        return false;
    if (nmi & SHI_NMI_PENDING && !(nmi & SHI_NMI_IN_SERVICE))
        return true;
    /* Who made room for its results did not come to say so (shi_lend_done). */
    if (shi_load_relaxed(&slot->starved) == SHI_ST_LOOK)
        return true;
    /* A line that was set, and whose sender did not come to say so in the word. */
    if (!(w & SHI_W_PENDING) && m->flow->pending(m, cpu))
        return true;
    /* These look at their word themselves.  (ASKED is the timer's business.) */
    if (state == SHI_POLLING || (state == SHI_RUNNING && !m->kick))
        return false;
    /* RUNG or KICKED with nothing sent silences every later sender, work or no work. */
    return shi_word_work(w) || state == SHI_RUNG || w & SHI_W_KICKED ||
           shi_resched_unsent(m, cpu, w);
}

static void look_at(struct shi_self *self, struct shi_watched *seen, uint32_t cpu)
{
    if (__builtin_expect(!stranded(self->m, cpu), 1)) {
        seen->stranded = 0;
        seen->rung = 0;
        return;
    }
    struct shi_slot *slot = shi_slot(self->m, cpu);
    uint64_t progress = shi_watch_progress(slot);
    uint32_t generation = shi_load_relaxed(&slot->generation);
    if (!seen->stranded || progress != seen->progress || generation != seen->generation) {
        *seen = (struct shi_watched){ .progress = progress,
                                      .generation = generation,
                                      .stranded = 1 };
        return;
    }
    if (seen->wait) {
        seen->wait--;
        return;
    }
    int rung = shi_irq_rering(self, cpu);
    if (!rung && shi_load_relaxed(&slot->starved) == SHI_ST_LOOK) {
        shi_chip_prod(self, cpu);
        rung = 1;
    }
    if (rung <= 0)
        return; /* nothing was queued: at the next look again */
    /* A stopped CPU, or one that keeps interrupts off, collects a signal or a token for
     * each: ever fewer, until it does something. */
    if (seen->rung < SLOWEST)
        seen->rung++;
    seen->wait = (uint16_t)((1u << seen->rung) - 1);
}

static void look_at_coprocessors(const struct shi_self *self, struct shi_watch *watch)
{
    uint32_t i;
    for (i = 0; i < SHI_NCOPROC; i++) {
        struct shi_coproc *coproc = &shi_irq_area(self->m)->coproc[i];
        uint8_t pending = shi_load_full(&coproc->pending) != 0;
        uint32_t event = shi_load_relaxed(&coproc->event);
        if (pending && watch->coproc_pending[i] && event == watch->coproc_event[i]) {
            shi_event_ring(&coproc->event);
            pending = 0; /* rung by one that does not die: once */
        }
        watch->coproc_pending[i] = pending;
        watch->coproc_event[i] = event;
    }
}

int shi_watch_ring(struct shi_self *self, uint32_t dst)
{
    struct shi_slot *slot = shi_slot(self->m, dst);
    /* One word: what it had done, 24 bits | milliseconds, 32 | how often it was rung, 8. */
    uint64_t done = shi_watch_progress(slot) & 0xffffff;
    uint32_t now = (uint32_t)(shi_now_ns() / 1000000);
    uint64_t was = shi_load_relaxed(&slot->rerung), n;
    do {
        n = was & 0xff;
        if (!n || was >> 40 != done) {
            n = 1;
            continue;
        }
        if (n > SLOWEST)
            n = SLOWEST;
        if (now - (uint32_t)(was >> 8) < (SHI_WATCH_NS / 1000000) << n)
            return 0;
        if (n < SLOWEST)
            n++;
        /* Compare-and-swap: of those who look at the same time, one rings.  If it dies before
         * that, the next does; what it rings for is in the target's word. */
    } while (!shi_cas_full(&slot->rerung, &was, done << 40 | (uint64_t)now << 8 | n));
    return shi_irq_rering(self, dst);
}

bool shi_watch_look(struct shi_self *self, struct shi_watch *watch)
{
    uint32_t n = self->m->ncpus, i;
    bool asked = false;
    for (i = 0; i < n && i < SHI_WATCH_CPUS; i++) {
        const struct shi_pic *pic = shi_pic(self->m, watch->next);
        look_at(self, &watch->cpu[watch->next], watch->next);
        asked |= shi_load_relaxed(&pic->init) ||
                 shi_load_relaxed(&pic->startup) == SHI_SU_ASKED;
        watch->next = watch->next + 1 < n ? watch->next + 1 : 0;
    }
    look_at_coprocessors(self, watch);
    if (self->m->timers)
        self->m->timers->watch(self);
    return asked;
}
