/* SPDX-License-Identifier: MIT */
/*
 * The physical limits of the box: round trips between two processes with nothing of
 * shmipi's protocol in between.  Each figure of the machine is printed beside one of them.
 *
 * Two processes, each already pinned to its core, map one struct shi_limit_area and run
 * shi_limit_ping() (the sender) and shi_limit_pong() (the target) with the same
 * parameters.  They meet, do warmup + calls round trips, and part.
 *
 * What is true of every kind in which the target sleeps: it sleeps without a time-out,
 * in exactly the one system call; the sender spins for the answer in shared memory
 * without system calls (except futex_park and pipe_park, where it sleeps too); and before each call the
 * sender lets gap_ns pass, so that the target's core is asleep.  area->slept says how often
 * the target really did.  Every wait ends at the deadline all the same: a timer of the
 * process, armed once per run, interrupts the system call.
 *
 * The kinds in which nobody sleeps (no system call, no clock inside a batch):
 *   floor      payload, ring and answer in ONE line; between receiving and sending each
 *              side works for 10 ns, and the sender leaves the line alone for backoff_ns
 *              before it looks for the answer
 *   mailbox    the same on the two lines that a call uses: the ring in the target's line,
 *              payload and answer in the sender's
 *   queue      nobody waits: a pool of payload lines, pushed on the target's list with a
 *              compare-and-swap, taken all at once, unlocked one by one
 *   cacheline  a curiosity: one line as fast as it goes, nothing between receiving and
 *              sending.  Whatever does anything at all in between, and be it 2 ns, gets
 *              the line at another moment and takes up to twice as long: no limit of calls
 *
 * The kinds in which the kernel interrupts the other core, on which a thread of the
 * sender's own process is busy: membarrier, and mprotect, which takes the right to write
 * from 1 or 64 pages that have just been written to, so that other cores must forget them.
 *
 * (Not called limits.h: with this directory on the include path that name would stand in
 * for the C library's.)
 */
#ifndef SHI_LIMIT_H
#define SHI_LIMIT_H

#include "base/sys.h"

#include <stdalign.h>
#include <stdint.h>

#include "base/atomics.h"
#include "base/hist.h"
#include "base/layout.h"
#include "irq/raw.h"

enum shi_limit_kind {
    SHI_LIMIT_FLOOR,
    SHI_LIMIT_MAILBOX,
    SHI_LIMIT_QUEUE,
    SHI_LIMIT_CACHELINE,
    SHI_LIMIT_FUTEX_PARK,
    SHI_LIMIT_SIGNAL,
    SHI_LIMIT_MEMBARRIER,
    SHI_LIMIT_MPROTECT,
    SHI_LIMIT_MPROTECT64,
    SHI_LIMIT_PIPE_PARK,
    SHI_LIMIT_BELLS, /* from here on those of the doorbells, by their numbers (raw.h) */
    SHI_LIMIT_KINDS = SHI_LIMIT_BELLS + SHI_DB_COUNT
};

#define SHI_LIMIT_OF(doorbell) (SHI_LIMIT_BELLS + SHI_DB_##doorbell)

#define SHI_LIMIT_PLACEMENTS 1024u /* lines in the area: 64 KiB */
#define SHI_LIMIT_POOL 64u    /* queue: calls in flight, as many as a sender of calls has */
#define SHI_LIMIT_WORK_NS 10u /* floor, mailbox: between receiving and sending, each side */
#define SHI_LIMIT_BACKOFFS 8u
#define SHI_LIMIT_BACKOFF_MAX 10000u
#define SHI_LIMIT_GAP_NS 30000u
#define SHI_LIMIT_CALLS_MAX (1u << 30)

/* The target gives up this much later than the sender: a signal sent at the last moment
 * still finds a handler. */
#define SHI_LIMIT_GRACE_NS 50000000u

/* The target stamps its arrival.  Both sides must set it; ping then fills one_way. */
#define SHI_LIMIT_ONE_WAY 1u

/* cacheline by plain loads and stores instead of compare-and-swap.  Slower on most
 * processors (see swap_for() in limit.c).  Both sides must set it. */
#define SHI_LIMIT_PLAIN 2u

#define SHI_LIMIT_PAYLOAD 3u /* 64-bit words: what a csd carries inline */

struct shi_limit_line {
    alignas(64) shi_a32 value;
    shi_a32 next;    /* queue: as a csd's; line 0's is the head of the list */
    shi_a64 arrived; /* the target's stamp travels with its answer */
    shi_a64 payload[SHI_LIMIT_PAYLOAD];
};
_Static_assert(sizeof(struct shi_limit_line) == 64, "one line there and back");

/*
 * Shared memory, aligned to 128 bytes; contents need no initialisation and nothing needs
 * to be cleared between runs.  Fields that are written by different sides or at different
 * moments keep 128 bytes apart: the prefetcher of x86 fetches lines in pairs.
 */
struct shi_limit_area {
    alignas(128) shi_a64 ping; /* session << 32 | phase or 0x80000000 + errno */
    alignas(128) shi_a64 pong;
    shi_a32 slept;     /* in the run, the target slept so often (voluntary switches) */
    shi_a32 preempted; /* and was pushed off its core: then the figures are not the box's
                        * (with a busy thread, both: its own; off its core gets no IPI) */
    alignas(128) shi_a32 request;
    alignas(128) shi_a32 answer;
    shi_a64 arrived;               /* the target's stamp; same line as answer on purpose */
    alignas(128) shi_a32 finished; /* session; a target without a part sleeps on it */
    alignas(128) uint8_t object[SHI_RAW_OBJECT]; /* of the doorbell */
    alignas(128) struct shi_limit_line lines[SHI_LIMIT_PLACEMENTS];
};

struct shi_limit_params {
    uint32_t kind;      /* enum shi_limit_kind */
    uint32_t session;   /* a number not used before in this area, the same on both sides */
    uint32_t calls;     /* measured round trips */
    uint32_t warmup;    /* round trips before them */
    uint32_t batch;     /* on lines: round trips between two looks at the clock */
    uint32_t placement; /* on lines: which, 0 .. SHI_LIMIT_PLACEMENTS - 1 */
    uint32_t backoffs;  /* floor, mailbox: how many of backoff_ns[], in turn; 0: none, 0 ns */
    uint32_t backoff_ns[SHI_LIMIT_BACKOFFS]; /* before the sender's first look, by batch */
    uint32_t flags;                          /* SHI_LIMIT_ONE_WAY | SHI_LIMIT_PLAIN */
    uint32_t gap_ns;      /* pause before each call, for all kinds that ring */
    uint64_t deadline_ns; /* CLOCK_MONOTONIC time at which everybody gives up */
    int32_t peer_pid;     /* sigwait, signal: the other process, as this one sees it */
    int32_t peer_tid;     /*   and its thread that runs the other role */
    int32_t signo;        /* sigwait, signal: the signal that is the doorbell */
    int32_t watch_signo;  /* the signal of this process's own deadline timer */
    int32_t fd;           /* eventfd, mqueue: the same one in both processes, blocking; or -1 */
    char name[64];        /* mqueue: if there is none, an unused name ("/x"): ping makes it,
                           *   pong opens it, gone when ping returns (the name as soon as
                           *   both have it) */
    int32_t core;         /* membarrier, mprotect: the target's, for the busy thread */
    int32_t reserved;
    struct shi_hist *one_way; /* ping only, with SHI_LIMIT_ONE_WAY: send to arrival, or NULL */
};

/* The JSON name of a kind, NULL for none; and back, -EINVAL for none. */
const char *shi_limit_name(int kind);
int shi_limit_kind(const char *name);

/*
 * Usable defaults for a kind: 1,000 calls, 100 warm-up, batch 1,000, gap 30 us, signals
 * SIGRTMAX - 1 and SIGRTMAX - 2, no descriptors, deadline 30 s from now (a hypervisor that
 * stops the guest for some seconds shall not end a run).  The caller sets session, and
 * where the kind needs them peer_pid, peer_tid, fd or name, core.
 */
void shi_limit_params_init(struct shi_limit_params *p, int kind);

/*
 * The sender.  With hist, every measured call is clocked and recorded (ns).  Without,
 * the kinds on lines run in batches with no clock inside (queue: always, the last call of
 * a batch has been taken when the batch ends).  batch_ns (if not NULL) has room for one
 * number for each back-off, at least one: the median over the batches with it of ns per
 * round trip where there are batches, else over the calls.
 *
 * The target.  Leaves signal mask and handlers as they were.
 *
 * Both return 0 or the same kinds of failure:
 *   -EINVAL            parameters that make no sense (also where a descriptor does not block)
 *   -EBADMSG           what travelled arrived changed: the measurement itself is wrong
 *   -ETIMEDOUT         the deadline passed: the other side did not come, or vanished
 *   -EBUSY             this process runs a limit already (handlers are per process)
 *   -ENOSYS, -EPERM, -EMFILE, -ENOSPC, -EBADF, -ESRCH, ...   what the system said no with
 * A failure of one side before the first call reaches the other side at once, as the same
 * number.
 */
int shi_limit_ping(struct shi_limit_area *area, const struct shi_limit_params *p,
                   struct shi_hist *hist, double *batch_ns);
int shi_limit_pong(struct shi_limit_area *area, const struct shi_limit_params *p);

#endif
