/* SPDX-License-Identifier: MIT */
/*
 * The shared segment, byte by byte.
 *
 *   header | array directory | slots | irq area | per-slot regions | arrays
 *
 * A per-slot region is what one sender owns: its call_single_data, its function
 * table and its payload arena.  Everything is named by offset or index, never by
 * pointer, and every index read from here is checked before use: a damaged segment
 * gives errors, not crashes.
 *
 * Regions and arrays are sparse.  What is used is allocated first (fallocate), so a
 * full /dev/shm is -ENOSPC at that moment and never a SIGBUS later.
 */
#ifndef SHI_LAYOUT_H
#define SHI_LAYOUT_H

#include <stddef.h>

#include "base/atomics.h"
#include "base/clock.h"

#define SHI_MAGIC "shmipi\n\x1a"
#define SHI_ABI 9u

#define SHI_LINE 64u
#define SHI_PAIR 128u /* two lines: the adjacent-line prefetcher moves pairs */
#define SHI_PAGE 4096u

#define SHI_MAX_CPUS 4096u
#define SHI_GUESTS 6u /* attached hosts: processes that came to a machine that runs */
#define SHI_EXTRA_SLOTS (2u + SHI_GUESTS) /* the host, the firmware which reaps, guests */
#define SHI_NAME_MAX 64u
#define SHI_INLINE 24u      /* bytes of an argument or result inside a csd */
#define SHI_NOWAIT_POOL 64u /* wait=0 calls in flight, per sender */
#define SHI_CSD_SPARE 4096u /* csds per slot beyond two for every CPU, at least */
#define SHI_FUNCS 16384u    /* functions one sender can have registered at a time */
#define SHI_NLINES 320u     /* interrupt lines of a chip: a whole number of words */
#define SHI_NVECTORS 256u   /* vector: of which are used; shared: that are the machine's */
#define SHI_NO_LINE UINT32_MAX
#define SHI_NROWS 32u     /* rows of /proc/interrupts that a chip may have */
#define SHI_NR_IRQS 1024u /* irq descriptors; virq 0 is none */
#define SHI_NDOMAINS 64u  /* irq domains: what gives hwirqs out */
#define SHI_NCOPROC 8u    /* processes that take interrupts and are no CPUs */
#define SHI_EQ 64u        /* entries of an event queue: a power of two */
#define SHI_ESB_LINES 28u /* esb: 8 for messages, then one for each source */
#define SHI_PPC_MSGS 5u   /* esb: PPC_MSG_*, lines from 0 */
#define SHI_PPC_MSG_RM_HOST_ACTION 4u
#define SHI_MAX_ARRAYS 4096u
#define SHI_CSD_LOCK_TIMEOUT 5000u /* ms, where nobody says otherwise */

/* ---- the word: queue head and CPU state in one atomic unit ----------------------- */

enum shi_state {
    SHI_OFFLINE = 0,
    SHI_RUNNING = 1, /* a task runs: ring with the kick signal */
    SHI_POLLING = 2, /* will look at this word before it does anything else: no ring */
    SHI_HALTED = 3,  /* asleep on the doorbell */
    SHI_RUNG = 4,    /* was halted; somebody undertook to ring the doorbell */
    SHI_DEAD = 5,
};

#define SHI_W_STATE 0x7ull
#define SHI_W_KICKED 0x10ull       /* a kick signal is outstanding */
#define SHI_W_PENDING 0x20ull      /* the chip has something for this CPU */
#define SHI_W_NEED_RESCHED 0x40ull /* TIF_NEED_RESCHED of what runs there */
#define SHI_W_ASKED 0x80ull        /* running: the interpreter was asked to run Python csds */
#define SHI_W_LAZY 0x100ull        /* TIF_NEED_RESCHED_LAZY */
#define SHI_W_GEN_SHIFT 16
#define SHI_W_GEN 0xffff0000ull
#define SHI_W_LOW 0xffffffffull
#define SHI_W_HEAD_SHIFT 32

static inline enum shi_state shi_word_state(uint64_t w)
{
    return (enum shi_state)(w & SHI_W_STATE);
}

static inline uint32_t shi_word_head(uint64_t w)
{
    return (uint32_t)(w >> SHI_W_HEAD_SHIFT);
}

static inline uint16_t shi_word_gen(uint64_t w)
{
    return (uint16_t)((w & SHI_W_GEN) >> SHI_W_GEN_SHIFT);
}

static inline uint64_t shi_word_with(uint64_t w, enum shi_state state)
{
    return (w & ~SHI_W_STATE) | (uint64_t)state;
}

/* Is there something that the owner has to look at? */
static inline bool shi_word_work(uint64_t w)
{
    return (w >> SHI_W_HEAD_SHIFT) != 0 || (w & SHI_W_PENDING) != 0;
}

static inline bool shi_word_online(uint64_t w)
{
    enum shi_state s = shi_word_state(w);
    return s != SHI_OFFLINE && s < SHI_DEAD;
}

/* ---- call_single_data ------------------------------------------------------------ */

/* The kernel's values (include/linux/smp_types.h); PARKED, DIED and LEFT are ours. */
#define SHI_CSD_LOCK 0x01ull
#define SHI_CSD_PARKED 0x02ull /* the waiter sleeps: unlock rings its doorbell */
#define SHI_CSD_DIED 0x04ull   /* unlocked by the reaper: the target died with it */
#define SHI_CSD_LEFT 0x08ull   /* nobody waits for it any more: its result is not kept */
#define SHI_CSD_ASYNC 0x00ull
#define SHI_CSD_SYNC 0x10ull
#define SHI_CSD_IRQ_WORK 0x20ull
#define SHI_CSD_TTWU 0x30ull
#define SHI_CSD_STOP 0x40ull        /* the stopper's, from here on (smp/stop.h) */
#define SHI_CSD_STOP_NOWAIT 0x50ull /* unlocked before its function, as ASYNC */
#define SHI_CSD_MULTI 0x60ull       /* multi_cpu_stop, and this CPU runs no function */
#define SHI_CSD_MULTI_ACTIVE 0x70ull
#define SHI_CSD_TYPE 0xf0ull
#define SHI_CSD_BEGUN 0x100ull  /* TTWU: the target runs the task, or has */
#define SHI_CSD_CANCEL 0x200ull /* TTWU: before BEGUN: never run it; after: interrupt it */
/* IRQ_WORK: LOCK is the kernel's PENDING, and this one its BUSY: claimed, or it runs. */
#define SHI_CSD_BUSY 0x400ull
#define SHI_CSD_WORK 0x800ull /* TTWU: not behind other tasks, by a kworker of its own */
#define SHI_CSD_DST_SHIFT 16
#define SHI_CSD_GEN_SHIFT 32
#define SHI_CSD_SEQ_SHIFT 48
#define SHI_CSD_SEQ (0xffffull << SHI_CSD_SEQ_SHIFT)
#define SHI_CSD_END_SHIFT 16 /* DIED: 32 bits, how the target ended, instead of dst and gen */

/* How a CPU's process ended, as the firmware was told: a signal's number, or this and an
 * exit status; 0: not known. */
#define SHI_END_EXITED 0x100u
#define SHI_END_STOPPED 0x200u /* by smp_send_stop, or a crash */
#define SHI_STOPPED_STATUS 86  /* of its process then: its slot tells */

/* What `value` of a csd holds, as argument and again as result. */
enum shi_kind {
    SHI_K_NONE = 0,
    SHI_K_INT = 1,   /* int64_t in value.i */
    SHI_K_FLOAT = 2, /* double in value.f */
    SHI_K_BOOL = 3,
    SHI_K_BYTES = 4,   /* len bytes in value.bytes */
    SHI_K_PICKLE = 5,  /* value.ref: a block of the sender's arena; SHI_S_LENT: the target's */
    SHI_K_POINTER = 6, /* value.u: an offset into the segment (native handlers) */
    SHI_K_EARLY = 7,   /* a result that its sender has read already, to make room */
};

/* How a Python function is applied to its argument. */
enum shi_apply {
    SHI_A_INFO = 0,    /* func(info), result dropped: the smp_call_function family */
    SHI_A_ONE = 1,     /* func(arg), result wanted */
    SHI_A_VOID = 2,    /* func(), result wanted */
    SHI_A_ARGS = 3,    /* func(*args, **kwargs) from a pickle, result wanted */
    SHI_A_THREAD = 16, /* flag: of the stopper's works: a thread above all, which may sleep */
    SHI_A_INLINE_FUNC = 8, /* flag: the pickle holds the function too */
};

enum shi_status {
    SHI_S_DONE = 0,      /* as the sender left it: success costs the target no store */
    SHI_S_RAISED = 1,    /* the result is a pickled exception */
    SHI_S_BROKEN = 2,    /* the target could not decode it: damaged segment */
    SHI_S_NOFUNC = 3,    /* the function id is not known any more */
    SHI_S_UNSENT = 4,    /* it has run, and there is no memory to send its result in */
    SHI_S_NOMEM = 6,     /* the target had no memory to take it, or to say what came of it */
    SHI_S_GONE = 7,      /* a stopper's work: its CPU went offline, and it has not run */
    SHI_S_CANCELLED = 5, /* a task that was cancelled: it never ran, or was interrupted */
    /* Flag: the result lies in a block of the target's arena, which is the sender's to
     * read until it clears this. */
    SHI_S_LENT = 0x80,
};

struct shi_ref {
    uint64_t offset; /* in the sender's arena, or (SHI_S_LENT) that of `cpu` */
    uint64_t sum;    /* keyed checksum of the payload */
    uint32_t length;
    uint16_t cpu, gen; /* who lends it */
};

union shi_value {
    int64_t i;
    uint64_t u;
    double f;
    uint8_t bytes[SHI_INLINE];
    struct shi_ref ref;
};

struct shi_csd {
    shi_a64 lock; /* flags | dst | dst generation | sequence */
    shi_a32 next; /* index + 1 of the csd pushed before this one */
    uint16_t src; /* slot of the sender */
    uint16_t src_gen;
    uint32_t func;   /* bit 31: native handler; else an index of src's function table */
    uint32_t serial; /* of the function: the index may be used again */
    uint8_t kind;    /* enum shi_kind of value */
    uint8_t length;  /* for SHI_K_BYTES */
    uint8_t apply;   /* enum shi_apply */
    shi_a8 status;   /* enum shi_status */
    uint32_t room;   /* bytes a result may use at `reply`, 0: no such block */
    union shi_value value;
    uint64_t reply; /* offset in the sender's arena; the argument's block, if it has one */
};

#define SHI_FUNC_NATIVE 0x80000000u
_Static_assert(sizeof(struct shi_csd) == SHI_LINE, "a csd is one cache line");
_Static_assert(offsetof(struct shi_csd, value) == 32,
               "the value fills the line but for `reply`");

/* A published function: where its pickle lies in the owner's arena. */
struct shi_func {
    shi_a32 serial; /* 0: free */
    uint32_t length;
    uint64_t offset;
    uint64_t sum;
    uint64_t reserved;
};
_Static_assert(sizeof(struct shi_func) == 32, "function table entry");

/* ---- counters -------------------------------------------------------------------- */

#define SHI_COUNTERS(X)                                                                        \
    X(calls_single) /* smp_call_function_single, call, submit */                               \
    X(calls_many)   /* smp_call_function_many and everything over it */                        \
    X(calls_self)   /* run inline on the calling CPU */                                        \
    X(csd_queued)   /* call_single_data pushed on a queue */                                   \
    X(csd_sync)     /* call_single_data run, unlocked after the function */                    \
    X(csd_async)    /* call_single_data run, unlocked before the function */                   \
    X(native_run)   /* native handlers run */                                                  \
    X(python_run)   /* Python handlers run */                                                  \
    X(tasks_run)    /* tasks run */                                                            \
    X(unraisable)   /* exceptions of handlers nobody waited for */                             \
    X(elided)       /* rings not needed: the target was polling */                             \
    X(coalesced)    /* rings not needed: the queue was not empty */                            \
    X(doorbells_sent)                                                                          \
    X(doorbells_received)                                                                      \
    X(doorbells_spurious) /* woken with nothing to do */                                       \
    X(doorbells_retried)  /* the doorbell was full for a moment */                             \
    X(kicks_sent)                                                                              \
    X(kicks_received)                                                                          \
    X(kicks_spurious)  /* not from this machine */                                             \
    X(kicks_empty)     /* from this machine, found nothing left to do */                       \
    X(kicks_coalesced) /* one was outstanding already */                                       \
    X(kicks_retried)   /* EAGAIN: the signal queue was full */                                 \
    X(kicks_timed)     /* the interpreter was asked again: it had not looked for 1 ms */       \
    X(rekicked)        /* rung again after 10 ms without progress */                           \
    X(halts)           /* times the CPU went to sleep */                                       \
    X(resched_sent)                                                                            \
    X(resched_elided)                                                                          \
    X(irq_resched)     /* RES: reschedule interrupts taken */                                  \
    X(irq_call_single) /* CAL: function call interrupts taken */                               \
    X(irq_call)        /* CAL: function call interrupts taken (many) */                        \
    X(irq_tlb)         /* TLB: flushes taken for other CPUs, with whatever interrupt */        \
    X(irq_other)       /* lines nobody claimed */                                              \
    X(irq_handled)     /* lines that a requested irq's handler took */                         \
    X(irq_spurious)    /* the chip had nothing when it was asked */                            \
    X(chip_writes)     /* stores to the chip's registers that sent an IPI */                   \
    X(nmi)             /* NMIs taken */                                                        \
    X(nmi_sent)                                                                                \
    X(nmi_collapsed) /* as many as can be were pending already */                              \
    X(nmi_external)  /* NMIs that a reason was found for: SERR, IO_CHECK */                    \
    X(nmi_unknown)   /* NMIs that nobody but handlers of NMI_UNKNOWN handled, if at all */     \
    X(nmi_swallowed) /* NMIs whose events an earlier one has handled */                        \
    X(irq_work)      /* irq_works run */                                                       \
    X(irq_taken)     /* interrupts taken from the controller: lines */                         \
    X(irq_timer)     /* LOC: interrupts of the CPU's own timer */                              \
    X(died)          /* call_single_data completed by the reaper for this CPU */               \
    X(corrupt)       /* damaged entries found and dropped */

enum shi_counter {
#define X(name) SHI_C_##name,
    SHI_COUNTERS(X)
#undef X
        SHI_NCOUNTERS
};
#define SHI_COUNTER_ROOM 48u
_Static_assert(SHI_NCOUNTERS <= SHI_COUNTER_ROOM, "counter row is full");

/* One copy per context: an interrupt never writes the word its task was adding to. */
enum shi_ctx {
    SHI_CTX_TASK = 0,
    SHI_CTX_IRQ = 1,
    SHI_CTX_NMI = 2,
    SHI_CTX_SOFTIRQ = 3,
    SHI_NCTX = 4
};

/*
 * Why a CPU was interrupted.  Each interrupt is counted above where it enters (irq_taken,
 * irq_timer, nmi), and here where it is known what it is for: the sums are the same, but for
 * those that are on their way from the one place to the other, and what a death has cut off there.
 */
#define SHI_CAUSES(X)                                                                          \
    X(reschedule)                                                                              \
    X(call)    /* function call interrupts, by what was first on the queue: a function, ... */ \
    X(wakeup)  /* ... a task, ... */                                                           \
    X(stopper) /* ... a work of the stopper, ... */                                            \
    X(empty)   /* ... nothing: whoever was interrupted before it took it along */              \
    X(irq_work) /* also by a line of its own, or the timer */                                  \
    X(timer)    /* own timer: hrtimers, and tasks that sleep */                                \
    X(tick)     /* own timer: others wait for what runs */                                     \
    X(broadcast)                                                                               \
    X(irq) /* requested, or to be */                                                           \
    X(icache)                                                                                  \
    X(stop) /* smp_send_stop, by a line */                                                     \
    X(nmi)                                                                                     \
    X(nmi_line) /* that stands in for an NMI */                                                \
    X(mux)      /* several messages behind one line, each of which is counted too */           \
    X(other)    /* counted and nothing else, or nobody's */

enum shi_cause {
#define X(name) SHI_CAUSE_##name,
    SHI_CAUSES(X)
#undef X
        SHI_NCAUSES
};

/* ---- tracepoints ----------------------------------------------------------------- */

#define SHI_TRACE_EVENTS(X)                                                                    \
    X(csd_queue_cpu)                                                                           \
    X(csd_function_entry)                                                                      \
    X(csd_function_exit)                                                                       \
    X(ipi_send_cpu)                                                                            \
    X(ipi_entry)                                                                               \
    X(ipi_exit)                                                                                \
    X(wake_idle_without_ipi)                                                                   \
    X(cpu_halt)                                                                                \
    X(cpu_wake)                                                                                \
    X(call_entry)       /* arg: enum shi_call_entry; cpu: the (first) target */                \
    X(call_begin)       /* a sender has a csd filled and goes for the queue */                 \
    X(queue_push)       /* the csd is locked and goes to the target's queue */                 \
    X(csd_coalesced)    /* not rung: the queue was not empty, somebody has */                  \
    X(call_ipi)         /* the chip is asked to interrupt one CPU for its queue; arg: line */  \
    X(ipi_send_cpumask) /* the same for several: cpu: how many, func: register writes */       \
    X(call_end)         /* a waiting sender has seen its csd unlocked */                       \
    X(csd_unlock)                                                                              \
    X(call_interrupt) /* a function call interrupt; arg: its line */                           \
    X(flush)          /* the whole queue was taken */                                          \
    X(scheduler_ipi)  /* a reschedule interrupt; arg: its line */                              \
    X(resched_idle)   /* the idle loop found NEED_RESCHED */                                   \
    X(irq_entry)      /* the kick signal's handler acknowledged */                             \
    X(irq_exit)                                                                                \
    X(irq_masked)   /* it found interrupts off: replayed later */                              \
    X(line_set)     /* arg: line made pending */                                               \
    X(line_kept)    /* arg: line that needed no ring: pending already, or masked */            \
    X(chip_message) /* arg: message stored behind a muxed line */                              \
    X(chip_trigger) /* arg: P and Q of the source before | line << 8 */                        \
    X(rung)         /* arg: enum shi_rung */                                                   \
    X(chip_demux)   /* arg: messages taken from behind a line, a bit each */                   \
    X(chip_eoi)     /* arg: 1 if the source was triggered again | line << 8 */                 \
    X(line_ack)     /* arg: line taken from the chip */                                        \
    X(line_eoi)     /* arg: line given back to the chip */                                     \
    X(nmi_send)                                                                                \
    X(nmi_entry)                                                                               \
    X(nmi_handler) /* its handler begins */                                                    \
    X(nmi_exit)                                                                                \
    X(softirq_raise) /* arg: its number */                                                     \
    X(softirq_entry) /* arg: its number */                                                     \
    X(softirq_exit)  /* arg: its number */                                                     \
    X(softirqd_wake) /* what is left of softirqs is ksoftirqd's; arg: their bits */            \
    X(vector_entry)  /* the handler of a line begins; arg: line | enum shi_use << 16 */        \
    X(vector_exit)                                                                             \
    X(reschedule_ipi) /* the chip is asked to nudge a CPU; arg: line */                        \
    X(irq_work_ipi)   /* a CPU interrupts itself; csd, func: the work's */                     \
    X(cpumask) /* of ipi_send_cpumask before it; csd: from that CPU on, func | arg << 32 */    \
    X(cpu_online)                                                                              \
    X(cpu_offline)                                                                             \
    X(cpu_dead) /* the reaper's: arg: how it ended, see SHI_END_EXITED */

/* Which function a caller has called. */
enum shi_call_entry {
    SHI_E_SINGLE = 0,
    SHI_E_MANY = 1,
    SHI_E_RESCHEDULE = 2,
    SHI_E_RESCHED_CPU = 3,
};

enum shi_trace_event {
    SHI_T_none = 0,
#define X(name) SHI_T_##name,
    SHI_TRACE_EVENTS(X)
#undef X
        SHI_T_COUNT
};

#define SHI_TF_IRQS_OFF 0x01u /* where a record was written */
#define SHI_TF_HARDIRQ 0x02u
#define SHI_TF_SOFTIRQ 0x04u
#define SHI_TF_NMI 0x08u
#define SHI_TF_TASK 0x10u

struct shi_trace_record {
    uint64_t stamp;
    uint8_t event;
    uint8_t flags; /* SHI_TF_* */
    uint16_t cpu;  /* the CPU the event is about */
    uint32_t csd;  /* index + 1, or 0 */
    uint32_t func; /* SHI_FUNC_NATIVE, or SHI_TRACE_NAMED and a name's number */
    uint32_t arg;
    uint32_t site; /* number of the name of who has called, 0: the core itself */
    shi_a32 seq;   /* position in the ring + 1, written last */
};
_Static_assert(sizeof(struct shi_trace_record) == 32, "trace record");
_Static_assert(SHI_T_COUNT <= 64, "events have a bit each");

#define SHI_TRACE_MOST (1u << 24) /* records of a ring: a power of two */
#define SHI_TRACE_NAMES 4096u
#define SHI_TRACE_NAMED 0x40000000u /* of a record's func, beside SHI_FUNC_NATIVE */

/* A name in traces: of a function, or of the line that called. */
struct shi_trace_name {
    shi_a32 length; /* stored last; 0: not there yet */
    char text[124];
};
_Static_assert(sizeof(struct shi_trace_name) == SHI_PAIR, "a name is a line pair");

struct shi_trace_head {
    _Alignas(SHI_PAIR) shi_a64 head; /* records begun: the owner's */
    shi_a64 dropped;                 /* not recorded: the ring was full, and is lossless */
    /* What was begun before this and is not finished never will be: its writer is dead. */
    shi_a64 born;
    shi_a32 owner;                   /* 1 + the generation that born is of */
    _Alignas(SHI_LINE) shi_a64 tail; /* records that a reader has taken: its own */
};

/* The rings: then a head for each slot, then the records of each slot. */
struct shi_trace_area {
    uint32_t records; /* of each ring */
    uint32_t reserved;
    shi_a32 lossless;
    shi_a32 nnames;
    shi_a64 reader; /* who drains, of several (shi_lock_try) */
    _Alignas(SHI_PAIR) struct shi_trace_name names[SHI_TRACE_NAMES];
};

/* ---- softirqs -------------------------------------------------------------------- */

/* include/linux/interrupt.h, lowest first; the names are those of /proc/softirqs. */
#define SHI_SOFTIRQS(X)                                                                        \
    X(HI)                                                                                      \
    X(TIMER)                                                                                   \
    X(NET_TX)                                                                                  \
    X(NET_RX)                                                                                  \
    X(BLOCK)                                                                                   \
    X(IRQ_POLL)                                                                                \
    X(TASKLET)                                                                                 \
    X(SCHED)                                                                                   \
    X(HRTIMER)                                                                                 \
    X(RCU)

enum shi_softirq {
#define X(name) SHI_##name##_SOFTIRQ,
    SHI_SOFTIRQS(X)
#undef X
        SHI_NR_SOFTIRQS
};

/* ---- interrupt controllers ------------------------------------------------------- */

/* What taking a line means. */
enum shi_line_use {
    SHI_USE_NONE = 0,
    SHI_USE_RESCHEDULE = 1,
    SHI_USE_CALL = 2,
    SHI_USE_CALL_SINGLE = 3,
    SHI_USE_NMI = 4,   /* chips without one: a line that can be masked stands in */
    SHI_USE_IRQ = 5,   /* of an IPI domain: whoever requested the irq */
    SHI_USE_COUNT = 6, /* counted and nothing else */
    SHI_USE_IRQ_WORK = 7,
    SHI_USE_TIMER = 8, /* tick broadcast */
    SHI_USE_STOP = 9,
    SHI_USE_ICACHE = 10,
    SHI_NUSES = 11,
};

/* A chip, as its class in shmipi/irq/chips/ describes it. */
struct shi_chip {
    char name[16];
    uint32_t flow; /* enum shi_flow_kind, irq/flows.h */
    uint32_t nlines;
    uint32_t call_single, call, reschedule;
    uint32_t nmi;       /* SHI_NO_LINE: a real one, that nothing masks */
    uint32_t per_cpu;   /* 1: of a system IPI's lines, CPU n has line + n */
    uint32_t group;     /* CPUs that one register write reaches in one go; 0: any mask */
    uint32_t shorthand; /* 1: all but self is one register write */
    uint32_t startup;   /* 1: secondary CPUs wait for a STARTUP IPI */
    uint32_t banked;    /* sgi: 1: pending for each source apart (GICv2) */
    uint32_t siblings;  /* esb: CPUs in a core, that ring each other's doorbells */
    uint32_t
        decrementer; /* 1: without a line for irq_work the timer is set to 1; else the tick */
    uint32_t nrows;
    uint8_t use[SHI_NLINES]; /* enum shi_line_use */
    uint8_t row[SHI_NLINES]; /* where a line is counted; SHI_NROWS and over: nowhere */
    struct {
        char label[8];
        char text[52];
        uint32_t counter; /* enum shi_counter, or SHI_NO_LINE: counted in shi_pic.rows */
    } rows[SHI_NROWS];
};

/* What a CPU's part of the controller holds, beside irr[]. */
struct shi_pic {
    _Alignas(SHI_PAIR) shi_a64 enable[SHI_NLINES / 64]; /* lines that are not masked */
    shi_a64 messages;                                   /* esb: one byte each, PPC_MSG_* */
    shi_a32 nmi;                                        /* pending | SHI_NMI_IN_SERVICE */
    shi_a32 startup;     /* enum shi_startup: futex of a CPU that waits for STARTUP */
    shi_a32 sipi;        /* vector of the STARTUP that it took */
    shi_a32 init;        /* generation of the process that INIT ends: the firmware's order */
    shi_a32 nmi_request; /* number of the NMI IPI that asks for this CPU; 0: none does */
    shi_a64 routed[SHI_NLINES / 64]; /* shared: lines mapped to this CPU (pcpu_masks) */
    shi_a64 bank[2]; /* sgi: 8 bits a line, the CPUs that sent it (GICD_SPENDSGIRn) */
    /* Written by the owner only. */
    _Alignas(SHI_PAIR) shi_a64 isr[SHI_NLINES / 64]; /* in service, or active */
    shi_a32 nmi_service; /* counts; odd while an NMI is in service */
    shi_a32 threshold;   /* TPR, CPPR, PMR */
    shi_a32 spurious;    /* 1: asserted, and masked before it was taken */
    shi_a32 happened;    /* esb: paca->irq_happened */
    shi_a32 iar;         /* sgi: what the last acknowledge read; esb: priority in service */
    shi_a32 running;     /* sgi: lines that were acknowledged, and not ended by EOIR yet */
    shi_a64 senders;     /* sgi: 4 bits a line, who sent what was acknowledged last */
    shi_a8 priority[32]; /* sgi: of each line, 0 is the highest */
    shi_a32 eq_at;       /* esb: how many entries were read */
    shi_a32 eq_put;      /* and how many were written */
    shi_a32 eq[SHI_EQ];  /* generation << 31 | line */
    /* Apart from the above, which each interrupt reads: lines of requested irqs only. */
    _Alignas(SHI_LINE) shi_a64 inprogress[SHI_NLINES / 64]; /* see shi_line_begin */
    shi_a64 put_off[SHI_NLINES / 64]; /* of those: the handler waits for the interpreter */
    shi_a64 wanted[SHI_NLINES / 64];  /* lines as software has enabled and disabled them last */
    _Alignas(SHI_PAIR) shi_a64 rows[SHI_NROWS]; /* interrupts taken */
};

#define SHI_NMI_PENDING 0xfu
#define SHI_NMI_IN_SERVICE 0x10u

enum shi_startup {
    SHI_SU_NONE = 0,    /* no process yet, or it comes up */
    SHI_SU_WAITING = 1, /* its process waits for STARTUP */
    SHI_SU_STARTED = 2,
    SHI_SU_ASKED = 3,   /* STARTUP has reached a CPU without a process: make one */
    SHI_SU_RESET = 4,   /* INIT: its process ends, and none is made before STARTUP */
    SHI_SU_GRANTED = 5, /* STARTUP has reached the process that waits; it has not gone on */
};

/* ---- tasks of the scheduler (smp/sched.c) ---------------------------------------- */

#define SHI_TASKS 1024u      /* at least, and eight for every CPU */
#define SHI_TASK_ROOM 16384u /* bytes of what a Python task is made of, or has returned */
#define SHI_COMM 16u         /* TASK_COMM_LEN */

/* __state of the kernel, and what comes before and after. */
enum shi_task_state {
    SHI_TASK_FREE = 0,
    SHI_TASK_CLAIMED = 1, /* somebody fills it in */
    SHI_TASK_NEW = 2,
    SHI_TASK_RUNNING = 3,
    SHI_TASK_INTERRUPTIBLE = 4,
    SHI_TASK_UNINTERRUPTIBLE = 5,
    SHI_TASK_WAKING = 6, /* its waker has it, and nobody else */
    SHI_TASK_DEAD = 7,   /* it has ended; what it returned can be read */
};

/*
 * A task's word.  Where it is, what it does and which use of the table's entry it is are one
 * atomic unit: who wakes it, who puts it to sleep and who moves it cannot all succeed.
 */
#define SHI_TW_STATE 0xfull
#define SHI_TW_ON_RQ 0x10ull
#define SHI_TW_ON_CPU 0x20ull  /* a step of it runs */
#define SHI_TW_PINNED 0x40ull  /* what it is made of is in the process of its CPU */
#define SHI_TW_DIED 0x80ull    /* DEAD: with its CPU */
#define SHI_TW_STOP 0x100ull   /* kthread_should_stop() */
#define SHI_TW_RAISED 0x200ull /* DEAD: by an exception */
#define SHI_TW_TURN 0x400ull   /* WAKING: its waker is on the way to a run queue with it */
#define SHI_TW_CPU_SHIFT 14
#define SHI_TW_WAKER_SHIFT 27 /* WAKING, CLAIMED: whose turn it is, slot + 1 */
#define SHI_TW_SLOT 0x1fffull
#define SHI_TW_SERIAL_SHIFT 40
_Static_assert(SHI_MAX_CPUS + SHI_EXTRA_SLOTS + 1 < SHI_TW_SLOT, "a task's word names a slot");

enum shi_task_flags {
    SHI_PF_PYTHON = 1,
    SHI_PF_BOUND = 2,     /* PF_NO_SETAFFINITY: a kernel thread of one CPU */
    SHI_PF_RT = 4,        /* before all others, and first come first served among its like */
    SHI_PF_REAP = 8,      /* nobody asks how it ended: its entry is free at once */
    SHI_PF_MIGRATES = 16, /* Python: what it has begun can be taken to another CPU */
    SHI_PF_WORK = 32,     /* a kworker: it runs the csd that `arg` is the index of, and ends */
};

struct shi_task {
    _Alignas(SHI_LINE) shi_a64 word;
    shi_a32 next;  /* in the run queue: index + 1 */
    uint32_t step; /* native: index of the function of its steps */
    uint64_t arg;
    uint32_t flags; /* enum shi_task_flags */
    shi_a32 length; /* Python: bytes in its room */
    shi_a64 timer;  /* schedule_timeout: when it is woken, by shi_now_ns(); 0: never */
    char comm[SHI_COMM];
    shi_a64 wakeups; /* by who wakes it, and has just written the word */
    /* Written by who runs it. */
    _Alignas(SHI_LINE) shi_a64 runtime_ns;
    shi_a64 switches, preempted, migrations;
    uint64_t reserved[4];
    shi_a64 allowed[]; /* cpus_ptr: as many words as ncpus needs */
};

struct shi_rq {
    _Alignas(SHI_PAIR) shi_a64 lock; /* shi_lock_take */
    shi_a32 head[2], tail[2];        /* RT, fair: index + 1 */
    shi_a32 queued;                  /* on both */
    shi_a32 curr;                    /* index + 1 of the task whose step runs, 0: none */
    shi_a32 active;                  /* tasks may be put here */
    shi_a32 llc;                     /* sd_llc_id: who has the same shares a cache */
    shi_a64 timer;                   /* no timer of a task that sleeps here is before this */
    shi_a64 switches;
    shi_a32 ttwu_pending; /* by who wakes, and has just looked at all of this line */
    _Alignas(SHI_LINE) shi_a32 wakelist; /* counts: tasks that came by the wake list */
    shi_a32 batches;                     /* and in how many calls of sched_ttwu_pending */
    shi_a32 pulled;
    shi_a64 ksoftirqd; /* its task, 0: it was not needed yet */
    shi_a64 turn;      /* until then what runs has its turn: others are not told at once */
};
_Static_assert(sizeof(struct shi_rq) == 2 * SHI_PAIR || sizeof(struct shi_rq) == SHI_PAIR,
               "run queues share no line pair");

/* Then the run queues, the tasks, and (sparse) the tasks' rooms. */
struct shi_sched {
    _Alignas(SHI_PAIR) shi_a32 next; /* where to look for a free entry first */
    shi_a32 top;                     /* entries below this have been used */
    shi_a32 overload;                /* a run queue may have a task too many */
    shi_a32 slice_ns;
    shi_a32 ipi_flagged; /* 1: some bit of the mask may be set */
    _Alignas(SHI_PAIR) shi_a64
        pending_ipi[SHI_MAX_CPUS / 64]; /* Zephyr's _kernel.pending_ipi */
};

/* ---- irq descriptors ------------------------------------------------------------- */

/* LINE: what taking another line means (smp_request_message_ipi). */
enum shi_irq_action { SHI_IA_NONE = 0, SHI_IA_NATIVE = 1, SHI_IA_PYTHON = 2, SHI_IA_LINE = 3 };

/* struct irq_desc and irq_data of the kernel in one; filled under the irq area's lock. */
struct shi_irqdesc {
    shi_a32 used;    /* 1: allocated */
    uint32_t flags;  /* shmipi/irq/table.py */
    uint32_t domain; /* 1 + its place in the machine's list of domains */
    uint32_t hwirq;
    uint32_t ipi_base;   /* first virq of the block that was reserved with it: its head */
    uint32_t ipi_nr;     /* virqs in the block */
    uint32_t ipi_offset; /* first CPU of the block */
    shi_a32 action;      /* enum shi_irq_action: published last */
    uint32_t func;       /* native, line: its number; Python: of the requester's table */
    uint32_t serial;
    uint16_t src, src_gen; /* the requester */
    uint32_t kind;         /* native: enum shi_kind of info */
    uint64_t info;
    char name[32];
    uint32_t epoch;  /* counts its reservations: a descriptor held for longer is stale */
    uint32_t stride; /* native, info in a per-CPU array: bytes from a CPU's row to the next */
    shi_a32 next;    /* vector: the irq that has the same line on other CPUs; 0: none */
    shi_a32 seq;     /* odd while who handles it changes: shi_irqdesc_read */
    uint32_t reserved[6];
};
_Static_assert(sizeof(struct shi_irqdesc) == 128, "an irq descriptor is a line pair");

/* What gives hardware irq numbers out: the controller itself, or a child of it. */
struct shi_irqdomain {
    shi_a32 used;    /* 1: there; stored last */
    uint32_t flags;  /* shmipi/irq/table.py */
    uint32_t parent; /* 1 + its place in the list; 0: a root */
    uint32_t coproc; /* 1 + the coprocessor whose domain it is; 0: the CPUs' */
    char name[32];
    uint64_t lines[SHI_NLINES / 64]; /* that are its own; none: what its parent has left */
    uint32_t reserved[10];
};
_Static_assert(sizeof(struct shi_irqdomain) == 128, "an irq domain is a line pair");

/* Whose NMIs a handler is for (asm/nmi.h). */
enum shi_nmi_type {
    SHI_NMI_LOCAL = 0,
    SHI_NMI_UNKNOWN = 1,
    SHI_NMI_SERR = 2,
    SHI_NMI_IO_CHECK = 3,
    SHI_NMI_MAX = 4,
};
#define SHI_NMI_ACTIONS 15u /* handlers of a type: four bits each, and 0 for none */
_Static_assert(SHI_NMI_ACTIONS * 4 < 64, "an order of handlers is a word");
#define SHI_NMI_REASON_SERR 0x80u /* as port 0x61 has them */
#define SHI_NMI_REASON_IOCHK 0x40u

/* irq/nmi.c. */
struct shi_nmi_area {
    /* Of each type who is asked, in order: 1 + a place in action[type], four bits each.  A
     * change is one store: who is killed in the middle of one has made none, or all of it. */
    _Alignas(SHI_PAIR) shi_a64 order[SHI_NMI_MAX];
    shi_a64 lock;    /* of the NMI IPI that is under way: 0, or its sender (shi_lock_try) */
    shi_a32 request; /* its number */
    shi_a32 reason;  /* SHI_NMI_REASON_*: why an NMI came that is no CPU's own */
    struct shi_irqdesc ipi; /* its function */
    struct shi_irqdesc action[SHI_NMI_MAX][SHI_NMI_ACTIONS];
};

struct shi_coproc {
    _Alignas(SHI_PAIR) shi_a32 pending; /* one bit: a SINGLE domain has one hwirq */
    shi_a32 event;                      /* its doorbell */
    shi_a32 pid;
    shi_a32 virq;
    char name[32];
};

/* What the CPUs' parts of the controller have in common. */
struct shi_irq_area {
    _Alignas(SHI_PAIR) shi_a64 shared[SHI_NLINES / 64]; /* shared: pending */
    _Alignas(SHI_PAIR) shi_a64 mask[SHI_NLINES / 64];   /* shared: enabled */
    shi_a32 route[SHI_NLINES];       /* shared: 1 + the CPU a line is mapped to */
    shi_a32 line_virq[SHI_NLINES];   /* descriptor (head) of a SHI_USE_IRQ line, 0: none;
                                      * vector: the first of those that have the line */
    _Alignas(SHI_PAIR) shi_a64 lock; /* 0, or its holder (shi_lock_try) */
    /* Descriptors that a change is about, first | how many << 32: who takes the lock from
     * a dead holder finds here what to free. */
    shi_a64 undo;
    struct shi_coproc coproc[SHI_NCOPROC];
    struct shi_irqdomain domain[SHI_NDOMAINS];
    struct shi_irqdesc desc[SHI_NR_IRQS]; /* desc[0]: no irq has the number 0 */
    struct shi_nmi_area nmi;
    struct shi_irqdesc softirq[SHI_NR_SOFTIRQS]; /* actions that are not the core's own */
    /* then a row for each CPU: how often it took each line, SHI_NLINES 64-bit words */
    /* then the affinity mask of each descriptor: 64-bit words, as many as ncpus needs */
};
_Static_assert(sizeof(struct shi_irq_area) % SHI_PAIR == 0, "counts start on a line pair");

/* ---- a slot: one per CPU, then the host's, the firmware's, and those of guests ---- */

#define SHI_WAITS_IRQS_OFF 0x10000ull
#define SHI_HANDLER_NAME 64u /* of what is longer, the end */

enum shi_handler { SHI_H_NONE = 0, SHI_H_IRQ = 1, SHI_H_NMI = 2, SHI_H_SOFTIRQ = 3 };

/* enum multi_stop_state: low four bits of a state's word, over which are 24 that count. */
enum shi_multi_state {
    SHI_MS_NONE = 0,
    SHI_MS_PREPARE = 1,     /* awaiting everyone */
    SHI_MS_DISABLE_IRQ = 2, /* everyone is there: interrupts off */
    SHI_MS_RUN = 3,         /* they are, everywhere; the next four bits: who died running it */
    SHI_MS_EXIT = 4,
    /* It was given up; the next four bits: in which state. */
    SHI_MS_TIMEOUT = 5,
    SHI_MS_DIED = 6, /* a CPU of it, or (in PREPARE) its sender */
    SHI_MS_GONE = 7, /* a CPU of it went offline before it came to it */
    SHI_MS_CANCELLED = 8,
};

/* struct multi_stop_data, of who has called; each slot has one. */
struct shi_multi {
    _Alignas(SHI_PAIR) shi_a32 state; /* the futex of those who wait with interrupts off */
    shi_a32 sleepers;
    shi_a64 ack; /* the state's word << 32 | how many have not acknowledged it */
    shi_a64 deadline_ns;
    shi_a32 n, nactive;
    shi_a32 lo, hi; /* its CPUs are among these */
};

/* CPUHP: where a CPU is on its way down. */
enum shi_idle_dead { SHI_ID_NOT = 0, SHI_ID_DEAD = 1, SHI_ID_REPORTED = 2 };

struct shi_slot {
    /* What every sender writes.  Pending lines share the line of the queue head: what
     * a bit means is the chip's flow's. */
    _Alignas(SHI_PAIR) shi_a64 word;
    shi_a64 irr[SHI_NLINES / 64];

    /* Identity: written at boot, read by senders. */
    _Alignas(SHI_PAIR) shi_a32 pid;
    shi_a32 tid;
    shi_a32 generation;
    shi_a32 core;
    shi_a64 start_time; /* field 22 of /proc/PID/stat */
    shi_a32 idle;       /* enum shi_idle */
    shi_a32 hotplug;    /* enum shi_hotplug: futex of a parked CPU */
    shi_a32 csd_top;    /* csds below this may be in use: what the reaper scans, if csds_out */
    shi_a32 func_top;   /* functions below this may be published */
    shi_a32 registered; /* 1 once the process has taken the slot */
    shi_a32 boot_error; /* errno of a process that could not become this CPU */
    shi_a32 event;      /* a host's doorbell: an event count */
    shi_a32 end;        /* dead: how its process ended, see SHI_END_EXITED */

    /* Published by the owner for others to read. */
    /* 0, or cpu + 1 | SHI_WAITS_IRQS_OFF | (csd index + 1) << 32 */
    _Alignas(SHI_PAIR) shi_a64 waiting_for;
    shi_a32 ringing;      /* 0, or target + 1: pid hazard */
    shi_a32 cur_csd;      /* index + 1 of what it executes, 0: nothing */
    shi_a32 task;         /* 1 while a task runs */
    shi_a32 damaged;      /* 1 once it dropped csds it could not believe */
    shi_a32 handler;      /* enum shi_handler: of Python; a native one is in cur_csd alone */
    shi_a32 cur_csd_func; /* what it executes: `func` of that csd, and before cur_csd says so */
    shi_a64 since;        /* stamp of its begin */
    shi_a64 cur_csd_info; /* and its argument, where that is a number or an offset */
    shi_a32 cur_csd_kind; /* enum shi_kind of that */
    shi_a32 dumped; /* 1: a waiter has had its stack dumped since it last took its queue */
    shi_a32 tick;   /* its reminder is set: it looks by itself within a millisecond */
    char handler_name[SHI_HANDLER_NAME];
    shi_a32 starved;   /* enum shi_starved: its senders write it too */
    shi_a32 lends;     /* 1 once a process of this slot has lent a result */
    shi_a64 rerung;    /* by who waits for it: see shi_watch_ring */
    shi_a32 quiet;     /* `departed`, when it last had no csd of anybody's in hand */
    shi_a32 ended;     /* `departed`, when the slot's last process had ended: the firmware's */
    shi_a32 cpus_read; /* depth of cpus_read_lock(): of a host, that of all its threads */
    /* csds that its process has handed out and not taken back: see shi_reap_complete.  Not
     * beside csd_top, in a line that its callers read: it changes with every call. */
    shi_a32 csds_out;
    shi_a32 csd_stuck; /* its waits of which was said that they are stuck (csd_lock_is_stuck) */
    shi_a32 masked;    /* 1: a kick found its interrupts off, and they have not come on since */
    shi_a32 stopped;   /* 1: its process was ended by smp_send_stop, or a crash */
    shi_a64 py_state;  /* of its interpreter, in its process: the thread's state, ... */
    shi_a64 py_outside; /* ... and the innermost frame that is not the CPU's own */

    struct shi_multi multi;
    /* What it acknowledged last of a multi_cpu_stop: the sender << 32 | the state's word. */
    shi_a64 stop_ack;
    shi_a32 idle_dead; /* enum shi_idle_dead */

    /* Tests: stop or die at a labelled step. */
    _Alignas(SHI_PAIR) shi_a32 step;
    shi_a32 step_action;
    shi_a32 step_skip;
    shi_a32 step_hit;

    _Alignas(SHI_PAIR) shi_a64 counters[SHI_NCTX][SHI_COUNTER_ROOM];
    char task_name[120];
    shi_a64 softirqs[SHI_NR_SOFTIRQS]; /* how often it has run each */
    shi_a64 causes[SHI_NCAUSES]; /* of its interrupts: each written in one context alone */

    struct shi_pic pic;
};
_Static_assert(sizeof(struct shi_slot) <= SHI_PAGE, "a slot fits a page");
#define SHI_SLOT_BYTES 4096u
_Static_assert(sizeof(struct shi_slot) <= SHI_SLOT_BYTES, "slot stride");

/* ---- the header ------------------------------------------------------------------ */

enum shi_machine_state {
    SHI_M_NEW = 0,
    SHI_M_BOOTING = 1,
    SHI_M_UP = 2,
    SHI_M_STOPPING = 3,
    SHI_M_DEAD = 4, /* the firmware is gone */
};

/* Has a CPU results that wait for room in its arena? */
enum shi_starved {
    SHI_ST_NO = 0,
    SHI_ST_WAITS = 1, /* until a sender has read one that is there */
    SHI_ST_LOOK = 2,  /* one has */
};

enum shi_hotplug { SHI_HP_ONLINE = 0, SHI_HP_OFFLINE = 1, SHI_HP_STOP = 2 };
enum shi_idle { SHI_IDLE_POLL = 0, SHI_IDLE_HALTPOLL = 1, SHI_IDLE_HALT = 2 };
/* What wakes a halted CPU, by its number in the header: irq/db_NAME.c each. */
#define SHI_DOORBELLS(X) X(futex) X(sem) X(signal) X(eventfd) X(mqueue) X(pipe)

enum shi_doorbell {
#define X(name) SHI_DB_##name,
    SHI_DOORBELLS(X)
#undef X
        SHI_DB_COUNT
};

/* What uses IPIs, and may have state of its own in an array of the segment. */
#define SHI_USERS(X)                                                                           \
    X(sched)                                                                                   \
    X(cpuhp)                                                                                   \
    X(stop)                                                                                    \
    X(tlb)                                                                                     \
    X(membarrier)                                                                              \
    X(icache)                                                                                  \
    X(backtrace)                                                                               \
    X(crash)                                                                                   \
    X(tick)                                                                                    \
    X(net)                                                                                     \
    X(rps)                                                                                     \
    X(cpumap)                                                                                  \
    X(blk)                                                                                     \
    X(rcu)                                                                                     \
    X(nohz)                                                                                    \
    X(trace)

enum shi_user {
#define X(name) SHI_USER_##name,
    SHI_USERS(X)
#undef X
        SHI_NUSERS
};
#define SHI_USER_ROOM 32u
_Static_assert(SHI_NUSERS <= SHI_USER_ROOM, "users have room in the header");

struct shi_header {
    /* These 80 bytes keep their place for ever: ps and clean read other versions. */
    char magic[8];
    uint32_t abi;
    uint32_t header_bytes;
    char name[SHI_NAME_MAX];

    uint64_t total_bytes; /* of the mapping; the file may be shorter at its end */
    uint64_t slot_offset;
    uint64_t irq_offset;
    uint64_t region_offset;
    uint64_t region_bytes; /* per slot: csds, function table, arena */
    uint64_t func_offset;  /* in a region */
    uint64_t arena_offset; /* in a region */
    uint64_t arena_bytes;
    uint64_t array_offset;
    uint64_t array_bytes;
    uint32_t ncpus;
    uint32_t csd_shift; /* 1 << this many csds per slot */
    uint32_t doorbell;
    uint32_t kick_signal;
    uint32_t kick; /* 0: cooperative */
    uint32_t cookie;
    uint32_t oversubscribed;
    uint64_t sum_key;
    uint64_t boot_time_ns; /* CLOCK_REALTIME */
    uint64_t sched_offset;
    uint64_t task_offset; /* the tasks' rooms */
    uint32_t nmi_signal;
    struct shi_chip chip;
    struct shi_clock clock;

    _Alignas(SHI_PAIR) shi_a32 machine_state; /* enum shi_machine_state */
    shi_a32 firmware_pid;
    shi_a32 host_pid;
    shi_a32 hotplug_event; /* futex: bumped at every CPU online, offline, dead */
    shi_a32 steps;         /* 1: labelled steps are looked at */
    shi_a32 shut_down;     /* 1: its owner ended it in order; set before the state says so */
    shi_a32 departed;      /* counts the senders that have ended (shi_reap_orphans) */
    /* Between hosts; as the irq area's, taken from a holder that died (shi_lock_try). */
    shi_a64 array_lock;
    shi_a64 hotplug_lock;
    shi_a64 tool_lock; /* stress and bench take the whole machine */
    shi_a32 starting;  /* 1: there are STARTING callbacks, Python's */
    shi_a64 stop_lock; /* while works for several CPUs are queued (smp/stop.h) */
    shi_a64 array_used;
    shi_a32 narrays;

    /* Read at every step that can be left out, and written by tests alone. */
    _Alignas(SHI_PAIR) shi_a64 broken; /* bits by enum shi_rule: which rules are off */
    shi_a64 tracing;                   /* bits by enum shi_trace_event: what is recorded */
    shi_a64 users[SHI_USER_ROOM];      /* by enum shi_user: where its state is, 0: nowhere */
    shi_a32 csd_lock_timeout;  /* ms until a wait for a csd is complained of; 0: never */
    shi_a32 panic_on_ipistall; /* ms until it is given up; 0: never */
    /* Written by who complains. */
    _Alignas(SHI_LINE) shi_a32 csd_bugs; /* counts those complained of */

    _Alignas(SHI_PAIR) shi_a64 arrays[SHI_MAX_ARRAYS]; /* offset of a descriptor each */
};

#endif
