/* SPDX-License-Identifier: MIT */
/*
 * set_current_state and try_to_wake_up: a task that sleeps when it finds nothing to do, two
 * wakers that each give it something once, and two CPUs that may run it.
 *
 * Modelled: a CPU takes the task off its run queue, and a step of it sets INTERRUPTIBLE (a full
 * read-modify-write), looks at what it waits for, and takes what is there (RUNNING again); with
 * nothing there the step ends, and one compare-and-swap puts the task to sleep if it is
 * INTERRUPTIBLE still, else it is queued again. A waker stores what it gives, reads the task's
 * word by a read-modify-write, and by a compare-and-swap marks a task whose step runs, or takes
 * one that sleeps (WAKING) and queues it.
 *
 * Rules, each removed by its switch:
 *   LOOK_FIRST       the state is set after the look
 *   STATE_BY_STORE   the state is a plain store (passes with -DSC)
 *   WAKER_LOADS      the waker's first look at the word is a plain load (passes with -DSC)
 *   SLEEP_BY_STORE   the word is read, and then sleep is stored
 *   NO_ON_CPU        a task whose step runs is taken like one that sleeps
 *   WAKING_BY_STORE  a waker takes the task by a store: two may
 */
#define T       0
#define GIVEN(k) (1 + (k))
#define NW      0
#define NMEM    3
#define NB      4
#include "tso.pml"

#define RUN_ON  1
#define INT_ON  2
#define INT_OFF 3
#define WAKING  4
#define RUN_OFF 5
#define GONE    6

byte steps_running;                             /* ghost */
byte queued;                                    /* ghost: in how many run queues */
byte taken[2], woke;

inline enqueue(me) {
    d_step { sb[me].n == 0 -> mem[T] = RUN_OFF; queued++; assert(queued == 1) }
}

inline set_state(me) {
#ifdef STATE_BY_STORE
    ST(me, T, INT_ON)
#else
    XCHG(me, T, INT_ON, w)
#endif
}

proctype Cpu(byte me) {
    byte ok, a, b;
    short w;
end:
    do
    :: mem[T] == RUN_OFF ->
        d_step {
            if
            :: mem[T] == RUN_OFF && sb[me].n == 0 -> mem[T] = RUN_ON; queued--; ok = 1
            :: else -> ok = 0
            fi
        };
        if
        :: ok ->
            d_step { steps_running++; assert(steps_running == 1) };
            do
            ::
#ifndef LOOK_FIRST
                set_state(me);
#endif
                LD(me, GIVEN(0), a);
                LD(me, GIVEN(1), b);
#ifdef LOOK_FIRST
                set_state(me);
#endif
                if
                :: (a && !taken[0]) || (b && !taken[1]) ->
                    XCHG(me, T, RUN_ON, w);
                    d_step { taken[0] = taken[0] || a; taken[1] = taken[1] || b }
                :: else -> break
                fi
            od;
            steps_running--;
            if
            :: taken[0] && taken[1] -> XCHG(me, T, GONE, w)
            :: else ->
#ifdef SLEEP_BY_STORE
                LD(me, T, w);
                skip;
                if
                :: w == INT_ON -> ST(me, T, INT_OFF)
                :: w == RUN_ON -> enqueue(me)
                :: else
                fi
#else
                CAS(me, T, INT_ON, INT_OFF, ok);
                if
                :: ok
                :: !ok && mem[T] == RUN_ON -> enqueue(me)
                :: else
                fi
#endif
            fi
        :: else
        fi
    od
}

proctype Waker(byte me, k) {
    byte ok;
    short w;
    ST(me, GIVEN(k), 1);
#ifdef WAKER_LOADS
    LD(me, T, w);
#else
    FOR(me, T, 0, w);
#endif
    do
    ::
        ok = 0;
        if
        :: w == INT_ON ->
#ifdef NO_ON_CPU
            CAS(me, T, INT_ON, WAKING, ok);
            if :: ok -> enqueue(me); break :: else fi
#else
            CAS(me, T, INT_ON, RUN_ON, ok);
            if :: ok -> break :: else fi
#endif
        :: w == INT_OFF ->
#ifdef WAKING_BY_STORE
            ST(me, T, WAKING);
            ok = 1;
#else
            CAS(me, T, INT_OFF, WAKING, ok);
#endif
            if :: ok -> enqueue(me); break :: else fi
        :: else -> break
        fi;
        LD(me, T, w);
        skip
    od;
    woke++
}

proctype NothingIsLost() {
    woke == 2;
    taken[0] && taken[1]
}

init {
    atomic {
        mem[T] = RUN_OFF;
        queued = 1;
        run Cpu(0); run Cpu(1); run Waker(2, 0); run Waker(3, 1);
        run Flush(0); run Flush(1); run Flush(2); run Flush(3);
        run NothingIsLost()
    }
}
