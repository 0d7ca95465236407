/* SPDX-License-Identifier: MIT */
/*
 * An expedited grace period of RCU: who removes an object, has CPUs interrupted that may read
 * it, and frees it when all have reported; and a CPU that reads, sleeps, and goes offline and
 * comes back anywhere.
 *
 * Modelled: a reader stores its depth with no barrier, finds the object, reads it twice, and at
 * the end looks whether it is to report. The interrupt's handler may run between any two of its
 * steps, on the same CPU, so it finds the depth in that CPU's own store buffer. A CPU that sleeps
 * has said so by a read-modify-write, and is not sent to. One that is offline refuses the
 * interrupt (-ENXIO): its word and the push are one compare-and-swap; it may have been taken
 * offline in the midst of a section, and reads on when it is back.
 *
 * Rules, each removed by its switch:
 *   DEPTH_AFTER_LOAD        the object is found before the depth is stored
 *   HANDLER_IGNORES_DEPTH   the handler reports for a CPU that reads
 *   LOOK_BEFORE_DEPTH       the end of a section looks first, and stores the depth then
 *   UNLOCK_DOES_NOT_LOOK    the end of a section does not look
 *   WAKE_BY_STORE           a CPU says by a plain store that it is awake (passes with -DSC)
 *   REMOVE_WITHOUT_BARRIER  no barrier between the removal and the look who sleeps (with -DSC)
 *   ALL_SLEEP               every CPU is taken for one that sleeps
 *   OFFLINE_IGNORES_DEPTH   who is offline is taken for quiescent, in a section or not
 *   ENXIO_IS_QUIESCENT      so is who refuses the interrupt, without another look
 *   ENXIO_IS_SENT           who refuses the interrupt is not asked again
 */
#define POINTER 0
#define FREED   1
#define DEPTH   2
#define NEED_QS 3
#define MASK    4
#define WATCH   5
#define WORD    6
#define SEQ     7
#define NW      0
#define NMEM    8
#define NB      2
#include "tso.pml"

#define DRIVER  0
#define CPU     1
#define ONLINE  1
#define SENT    2

inline report(me) { FAND(me, MASK, 0, t) }

inline report_self() {
    ST(CPU, NEED_QS, 0);
    report(CPU)
}

/* rcu_exp_handler */
inline handler() {
    LD(CPU, MASK, t);
    if
    :: t ->
        LD(CPU, DEPTH, t);
        if
#ifndef HANDLER_IGNORES_DEPTH
        :: t -> ST(CPU, NEED_QS, 1)
#endif
        :: else -> report_self()
        fi
    :: else
    fi
}

/* Between two steps: what has come, now or later; and once it is offline for a while. */
inline interrupts() {
    do
    :: mem[WORD] & SENT ->
        FAND(CPU, WORD, ONLINE, t);
        handler()
    :: !gone ->
        gone = 1;
        CAS(CPU, WORD, ONLINE, 0, t);           /* not with an interrupt pending */
        if
        :: t -> XCHG(CPU, WORD, ONLINE, t)
        :: else
        fi
    :: break
    od
}

inline read_lock() {
    ST(CPU, DEPTH, 1);
    interrupts()
}

proctype Reader() {
    byte turn, gone, found, watch;
    short t;
    for (turn : 1 .. 2) {
        if
        :: /* it reads */
#ifndef DEPTH_AFTER_LOAD
            read_lock();
#endif
            LD(CPU, POINTER, found);
#ifdef DEPTH_AFTER_LOAD
            interrupts();
            read_lock();
#endif
            interrupts();
            if
            :: found == 0 ->
                LD(CPU, FREED, t);
                assert(!t);
                interrupts();
                LD(CPU, FREED, t);
                assert(!t)
            :: else
            fi;
#ifdef LOOK_BEFORE_DEPTH
            LD(CPU, NEED_QS, found);
            interrupts();
            ST(CPU, DEPTH, 0);
#else
            ST(CPU, DEPTH, 0);
            interrupts();
#ifdef UNLOCK_DOES_NOT_LOOK
            found = 0;
#else
            LD(CPU, NEED_QS, found);
#endif
#endif
            if
            :: found -> report_self()
            :: else
            fi
        :: /* it sleeps */
            XCHG(CPU, WATCH, watch + 1, t);
            LD(CPU, MASK, t);
            if
            :: t -> report_self()
            :: else
            fi;
            watch = watch + 2;
#ifdef WAKE_BY_STORE
            ST(CPU, WATCH, watch)
#else
            XCHG(CPU, WATCH, watch, t)
#endif
        fi;
        interrupts()
    }
end:                                            /* it runs on, and takes what comes */
    do
    :: mem[WORD] & SENT ->
        FAND(CPU, WORD, ONLINE, t);
        handler()
    od
}

inline is_offline() {
    LD(DRIVER, WORD, t);
#ifdef OFFLINE_IGNORES_DEPTH
    quiet = (t == 0)
#else
    quiet = 0;
    if
    :: t == 0 -> LD(DRIVER, DEPTH, t); quiet = (t == 0)
    :: else
    fi
#endif
}

inline has_slept() {
    LD(DRIVER, WATCH, t);
#ifdef ALL_SLEEP
    quiet = 1
#else
    quiet = (t & 1) || t != snap
#endif
}

proctype Updater() {
    byte quiet, sent, snap, pushed;
    short t;
    ST(DRIVER, POINTER, 1);
    ST(DRIVER, MASK, 1);
#ifdef REMOVE_WITHOUT_BARRIER
    LD(DRIVER, WATCH, snap);
#else
    FOR(DRIVER, SEQ, 1, t);
    FOR(DRIVER, WATCH, 0, snap);
#endif
    XCHG(DRIVER, NEED_QS, 1, t);
    do
    :: mem[MASK] == 0 && sb[DRIVER].n == 0 -> break
    :: mem[MASK] && (!sent || mem[WORD] == 0 || mem[WATCH] != snap || (snap & 1)) ->
        is_offline();
        if
        :: quiet
        :: else -> has_slept()
        fi;
        if
        :: quiet -> report(DRIVER)
        :: !quiet && sent
        :: else ->
            CAS(DRIVER, WORD, ONLINE, ONLINE + SENT, pushed);
            if
            :: pushed -> sent = 1
            :: else ->                          /* -ENXIO */
#ifdef ENXIO_IS_QUIESCENT
                report(DRIVER)
#else
#ifdef ENXIO_IS_SENT
                sent = 1
#else
                is_offline();
                if
                :: quiet -> report(DRIVER)
                :: else                         /* a tick later again */
                fi
#endif
#endif
            fi
        fi
    od;
    ST(DRIVER, FREED, 1)
}

init {
    atomic {
        mem[WORD] = ONLINE;
        run Reader(); run Updater();
        run Flush(0); run Flush(1)
    }
}
