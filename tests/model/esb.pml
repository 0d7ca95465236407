/* SPDX-License-Identifier: MIT */
/*
 * Messages behind one source with P and Q (XIVE under powerpc's muxed IPIs).
 *
 * Modelled: two senders store a message byte each, plainly, and trigger the source. The trigger
 * that finds P clear notifies (N, what is on its way to the event queue); who sees a notification
 * then, and that the CPU's priority (CPPR) lets it through, rings. The CPU takes N, raises CPPR,
 * exchanges the messages with zero, and ends: CPPR down again, then EOI, which clears P, or where
 * it finds Q notifies again. `due` counts messages that are stored and not taken. A CPU that
 * sleeps while one is due is the lost IPI.
 *
 * Rules, each removed by its switch:
 *   NO_RETRIGGER          EOI forgets Q
 *   NO_Q                  a trigger that finds P leaves no Q
 *   MESSAGE_AFTER_TRIGGER the message is stored after the trigger
 *   TRIGGER_BY_LOAD       a load that sees a notification will do; it does not wait for the
 *                         message's store
 *   EOI_BY_STORE          EOI clears the bits by a store, whatever came since it read them
 *   CPPR_AFTER_EOI        CPPR goes down after EOI, by a store that nothing waits for
 *   RING_IF_P_WAS_CLEAR   only the one who notified rings: with DIE, who is killed before he does
 *                         so; the other one comes after that
 */
#define NW 1
#define ESB 1
#define MSG 2                                   /* one cell for each sender's byte */
#define SENDERS 2
#define CPPR (2 + SENDERS)                      /* 1: something is in service */
#define NMEM (3 + SENDERS)
#define NB   (2 + SENDERS)
#define PBIT 1
#define QBIT 2
#define NBIT 4
byte due;
byte ended;
#define ALL_DONE (ended == SENDERS && !due)
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
    int w, e, c; byte ok;
    due++;
#ifdef DIE
    me == 2 || ended;
#endif
#ifndef MESSAGE_AFTER_TRIGGER
    ST(me, MSG + me - 2, 1);
#endif
#ifdef TRIGGER_BY_LOAD
    LD(me, ESB, e);
    if :: e & NBIT -> goto triggered :: else fi;
#endif
    do
    :: LD(me, ESB, e);
        if
#ifdef NO_Q
        :: e & PBIT -> CAS(me, ESB, e, e, ok)
#else
        :: e & PBIT -> CAS(me, ESB, e, e | QBIT, ok)
#endif
        :: else -> CAS(me, ESB, e, e | PBIT | NBIT, ok)
        fi;
        if :: ok -> break :: else fi
    od;
#ifdef DIE
    if :: me == 2 -> goto dead :: else fi;      /* killed before he rang */
#endif
#ifdef RING_IF_P_WAS_CLEAR
    if :: !(e & PBIT) -> undertake(me) :: else fi;
#else
    LD(me, ESB, e);
    LD(me, CPPR, c);
    if :: e & NBIT && !c -> undertake(me) :: else fi;
#endif
#ifdef DIE
dead:
#endif
#ifdef TRIGGER_BY_LOAD
triggered:
#endif
#ifdef MESSAGE_AFTER_TRIGGER
    ST(me, MSG + me - 2, 1);
#endif
    ended++
}

proctype Cpu() {
    int w, e, m; byte ok;
again:
    do
    :: FAND(0, 0, ~PENDING, w);
        LD(0, ESB, e);
        do
        :: e & NBIT ->
            FAND(0, ESB, ~NBIT, e);
            ST(0, CPPR, 1);
            d_step {                            /* xchg(&messages, 0): all bytes at once */
                sb[0].n == 0 ->
                due = due - (mem[MSG] + mem[MSG + 1]);
                mem[MSG] = 0; mem[MSG + 1] = 0
            };
#ifndef CPPR_AFTER_EOI
            ST(0, CPPR, 0);
#endif
#ifdef EOI_BY_STORE
            LD(0, ESB, e);
            if :: e & QBIT -> e = PBIT | NBIT :: else -> e = 0 fi;
            ST(0, ESB, e);
#else
            do
            :: LD(0, ESB, e);
#ifdef NO_RETRIGGER
                CAS(0, ESB, e, 0, ok);
#else
                CAS(0, ESB, e, (e & QBIT -> PBIT | NBIT : 0), ok);
#endif
                if :: ok -> break :: else fi
            od;
#endif
#ifdef CPPR_AFTER_EOI
            ST(0, CPPR, 0);
#endif
            LD(0, ESB, e)
        :: else -> break
        od;
        e = 0;
        LD(0, 0, w);
        if
        :: WORK(w) -> goto again
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
        mem[0] = POLLING;
        run Flush(0); run Flush(2); run Flush(3);
        run Cpu(); run Sender(2); run Sender(3)
    }
}
