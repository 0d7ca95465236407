/* SPDX-License-Identifier: MIT */
/*
 * A target that runs tasks and is kicked by a signal.
 *
 * Modelled: the target starts a short task, ends it, halts or not, starts a long task that never
 * comes back by itself (a loop, a blocked system call): a call that nobody kicks for is a
 * deadlock. Inside a task it disables and enables interrupts (soft mask and `happened`). Two
 * senders, a call each (-DCALLS=3: three calls, 20 times the states). The kick handler runs in the same thread as the task: it is a process of
 * its own here that stops the target (`provided (!in_irq)`) between any two of its steps, and
 * uses the target's store buffer. A signal that is pending stays one signal.
 * The handler: acknowledge (KICKED off), soft-masked: remember and return; state not RUNNING:
 * return, the code that was interrupted drains before it sleeps or starts anything; else POLLING,
 * drain, RUNNING again by a compare-and-swap that demands no work.
 * Abstracted: what a csd does; the irr lines beyond PENDING (see halt.pml); a sleep is not ended
 * by the kick (it may be in reality, that only wakes more).
 *
 * Rules, each removed by its switch:
 *   ACK_AFTER_DRAIN          KICKED is cleared after the drain instead of before
 *   TASK_START_WITHOUT_DRAIN POLLING -> RUNNING although there is work
 *   TASK_START_DEKKER        not a mutation: exchange to RUNNING, then look for work
 *   TASK_START_DEKKER + PLAIN_STORE_STATE  the same with a plain store (passes with -DSC)
 *   NO_HAPPENED_REPLAY       enabling interrupts does not look at `happened`
 *   HAPPENED_BEFORE_UNMASK   it looks before it clears the mask, not after
 *   REPLAY_ONCE              the replay runs masked: a kick that comes after its last drain sets
 *                            `happened` again, so unmasking has to look again
 *   HANDLER_BACK_WITHOUT_CHECK  the handler goes back to RUNNING although there is work
 *   KICK_IN_ANY_STATE        the handler changes the state also when it was not RUNNING
 *   NO_KICK                  KICKED is set and no signal is sent
 *   TASK_START_KEEPS_POLLING a task runs while the word says POLLING
 */
#define NW 1
#define PAY(c)  (1 + (c))
#define NEXT(c) (4 + (c))
#define NMEM    7
#define NB      3
#define T       2
#ifndef CALLS
#define CALLS   2
#endif
byte handled;
#define ALL_DONE (handled == CALLS)             /* an idle CPU may sleep for ever then */
#include "tso.pml"

bool kick;                                      /* the kick signal is pending */
bool in_irq, mask, happened;                    /* the target's own */

inline call(p, c) {
    ST(p, PAY(c), c + 1);
    do
    :: LD(p, 0, w);
        ST(p, NEXT(c), HEAD(w));
        CAS(p, 0, w, SETHEAD(w, c + 1), ok);
        if :: ok -> break :: else fi
    od;
    if
    :: HEAD(w) == 0 && STATE(w) != POLLING ->
        do
        :: LD(p, 0, w);
            if
            :: STATE(w) == HALTED -> CAS(p, 0, w, SETST(w, RUNG) | PENDING, ok)
            :: STATE(w) == RUNNING -> CAS(p, 0, w, w | KICKED | PENDING, ok)
            :: else -> CAS(p, 0, w, w | PENDING, ok)
            fi;
            if :: ok -> break :: else fi
        od;
        if
        :: STATE(w) == HALTED -> doorbell(0)
#ifndef NO_KICK
        :: STATE(w) == RUNNING && !(w & KICKED) -> kick = 1
#endif
        :: else
        fi
    :: else
    fi;
    atomic { w = 0; ok = 0 }
}

proctype Sender(byte me) {
    int w; byte ok;
    call(me, me);
    if
    :: me == 0 && CALLS == 3 -> call(me, 2)
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
        LD(T, PAY(c - 1), w);
        assert(w == c);
        handled++;
        c = n
    od;
    atomic { w = 0; n = 0; c = 0 }
}

/* What the kick handler and the replay on enable do once the kick is acknowledged. */
inline service() {
    d_step {
        sb[T].n == 0 -> assert(STATE(mem[0]) == RUNNING); mem[0] = SETST(mem[0], POLLING)
    };
    do
    :: drain();
        LD(T, 0, w);
#ifdef HANDLER_BACK_WITHOUT_CHECK
        d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], RUNNING) };
        break
#else
        if
        :: WORK(w) -> ok = 0
        :: else -> CAS(T, 0, w, SETST(w, RUNNING), ok)
        fi;
        if :: ok -> break :: else fi
#endif
    od;
    atomic { w = 0; ok = 0 }
}

proctype Kick() {
    int w, c; byte n, ok;
end:
    do
    :: atomic { kick && !in_irq -> kick = 0; in_irq = 1 };
#ifndef ACK_AFTER_DRAIN
        FAND(T, 0, ~KICKED, w);
#else
        LD(T, 0, w);
#endif
        if
        :: mask -> happened = 1
#ifndef KICK_IN_ANY_STATE
        :: !mask && STATE(w) != RUNNING
#endif
        :: else -> service()
        fi;
#ifdef ACK_AFTER_DRAIN
        FAND(T, 0, ~KICKED, w);
#endif
        w = 0;
        in_irq = 0
    od
}

inline irqs_off_and_on() {
    mask = 1;
    skip;                                       /* a core section */
#ifdef HAPPENED_BEFORE_UNMASK
    if :: happened -> happened = 0; service() :: else fi;
    mask = 0
#else
    mask = 0;
#ifndef NO_HAPPENED_REPLAY
    do
    :: happened -> happened = 0; mask = 1; service(); mask = 0;
#ifdef REPLAY_ONCE
        break
#endif
    :: else -> break
    od
#endif
#endif
}

inline start_task() {
    do
    :: LD(T, 0, w);
        assert(STATE(w) == POLLING);
#ifdef TASK_START_KEEPS_POLLING
        break;
#endif
#ifdef TASK_START_WITHOUT_DRAIN
        CAS(T, 0, w, SETST(w, RUNNING), ok);
#else
#ifdef TASK_START_DEKKER
#ifdef PLAIN_STORE_STATE
        ST(T, 0, RUNNING);
#else
        d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], RUNNING) };
#endif
        LD(T, 0, w);
        ok = !WORK(w);
        if
        :: !ok -> d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], POLLING) }
        :: else
        fi;
#else
        if
        :: WORK(w) -> ok = 0
        :: else -> CAS(T, 0, w, SETST(w, RUNNING), ok)
        fi;
#endif
#endif
        if :: ok -> break :: else -> drain() fi
    od;
    atomic { w = 0; ok = 0 }
}

inline end_task() {
    d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], POLLING) };
    drain()
}

proctype Target() provided (!in_irq) {
    int w, c; byte n, ok;
    start_task();
    if :: irqs_off_and_on() :: skip fi;
    end_task();
    if
    :: true ->                                  /* idle between the tasks */
        LD(T, 0, w);
        if
        :: WORK(w) -> skip
        :: else -> CAS(T, 0, w, SETST(w, HALTED), ok); w = SETST(w, HALTED);
            if :: ok -> sleep(T, 0, w) :: else fi
        fi;
        d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], POLLING) };
        atomic { w = 0; ok = 0 };
        drain()
    :: skip
    fi;
    start_task();
    if :: irqs_off_and_on() :: skip fi;
    handled == CALLS                            /* the long task: only a kick gets in here */
}

init {
    atomic {
        mem[0] = POLLING;
        run Flush(0); run Flush(1); run Flush(T);
        run Sender(0); run Sender(1); run Target(); run Kick()
    }
}
