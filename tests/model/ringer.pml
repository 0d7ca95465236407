/* SPDX-License-Identifier: MIT */
/*
 * The ringer is killed, or (-DSTOP) stopped for good, at any of its steps, or (-DFULL) finds no
 * room for its signal.
 *
 * Modelled: the target of running.pml without its soft mask: a short task, an idle halt, a long
 * task that only a kick gets into. The ringer pushes csd 0 and rings, or (-DLATE) rings late for
 * an unlock (HALTED -> RUNG and nothing else in the word). At each labelled step (STEP) it may
 * be lost. A store it had retired still reaches memory. A second sender pushes csd 1 at any
 * moment, before, between or after.
 * Killed: the second sender does not wait, nobody else will ring; after the death the reaper
 * looks at the target's word once and rings it when somebody's undertaking may have died: work,
 * KICKED, or RUNG. Whatever the bits say: a doorbell for RUNG, a signal although KICKED is set.
 * Stopped: there is no reaper, and nobody waits. The watchdog looks at the target's word and
 * rings by the reaper's rule when nothing else moves (twice the same, 10 ms apart; -DEARLY: and
 * once at any moment). -DFULL: the same, and a signal that cannot be queued takes KICKED back.
 * Abstracted: payloads (halt.pml and running.pml have them), the soft mask.
 *
 * Rules, each removed by its switch:
 *   NO_REAPER_RING           the reaper rings nobody
 *   REAPER_RINGS_QUEUES_ONLY it rings only for a head or PENDING: what died may have been nothing
 *                            but the undertaking, and the bit it left makes later senders silent
 *   REAPER_HONOURS_BITS      RUNG and KICKED count as "somebody does it already"
 *   RING_EITHER_OR           a CPU that halted with a stale KICKED gets its doorbell and no signal
 *   NO_WATCHDOG, WATCHDOG_HONOURS_BITS   the same of the watchdog
 *   TASK_START_CLEARS_KICKED not a mutation: KICKED ends with the task it was sent to. It frees
 *                            senders of a stale KICKED without a reaper, and allows one more
 *                            signal in flight; a stale RUNG is still the reaper's business
 */
#define NW 1
#define NEXT(c) (1 + (c))
#define NMEM    3
#define NB      4                               /* ringer, sender, target, reaper */
#define T       2
#define REAPER  3
byte served[2];
bool pushed;                                    /* ghost: csd 0 is in the queue */
#ifdef FULL
#define STOP
#endif
#if defined(STOP) && defined(LATE)
#define ALL_DONE (served[1])
#elif defined(STOP)
#define ALL_DONE (served[1] && served[0])
#else
#define ALL_DONE (served[1] && (served[0] || !pushed) && gone)
#endif
bool gone;                                      /* the ringer is dead, or at its end */
#include "tso.pml"

bool died, kick, in_irq;

#ifdef STOP
#define STEP if :: goto end_stopped :: skip fi
#else
#define STEP if :: goto killed :: skip fi
#endif

inline push(p, c) {
    do
    :: LD(p, 0, w);
        ST(p, NEXT(c), HEAD(w));
        d_step {
            sb[p].n == 0 ->
            if
            :: mem[0] == w ->
                mem[0] = SETHEAD(w, c + 1);
                ok = 1;
                if :: c == 0 -> pushed = 1 :: else fi
            :: else -> ok = 0
            fi
        };
        if :: ok -> break :: else fi
    od
}

inline undertake(p) {
    do
    :: LD(p, 0, w);
        if
        :: STATE(w) == HALTED -> CAS(p, 0, w, SETST(w, RUNG) | PENDING, ok)
        :: STATE(w) == RUNNING -> CAS(p, 0, w, w | KICKED | PENDING, ok)
        :: else -> CAS(p, 0, w, w | PENDING, ok)
        fi;
        if :: ok -> break :: else fi
    od
}

inline keep_word() {
    if
    :: STATE(w) == HALTED -> doorbell(0)
    :: STATE(w) == RUNNING && !(w & KICKED) -> kick = 1
    :: else
    fi
}

proctype Ringer() {
    int w; byte ok;
#ifdef LATE                                     /* the late ring of an unlock */
    LD(0, 0, w);
    if
    :: STATE(w) == HALTED -> CAS(0, 0, w, SETST(w, RUNG), ok)
    :: else -> ok = 0
    fi;
    if
    :: ok -> STEP; doorbell(0)
    :: else
    fi;
#else
    push(0, 0);
    STEP;
    if
    :: HEAD(w) == 0 && STATE(w) != POLLING ->
        undertake(0);
        STEP;
#ifdef FULL
        if
        :: STATE(w) == RUNNING && !(w & KICKED) -> FAND(0, 0, ~KICKED, w)
        :: else -> keep_word()
        fi
#else
        keep_word()
#endif
    :: else
    fi;
#endif
    goto done;
#ifdef STOP
end_stopped:
    false;
#else
killed:
    died = 1; goto end
#endif
done:
    gone = 1;
end:
    skip
}

inline ring_again(p) {
    do
    :: LD(p, 0, w);
#if defined(REAPER_HONOURS_BITS) || defined(WATCHDOG_HONOURS_BITS)
        if
        :: STATE(w) == HALTED -> CAS(p, 0, w, SETST(w, RUNG), ok);
            if :: ok -> doorbell(0); break :: else fi
        :: STATE(w) == RUNNING && !(w & KICKED) -> CAS(p, 0, w, w | KICKED, ok);
            if :: ok -> kick = 1; break :: else fi
        :: else -> break
        fi
#else
#ifdef RING_EITHER_OR
        if :: STATE(w) == RUNNING -> kick = 1 :: else fi;
#else
        if :: STATE(w) == RUNNING || w & KICKED -> kick = 1 :: else fi;
#endif
        if
        :: STATE(w) == HALTED -> CAS(p, 0, w, SETST(w, RUNG), ok);
            if :: ok -> doorbell(0); break :: else fi
        :: STATE(w) == RUNG -> doorbell(0); break
        :: else -> break
        fi
#endif
    od
}

proctype Sender() {
    int w; byte ok;
    push(1, 1);
    if
    :: HEAD(w) == 0 && STATE(w) != POLLING -> undertake(1); keep_word()
    :: else
    fi
}

#ifdef STOP
inline look() {
    LD(REAPER, 0, w);
    if
    :: WORK(w) || w & KICKED || STATE(w) == RUNG -> ring_again(REAPER)
    :: else
    fi;
    atomic { w = 0; ok = 0 }
}

proctype Watchdog() {
    int w; byte ok, late;
    do
    :: ALL_DONE -> break
#ifndef NO_WATCHDOG
#ifdef EARLY
    :: late == 0 -> late = 1; look()
#endif
    :: timeout && late < 2 -> late = 2; look()
#endif
    od
}
#endif

#ifndef STOP
proctype Reaper() {
    int w; byte ok;
    if
    :: gone
    :: died && sb[0].n == 0 ->
#ifndef NO_REAPER_RING
        LD(REAPER, 0, w);
        if
#ifdef REAPER_RINGS_QUEUES_ONLY
        :: WORK(w) -> ring_again(REAPER)
#else
        :: WORK(w) || w & KICKED || STATE(w) == RUNG -> ring_again(REAPER)
#endif
        :: else
        fi;
#endif
        gone = 1
    fi
}
#endif

inline drain() {
    FAND(T, 0, ~PENDING, w);
    FAND(T, 0, 127, w);
    c = HEAD(w);
    do
    :: c == 0 -> break
    :: else ->
        LD(T, NEXT(c - 1), n);
        served[c - 1]++;
        assert(served[c - 1] == 1);
        c = n
    od;
    atomic { w = 0; n = 0; c = 0 }
}

proctype Kick() {
    int w, c; byte n, ok;
end:
    do
    :: atomic { kick && !in_irq -> kick = 0; in_irq = 1 };
        FAND(T, 0, ~KICKED, w);
        if
        :: STATE(w) != RUNNING
        :: else ->
            d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], POLLING) };
            do
            :: drain();
                LD(T, 0, w);
                if
                :: WORK(w) -> ok = 0
                :: else -> CAS(T, 0, w, SETST(w, RUNNING), ok)
                fi;
                if :: ok -> break :: else fi
            od;
            ok = 0
        fi;
        w = 0;
        in_irq = 0
    od
}

inline start_task() {
    do
    :: LD(T, 0, w);
        if
        :: WORK(w) -> ok = 0
#ifdef TASK_START_CLEARS_KICKED
        :: else -> CAS(T, 0, w, SETST(w & ~KICKED, RUNNING), ok)
#else
        :: else -> CAS(T, 0, w, SETST(w, RUNNING), ok)
#endif
        fi;
        if :: ok -> break :: else -> drain() fi
    od;
    atomic { w = 0; ok = 0 }
}

proctype Target() provided (!in_irq) {
    int w, c; byte n, ok;
    d_step { sb[T].n == 0 -> mem[0] = SETST(mem[0], POLLING) };
    drain();
    if
    :: true ->
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
    ALL_DONE
}

init {
    atomic {
        mem[0] = RUNNING;                       /* in the short task */
        run Flush(0); run Flush(1); run Flush(T); run Flush(REAPER);
        run Ringer(); run Sender(); run Target(); run Kick();
#ifdef STOP
        run Watchdog()
#else
        run Reaper()
#endif
    }
}
