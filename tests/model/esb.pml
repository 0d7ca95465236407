/* SPDX-License-Identifier: MIT */
/*
 * Messages behind one source with P and Q (XIVE under powerpc's muxed IPIs).
 *
 * Modelled: two senders store a message byte each, plainly, and trigger the source; only the
 * trigger that finds P clear rings. The CPU takes P, exchanges the messages with zero, and ends:
 * EOI clears P, and sets it again where it finds Q. `due` counts messages that are stored and not
 * taken. A CPU that sleeps while one is due is the lost IPI.
 *
 * Rules, each removed by its switch:
 *   NO_RETRIGGER          EOI forgets Q
 *   NO_Q                  a trigger that finds P leaves no Q
 *   MESSAGE_AFTER_TRIGGER the message is stored after the trigger
 *   TRIGGER_BY_LOAD       P is looked at by a load, which does not wait for the message's store
 *   EOI_BY_STORE          EOI clears both bits by a store, whatever came since it read them
 */
#define NW 1
#define ESB 1
#define MSG 2                                   /* one cell for each sender's byte */
#ifdef THREE                                    /* only then can a sender find Q */
#define SENDERS 3
#else
#define SENDERS 2
#endif
#define NMEM (2 + SENDERS)
#define NB   (2 + SENDERS)
#define PBIT 1
#define QBIT 2
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
    int w, e; byte ok;
    due++;
#ifndef MESSAGE_AFTER_TRIGGER
    ST(me, MSG + me - 2, 1);
#endif
#ifdef TRIGGER_BY_LOAD
    LD(me, ESB, e);
    if :: e & QBIT -> goto triggered :: else fi;
#endif
    do
    :: LD(me, ESB, e);
        if
#ifdef NO_Q
        :: e & PBIT -> CAS(me, ESB, e, e, ok)
#else
        :: e & PBIT -> CAS(me, ESB, e, e | QBIT, ok)
#endif
        :: else -> CAS(me, ESB, e, e | PBIT, ok)
        fi;
        if :: ok -> break :: else fi
    od;
    if :: !(e & QBIT) -> undertake(me) :: else fi;
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
        :: e & PBIT ->
            d_step {                            /* xchg(&messages, 0): all bytes at once */
                sb[0].n == 0 ->
                due = due - (mem[MSG] + mem[MSG + 1]);
                mem[MSG] = 0; mem[MSG + 1] = 0
#ifdef THREE
                ;
                due = due - mem[MSG + 2];
                mem[MSG + 2] = 0
#endif
            };
#ifdef EOI_BY_STORE
            LD(0, ESB, e);
            if :: e & QBIT -> e = PBIT :: else -> e = 0 fi;
            ST(0, ESB, e);
#else
            do
            :: LD(0, ESB, e);
#ifdef NO_RETRIGGER
                CAS(0, ESB, e, 0, ok);
#else
                CAS(0, ESB, e, (e & QBIT -> PBIT : 0), ok);
#endif
                if :: ok -> break :: else fi
            od;
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
#ifdef THREE
        ;
        run Flush(4); run Sender(4)
#endif
    }
}
