/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <unistd.h>

#include "base/event.h"
#include "base/machine.h"

void shi_hosts_ring(const struct shi_machine *m)
{
    uint32_t id;
    for (id = m->ncpus; id < m->nslots; id++)
        shi_event_ring(&shi_slot(m, id)->event);
}

/* ---- locks between processes ------------------------------------------------------ */

static bool holder_lives(const struct shi_machine *m, uint64_t held)
{
    uint32_t slot = shi_holder_slot(held);
    uint16_t gen = (uint16_t)(held >> (SHI_HOLDER_SLOT_BITS + SHI_HOLDER_PID_BITS));
    if (slot >= m->nslots)
        return false; /* damaged */
    /* The end of the host (or the firmware) is the machine's, so that theirs stays 0;
     * a guest's slot has a new generation as soon as the firmware knows that it is gone. */
    if (slot >= m->ncpus)
        return (uint16_t)shi_load_acquire(&shi_slot(m, slot)->generation) == gen;
    uint64_t w = shi_load_acquire(&shi_slot(m, slot)->word);
    return shi_word_state(w) != SHI_DEAD && shi_word_gen(w) == gen;
}

static uint64_t holder(const struct shi_self *self, uint32_t pid)
{
    return (uint64_t)(self->id + 1) | (uint64_t)pid << SHI_HOLDER_SLOT_BITS |
           (uint64_t)self->gen << (SHI_HOLDER_SLOT_BITS + SHI_HOLDER_PID_BITS);
}

static uint64_t as_holder(const struct shi_self *self)
{
    return holder(self, (uint32_t)getpid());
}

int shi_lock_steal(struct shi_self *self, shi_a64 *lock, uint64_t *dead)
{
    uint64_t held = shi_load_relaxed(lock);
    if (held && holder_lives(self->m, held))
        return -EAGAIN;
    *dead = held;
    /* Acquires what the unlock, or the dead holder, stored.  The pid of the process that has
     * the slot, without a system call: a fork's child never comes here. */
    return shi_cas_full(lock, &held, holder(self, (uint32_t)self->pid)) ? *dead != 0 : -EAGAIN;
}

int shi_lock_take(struct shi_self *self, shi_a64 *lock)
{
    uint64_t dead;
    return shi_lock_steal(self, lock, &dead);
}

void shi_lock_drop(struct shi_self *self, shi_a64 *lock)
{
    uint64_t held = holder(self, (uint32_t)self->pid);
    /* Releases what was changed under it.  Not if it was taken from us: then we are dead. */
    shi_cas_full(lock, &held, 0);
}

bool shi_lock_mine(const struct shi_self *self, const shi_a64 *lock)
{
    return shi_load_relaxed(lock) == as_holder(self);
}

bool shi_lock_is_free(const struct shi_self *self, const shi_a64 *lock)
{
    uint64_t held = shi_load_full(lock);
    return !held || !holder_lives(self->m, held);
}

int shi_lock_try(struct shi_self *self, shi_a64 *lock)
{
    uint64_t held = shi_load_relaxed(lock);
    if (held && holder_lives(self->m, held))
        return -EAGAIN;
    /* Acquires what the unlock, or the dead holder, stored. */
    return shi_cas_full(lock, &held, as_holder(self)) ? 0 : -EAGAIN;
}

void shi_lock_release(struct shi_self *self, shi_a64 *lock)
{
    uint64_t held = as_holder(self);
    /* Releases what was changed under it.  Not if it was taken from us: then we are dead. */
    shi_cas_full(lock, &held, 0);
}

void shi_lock_orphan(const struct shi_self *self, shi_a64 *lock, uint32_t pid)
{
    uint64_t held = holder(self, pid);
    /* Not freed: who takes it next has to learn, as of every dead holder, that what it
     * protects may be half changed. */
    shi_cas_full(lock, &held, SHI_HOLDER_ORPHAN);
}
