/* SPDX-License-Identifier: MIT */
/*
 * A wait with interrupts off: a task that has its soft mask set calls and parks. It may not serve
 * its own queue, so it cannot meet a halt or a return to RUNNING that demand an empty one.
 *
 * Modelled: CPU 0 is in a task, masked, and waits for csd 0, which an unlocker completes; a
 * sender pushes csd 1 to CPU 0 meanwhile. The waiter publishes HALTED whatever is queued (those
 * pushes have rung and will be served later), reads the lock again, sleeps; woken for nothing it
 * parks again. When it has its answer it goes back to RUNNING whatever is queued, and takes note:
 * work in the word is `happened`, as if the kick had come. Unmasking replays. The task never
 * ends, so a call that is not replayed is a deadlock. Kicks as in running.pml; the drain of a
 * handler is one step here.
 *
 * Rules, each removed by its switch:
 *   NO_HAPPENED_AFTER_WAIT  back to RUNNING without taking note of what was queued
 *   BACK_NEEDS_NO_WORK      back to RUNNING only with an empty queue, as other tasks start
 *   HALT_NEEDS_NO_WORK      HALTED only with an empty queue: the waiter spins for ever, which is
 *                           reported here as being stuck
 *   NOTE_BEFORE_BACK        it looks for work before it publishes RUNNING
 */
#define NW 1
#define LOCKW 1
#define NMEM  2
#define NB    4
#define PARKED 2
byte served;
#include "tso.pml"

bool kick, in_irq, mask = 1, happened;

inline ring() {
    do
    :: LD(me, 0, w);
        if
        :: STATE(w) == HALTED -> CAS(me, 0, w, SETST(w, RUNG) | add, ok)
        :: STATE(w) == RUNNING && add -> CAS(me, 0, w, w | KICKED | add, ok)
        :: else -> CAS(me, 0, w, w | add, ok)
        fi;
        if :: ok -> break :: else fi
    od;
    if
    :: STATE(w) == HALTED -> doorbell(0)
    :: STATE(w) == RUNNING && add && !(w & KICKED) -> kick = 1
    :: else
    fi
}

proctype Unlocker(byte me) {
    int w; byte ok, add;
    XCHG(me, LOCKW, 0, w);
    if :: w & PARKED -> ring() :: else fi
}

proctype Sender(byte me) {
    int w; byte ok, add = PENDING;
    do
    :: LD(me, 0, w);
        CAS(me, 0, w, SETHEAD(w, 1), ok);
        if :: ok -> break :: else fi
    od;
    if
    :: HEAD(w) == 0 && STATE(w) != POLLING -> ring()
    :: else
    fi
}

inline service() {
    d_step {
        sb[0].n == 0 ->
        served = served + HEAD(mem[0]);
        mem[0] = LOW(mem[0]) & ~PENDING
    }
}

proctype Kick() {
    int w;
end:
    do
    :: atomic { kick && !in_irq -> kick = 0; in_irq = 1 };
        FAND(0, 0, ~KICKED, w);
        if
        :: mask -> happened = 1
        :: !mask && STATE(w) == RUNNING -> service()
        :: else
        fi;
        w = 0;
        in_irq = 0
    od
}

proctype Waiter() provided (!in_irq) {
    int w; byte ok, l;
    do
    :: LD(0, LOCKW, l);
        if
        :: l -> CAS(0, LOCKW, l, l | PARKED, ok)
        :: else -> break
        fi;
        if
        :: ok ->
#ifdef HALT_NEEDS_NO_WORK
            d_step {
                sb[0].n == 0 && !WORK(mem[0]) ->
                mem[0] = SETST(mem[0], HALTED); w = mem[0]
            };
#else
            d_step { sb[0].n == 0 -> mem[0] = SETST(mem[0], HALTED); w = mem[0] };
#endif
            LD(0, LOCKW, l);
            if :: l -> sleep(0, 0, w) :: else fi;
            d_step { sb[0].n == 0 -> mem[0] = SETST(mem[0], POLLING) };
            w = 0
        :: else
        fi
    od;
    skip;
#ifdef NOTE_BEFORE_BACK
    LD(0, 0, w);
    if :: WORK(w) -> happened = 1 :: else fi;
#endif
    d_step {
#ifdef BACK_NEEDS_NO_WORK
        sb[0].n == 0 && !WORK(mem[0]) ->
#else
        sb[0].n == 0 ->
#endif
        mem[0] = SETST(mem[0], RUNNING);
        w = mem[0]
    };
#if !defined(NO_HAPPENED_AFTER_WAIT) && !defined(NOTE_BEFORE_BACK)
    if :: WORK(w) -> happened = 1 :: else fi;
#endif
    mask = 0;
    do
    :: happened -> happened = 0; mask = 1; service(); mask = 0
    :: else -> break
    od;
    served == 1                                 /* the rest of the task */
}

init {
    atomic {
        mem[0] = RUNNING; mem[LOCKW] = 1;
        run Flush(0); run Flush(1); run Flush(2);
        run Waiter(); run Kick(); run Unlocker(1); run Sender(2)
    }
}
