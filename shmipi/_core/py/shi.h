/* SPDX-License-Identifier: MIT */
/* What the files of the Python binding share.  Only module.c and py_*.c include it. */
#ifndef SHI_PY_H
#define SHI_PY_H

#define PY_SSIZE_T_CLEAN
#include "base/sys.h"

#include <Python.h>

#include "smp/call.h"
#include "smp/csd.h"
#include "smp/func.h"
#include "irq/irq.h"
#include "base/machine.h"
#include "smp/wait.h"

#define SHI_GIL_SPIN_NS 20000u /* the interpreter is never held for longer by a spin */
#define SHI_REPLY_ROOM 4096u   /* block for the result of a call */

struct func_entry;

/* A result for which there was no room.  Its csd stays locked, so its sender waits. */
struct unsent {
    uint32_t csd; /* index through all slots */
    uint8_t status;
    PyObject *bytes;
};

/* Functions this process has sent: object -> number, by identity. */
struct func_table {
    struct func_entry **slots;
    uint32_t size, used;
    uint32_t hand; /* of the sweep */
};

/* Functions this process has received, per sender. */
struct func_cache {
    uint16_t gen;
    uint32_t size, live, misses;
    struct func_cached {
        uint32_t serial;
        PyObject *function;
    } *entries;
};

typedef struct {
    PyObject_HEAD struct shi_machine m;
    struct shi_self self;
    int attached; /* mapped, self initialised */
    int closed;
    int ending;        /* the host: its orderly end has begun */
    int foreign;       /* a fork's child: this machine is its parent's */
    uint32_t waiters;  /* host: threads that have given the interpreter up inside a wait */
    uint32_t *natives; /* guest: the machine's number of each of ours + 1; NULL: the same */
    struct func_table sent;
    bool sending;       /* functions have been sent */
    uint32_t *irq_held; /* by virq: the function that its handler is, + 1 (py/irq.c) */
    struct func_cache *received;
    struct unsent *unsent; /* results that wait for room: self.unsent of them, oldest first */
    uint32_t unsent_room;
    PyObject *early;         /* results read before they were asked for: local index -> bytes */
    PyObject *on_cancel;     /* CPU: of the task, see on_task_cancel */
    PyThreadState *released; /* CPU: the interpreter was given up by the core's hook */
    uint64_t *late;          /* what other threads of a CPU's process freed: shi_late */
    uint32_t nlate, late_room;
    uint64_t array_top; /* where the arrays end that this process has made */
    uint64_t put_off;   /* signals of the task's that came during a handler: 1 << number - 1 */
    bool raised;        /* they have been raised again, and the interpreter has to look */
    struct shi_watch *watch; /* firmware: what its watchdog saw */
    uint64_t looked_ns;      /* and when */
    uint32_t room_looks;     /* in vain, one after another, for room for wait=0 calls */
} Machine;

/* From Python, looked up once (module.c). */
struct shi_python {
    PyObject *dumps, *loads;  /* pickle by value where it must */
    PyObject *publish;        /* function -> (bytes, and lists for py/guard.c) */
    PyObject *forget;         /* no machine is open any more */
    PyObject *dump_exception; /* exception -> bytes */
    PyObject *load_exception; /* (bytes, cpu) -> exception */
    PyObject *mask_cpus;      /* (mask, ncpus) -> list of int */
    PyObject *task_name;      /* function -> str for messages */
    PyObject *ending;         /* SHI_END_EXITED | status, or a signal -> words */
    PyObject *run_coroutine;  /* coroutine -> its result */
    PyObject *OfflineError, *UnknownError, *DiedError, *MachineDiedError, *BusyError,
        *DeadlockError;
    PyObject *TimeoutError, *ArenaError, *LayoutError, *StateError, *NoMachineError;
    PyObject *RemoteError, *Warning, *OSError, *CancelledError, *TaskInterrupt, *GroupError;
    PyObject *TableError;
};
extern struct shi_python shi_py;

extern PyTypeObject *shi_machine_type, *shi_native_type, *shi_csd_type;
/* The machine module-level functions act on; borrowed. */
extern Machine *shi_current;
/* Why there is none, for people. */
extern const char *shi_absence;
#define SHI_NO_CLUSTER                                                                         \
    "no Cluster is open in this process (with several, each has its cluster.smp)"
#define SHI_CHILD "this process is a fork's child of a machine's, and part of none"

typedef struct {
    PyObject_HEAD uint32_t index;
    PyObject *name;
} NativeHandler;

/* The Python half, imported when it is first needed.  0, or -1. */
int shi_bound(void);

/* ---- errors: every errno of the core becomes a typed exception here -------------- */
PyObject *shi_raise(PyObject *kind, int err, int cpu, const char *format, ...);
/* A plain OSError. */
PyObject *shi_os_error(int err, const char *what);
/* For a call to `cpu` that failed with -errno. */
PyObject *shi_raise_errno(Machine *machine, int err, int cpu);
/* For a csd that was unlocked by the reaper; its lock word says how the CPU ended. */
PyObject *shi_raise_died(Machine *machine, int cpu, uint64_t lock);
/* 0 when this thread may use the machine, else -1 with an exception. */
int shi_use(Machine *machine);
Machine *shi_use_current(void);
/* Give a ShmipiWarning; -1 when it was turned into an error. */
int shi_warn_once(bool *given, const char *text);

/* The number that the machine has for a native handler, or -1 with an exception. */
int64_t shi_native_number(const Machine *machine, PyObject *handler);

/* A function's number or a csd freed on another thread of a CPU: given back later. */
bool shi_other_thread(const Machine *machine);
void shi_late(Machine *machine, uint32_t index, bool csd);
void shi_late_done(Machine *machine);

/* ---- functions (py/func.c) ------------------------------------------------------- */
/* Number of `function` for this sender: >= 0, -1 not by number (pickle it with the
 * arguments), -2 with an exception set.  Hold it (shi_func_hold) before Python code runs. */
int64_t shi_function_number(Machine *machine, PyObject *function);
/* A new reference to src's function, or NULL (with or without an exception). */
PyObject *shi_function_received(Machine *machine, uint32_t src, uint16_t src_gen,
                                uint32_t index, uint32_t serial);
void shi_functions_clear(Machine *machine);

/* ---- what a published function was made of (py/guard.c) -------------------------- */
struct shi_guards;
/* From the lists of byvalue.publish(); NULL with an exception set.  Runs Python code. */
struct shi_guards *shi_guards_new(PyObject *functions, PyObject *types, PyObject *tables,
                                  PyObject *published);
/* Is everything as it was? */
bool shi_guards_hold(struct shi_guards *guards, PyObject *published);
void shi_guards_free(struct shi_guards *guards);
/* functions_rebound(): a table says something else of a name than before. */
PyObject *shi_functions_rebound(PyObject *module, PyObject *unused);

/* ---- values (py/codec.c) --------------------------------------------------------- */
/* What a call is made of before it has a csd. */
struct outgoing {
    uint32_t func, serial;
    int64_t number; /* of the function, or -1 */
    uint8_t kind, length, apply;
    union shi_value value;
    PyObject *pickle; /* owned; NULL when the argument is inline */
    uint32_t room;
    Machine *holder; /* holds function `number` until cleared */
};
/* func(info). */
int shi_outgoing_info(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *info);
/* func(*args, **kwargs), result wanted. */
int shi_outgoing_call(Machine *machine, struct outgoing *out, PyObject *function,
                      PyObject *args, PyObject *kwargs);
/* The same where nothing needs pickling or clearing: 1, else 0 (or -1, exception set). */
int shi_outgoing_inline(Machine *machine, struct outgoing *out, PyObject *function,
                        PyObject *info);
void shi_outgoing_clear(struct outgoing *out);
/* Fill csd `local`; inside shi_enter/shi_leave.  0 or -errno. */
int shi_outgoing_fill(Machine *machine, const struct outgoing *out, uint32_t local);
/* Let `local` carry the same payload as `owner`. */
void shi_outgoing_share(Machine *machine, const struct outgoing *out, uint32_t local,
                        uint32_t owner);

/* The result of an unlocked csd (not given back): new reference, or NULL. */
PyObject *shi_result(Machine *machine, uint32_t local, uint32_t dst, uint8_t apply);

/* A host waits for `dst`, which has no room for what it has to send: read all that it lends
 * this host into private memory, whoever asks for it later. */
void shi_read_early(Machine *machine, uint32_t dst);
/* Nobody will ask for the result of `local`. */
void shi_drop_early(Machine *machine, uint32_t local);

/* Target side. */
struct incoming {
    PyObject *function; /* owned */
    PyObject *args;     /* owned: tuple */
    PyObject *kwargs;   /* owned or NULL */
    uint8_t apply;
    bool bare; /* `args` is the one argument itself */
};
/* 0, or -1 after the csd was completed with an error. */
int shi_incoming(Machine *machine, struct incoming *in, struct shi_csd *csd, bool async);
void shi_incoming_clear(struct incoming *in);
PyObject *shi_incoming_apply(const struct incoming *in);
/* Store the outcome of a SYNC csd (`value` NULL: the exception that is set).  True: unlock
 * it; false: it waits for room, and shi_send_unsent will. */
bool shi_outcome(Machine *machine, struct shi_csd *csd, PyObject *value, bool wanted);
/* Send what waits for room, as far as there is some now. */
void shi_send_unsent(Machine *machine);

/* ---- calling (py/call.c) --------------------------------------------------------- */
/* Wait for csd `local`; serves the own queue.  0, or -1 with an exception (the csd is
 * left behind, safely). */
int shi_wait_csd(Machine *machine, uint32_t local, uint32_t dst, uint64_t deadline_ns);
/* A CPU in a wait polls, and has run the handlers that a kick put off. */
void shi_wait_settle(Machine *machine);
/* The interpreter, given up for a wait by this thread (host: not NULL) or for the core's
 * hooks to take back when Python work arrives; and taken back. */
PyThreadState *shi_give_up(Machine *machine);
void shi_take_back(Machine *machine, PyThreadState *mine);
void shi_give_back(Machine *machine, uint32_t local);
/* The kernel's WARN_ON_ONCEs at the head of the cross calls. */
int shi_check_context(const Machine *machine);
void shi_leave_behind(Machine *machine, uint32_t local);
/* A csd that holds `out`.  `nowait`: from the pool.  Local index, or -1. */
int64_t shi_get_filled(Machine *machine, const struct outgoing *out, bool nowait);
/* Every csd for wait=0 calls is in flight: wait for the oldest.  0, or -1. */
int shi_wait_for_room(Machine *machine);
/* func(info) here, with interrupts off: no csd, no doorbell. */
int shi_run_local(Machine *machine, PyObject *function, PyObject *info, bool wait);
int shi_as_cpu(PyObject *object, int64_t *cpu);
int shi_as_bool(PyObject *object, int otherwise);
/* None or seconds >= 0: 0 for none, or when that is by shi_now_ns().  0, or -1. */
int shi_as_deadline(PyObject *timeout, uint64_t *deadline);
/* CPU numbers of a mask argument (NULL: all), ascending; PyMem_Free them. */
int shi_as_mask(Machine *machine, PyObject *mask, uint32_t **cpus, uint32_t *n);

typedef PyObject *shi_smp_function(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                   PyObject *kwnames);
shi_smp_function shi_call_mask, shi_call_others, shi_each_cpu, shi_each_cpu_mask;
shi_smp_function shi_each_cpu_cond_mask, shi_single_async;
extern PyMethodDef shi_call_methods[];   /* of Machine */
extern PyMethodDef shi_call_functions[]; /* of the module: on the current machine */

/* ---- tasks that wait (py/wait.c) ------------------------------------------------- */
extern PyMethodDef shi_wait_methods[]; /* of Machine */
extern PyMethodDef shi_wait_functions[];

/* ---- interrupts (py/irq.c) ------------------------------------------------------- */
/* The Python handler of a requested irq's line: run, then end the line.  Soft-masked. */
void shi_run_line(Machine *machine, uint32_t line);
/* The Python handler of the NMI that is in service, and of those after it. */
void shi_run_nmi(Machine *machine);

/* ---- interrupt controllers (py/chip.c) ------------------------------------------- */
/* Fill `chip` from the description that shmipi/irq/chips/base.py makes: 0, or -1. */
int shi_chip_from_python(PyObject *description, struct shi_chip *chip);
/* 0, or -1: ValueError. */
int shi_check_line(const Machine *machine, unsigned line);

/* ---- being a CPU (py/cpu.c) ------------------------------------------------------ */
/* Interrupts came on, or something was let through: take what is there now. */
void shi_after_enable(Machine *machine);
void shi_cpu_hooks(Machine *machine);
/* After a function of the user's: `result`, or an exception.  Ends a fork's child. */
void shi_leave_if_forked(Machine *machine, PyObject *result);
/* For who looks from outside: a Python handler begins, or `outer` goes on. */
struct handler_said {
    uint32_t kind;
    uint64_t since;
    char name[SHI_HANDLER_NAME];
};
void shi_say_handler(struct shi_self *self, PyObject *function, enum shi_handler kind);
void shi_handler_outer(const struct shi_self *self, struct handler_said *outer);
void shi_say_outer(struct shi_self *self, const struct handler_said *outer);
/* Where an exception may enter the task: -1, TaskInterrupt set, when it was cancelled. */
int shi_task_interrupt(Machine *machine);
/* Run Python csds that the kick handler put off.  Holds the interpreter. */
void shi_run_deferred(Machine *machine);
/* The same between two steps of a task: and senders kick again from then on. */
void shi_take_deferred(Machine *machine);
/* What interrupts a wait: Python csds, and the request to go offline. */
void shi_wait_python(Machine *machine);
/* What cpu_context() returns. */
enum { SHI_NO_CPU, SHI_CPU_TASK, SHI_CPU_HANDLER };
/* Bodies of the Python-level handlers of kick and NMI: 0, or -1 for an exception that is
 * the interrupted task's own. */
int shi_irq_entry_python(Machine *machine);
int shi_nmi_entry_python(Machine *machine);
extern PyMethodDef shi_cpu_methods[];
extern PyMethodDef shi_cpu_functions[];

/* ---- handlers and the task beneath them (py/shield.c) ---------------------------- */
/* Frames for a handler on top of a task; what begin returned goes to end. */
int shi_headroom_begin(const Machine *machine);
void shi_headroom_end(int limit);
/* Signals of the task's that came meanwhile are raised again, and then looked at: 0, or -1
 * with what its handler raised. */
void shi_signals_raise(Machine *machine);
int shi_signals_check(Machine *machine);
static inline void shi_signals_let_go(Machine *machine)
{
    if (__builtin_expect(machine->put_off != 0, 0) && !machine->self.in_irq &&
        !machine->self.in_nmi)
        shi_signals_raise(machine);
}
extern PyMethodDef shi_shield_functions[];
int shi_shield_types(PyObject *module);

extern PyMethodDef shi_native_functions[];
extern PyMethodDef shi_segment_functions[];
extern PyMethodDef shi_machine_methods[];
extern PyMethodDef shi_machine_functions[];
extern PyMethodDef shi_barrier_functions[];
extern PyMethodDef shi_bench_methods[];
extern PyMethodDef shi_bench_functions[];
extern PyMethodDef shi_chip_methods[];
extern PyMethodDef shi_irq_methods[];
extern PyMethodDef shi_irq_functions[];

int shi_atomic_add(PyObject *module);
int shi_native_types(PyObject *module);
int shi_function_types(void);
int shi_machine_types(PyObject *module);
int shi_csd_types(PyObject *module);
int shi_bench_types(PyObject *module);

/* The exception that is set, taken: new reference. */
PyObject *shi_take_exception(void);

/* Arguments by position or keyword: fills `out[0..n)`, NULL where absent. */
int shi_parse(const char *function, const char *const *names, int required, int total,
              PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, PyObject **out);

#endif
