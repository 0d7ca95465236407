/* SPDX-License-Identifier: MIT */
/*
 * Push, halt, ring: two senders, one target that polls, halts and is woken by its doorbell.
 *
 * Modelled: sender 0 sends one ASYNC csd twice (it waits until the csd is unlocked); sender 1
 * sends a csd, then a line without a csd (an ICR write). Push with one compare-and-swap, elision
 * when the state was POLLING, coalescing behind a queue that was not empty, chip send (irr line,
 * then PENDING and HALTED -> RUNG in one step), doorbell as futex or (-DTOKEN) as token.
 * Payload, next and lock are plain stores. The target checks each payload it runs.
 * Abstracted: one irr bit per sender; the list is run newest first (order is a local matter of
 * the drain and has its own unit tests); no time.
 *
 * Rules, each removed by its switch:
 *   NO_HALT_RECHECK        HALTED although there is work
 *   DEKKER                 not a mutation: publish HALTED by an exchange, then look for work
 *   DEKKER + PLAIN_STORE_STATE  the same with a plain store (passes with -DSC: buffers matter)
 *   STATE_READ_BEFORE_PUSH the elision goes by a state read before the push, not by the one in
 *                          the word that the push replaced
 *   PAYLOAD_AFTER_PUSH, NEXT_AFTER_PUSH   a field is written after the push has published it
 *   READ_AFTER_UNLOCK      an ASYNC csd is unlocked before its payload was copied
 *   DRAIN_LOAD_STORE       the list is taken by a load and a later clear
 *   PENDING_BEFORE_IRR     the sender turns PENDING on before it sets the line
 *   IRR_BEFORE_PENDING     the target takes the lines before it clears PENDING
 *   FUTEX_NO_COMPARE       sleep without comparing the word
 *   NO_RUNG_DOORBELL       HALTED -> RUNG without a doorbell
 */
#define NW 1
#define PAY(c)  (1 + (c))
#define NEXT(c) (3 + (c))
#define LOCK(c) (5 + (c))
#define IRR     7
#define NMEM    8
#define NB      3
#define T       2                               /* the target's buffer */
#include "tso.pml"

#define CALLS 3
#define LINES 1
byte handled, lines;
byte expect[2];                                 /* ghost: payload of the call in flight */

inline send(q, line) {
#ifndef PENDING_BEFORE_IRR
    FOR(q, IRR, line, w);
#endif
    do
    :: LD(q, 0, w);
        if
        :: STATE(w) == HALTED -> CAS(q, 0, w, SETST(w, RUNG) | PENDING, ok)
        :: else -> CAS(q, 0, w, w | PENDING, ok)
        fi;
        if :: ok -> break :: else fi
    od;
#ifdef PENDING_BEFORE_IRR
    FOR(q, IRR, line, ok);
#endif
#ifndef NO_RUNG_DOORBELL
    if :: STATE(w) == HALTED -> doorbell(0) :: else fi;
#endif
}

inline call(p, c, value) {
    ok = 1;
    do
    :: ok -> LD(p, LOCK(c), ok)
    :: else -> break
    od;
    expect[c] = value;
    ST(p, LOCK(c), 1);
#ifndef PAYLOAD_AFTER_PUSH
    ST(p, PAY(c), value);
#endif
#ifdef STATE_READ_BEFORE_PUSH
    LD(p, 0, was);
    was = STATE(was);
#endif
    do
    :: LD(p, 0, w);
#ifndef NEXT_AFTER_PUSH
        ST(p, NEXT(c), HEAD(w));
#endif
        CAS(p, 0, w, SETHEAD(w, c + 1), ok);
        if :: ok -> break :: else fi
    od;
#ifdef NEXT_AFTER_PUSH
    ST(p, NEXT(c), HEAD(w));
#endif
#ifdef PAYLOAD_AFTER_PUSH
    ST(p, PAY(c), value);
#endif
#ifndef STATE_READ_BEFORE_PUSH
    was = STATE(w);
#endif
    if
    :: HEAD(w) == 0 && was != POLLING -> send(p, 1)
    :: else                                     /* coalesced or elided */
    fi;
    atomic { w = 0; ok = 0; was = 0 }
}

proctype Sender(byte me) {
    int w; byte ok, was;
    call(me, me, 1 + me);
    if
    :: me == 0 -> call(me, me, 3)
    :: else -> send(me, 2)
    fi
}

inline drain() {
#ifdef IRR_BEFORE_PENDING
    XCHG(T, IRR, 0, w);
    lines = lines + (w >> 1);
    FAND(T, 0, ~PENDING, w);
#else
    FAND(T, 0, ~PENDING, w);
    if
    :: w & PENDING -> XCHG(T, IRR, 0, w); lines = lines + (w >> 1)
    :: else
    fi;
#endif
#ifdef DRAIN_LOAD_STORE
    LD(T, 0, w);
    FAND(T, 0, 127, c);
#else
    FAND(T, 0, 127, w);
#endif
    c = HEAD(w);
    do
    :: c == 0 -> break
    :: else ->
        LD(T, NEXT(c - 1), n);
#ifdef READ_AFTER_UNLOCK
        XCHG(T, LOCK(c - 1), 0, w);
        assert(w == 1);
        LD(T, PAY(c - 1), w);
        assert(w == expect[c - 1]);
#else
        LD(T, PAY(c - 1), w);
        assert(w == expect[c - 1]);
        d_step {                                /* the unlock, with a check of the ghost */
            sb[T].n == 0 -> assert(mem[LOCK(c - 1)] == 1); mem[LOCK(c - 1)] = 0
        };
#endif
        handled++;
        c = n
    od;
    atomic { w = 0; n = 0; c = 0 }
}

proctype Target() {
    int w, c; byte n, ok;
    do
    :: handled == CALLS && lines == LINES -> break
    :: else ->
        LD(T, 0, w);
        assert(STATE(w) == POLLING);
        if
        :: WORK(w) -> drain()                   /* polling saw it */
        :: true ->                              /* or the poll window is over: halt */
#ifdef DEKKER
#ifdef PLAIN_STORE_STATE
            ST(T, 0, HALTED);
#else
            d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], HALTED) };
#endif
            LD(T, 0, w);
            ok = !WORK(w);
            w = SETST(GENBITS(GEN(w)), HALTED);
#else
#ifdef NO_HALT_RECHECK
            LD(T, 0, w);
            CAS(T, 0, w, SETST(w, HALTED), ok);
#else
            if
            :: WORK(w) -> ok = 0
            :: else -> CAS(T, 0, w, SETST(w, HALTED), ok)
            fi;
#endif
            w = SETST(w, HALTED);
#endif
            if :: ok -> sleep(T, 0, w) :: else fi;
            d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], POLLING) };
            atomic { w = 0; ok = 0 };
            drain()
        fi
    od
}

init {
    atomic {
        mem[0] = POLLING;
        run Flush(0); run Flush(1); run Flush(T);
        run Sender(0); run Sender(1); run Target()
    }
}
