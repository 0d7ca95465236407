/* SPDX-License-Identifier: MIT */
/*
 * Parked waiters and the unlock, between two CPUs that call each other at the same time.
 *
 * Modelled: each CPU pushes one SYNC csd to the other, then waits: PARKED into csd.lock by a
 * compare-and-swap, HALTED into its own word (only without work), csd.lock read again, sleep;
 * a call that comes in meanwhile wakes it by the same way and is served, then it parks again.
 * The handler stores the result (plain), then unlocks: exchange the lock with 0, and when PARKED
 * was in it, ring the waiter (HALTED -> RUNG, doorbell). The waiter checks the result. After its
 * own call a CPU serves as an idle one until it has served the calls to it. A third process sends
 * CPU 0 an ASYNC csd (csd 2) at any moment.
 * The Dekker: the waiter publishes HALTED, then reads the lock; the unlocker exchanges the lock,
 * then reads the waiter's word.
 * The 10 ms limit of a parked sleep is left out on purpose: it would hide what is looked for.
 *
 * Rules, each removed by its switch:
 *   NO_LOCK_RECHECK        the lock is not read again after HALTED was published
 *   UNLOCK_WITHOUT_RING    the unlock does not look at PARKED
 *   NO_PARKED              the waiter does not set PARKED
 *   PARKED_BY_STORE        PARKED is stored after a load, not compared-and-swapped
 *   UNLOCK_BY_STORE        load the lock, look at PARKED, store 0
 *   ALWAYS_RING            not a mutation: the unlock looks at the word whatever PARKED says
 *   ALWAYS_RING + UNLOCK_BY_STORE     a plain store is then only wrong for the buffer
 *                          (passes with -DSC)
 *   DEKKER                 not a mutation: publish HALTED by an exchange, then look for work and
 *                          at the lock
 *   DEKKER + PLAIN_STORE_STATE        the same with a plain store (passes with -DSC)
 *   RESULT_AFTER_UNLOCK    the result is stored after the unlock
 *   CHECK_BEFORE_HALT_ONLY work is looked for before HALTED, by a load of its own
 */
#define NW 2
#define PAY(c)  (2 + (c))
#define NEXT(c) (5 + (c))
#define LOCK(c) (8 + (c))
#define RES(c)  (11 + (c))
#define NMEM    13
#define NB      3
#define PARKED  2
#include "tso.pml"

byte served[3];                                 /* ghost: how often csd c was run */

inline ring(me, k) {
    do
    :: LD(me, k, w);
        if
        :: STATE(w) == HALTED -> CAS(me, k, w, SETST(w, RUNG), ok);
            if :: ok -> doorbell(k); break :: else fi
        :: else -> break
        fi
    od
}

inline call(me, k, c) {
    ST(me, LOCK(c), 1);
    ST(me, PAY(c), c + 1);
    do
    :: LD(me, k, w);
        ST(me, NEXT(c), HEAD(w));
        CAS(me, k, w, SETHEAD(w, c + 1), ok);
        if :: ok -> break :: else fi
    od;
    if
    :: HEAD(w) == 0 && STATE(w) != POLLING ->
        do
        :: LD(me, k, w);
            if
            :: STATE(w) == HALTED -> CAS(me, k, w, SETST(w, RUNG) | PENDING, ok)
            :: else -> CAS(me, k, w, w | PENDING, ok)
            fi;
            if :: ok -> break :: else fi
        od;
        if :: STATE(w) == HALTED -> doorbell(k) :: else fi
    :: else
    fi
}

inline unlock(me, c) {
#ifdef UNLOCK_BY_STORE
    LD(me, LOCK(c), was);
    ST(me, LOCK(c), 0);
#else
    XCHG(me, LOCK(c), 0, was);
#endif
    assert(was & 1);
#ifdef RESULT_AFTER_UNLOCK
    ST(me, RES(c), c + 5);
#endif
#ifndef UNLOCK_WITHOUT_RING
#ifdef ALWAYS_RING
    ring(me, c)                                 /* csd c belongs to CPU c */
#else
    if :: was & PARKED -> ring(me, c) :: else fi
#endif
#endif
}

inline drain(me) {
    FAND(me, me, ~PENDING, w);
    FAND(me, me, 127, w);
    c = HEAD(w);
    do
    :: c == 0 -> break
    :: else ->
        LD(me, NEXT(c - 1), n);
        LD(me, PAY(c - 1), w);
        assert(w == c);
        served[c - 1]++;
        assert(served[c - 1] == 1);
        if
        :: c < 3 ->
#ifndef RESULT_AFTER_UNLOCK
            ST(me, RES(c - 1), c + 4);
#endif
            unlock(me, (c - 1))
        :: else
        fi;
        c = n
    od;
    atomic { w = 0; ok = 0; was = 0; n = 0 }
}

/* Halt unless there is work, or the lock that is waited for (0: none) is free. */
inline halt(me, waiting) {
#ifdef DEKKER
#ifdef PLAIN_STORE_STATE
    ST(me, me, HALTED);
#else
    d_step { sb[me].n == 0 -> mem[me] = SETST(mem[me], HALTED) };
#endif
    LD(me, me, w);
    ok = !WORK(w);
#else
#ifdef CHECK_BEFORE_HALT_ONLY
    LD(me, me, w);
    if
    :: WORK(w) -> ok = 0
    :: else -> ok = 1; d_step { sb[me].n == 0 -> mem[me] = SETST(mem[me], HALTED) }
    fi;
#else
    LD(me, me, w);
    if
    :: WORK(w) -> ok = 0
    :: else -> CAS(me, me, w, SETST(w, HALTED), ok)
    fi;
#endif
#endif
    w = HALTED;
    if
    :: ok ->
#ifndef NO_LOCK_RECHECK
        if
        :: waiting -> LD(me, LOCK(me), was); ok = was & 1
        :: else
        fi;
        was = 0;
#endif
        if :: ok -> sleep(me, me, w) :: else fi
    :: else
    fi;
    d_step { sb[me].n == 0 -> mem[me] = SETST(mem[me], POLLING) };
    atomic { w = 0; ok = 0 }
}

proctype Cpu(byte self) {
    int w, c; byte ok, was, n;
    call(self, 1 - self, self);
    do
    :: LD(self, LOCK(self), was);
        if
        :: !(was & 1) -> break
        :: else ->
#ifndef NO_PARKED
#ifdef PARKED_BY_STORE
            ST(self, LOCK(self), was | PARKED); ok = 1;
#else
            CAS(self, LOCK(self), was, was | PARKED, ok);
#endif
            was = 0;
            if :: ok -> halt(self, true) :: else fi;
#else
            was = 0;
            halt(self, true);
#endif
            drain(self)
        fi
    od;
    LD(self, RES(self), w);
    assert(w == self + 5);
    atomic { w = 0; was = 0 };
    do
    :: served[1 - self] && (self == 1 || served[2]) -> break
    :: else -> halt(self, false); drain(self)
    od
}

proctype Sender() {
    int w; byte ok;
    call(2, 0, 2)
}

init {
    atomic {
        mem[0] = POLLING; mem[1] = POLLING;
        run Flush(0); run Flush(1); run Flush(2);
        run Cpu(0); run Cpu(1); run Sender()
    }
}
