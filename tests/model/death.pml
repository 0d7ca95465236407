/* SPDX-License-Identifier: MIT */
/*
 * Death of the target with a sender at any step of its push, ring or wait.
 *
 * Modelled: target T (word 0), killed at any labelled step, booted again once with the next
 * generation, killed again; target U (word 1), which lives; the sender (word 2) with one csd that
 * it uses twice: first to T, then to T or U. A call: read the target's word, lock := LOCK | dst |
 * gen | seq (plain store), push (compare-and-swap of the word; -ENXIO when it says OFFLINE or
 * DEAD, or another generation than the lock), ring, wait parked as in park.pml, and before and
 * after it all `csds_out` := 1 and 0 (plain stores), without which the scan passes it by; the
 * sleep ends by itself (10 ms) when nothing else moves, twice at most, so that a wait for
 * something that never comes is still a deadlock. The reaper: exchange T's word to DEAD, scan the csd (LOCK, dst T, that generation:
 * compare-and-swap the lock to DIED | seq, again when PARKED came in between; ring if PARKED),
 * wait until the sender's `ringing` does not name T, waitpid (from here the pid may be anybody's),
 * boot. Every ring of T is a signal to its pid (the doorbell `signal` and the kick are).
 * A store that the dead had retired reaches memory before the reaper looks.
 * Checked: each call is completed once, by the one whose it is; what ends well has its own result;
 * U's calls never end as DIED; no ring to a pid that was reaped; the sender is never left.
 * Abstracted: T sleeps HALTED between calls and does not poll on its own; one csd, so no list.
 *
 * The lock: LOCK 1, PARKED 2, DIED 4, dst bit 3, gen bits 4..5, seq bits 6..
 *
 * Rules, each removed by its switch:
 *   REAPER_IGNORES_SEQ     the scan unlocks what it finds locked now, not what it has checked
 *   REAPER_CAS_ONCE        the scan gives up when PARKED came in between
 *   NO_TIME_LIMIT          a parked sleep has no end of its own: the target may have died between
 *                          its unlock and its ring, and the scan finds nothing locked
 *   NO_TIME_LIMIT + REAPER_RINGS_WAITERS   not a mutation: after the scan the reaper rings whoever
 *                          is HALTED and waits for the dead, scan or no scan; then no sleep needs
 *                          its limit
 *   REAPER_SCANS_FIRST     the word goes to DEAD after the scan
 *   STATUS_BEFORE_CAS      DIED is a plain field of the csd, written before the lock's CAS: it can
 *                          land in the next use of the csd
 *   STATUS_AFTER_CAS       ... or after it: the waiter reads the csd before it is there
 *   PUSH_IGNORES_GEN       the push goes on when a new generation came up since the lock was made
 *   SPLIT_ONLINE_CHECK     the state is checked, then the csd is pushed whatever the state is
 *   REAP_WITHOUT_HAZARD    the reaper does not wait for `ringing`
 *   HAZARD_AFTER_CHECK     the sender says `ringing` after it has read the word
 *   OUT_AFTER_PUSH         a sender says that it has a csd out when it has queued it
 *   OUT_ENDS_AT_PUSH       it says so no longer when it has queued it
 *   OUT_READ_FIRST         the reaper looks who has some out before the word goes to DEAD
 *   HAZARD_CHECK_BY_LOAD   it says so before, but reads the word by a plain load (as in a rekick
 *                          that changes nothing; passes with -DSC: buffers matter)
 */
#define NW 3
#define PAY    3
#define LOCKW  4
#define RES    5
#define STATUS 6
#define RINGING 7
#define OUT    8
#define NMEM   9
#define NB     4                                /* T, U, sender, reaper */
#define SND      2
#define RPR      3
#ifndef SB
#define SB     3
#endif
#include "tso.pml"

#define LOCK   1
#define PARKED 2
#define DIED   4
#define DST(l) (((l) >> 3) & 1)
#define LGEN(l) (((l) >> 4) & 3)
#define SEQ(l) ((l) >> 6)

bool dead, reaped, boot;                        /* of T's present process */
byte pidgen = 1;
byte completed;                                 /* ghost: seqs completed, as a count */

inline die() {
    if
    :: k == 0 -> goto killed
    :: true
    fi
}

inline ring_sender(me) {
    do
    :: LD(me, SND, w);
        if
        :: STATE(w) == HALTED -> CAS(me, SND, w, SETST(w, RUNG), ok);
            if :: ok -> doorbell(SND); break :: else fi
        :: else -> break
        fi
    od
}

/* T and U: asleep, woken, drain, run, unlock, ring, asleep. */
proctype Target(byte k) {
    int w; byte ok, l;
again:
    do
    :: die();
        LD(k, k, w);
        if
        :: WORK(w) -> ok = 0
        :: else -> CAS(k, k, w, SETST(w, HALTED), ok); w = SETST(w, HALTED)
        fi;
        if
        :: ok ->
            d_step {
                sb[k].n == 0 ->
                if :: LOW(mem[k]) == LOW(w) -> asleep[k] = 1 :: else fi
            };
end_idle:
            if
            :: asleep[k] == 0
            :: k == 0 -> asleep[k] = 0; goto killed
            fi
        :: else
        fi;
        d_step { sb[k].n == 0 -> mem[k] = SETST(mem[k], POLLING) };
        die();
        FAND(k, k, ~PENDING, w);
        FAND(k, k, 127, w);
        die();
        if
        :: HEAD(w) ->
            LD(k, LOCKW, l);
            assert(l & LOCK && DST(l) == k);
            LD(k, PAY, w);
            assert(w == SEQ(l));
            ST(k, RES, w + 4);
#if defined(STATUS_BEFORE_CAS) || defined(STATUS_AFTER_CAS)
            ST(k, STATUS, 1);
#endif
            die();
            d_step {
                sb[k].n == 0 ->
                assert(mem[LOCKW] == l || mem[LOCKW] == (l | PARKED));
                assert(completed == SEQ(l) - 1);
                completed++;
                l = mem[LOCKW];
                mem[LOCKW] = SEQ(l) << 6
            };
            die();
            if :: l & PARKED -> ring_sender(k) :: else fi;
            l = 0
        :: else
        fi;
        atomic { w = 0; ok = 0 }
    od;
killed:
    atomic { w = 0; ok = 0; l = 0; dead = 1 };
end_dead:
    atomic { boot -> boot = 0 };
    die();
    d_step { sb[k].n == 0 -> mem[k] = POLLING | GENBITS(pidgen) };  /* online */
    goto again
}

inline tell_pid(t) {                            /* tgkill */
    assert(t != 0 || !reaped);
    asleep[t] = 0
}

inline send(t) {
#ifndef HAZARD_AFTER_CHECK
    ST(SND, RINGING, t + 1);
#endif
    do
#ifdef HAZARD_CHECK_BY_LOAD
    :: LD(SND, t, w);
        if
        :: STATE(w) == HALTED || STATE(w) == RUNG -> tell_pid(t)
        :: else
        fi;
        w = 0
#endif
    :: LD(SND, t, w);
        if
        :: STATE(w) == HALTED -> CAS(SND, t, w, SETST(w, RUNG) | PENDING, ok)
        :: STATE(w) == DEAD || STATE(w) == OFFLINE -> ok = 1
        :: else -> CAS(SND, t, w, w | PENDING, ok)
        fi;
        if :: ok -> break :: else fi
    od;
#ifdef HAZARD_AFTER_CHECK
    ST(SND, RINGING, t + 1);
#endif
    if
    :: STATE(w) == HALTED -> tell_pid(t)
    :: else
    fi;
    ST(SND, RINGING, 0)
}

/* One call. l is the lock as it was made. */
inline call(t, q) {
    LD(SND, t, w);
    if
    :: STATE(w) == OFFLINE || STATE(w) == DEAD -> l = 0; completed = q
    :: else ->
#ifndef OUT_AFTER_PUSH
        ST(SND, OUT, 1);
#endif
        l = LOCK | (t << 3) | (GEN(w) << 4) | (q << 6);
        ST(SND, LOCKW, l);
        ST(SND, PAY, q);
        do
        :: LD(SND, t, w);
            if
#ifdef SPLIT_ONLINE_CHECK
            :: STATE(w) == OFFLINE || STATE(w) == DEAD -> ok = 0; break
            :: else ->
                d_step {
                    sb[SND].n == 0 -> w = mem[t]; mem[t] = SETHEAD(w, 1); ok = 1
                };
                break
#else
            :: STATE(w) == OFFLINE || STATE(w) == DEAD -> ok = 0; break
#ifndef PUSH_IGNORES_GEN
            :: STATE(w) != OFFLINE && STATE(w) != DEAD && GEN(w) != LGEN(l) -> ok = 0; break
#endif
            :: else ->
                CAS(SND, t, w, SETHEAD(w, 1), ok);
                if :: ok -> break :: else fi
#endif
            fi
        od;
#ifdef OUT_AFTER_PUSH
        ST(SND, OUT, 1);
#endif
#ifdef OUT_ENDS_AT_PUSH
        ST(SND, OUT, 0);
#endif
        if
        :: !ok ->                               /* -ENXIO: back to us, or the reaper has it */
            d_step {
                sb[SND].n == 0 ->
                if
                :: mem[LOCKW] == l ->
                    assert(completed == q - 1);
                    completed++;
                    mem[LOCKW] = q << 6
                :: else -> assert(completed == q)
                fi
            }
        :: else ->
            if
            :: HEAD(w) == 0 && STATE(w) != POLLING -> send(t)
            :: else
            fi;
            do
            :: LD(SND, LOCKW, l);
                if
                :: !(l & LOCK) -> break
                :: else -> CAS(SND, LOCKW, l, l | PARKED, ok)
                fi;
                if
                :: ok ->
                    d_step { sb[SND].n == 0 -> mem[SND] = SETST(mem[SND], HALTED); w = mem[SND] };
                    LD(SND, LOCKW, l);
                    if
                    :: l & LOCK ->
                        d_step {
                            sb[SND].n == 0 ->
                            if :: LOW(mem[SND]) == LOW(w) -> asleep[SND] = 1 :: else fi
                        };
                        if
                        :: asleep[SND] == 0
#ifndef NO_TIME_LIMIT
                        :: timeout && late < 2 -> late++; asleep[SND] = 0
#endif
                        fi
                    :: else
                    fi;
                    d_step { sb[SND].n == 0 -> mem[SND] = SETST(mem[SND], POLLING) }
                :: else
                fi
            od;
            assert(completed == q);
#if defined(STATUS_BEFORE_CAS) || defined(STATUS_AFTER_CAS)
            LD(SND, STATUS, l);
            assert(l);
            ok = l == DIED;
#else
            assert(SEQ(l) == q);
            ok = l & DIED;
#endif
            if
            :: ok -> assert(t == 0)
            :: else -> LD(SND, RES, w); assert(w == q + 4)
            fi
        fi;
        ST(SND, OUT, 0)
    fi;
#if defined(STATUS_BEFORE_CAS) || defined(STATUS_AFTER_CAS)
    ST(SND, STATUS, 0);
#endif
    atomic { w = 0; ok = 0; l = 0 }
}

proctype Sender() {
    int w; byte ok, l, late;
    call(0, 1);
    if
    :: call(0, 2)
    :: call(1, 2)
    fi
}

proctype Reaper() {
    int w; byte ok, l; bool out;
end:
    do
    :: atomic { dead && sb[0].n == 0 -> dead = 0 };
#ifdef OUT_READ_FIRST
        LD(RPR, OUT, out);
#endif
#ifndef REAPER_SCANS_FIRST
        XCHG(RPR, 0, DEAD | GENBITS(pidgen), w);
#endif
#ifndef OUT_READ_FIRST
        LD(RPR, OUT, out);
#endif
        do
        :: LD(RPR, LOCKW, l);
            if
            :: out && l & LOCK && DST(l) == 0 && LGEN(l) == pidgen ->
#ifdef STATUS_BEFORE_CAS
                ST(RPR, STATUS, DIED);
#endif
                d_step {
                    sb[RPR].n == 0 ->
                    if
#ifdef REAPER_IGNORES_SEQ
                    :: mem[LOCKW] & LOCK -> l = mem[LOCKW];
#else
                    :: mem[LOCKW] == l ->
#endif
                        assert(completed == SEQ(mem[LOCKW]) - 1);
                        assert(DST(mem[LOCKW]) == 0);
                        completed++;
                        mem[LOCKW] = DIED | (SEQ(l) << 6);
                        ok = 1
                    :: else -> ok = 0
                    fi
                };
#ifdef STATUS_AFTER_CAS
                if :: ok -> ST(RPR, STATUS, DIED) :: else fi;
#endif
                if
                :: ok && l & PARKED -> ring_sender(RPR); ok = 1
                :: else
                fi;
#ifdef REAPER_CAS_ONCE
                break
#else
                if :: ok -> break :: else fi
#endif
            :: else -> break
            fi
        od;
#ifdef REAPER_SCANS_FIRST
        XCHG(RPR, 0, DEAD | GENBITS(pidgen), w);
#endif
#ifdef REAPER_RINGS_WAITERS
        ring_sender(RPR);
#endif
#ifndef REAP_WITHOUT_HAZARD
        do
        :: LD(RPR, RINGING, w);
            if :: w == 1 -> (mem[RINGING] != 1) :: else -> break fi
        od;
#endif
        reaped = 1;
        atomic { w = 0; ok = 0; l = 0; out = 0 };
        if
        :: pidgen == 1 ->
            atomic { pidgen = 2; reaped = 0; boot = 1 }
        :: else -> break
        fi
    od
}

init {
    atomic {
        mem[0] = POLLING | GENBITS(1); mem[1] = POLLING | GENBITS(1); mem[SND] = POLLING;
        run Flush(0); run Flush(1); run Flush(SND); run Flush(RPR);
        run Target(0); run Target(1); run Sender(); run Reaper()
    }
}
