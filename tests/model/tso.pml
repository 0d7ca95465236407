/* SPDX-License-Identifier: MIT */
/*
 * Memory with an explicit store buffer per process (TSO), the slot word and the csd, shared by
 * every model in this directory.
 *
 * Why store buffers: plain Promela is sequentially consistent. A store is seen by everybody in
 * the step that makes it, so a model without buffers passes whether or not the protocol has its
 * read-modify-writes, and proves nothing about them. Here
 *   ST    a plain store: goes to the end of the own buffer (blocks while that is full);
 *   LD    a plain load: the youngest own buffered store to that cell, else memory;
 *   CAS, XCHG, FAND, FOR: wait until the own buffer has drained, then act in one step;
 *   Flush(p) moves the oldest store of process p to memory, at any moment.
 * This is x86-TSO. AArch64 is weaker; there the code relies on the C11 orders of atomics.h
 * (seq_cst read-modify-writes, acquire loads), which is outside these models: what they check is
 * which transitions have to be read-modify-writes at all, and in which order things are done.
 * -DSC makes ST write through. `run` uses it as a control: a mutation that is only wrong because
 * of the buffers has to pass with it.
 *
 * The word of a slot is one cell, as in the segment: bits 0..2 state, 3 KICKED, 4 PENDING,
 * 5..6 generation (2 bits here), 7.. head (csd index + 1, 0 = empty). It only changes by
 * read-modify-writes, except in mutations that store the state byte alone: a buffered store to
 * a word cell (cells below NW) replaces the state and leaves the rest of the word as it is.
 *
 * The file that includes this one defines NMEM (cells), NW (how many of them, from 0, are
 * words), NB (processes with a buffer).
 *
 * A model passes when no assertion fails and no invalid end state is reachable. A CPU that sleeps
 * while somebody waits for it is an invalid end state: that is the lost wake-up.
 */
#define OFFLINE 0
#define RUNNING 1
#define POLLING 2
#define HALTED  3
#define RUNG    4
#define DEAD    5
#define KICKED  8
#define PENDING 16
#define WORK(w)       ((w) & ~(15 + 96))        /* PENDING or head: what forbids to halt */
#define STATE(w)      ((w) & 7)
#define SETST(w, s)   (((w) & ~7) | (s))
#define GEN(w)        (((w) >> 5) & 3)
#define GENBITS(g)    ((g) << 5)
#define HEAD(w)       ((w) >> 7)
#define LOW(w)        ((w) & 127)
#define SETHEAD(w, h) (LOW(w) | ((h) << 7))

#ifndef SB
#define SB 2                                    /* entries of a store buffer */
#endif

int mem[NMEM];
typedef buffer { byte n; byte a[SB]; short v[SB] };
buffer sb[NB];
hidden byte i_;

#ifndef ALL_DONE
#define ALL_DONE false                          /* an idle CPU may sleep for ever when true */
#endif

#define PUT(X, Y) if :: (X) < NW -> mem[X] = SETST(mem[X], Y) :: else -> mem[X] = (Y) fi

#ifdef SC
inline ST(P, X, Y) { d_step { PUT(X, Y) } }
#else
inline ST(P, X, Y) {
    d_step { sb[P].n < SB -> sb[P].a[sb[P].n] = X; sb[P].v[sb[P].n] = Y; sb[P].n++ }
}
#endif

inline LD(P, X, R) {
    d_step {
        R = mem[X];
        i_ = 0;
        do
        :: i_ < sb[P].n ->
            if
            :: sb[P].a[i_] == (X) && (X) < NW -> R = SETST(R, sb[P].v[i_])
            :: sb[P].a[i_] == (X) && (X) >= NW -> R = sb[P].v[i_]
            :: else
            fi;
            i_++
        :: else -> break
        od
    }
}

inline CAS(P, X, O, N, OK) {
    d_step {
        sb[P].n == 0 ->
        if
        :: mem[X] == (O) -> mem[X] = (N); OK = 1
        :: else -> OK = 0
        fi
    }
}
inline XCHG(P, X, N, R) { d_step { sb[P].n == 0 -> R = mem[X]; mem[X] = (N) } }
inline FAND(P, X, M, R)   { d_step { sb[P].n == 0 -> R = mem[X]; mem[X] = mem[X] & (M) } }
inline FOR(P, X, M, R)    { d_step { sb[P].n == 0 -> R = mem[X]; mem[X] = mem[X] | (M) } }

proctype Flush(byte p) {
end:
    do
    :: d_step {
        sb[p].n > 0 ->
        PUT(sb[p].a[0], sb[p].v[0]);
        i_ = 1;
        do
        :: i_ < SB ->
            sb[p].a[i_ - 1] = sb[p].a[i_];
            sb[p].v[i_ - 1] = sb[p].v[i_];
            i_++
        :: else -> break
        od;
        sb[p].a[SB - 1] = 0;
        sb[p].v[SB - 1] = 0;
        sb[p].n--
       }
    od
}

/*
 * Doorbells. futex: the kernel compares the low half of the word with the value that HALTED was
 * published with and goes to sleep in one step against FUTEX_WAKE; the system call drains the
 * buffer. token: a semaphore, an eventfd, a queue, a blocked signal: what was rung before the
 * sleep is not lost. A mutation that is only wrong for one of them is run with that one.
 */
byte asleep[4];
byte token[4];
#ifdef TOKEN
inline doorbell(K)    { d_step { if :: token[K] < 3 -> token[K]++ :: else fi } }
inline sleep(P, K, W) { d_step { 
        sb[P].n == 0 && (token[K] > 0 || ALL_DONE) ->
        if :: token[K] > 0 -> token[K]-- :: else fi
    } }
#else
inline doorbell(K)    { asleep[K] = 0 }
inline sleep(P, K, W) {
    d_step {
        sb[P].n == 0 ->
#ifdef FUTEX_NO_COMPARE
        asleep[K] = 1
#else
        if :: LOW(mem[K]) == LOW(W) -> asleep[K] = 1 :: else fi
#endif
    };
    asleep[K] == 0 || ALL_DONE
}
#endif
