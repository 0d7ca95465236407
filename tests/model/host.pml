/* SPDX-License-Identifier: MIT */
/*
 * Parked threads of the host: several threads wait on one slot, so the host has no HALTED word to
 * ring but an event count to sleep on.
 *
 * Modelled: two host threads, each waits for a csd of its own that a CPU of its own completes.
 * Thread: read the event count, PARKED into csd.lock by a compare-and-swap (this is also the last
 * look at the lock), FUTEX_WAIT while the count is what was read. Unlocker: exchange the lock;
 * PARKED in it: count + 1, FUTEX_WAKE of all.
 *
 * Rules, each removed by its switch:
 *   EVENT_READ_LATE   the count is read after PARKED was set
 *   WAKE_ONE          one thread is woken, perhaps the wrong one
 *   UNLOCK_BY_STORE   load the lock, look at PARKED, store 0
 *   WAKE_WITHOUT_COUNT  FUTEX_WAKE without counting
 */
#define NW 0
#define LOCK(c) (c)
#define RES(c)  (2 + (c))
#define EVENT   4
#define NMEM    5
#define NB      4                               /* threads 0 and 1, CPUs 2 and 3 */
#define PARKED  2
#include "tso.pml"

inline wake() {
#ifdef WAKE_ONE
    if
    :: asleep[0] -> asleep[0] = 0
    :: asleep[1] -> asleep[1] = 0
    :: else
    fi
#else
    d_step { asleep[0] = 0; asleep[1] = 0 }
#endif
}

proctype Thread(byte me) {
    byte e, was, ok;
    do
    ::
#ifndef EVENT_READ_LATE
        LD(me, EVENT, e);
#endif
        LD(me, LOCK(me), was);
        if
        :: !(was & 1) -> break
        :: else -> CAS(me, LOCK(me), was, was | PARKED, ok)
        fi;
        if
        :: ok ->
#ifdef EVENT_READ_LATE
            LD(me, EVENT, e);
#endif
            d_step {
                sb[me].n == 0 ->
                if :: mem[EVENT] == e -> asleep[me] = 1 :: else fi
            };
            asleep[me] == 0
        :: else
        fi
    od;
    LD(me, RES(me), e);
    assert(e == me + 5)
}

proctype Cpu(byte me; byte c) {
    byte was;
    ST(me, RES(c), c + 5);
#ifdef UNLOCK_BY_STORE
    LD(me, LOCK(c), was);
    ST(me, LOCK(c), 0);
#else
    XCHG(me, LOCK(c), 0, was);
#endif
    assert(was & 1);
    if
    :: was & PARKED ->
#ifndef WAKE_WITHOUT_COUNT
        d_step { sb[me].n == 0 -> mem[EVENT]++ };
#endif
        wake()
    :: else
    fi
}

init {
    atomic {
        mem[LOCK(0)] = 1; mem[LOCK(1)] = 1;
        run Flush(0); run Flush(1); run Flush(2); run Flush(3);
        run Thread(0); run Thread(1); run Cpu(2, 0); run Cpu(3, 1)
    }
}
