/* SPDX-License-Identifier: MIT */
/*
 * Offline in order, and online again, under fire.
 *
 * Modelled: a target that polls, halts, and at any moment goes offline (drain, then OFFLINE by a
 * compare-and-swap that demands no work), comes online with the next generation and goes offline
 * for good. Two senders, three SYNC calls; each is either served or -ENXIO, and a sender waits
 * until its lock is free (it spins: parking is park.pml's).
 *
 * Rules, each removed by its switch:
 *   SPLIT_ONLINE_CHECK    the state is checked, then the csd is pushed whatever the state is
 *   OFFLINE_WITHOUT_CHECK OFFLINE although there is work
 *   OFFLINE_DEKKER        not a mutation: exchange to OFFLINE, then drain once more
 *   OFFLINE_DEKKER + PLAIN_STORE_STATE   the same with a plain store (passes with -DSC)
 */
#define NW 1
#define NEXT(c) (1 + (c))
#define LOCK(c) (3 + (c))
#define RES(c)  (5 + (c))
#define NMEM    7
#define NB      3
#define T       2
#include "tso.pml"

byte calls;                                     /* ghost: calls that are over */

inline call(p, v) {
    ST(p, LOCK(p), v);
    do
    :: LD(p, 0, w);
        if
        :: STATE(w) == OFFLINE -> ok = 0; break
        :: else -> skip
        fi;
        ST(p, NEXT(p), HEAD(w));
#ifdef SPLIT_ONLINE_CHECK
        d_step {
            sb[p].n == 0 ->
            if
            :: HEAD(mem[0]) == HEAD(w) -> w = mem[0]; mem[0] = SETHEAD(w, p + 1); ok = 1
            :: else -> ok = 0
            fi
        };
#else
        CAS(p, 0, w, SETHEAD(w, p + 1), ok);
#endif
        if :: ok -> break :: else fi
    od;
    if
    :: !ok -> ST(p, LOCK(p), 0)                 /* -ENXIO */
    :: else ->
        if
        :: HEAD(w) == 0 && STATE(w) != POLLING ->
            do
            :: LD(p, 0, w);
                if
                :: STATE(w) == HALTED -> CAS(p, 0, w, SETST(w, RUNG) | PENDING, ok)
                :: STATE(w) == OFFLINE -> ok = 1
                :: else -> CAS(p, 0, w, w | PENDING, ok)
                fi;
                if :: ok -> break :: else fi
            od;
            if :: STATE(w) == HALTED -> doorbell(0) :: else fi
        :: else
        fi;
        do
        :: LD(p, LOCK(p), ok);
            if :: ok -> (mem[LOCK(p)] == 0) :: else -> break fi
        od;
        LD(p, RES(p), w);
        assert(w == v + 4)
    fi;
    calls++;
    atomic { w = 0; ok = 0 }
}

proctype Sender(byte me) {
    int w; byte ok;
    call(me, 1);
    if
    :: me == 0 -> call(me, 2)
    :: else
    fi
}

inline drain() {
    FAND(T, 0, ~PENDING, w);
    FAND(T, 0, 127, w);
    c = HEAD(w);
    do
    :: c == 0 -> break
    :: else ->
        LD(T, NEXT(c - 1), n);
        LD(T, LOCK(c - 1), w);
        assert(w);
        ST(T, RES(c - 1), w + 4);
        XCHG(T, LOCK(c - 1), 0, w);
        c = n
    od;
    atomic { w = 0; n = 0; c = 0 }
}

inline offline() {
    do
    :: drain();
#ifdef OFFLINE_WITHOUT_CHECK
        d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], OFFLINE) };
        break;
#endif
#ifdef OFFLINE_DEKKER
#ifdef PLAIN_STORE_STATE
        ST(T, 0, OFFLINE);
        LD(T, 0, w);
        if
        :: WORK(w) -> drain()
        :: else -> break
        fi;
#else
        d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], OFFLINE) };
        drain();
        break;
#endif
#else
        LD(T, 0, w);
        if
        :: WORK(w) -> ok = 0
        :: else -> CAS(T, 0, w, SETST(w, OFFLINE), ok)
        fi;
        if :: ok -> break :: else fi
#endif
    od;
    atomic { w = 0; ok = 0 }
}

proctype Target() {
    int w, c; byte n, ok, again;
    do
    :: again == 0 && calls < 3 ->               /* idle: halt */
        LD(T, 0, w);
        if
        :: WORK(w) -> ok = 0
        :: else -> CAS(T, 0, w, SETST(w, HALTED), ok)
        fi;
        w = SETST(w, HALTED);
        if
        :: ok ->
            d_step {
                sb[T].n == 0 ->
                if :: LOW(mem[0]) == LOW(w) -> asleep[0] = 1 :: else fi
            };
            asleep[0] == 0 || calls == 3
        :: else
        fi;
        d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], POLLING) };
        atomic { w = 0; ok = 0 };
        drain()
    :: true ->
        offline();
        if
        :: again -> break
        :: else -> again = 1;                   /* online: the word is made anew */
            d_step { sb[T].n == 0 -> mem[0] = POLLING | GENBITS(1) }
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
