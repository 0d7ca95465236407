/* SPDX-License-Identifier: MIT */
/* The kernel's names: each a method of Machine, and a function that acts on the current one. */
#include "py/base.h"

#include "py/call.h"
#include "py/csd.h"
#include "py/many.h"
#include "py/tables.h"
#include "py/wake.h"

#define SMP(name, impl)                                                                        \
    static PyObject *method_##name(PyObject *m, PyObject *const *args, Py_ssize_t nargs,       \
                                   PyObject *kwnames)                                          \
    {                                                                                          \
        return shi_use((Machine *)m) < 0 ? NULL : impl((Machine *)m, args, nargs, kwnames);    \
    }                                                                                          \
    static PyObject *function_##name(PyObject *module, PyObject *const *args,                  \
                                     Py_ssize_t nargs, PyObject *kwnames)                      \
    {                                                                                          \
        Machine *m = shi_use_current();                                                        \
        (void)module;                                                                          \
        return m ? impl(m, args, nargs, kwnames) : NULL;                                       \
    }
SMP(smp_call_function_single, shi_single)
SMP(smp_call_function_single_async, shi_single_async)
SMP(smp_call_function_many, shi_call_mask)
SMP(smp_call_function, shi_call_others)
SMP(on_each_cpu, shi_each_cpu)
SMP(on_each_cpu_mask, shi_each_cpu_mask)
SMP(on_each_cpu_cond_mask, shi_each_cpu_cond_mask)
SMP(smp_send_reschedule, shi_send_reschedule)
SMP(resched_cpu, shi_resched_cpu)
SMP(wake_up_if_idle, shi_wake_if_idle)
SMP(wake_up_all_idle_cpus, shi_wake_all_idle)
SMP(cpus_peek_for_pending_ipi, shi_peek_for_pending)
SMP(flag_ipi, shi_flag_ipis)
SMP(signal_pending_ipi, shi_signal_pending)
#undef SMP

#define DOC_SINGLE                                                                             \
    "smp_call_function_single(cpu, func, info=None, wait=True)\n--\n\n"                        \
    "Run func(info) on `cpu` as an IPI handler.\n\n"                                           \
    "On the calling CPU itself func runs inline with interrupts off, without a doorbell.\n"    \
    "wait=True returns when func has returned; its exception is raised here as\n"              \
    "RemoteCallError.  wait=False draws from a pool of 64 requests per sender and waits\n"     \
    "only when that is empty (the kernel has one request and waits for that).\n\n"             \
    "Raises CpuOfflineError (ENXIO) for a CPU that is offline or does not exist,\n"            \
    "CpuDiedError when it dies meanwhile, IpiDeadlockError (EDEADLK).  kernel/smp.c."
#define DOC_ASYNC                                                                              \
    "smp_call_function_single_async(cpu, csd)\n--\n\n"                                         \
    "Submit a caller-owned CallSingleData.  Never allocates, never waits; legal with\n"        \
    "interrupts disabled and in handlers.  Raises CsdBusyError (EBUSY) while it is in use,\n"  \
    "CpuOfflineError (ENXIO)."
#define DOC_MANY                                                                               \
    "smp_call_function_many(mask, func, info=None, wait=True)\n--\n\n"                         \
    "Run func(info) on every online CPU of `mask` but the calling one.  Offline CPUs are\n"    \
    "skipped.  `mask`: CpuMask, cpulist string or iterable of CPU numbers.  What several\n"    \
    "CPUs fail with is raised as a CpusFailedError, when all have run.  A task calls it\n"     \
    "between preempt_disable() and preempt_enable(), else ShmipiWarning, once.  With "         \
    "several\n"                                                                                \
    "targets nobody asks whether they poll: each is sent the interrupt."
#define DOC_ALL                                                                                \
    "smp_call_function(func, info=None, wait=True)\n--\n\n"                                    \
    "Run func(info) on all other online CPUs."
#define DOC_EACH                                                                               \
    "on_each_cpu(func, info=None, wait=True)\n--\n\n"                                          \
    "Run func(info) on all online CPUs, the calling one included: there it runs after the\n"   \
    "doorbells were rung and before the wait, with interrupts off.  What one CPU fails with\n" \
    "is raised when all have run, of several a CpusFailedError (an ExceptionGroup)."
#define DOC_EACH_MASK                                                                          \
    "on_each_cpu_mask(mask, func, info=None, wait=True)\n--\n\n"                               \
    "on_each_cpu for the CPUs of `mask`."
#define DOC_COND                                                                               \
    "on_each_cpu_cond_mask(cond_func, func, info=None, wait=True, mask=None)\n--\n\n"          \
    "on_each_cpu_mask for the CPUs for which cond_func(cpu, info) is true: asked once per\n"   \
    "CPU at send time, for the calling CPU after the IPIs went out.  mask=None: all."
#define DOC_RESCHED                                                                            \
    "smp_send_reschedule(cpu)\n--\n\n"                                                         \
    "Send `cpu` a reschedule IPI: always, also where it polls, and to this CPU.  An offline\n" \
    "CPU is warned about (ShmipiWarning) and not sent to.  linux/smp.h."
#define DOC_RESCHED_CPU                                                                        \
    "resched_cpu(cpu)\n--\n\n"                                                                 \
    "Have `cpu` reschedule: need_resched() is true there, and it is sent a reschedule IPI\n"   \
    "unless it was true already, or the CPU polls (then its idle loop looks at it), or is\n"   \
    "this one.  Nothing is done to an offline CPU.  kernel/sched/core.c, __resched_curr."

#define DOC_WAKE                                                                               \
    "wake_up_if_idle(cpu)\n--\n\n"                                                             \
    "resched_cpu(cpu) if nothing runs there but its idle loop.  kernel/sched/core.c."
#define DOC_WAKE_ALL                                                                           \
    "wake_up_all_idle_cpus()\n--\n\n"                                                          \
    "wake_up_if_idle() for every other CPU that is online: those that run something are\n"     \
    "left alone.  kernel/smp.c."
#define DOC_PEEK                                                                               \
    "cpus_peek_for_pending_ipi(mask)\n--\n\n"                                                  \
    "Is anything in the call_single_queue of a CPU of `mask` at this moment?  kernel/smp.c."

#define DOC_FLAG                                                                               \
    "flag_ipi(mask)\n--\n\n"                                                                   \
    "Have the CPUs of `mask` sent a reschedule IPI at the next schedule point: when a CPU\n"   \
    "goes to its next task or idles, at cond_resched(), at the last preempt_enable(), or\n"    \
    "when somebody calls signal_pending_ipi().  Flagged many times they are sent one.  From\n" \
    "everywhere.  Zephyr, kernel/ipi.c."
#define DOC_SIGNAL                                                                             \
    "signal_pending_ipi()\n--\n\n"                                                             \
    "Send what flag_ipi() has put off: how many IPIs that was.  None goes to this CPU, nor\n"  \
    "to those that are offline.  Zephyr, kernel/ipi.c."

#define ENTRY(kind, name, doc)                                                                 \
    { #name, FAST(kind##_##name), METH_FASTCALL | METH_KEYWORDS, doc }
#define ENTRIES(kind)                                                                          \
    ENTRY(kind, smp_call_function_single, DOC_SINGLE),                                         \
        ENTRY(kind, smp_call_function_single_async, DOC_ASYNC),                                \
        ENTRY(kind, smp_call_function_many, DOC_MANY),                                         \
        ENTRY(kind, smp_call_function, DOC_ALL), ENTRY(kind, on_each_cpu, DOC_EACH),           \
        ENTRY(kind, on_each_cpu_mask, DOC_EACH_MASK),                                          \
        ENTRY(kind, on_each_cpu_cond_mask, DOC_COND),                                          \
        ENTRY(kind, smp_send_reschedule, DOC_RESCHED),                                         \
        ENTRY(kind, resched_cpu, DOC_RESCHED_CPU), ENTRY(kind, wake_up_if_idle, DOC_WAKE),     \
        ENTRY(kind, wake_up_all_idle_cpus, DOC_WAKE_ALL),                                      \
        ENTRY(kind, cpus_peek_for_pending_ipi, DOC_PEEK), ENTRY(kind, flag_ipi, DOC_FLAG),     \
        ENTRY(kind, signal_pending_ipi, DOC_SIGNAL)

PyMethodDef shi_smp_methods[] = {
    ENTRIES(method),
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_smp_functions[] = {
    ENTRIES(function),
    { NULL, NULL, 0, NULL },
};
