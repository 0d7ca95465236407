/* SPDX-License-Identifier: MIT */
/*
 * Rules that a test can switch off, to see that the check of their user notices.
 *
 * Each stands for something that a kernel function does, or for its place among others.
 * They cost one predictable branch on a word that nobody writes to, as labelled steps do,
 * so the code that is checked is the code that is shipped.
 */
#ifndef SHI_RULES_H
#define SHI_RULES_H

#include "base/segment.h"

#define SHI_RULES_STOP(X)                                                                      \
    X(stop, irqs_off, "multi_cpu_stop", "CPUs that have stopped disable interrupts")           \
    X(stop, last_ack, "ack_state",                                                             \
      "the last CPU to acknowledge a state moves to the next, not the first")                  \
    X(stop, atomic, "multi_cpu_stop", "a CPU stays in the stopper until the state is EXIT")

#define SHI_RULES_NMI(X)                                                                       \
    X(nmi, unmaskable, "nmi_raise_cpu_backtrace",                                              \
      "a CPU with interrupts off is asked by what it cannot mask")                             \
    X(nmi, clear_cpu, "nmi_cpu_backtrace", "a CPU that has answered leaves backtrace_mask")    \
    X(nmi, one_at_a_time, "nmi_trigger_cpumask_backtrace",                                     \
      "a second caller returns while backtrace_flag is set")                                   \
    X(nmi, stop, "native_stop_other_cpus",                                                     \
      "a CPU with interrupts off is stopped by what it cannot mask")                           \
    X(crash, nmi, "nmi_shootdown_cpus", "CPUs with interrupts off take the crash's NMI")       \
    X(crash, save, "crash_nmi_callback", "a CPU saves its registers before it says it has")

#define SHI_RULES_MM(X)                                                                        \
    X(tlb, shootdown, "native_flush_tlb_multi",                                                \
      "no CPU is asked to drop what was unmapped from its TLB")                                \
    X(tlb, lazy, "switch_mm_irqs_off",                                                         \
      "a CPU back from lazy TLB mode does not look whether it has missed a flush")             \
    X(tlb, generation, "flush_tlb_func",                                                       \
      "a partial flush also where one before it was missed (new == local + 1 == mm)")          \
    X(tlb, batched, "flush_tlb_batched_pending",                                               \
      "munmap does not wait for the flush that reclaim has put off")                           \
    X(icache, ipi, "text_poke_sync", "no CPU drops what it has fetched of the old function")   \
    X(icache, wait, "synchronize_rcu_tasks", "calls that began before are not waited for")     \
    X(membarrier, ipi, "membarrier_private_expedited",                                         \
      "the last of the CPUs that run the address space is not interrupted")                    \
    X(membarrier, rseq, "ipi_rseq", "a sequence that is interrupted goes on where it was")     \
    X(membarrier, registered, "membarrier_private_expedited",                                  \
      "an address space that is not registered is not refused")

#define SHI_RULES_RCU(X)                                                                       \
    X(rcu, handler, "rcu_exp_handler", "a CPU in a read-side section reports at once")         \
    X(rcu, idle, "rcu_watching_snap_in_eqs", "every CPU is taken for one that sleeps")

#define SHI_RULES_NOHZ(X)                                                                      \
    X(nohz, housekeeping, "housekeeping_any_cpu", "timers of any CPU stay on isolated ones")   \
    X(nohz, cause, "tick_nohz_dep_set_cpu", "isolated CPUs are kicked that have no cause")     \
    X(nohz, account, "__irq_work_run_list",                                                    \
      "a function call interrupt that an irq_work has sent is nobody's")

#define SHI_RULES_TICK(X)                                                                      \
    X(tick, early, "hrtimer_interrupt", "timers are run before they expire")                   \
    X(tick, program, "___tick_broadcast_oneshot_control",                                      \
      "a CPU sleeps, and the broadcast device is not set for its timer")                       \
    X(tick, reprogram, "tick_handle_oneshot_broadcast",                                        \
      "the broadcast device is not set again for CPUs that sleep on")

#define SHI_RULES_SOFTIRQ(X)                                                                   \
    X(softirq, nested, "irq_exit", "no softirq runs on top of another")                        \
    X(softirq, bh_enable, "__local_bh_enable_ip",                                              \
      "the last local_bh_enable() runs what was raised meanwhile")                             \
    X(softirq, pending, "irq_work_single",                                                     \
      "an irq_work is no longer pending when its function begins")

#define SHI_RULES_NET(X)                                                                       \
    X(cpumap, recheck, "cpu_map_kthread_run",                                                  \
      "the thread looks at its ring again after it has set INTERRUPTIBLE")                     \
    X(cpumap, drain, "cpu_map_kthread_run",                                                    \
      "a thread that is told to stop empties its ring first")                                  \
    X(cpumap, producer_lock, "bq_flush_to_queue", "producers of a ring take its lock")         \
    X(rps, rfs_order, "get_rps_cpu",                                                           \
      "a flow moves when its packets have left the old CPU's backlog, not before")             \
    X(rps, napi_lock, "process_backlog",                                                       \
      "NAPI_STATE_SCHED is cleared under the lock that packets are queued with")               \
    X(rps, send_ipi, "net_rps_send_ipi", "each CPU on the list is sent its IPI")               \
    X(blk, same_cpu, "blk_mq_complete_need_ipi",                                               \
      "a request completes on the CPU that has submitted it")                                  \
    X(blk, send_ipi, "blk_mq_complete_send_ipi",                                               \
      "who finds the list of what is done empty sends the IPI")

/* X(user, rule, the kernel function, what is left out): at least two of each user. */
#define SHI_RULES(X)                                                                           \
    SHI_RULES_NET(X)                                                                           \
    SHI_RULES_STOP(X)                                                                          \
    SHI_RULES_NMI(X)                                                                           \
    X(sched, state_first, "set_current_state",                                                 \
      "the state is set before the condition is looked at")                                    \
    X(sched, on_cpu, "try_to_wake_up",                                                         \
      "a task that is about to sleep is not queued elsewhere while it still runs")             \
    X(sched, cpus_ptr, "select_task_rq", "a task is queued only where it may run")             \
    X(sched, resched, "ttwu_do_activate",                                                      \
      "the CPU that a task was queued on is told to reschedule")                               \
    SHI_RULES_TICK(X)                                                                          \
    SHI_RULES_MM(X)                                                                            \
    SHI_RULES_SOFTIRQ(X)                                                                       \
    SHI_RULES_RCU(X)                                                                           \
    SHI_RULES_NOHZ(X)

enum shi_rule {
#define X(user, rule, function, what) SHI_RULE_##user##_##rule,
    SHI_RULES(X)
#undef X
        SHI_RULE_COUNT
};
_Static_assert(SHI_RULE_COUNT <= 64, "rules have a bit each");

struct shi_rule_text {
    const char *user, *rule, *function, *what;
};

/* By enum shi_rule; ends with one whose user is NULL. */
extern const struct shi_rule_text shi_rule_texts[SHI_RULE_COUNT + 1];

/* Is this rule switched off? */
static inline bool shi_rule_off(const struct shi_machine *m, enum shi_rule rule)
{
    return __builtin_expect((shi_load_relaxed(&m->header->broken) >> rule & 1) != 0, 0);
}

#endif
