/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include "base/event.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "irq/ring.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/lend.h"
#include "smp/queue.h"
#include "smp/reap.h"
#include "smp/sched.h"
#include "smp/stop.h"

/* Its process queues nothing any more. */
static void depart(struct shi_self *self, struct shi_slot *slot)
{
    shi_store_relaxed(&slot->ended, shi_fetch_add_full(&self->m->header->departed, 1) + 1);
}

void shi_reap_mark(struct shi_self *self, uint32_t cpu, uint32_t end)
{
    struct shi_slot *slot = shi_slot(self->m, cpu);
    uint64_t w = shi_load_relaxed(&slot->word);
    /* Before DEAD, by the exchange below: who finds the CPU dead finds how it ended. */
    shi_store_relaxed(&slot->end, end);
    /* The whole word: its list is left behind, never walked.  What was on it is found
     * by the scan, which does not depend on links the dead may have half written. */
    while (!shi_cas_full(&slot->word, &w, (w & SHI_W_GEN) | SHI_DEAD))
        ;
    SHI_TRACE(self, cpu_dead, cpu, 0, 0, end);
    shi_startup_died(self->m, cpu); /* after the word: see shi_chip_startup */
    /* Pushers link first and swap second, so whoever was killed wherever, the queue is whole.
     * Acquire is the swap's above; nobody unlocks these before shi_reap_complete. */
    if (self->steps && shi_queue_valid(self->m, cpu, w) < 0)
        shi_count(self, SHI_C_corrupt);
    shi_store_release(&slot->waiting_for, 0);
    shi_store_release(&slot->ringing, 0);
    shi_store_release(&slot->cpus_read, 0);
    shi_store_relaxed(&slot->pic.init, 0);
    depart(self, slot);
    shi_multi_orphan(self, cpu);
    if (self->m->timers)
        self->m->timers->leave(self, cpu);
    shi_event_ring(&self->m->header->hotplug_event);
}

static uint32_t csds_of(const struct shi_machine *m, uint32_t id)
{
    uint32_t top = shi_load_acquire(&shi_slot(m, id)->csd_top);
    return top < m->csds_per_slot ? top : m->csds_per_slot;
}

/* `wake_ups`: those as well that were to wake a task. */
static uint32_t complete_calls(struct shi_self *self, uint32_t cpu, bool wake_ups)
{
    const struct shi_machine *m = self->m;
    uint16_t gen = shi_word_gen(shi_load_relaxed(&shi_slot(m, cpu)->word));
    uint64_t end = shi_load_relaxed(&shi_slot(m, cpu)->end);
    uint32_t s, i, done = 0;
    for (s = 0; s < m->nslots; s++) {
        /*
         * Thousands of CPUs that have all broadcast have millions of csds, and next to none
         * in flight.  A csd pushed before the word was made DEAD is counted here: the push's
         * swap released the count, and shi_reap_mark's exchange of the same word acquired it.
         * If the count is a later one, its sender has found the csd unlocked.  Relaxed, the
         * process of a killed sender counts as it did, until the slot's next has inherited.
         */
        if (!shi_load_relaxed(&shi_slot(m, s)->csds_out))
            continue;
        uint32_t top = csds_of(m, s);
        struct shi_csd *csd = (struct shi_csd *)shi_region(m, s);
        for (i = 0; i < top; i++, csd++) {
            uint64_t lock = shi_load_acquire(&csd->lock);
            while (lock & SHI_CSD_LOCK && (uint16_t)(lock >> SHI_CSD_DST_SHIFT) == cpu &&
                   (uint16_t)(lock >> SHI_CSD_GEN_SHIFT) == gen) {
                /* The sequence number is in the word: if the sender has given up on
                 * this use and begun another, the swap fails. */
                uint64_t died = (lock & (SHI_CSD_SEQ | SHI_CSD_TYPE | SHI_CSD_BEGUN)) |
                                SHI_CSD_DIED | end << SHI_CSD_END_SHIFT;
                /* Read before: after it the csd is its sender's. */
                bool wakes = (lock & SHI_CSD_TYPE) == SHI_CSD_TTWU &&
                             csd->func & SHI_FUNC_NATIVE;
                uint64_t task = csd->value.u;
                if (wakes && !wake_ups)
                    break;
                if (!shi_cas_full(&csd->lock, &lock, died))
                    continue;
                if (wakes)
                    shi_sched_rewake(self, task, s);
                done++;
                if (shi_type_stops(lock))
                    shi_multi_lost(self, s, lock);
                if (lock & SHI_CSD_PARKED)
                    shi_irq_ring_waiter(self, s);
                break;
            }
        }
    }
    shi_fetch_add_relaxed(&shi_slot(m, cpu)->counters[SHI_CTX_TASK][SHI_C_died], done);
    return done;
}

uint32_t shi_reap_complete(struct shi_self *self, uint32_t cpu)
{
    uint32_t done = complete_calls(self, cpu, true);
    shi_sched_cpu_dead(self, cpu);
    return done;
}

bool shi_reap_calls(struct shi_self *self, uint32_t cpu)
{
    if (shi_sched_is_free(self, cpu))
        return true;
    complete_calls(self, cpu, false);
    return false;
}

/* Is this csd of a process that ended, at `ended`, in nobody's hands?  `lock`: locked. */
static bool orphan(struct shi_self *self, uint64_t lock, uint32_t ended)
{
    struct shi_slot *target = shi_slot(self->m, (uint16_t)(lock >> SHI_CSD_DST_SHIFT));
    uint64_t w = shi_load_acquire(&target->word);
    /* Of a process that is dead: shi_reap_complete has been through, and this one's
     * generation was written after that. */
    if ((uint16_t)(lock >> SHI_CSD_GEN_SHIFT) != shi_word_gen(w) ||
        shi_word_state(w) == SHI_DEAD)
        return true;
    if ((int32_t)(shi_load_acquire(&target->quiet) - ended) >= 0)
        return true;
    /* It looks when it is idle next.  Asleep, or polling for good, it is so already. */
    if (shi_word_state(w) == SHI_HALTED || shi_word_state(w) == SHI_POLLING)
        shi_chip_prod(self, (uint16_t)(lock >> SHI_CSD_DST_SHIFT));
    return false;
}

uint32_t shi_reap_orphans(struct shi_self *self, uint32_t id)
{
    const struct shi_machine *m = self->m;
    struct shi_slot *slot = shi_slot(m, id);
    struct shi_csd *csd = (struct shi_csd *)shi_region(m, id);
    bool dead = id < m->ncpus && shi_word_state(shi_load_acquire(&slot->word)) == SHI_DEAD;
    bool nobody = dead || (id >= shi_first_guest(m) && !shi_load_acquire(&slot->pid));
    uint16_t gen = (uint16_t)shi_load_acquire(&slot->generation);
    uint32_t ended = shi_load_relaxed(&slot->ended), i, n = csds_of(m, id), out = 0;
    for (i = 0; i < n; i++, csd++) {
        /* Acquire pairs with the push's store of the generation: src_gen is of this use, or
         * the word has changed since and the swap fails. */
        uint64_t lock = shi_load_acquire(&csd->lock);
        if (!(lock & SHI_CSD_LOCK))
            continue;
        if (!(lock >> SHI_CSD_GEN_SHIFT & 0xffff)) {
            /* Not aimed at anybody yet: no queue has it, nor will.  But whose it is is written
             * after the lock: with a process in the slot it may be that one's, which has freed
             * those of the one before (inherit).  Who makes processes for slots calls this. */
            if (nobody)
                shi_cas_full(&csd->lock, &lock, lock & SHI_CSD_SEQ);
            continue;
        }
        if ((csd->src_gen == gen && !dead) || (uint16_t)(lock >> SHI_CSD_DST_SHIFT) >= m->ncpus)
            continue;
        if (!orphan(self, lock, ended) || !shi_cas_full(&csd->lock, &lock, lock & SHI_CSD_SEQ))
            out++;
    }
    return out;
}

void shi_reap_ring_all(struct shi_self *self)
{
    uint32_t cpu;
    for (cpu = 0; cpu < self->m->ncpus; cpu++) {
        bool starved = shi_lend_remind(self, cpu); /* the dead read nothing: room is free */
        if (shi_irq_rering(self, cpu) <= 0 && starved)
            shi_chip_prod(self, cpu);
        /* A task that waits for another may have been woken in its place, or have been
         * about to be woken by it: let it look. */
        if (shi_load_acquire(&shi_slot(self->m, cpu)->task))
            shi_irq_ring_waiter(self, cpu);
    }
    shi_hosts_ring(self->m);
}

uint32_t shi_reap_guards(struct shi_self *self, uint32_t id)
{
    struct shi_slot *slot = shi_slot(self->m, id);
    /* Full: after the word was made DEAD (see hazard_set). */
    uint32_t target = shi_load_full(&slot->ringing);
    if (!target || (id < self->m->ncpus && !shi_word_online(shi_load_full(&slot->word))))
        return 0;
    return target;
}

uint32_t shi_reap_reset(struct shi_self *self, uint32_t cpu)
{
    struct shi_slot *slot = shi_slot(self->m, cpu);
    uint32_t gen = shi_load_relaxed(&slot->generation) + 1;
    if (!(gen & 0xffff))
        gen++; /* 0 means "not queued" in a csd's lock word */
    shi_chip_reset(self->m, cpu);
    shi_store_relaxed(&slot->registered, 0);
    shi_store_relaxed(&slot->boot_error, 0);
    shi_store_relaxed(&slot->pic.init, 0);
    shi_store_relaxed(&slot->pid, 0);
    shi_store_relaxed(&slot->tid, 0);
    shi_store_relaxed(&slot->hotplug, SHI_HP_ONLINE);
    shi_store_relaxed(&slot->cur_csd, 0);
    shi_store_relaxed(&slot->csd_stuck, 0);
    shi_store_relaxed(&slot->masked, 0);
    shi_store_relaxed(&slot->stopped, 0);
    shi_store_relaxed(&slot->dumped, 0);
    shi_store_relaxed(&slot->task, 0);
    shi_store_relaxed(&slot->end, 0);
    shi_store_relaxed(&slot->handler, SHI_H_NONE);
    shi_store_relaxed(&slot->damaged, 0);
    shi_store_relaxed(&slot->starved, SHI_ST_NO);
    shi_store_relaxed(&slot->tick, 0);
    shi_store_relaxed(&slot->rerung, 0);
    /* The step of a boot is armed before it: while it boots nobody would be in time. */
    if (shi_load_relaxed(&slot->step) != SHI_STEP_online)
        shi_store_relaxed(&slot->step, 0);
    shi_store_relaxed(&slot->generation, gen);
    shi_store_full(&slot->word, (uint64_t)(uint16_t)gen << SHI_W_GEN_SHIFT | SHI_OFFLINE);
    return gen;
}

void shi_reap_stop_all(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    uint32_t cpu;
    shi_store_full(&m->header->machine_state, SHI_M_STOPPING);
    for (cpu = 0; cpu < m->ncpus; cpu++) {
        /* A parked CPU sleeps on this value: it must change, not only be woken. */
        shi_store_full(&shi_slot(m, cpu)->hotplug, SHI_HP_STOP);
        shi_event_wake(&shi_slot(m, cpu)->hotplug);
        shi_chip_prod(self, cpu);
    }
    shi_coproc_ring_all(m);
    shi_hosts_ring(m);
    shi_event_ring(&m->header->hotplug_event);
}

/* ---- guests ---------------------------------------------------------------------- */

static void next_generation(struct shi_slot *slot)
{
    uint32_t gen = shi_load_relaxed(&slot->generation) + 1;
    if (!(gen & 0xffff))
        gen++; /* 0 is the host's */
    /* Full: who still reads the old one does so before the slot is anybody else's. */
    shi_xchg_full(&slot->generation, gen);
}

void shi_guest_admit(struct shi_self *self, uint32_t id, uint32_t pid)
{
    struct shi_slot *slot = shi_slot(self->m, id);
    uint32_t ctx, c;
    for (ctx = 0; ctx < SHI_NCTX; ctx++)
        for (c = 0; c < SHI_COUNTER_ROOM; c++)
            shi_store_relaxed(&slot->counters[ctx][c], 0);
    shi_store_relaxed(&slot->step, 0);
    shi_store_relaxed(&slot->step_hit, 0);
    shi_store_release(&slot->pid, pid);
    next_generation(slot);
}

/* Nobody waits for its calls any more, and nobody reads a result that a CPU lends.  Its tasks
 * end with it: they would hold up everybody's, and none could cancel them. */
static void leave_calls(struct shi_self *self, uint32_t id)
{
    struct shi_csd *csd = (struct shi_csd *)shi_region(self->m, id);
    uint32_t i, n = csds_of(self->m, id);
    for (i = 0; i < n; i++) {
        uint64_t lock = shi_load_acquire(&csd[i].lock), left;
        do {
            left = SHI_CSD_LEFT;
            if ((lock & SHI_CSD_TYPE) == SHI_CSD_TTWU)
                left |= SHI_CSD_CANCEL; /* see BEGUN in run_task */
            /* As in shi_csd_abandon: the unlock finds LEFT, or this finds it unlocked. */
        } while (lock & SHI_CSD_LOCK && !shi_cas_full(&csd[i].lock, &lock, lock | left));
        if (!(lock & SHI_CSD_LOCK) && shi_load_relaxed(&csd[i].status) & SHI_S_LENT)
            shi_lend_done(self, &csd[i]);
    }
    /* Now that no other of them can begin, those that run: their CPUs look for CANCEL. */
    const uint64_t runs = SHI_CSD_LOCK | SHI_CSD_BEGUN | SHI_CSD_CANCEL;
    for (i = 0; i < n; i++) {
        uint64_t lock = shi_load_acquire(&csd[i].lock);
        uint32_t dst = (uint16_t)(lock >> SHI_CSD_DST_SHIFT);
        if ((lock & runs) == runs && (lock & SHI_CSD_TYPE) == SHI_CSD_TTWU &&
            dst < self->m->ncpus)
            shi_chip_prod(self, dst);
    }
}

void shi_guest_bury(struct shi_self *self, uint32_t id)
{
    struct shi_slot *slot = shi_slot(self->m, id);
    next_generation(slot); /* its locks are free, its irq handlers gone */
    depart(self, slot);
    shi_multi_orphan(self, id);
    leave_calls(self, id);
    shi_sched_slot_dead(self, id);
    shi_store_release(&slot->pid, 0);
    shi_store_release(&slot->waiting_for, 0);
    shi_store_release(&slot->ringing, 0);
    shi_store_release(&slot->cpus_read, 0);
    shi_reap_ring_all(self); /* a ring may have died with it */
}

uint32_t shi_guest_clear(struct shi_self *self, uint32_t id)
{
    const struct shi_machine *m = self->m;
    struct shi_slot *slot = shi_slot(m, id);
    struct shi_csd *csd = (struct shi_csd *)shi_region(m, id);
    uint32_t i, busy = 0, top = csds_of(m, id);
    shi_reap_orphans(self, id);
    for (i = 0; i < top; i++)
        /* Acquire pairs with the unlock: who had it has done with its payload too. */
        if (shi_csd_locked(&csd[i]) && !shi_csd_unqueued(&csd[i]))
            busy++;
    if (busy)
        return busy;
    /* Its functions and payloads.  Not the csds, a few pages: CPUs look at them for what
     * they have lent, and a hole that is touched when /dev/shm is full is a SIGBUS. */
    shi_store_full(&slot->func_top, 0);
    shi_machine_punch(m, m->region_offset + (uint64_t)id * m->region_bytes + m->func_offset,
                      m->region_bytes - m->func_offset);
    return 0;
}
