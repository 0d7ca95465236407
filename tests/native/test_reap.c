/* SPDX-License-Identifier: MIT */
/* What the firmware does for a CPU that died, step by step. */
#include "rig.h"

#include "smp/reap.h"

static struct rig rig;

#define CORRUPT() shi_load_relaxed(&rig.firmware.counts[SHI_C_corrupt])

static void boot(void)
{
    rig_quiet(&rig, 3);
    uint32_t i;
    for (i = 0; i < 3; i++)
        rig_set_state(&rig, i, SHI_RUNNING);
}

/* Nobody can queue for the dead; who waits for it hears how it ended, and only he. */
static void who_waited_is_told(void)
{
    uint32_t first, second, other;
    boot();
    CHECK(rig_push(&rig, 1, SHI_CSD_SYNC, &first) >= 0);
    CHECK(rig_push(&rig, 1, SHI_CSD_TTWU, &second) >= 0);
    CHECK(rig_push(&rig, 2, SHI_CSD_SYNC, &other) >= 0);
    struct shi_csd *csd = shi_own_csd(&rig.host, first);
    shi_fetch_or_full(&csd->lock, SHI_CSD_PARKED);
    uint32_t seen = shi_load_full(&rig.host.slot->event);
    shi_store_full(&rig.cpu[1].slot->waiting_for, 1);
    shi_reap_mark(&rig.firmware, 1, 9);
    uint64_t w = shi_load_full(&rig.cpu[1].slot->word);
    CHECK(shi_word_state(w) == SHI_DEAD && !shi_word_head(w));
    CHECK(shi_word_gen(w) == rig.cpu[1].gen);
    CHECK(shi_load_full(&rig.cpu[1].slot->waiting_for) == 0);
    CHECK(CORRUPT() == 0);
    uint32_t refused;
    CHECK(rig_push(&rig, 1, SHI_CSD_SYNC, &refused) == -ENXIO);
    CHECK(shi_reap_complete(&rig.firmware, 1) == 2);
    CHECK(!shi_csd_locked(csd) && shi_load_full(&csd->lock) & SHI_CSD_DIED);
    CHECK((shi_load_full(&csd->lock) >> SHI_CSD_END_SHIFT & 0xffffffff) == 9);
    CHECK(shi_load_full(&rig.host.slot->event) != seen);
    CHECK(shi_load_full(&shi_own_csd(&rig.host, second)->lock) & SHI_CSD_DIED);
    CHECK(shi_csd_locked(shi_own_csd(&rig.host, other)));
    CHECK(shi_reap_complete(&rig.firmware, 1) == 0);
    rig_unquiet(&rig);
}

/* Its queue is whole wherever it was killed.  One that is not is counted. */
static void a_broken_queue_is_found(void)
{
    uint32_t locals[2], i;
    for (i = 0; i < 2; i++) {
        boot();
        CHECK(rig_push(&rig, 1, SHI_CSD_SYNC, &locals[0]) >= 0);
        CHECK(rig_push(&rig, 1, SHI_CSD_SYNC, &locals[1]) >= 0);
        shi_store_relaxed(&shi_own_csd(&rig.host, locals[0])->next,
                          shi_own_index(&rig.host, locals[1]) + 1); /* a circle */
        rig.firmware.steps = i == 0;
        shi_reap_mark(&rig.firmware, 1, 0);
        CHECK(CORRUPT() == (i == 0));                    /* users' machines do not look */
        CHECK(shi_reap_complete(&rig.firmware, 1) == 2); /* which needs no links */
        rig_unquiet(&rig);
    }
}

/* A pid is kept while a live slot may signal it. */
static void pids_are_guarded(void)
{
    boot();
    shi_reap_mark(&rig.firmware, 1, 0);
    CHECK(rig_unguarded(&rig, 1));
    shi_store_full(&rig.host.slot->ringing, 1 + 1);
    CHECK(!rig_unguarded(&rig, 1));
    shi_store_full(&rig.host.slot->ringing, 2 + 1);
    CHECK(rig_unguarded(&rig, 1));
    shi_store_full(&rig.cpu[2].slot->ringing, 1 + 1);
    CHECK(!rig_unguarded(&rig, 1));
    shi_store_full(&rig.cpu[2].slot->word, SHI_DEAD); /* rings nobody any more */
    CHECK(rig_unguarded(&rig, 1));
    rig_unquiet(&rig);
}

/* A new process is another generation, and finds nothing of the old one's. */
static void a_new_process(void)
{
    boot();
    struct shi_slot *slot = rig.cpu[1].slot;
    uint32_t was = shi_load_full(&slot->generation);
    shi_store_full(&slot->damaged, 1);
    shi_store_full(&slot->task, 5);
    shi_reap_mark(&rig.firmware, 1, 0);
    CHECK(shi_reap_reset(&rig.firmware, 1) == was + 1);
    CHECK(shi_word_state(shi_load_full(&slot->word)) == SHI_OFFLINE);
    CHECK(shi_word_gen(shi_load_full(&slot->word)) == (uint16_t)(was + 1));
    CHECK(!shi_load_full(&slot->damaged) && !shi_load_full(&slot->task));
    shi_store_full(&slot->generation, 0xffff); /* 0 is "not queued" in a csd */
    CHECK(shi_reap_reset(&rig.firmware, 1) == 0x10001);
    rig_unquiet(&rig);
}

/* A csd for CPU 1 that its sender has locked, and aimed at that generation (0: not yet). */
static struct shi_csd *locked_by(struct shi_self *sender, uint16_t gen)
{
    shi_enter(sender);
    int64_t local = shi_csd_get(sender);
    CHECK(local >= 0);
    struct shi_csd *csd = shi_own_csd(sender, (uint32_t)local);
    CHECK(shi_csd_trylock(sender, csd, SHI_CSD_SYNC, 1) == 0);
    shi_fetch_or_full(&csd->lock, (uint64_t)gen << SHI_CSD_GEN_SHIFT);
    shi_leave(sender);
    return csd;
}

/* Locked, and its sender killed before it was aimed at anybody: free at its death. */
static void never_aimed(void)
{
    boot();
    struct shi_csd *csd = locked_by(&rig.cpu[0], 0);
    CHECK(shi_reap_orphans(&rig.firmware, 0) == 0); /* it lives, and may push it at any time */
    CHECK(shi_csd_locked(csd));
    shi_reap_mark(&rig.firmware, 0, 9);
    CHECK(shi_reap_orphans(&rig.firmware, 0) == 0);
    CHECK(!shi_csd_locked(csd));
    rig_unquiet(&rig);
}

/* Locked and aimed, and its sender killed before the swap: nobody else would unlock it. */
static void orphans(void)
{
    boot();
    struct shi_csd *csd = locked_by(&rig.cpu[0], rig.cpu[1].gen);
    CHECK(shi_reap_orphans(&rig.firmware, 0) == 0); /* it lives: the csd is its own */
    CHECK(shi_csd_locked(csd));
    shi_reap_mark(&rig.firmware, 0, 9);
    CHECK(shi_reap_orphans(&rig.firmware, 0) == 1); /* it may be in CPU 1's hands */
    CHECK(shi_csd_locked(csd));
    shi_store_full(&rig.cpu[1].slot->quiet, shi_load_full(&rig.m.header->departed));
    CHECK(shi_reap_orphans(&rig.firmware, 0) == 0); /* which has been idle since */
    CHECK(!shi_csd_locked(csd));
    rig_unquiet(&rig);
}

/* Thousands of senders that have broadcast have millions of csds: only those with some out are
 * looked at.  How many are out is right at every moment at which one may be in a queue. */
static void only_who_has_some_out_is_scanned(void)
{
    boot();
    struct shi_self *sender = &rig.cpu[0];
    uint32_t i, locals[70];
    shi_enter(sender);
    CHECK(shi_load_full(&sender->slot->csds_out) == 0);
    for (i = 0; i < 70; i++) { /* more than a page of them */
        int64_t local = shi_csd_get(sender);
        CHECK(local >= 0 && shi_load_full(&sender->slot->csds_out) == i + 1);
        locals[i] = (uint32_t)local;
    }
    for (i = 69; i > 0; i--) {
        shi_csd_put(sender, locals[i]);
        CHECK(shi_load_full(&sender->slot->csds_out) == i);
    }
    struct shi_csd *csd = shi_own_csd(sender, locals[0]);
    CHECK(shi_csd_trylock(sender, csd, SHI_CSD_SYNC, 1) == 0);
    CHECK(shi_queue_push(sender, 1, shi_own_index(sender, locals[0]), csd) >= 0);
    /* Nobody's: a look at it would take it for a call to CPU 1 and unlock it. */
    struct shi_csd *stray = shi_own_csd(&rig.cpu[2], 0);
    shi_leave(sender);
    shi_enter(&rig.cpu[2]);
    int64_t local = shi_csd_get(&rig.cpu[2]);
    CHECK(local == 0);
    shi_csd_put(&rig.cpu[2], 0);
    shi_leave(&rig.cpu[2]);
    shi_store_full(&stray->lock, shi_load_full(&csd->lock));
    shi_reap_mark(&rig.firmware, 1, 9);
    CHECK(shi_reap_complete(&rig.firmware, 1) == 1);
    CHECK(!shi_csd_locked(csd) && shi_csd_locked(stray));
    shi_store_full(&stray->lock, 0);
    rig_unquiet(&rig);
}

/* What a killed sender had out stays told until the slot's next process knows all of it. */
static void what_the_dead_had_out_is_told(void)
{
    uint32_t local;
    boot();
    struct shi_self *sender = &rig.cpu[0];
    shi_enter(sender);
    int64_t at = shi_csd_get(sender);
    CHECK(at >= 0 && shi_csd_get(sender) >= 0); /* the other was never sent */
    local = (uint32_t)at;
    struct shi_csd *csd = shi_own_csd(sender, local);
    CHECK(shi_csd_trylock(sender, csd, SHI_CSD_SYNC, 1) == 0);
    CHECK(shi_queue_push(sender, 1, shi_own_index(sender, local), csd) >= 0);
    shi_leave(sender);
    shi_reap_mark(&rig.firmware, 0, 9);
    CHECK(shi_load_full(&sender->slot->csds_out) == 2);
    shi_reap_reset(&rig.firmware, 0);
    CHECK(shi_load_full(&sender->slot->csds_out) == 2);
    shi_self_fini(sender);
    CHECK(shi_self_init(sender, &rig.m, 0) == 0);
    CHECK(shi_load_full(&sender->slot->csds_out) == 1);
    shi_reap_mark(&rig.firmware, 1, 9);
    CHECK(shi_reap_complete(&rig.firmware, 1) == 1);
    CHECK(!shi_csd_locked(csd));
    rig_unquiet(&rig);
}

int main(void)
{
    who_waited_is_told();
    a_broken_queue_is_found();
    pids_are_guarded();
    a_new_process();
    never_aimed();
    orphans();
    only_who_has_some_out_is_scanned();
    what_the_dead_had_out_is_told();
    return 0;
}
