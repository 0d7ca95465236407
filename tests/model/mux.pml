/* SPDX-License-Identifier: MIT */
/*
 * Lines behind a mask: a mailbox, and the kernel's ipi-mux, which only rings for a bit that goes
 * from 0 to 1 and is enabled.
 *
 * Modelled: two senders of one line; an idle CPU that takes what is enabled, halts, and at any of
 * its turns masks the line and unmasks it again. `due`: a sender has set the bit since it was
 * last taken. A CPU that sleeps while something is due and nobody will ring is the lost IPI.
 * -DMAILBOX: every sender rings.
 *
 * Rules, each removed by its switch:
 *   NO_RECHECK        unmask does not look at what is pending
 *   UNMASK_BY_STORE   it enables by a store: its look may come before that is seen
 *   ENABLE_READ_FIRST the sender looks at the mask before it has set the bit
 *   SUMMARY_LAST      the CPU clears the summary bit after it has looked at the lines
 *   TAKES_MASKED      taking the lines clears those that are masked, too
 *   RING_ON_ONE       the sender rings when the bit was set already, and not when it was clear
 */
#define NW 1
#define BITS 1
#define EN   2
#define NMEM 3
#define NB   4                                  /* CPU, its unmasking, two senders */
bool due;
byte ended;
#define ALL_DONE (ended == 2 && !due)
#include "tso.pml"

inline undertake(p) {
    do
    :: LD(p, 0, w);
        if
        :: STATE(w) == HALTED -> CAS(p, 0, w, SETST(w, RUNG) | PENDING, ok)
        :: else -> CAS(p, 0, w, w | PENDING, ok)
        fi;
        if :: ok -> break :: else fi
    od;
    if :: STATE(w) == HALTED -> doorbell(0) :: else fi
}

proctype Sender(byte me) {
    int w, b, e; byte ok;
#ifdef ENABLE_READ_FIRST
    LD(me, EN, e);
#endif
    d_step { sb[me].n == 0 -> b = mem[BITS]; mem[BITS] = 1; due = 1 };
#ifndef ENABLE_READ_FIRST
    LD(me, EN, e);
#endif
    if
#ifdef MAILBOX
    :: true -> undertake(me)
#elif defined(RING_ON_ONE)
    :: b && e -> undertake(me)
    :: else
#else
    :: !b && e -> undertake(me)
    :: else
#endif
    fi;
    ended++
}

inline unmask() {
#ifdef UNMASK_BY_STORE
    ST(0, EN, 1);
#else
    FOR(0, EN, 1, e);
#endif
    masked = 0;
#ifndef NO_RECHECK
    LD(0, BITS, b);
    if :: b -> FOR(0, 0, PENDING, w) :: else fi;
#endif
    b = 0
}

proctype Cpu() {
    int w, b, e; byte ok, turns; bool masked;
again:
    do
#ifndef SUMMARY_LAST
    :: FAND(0, 0, ~PENDING, w);
#else
    :: skip;
#endif
        LD(0, EN, e);
        LD(0, BITS, b);
#ifdef SUMMARY_LAST
        FAND(0, 0, ~PENDING, w);
#endif
        if
#ifdef TAKES_MASKED
        :: b -> d_step { sb[0].n == 0 -> due = (e -> 0 : due); mem[BITS] = 0 }
#else
        :: b && e -> d_step { sb[0].n == 0 -> mem[BITS] = 0; due = 0 }
#endif
        :: else
        fi;
        b = 0;
        if
        :: turns < 2 && !masked -> turns++; masked = 1; FAND(0, EN, 0, e)
        :: masked -> unmask()
        :: skip
        fi;
        e = 0;
        LD(0, 0, w);
        if
        :: WORK(w) -> goto again
        :: !WORK(w) && masked -> unmask(); goto again
        :: else -> CAS(0, 0, w, SETST(w, HALTED), ok)
        fi;
        if
        :: ok ->
            w = SETST(w, HALTED);
            sleep(0, 0, w);
            if :: ALL_DONE -> break :: else fi;
            d_step { sb[0].n == 0 -> mem[0] = SETST(mem[0], POLLING); w = 0 }
        :: else
        fi
    od
}

init {
    atomic {
        mem[0] = POLLING; mem[EN] = 1;
        run Flush(0); run Flush(2); run Flush(3);
        run Cpu(); run Sender(2); run Sender(3)
    }
}
