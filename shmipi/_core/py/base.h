/* SPDX-License-Identifier: MIT */
/* What every file of the binding needs: a process's view of a machine, errors, arguments. */
#ifndef SHI_PY_BASE_H
#define SHI_PY_BASE_H

#define PY_SSIZE_T_CLEAN
#include "base/sys.h"

#include <Python.h>

#include "base/machine.h"
#include "smp/csd.h"
#include "smp/entry.h"
#include "smp/payload.h"
#include "smp/sender.h"
#include "smp/smp.h"
#include "smp/wait.h"

struct func_entry;
struct nmi_sending;
struct begun;

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
    PyObject_HEAD
    struct shi_machine m;
    struct shi_self self;
    int attached; /* mapped, self initialised */
    int closed;
    int ending;   /* the host: its orderly end has begun */
    int foreign;  /* a fork's child: this machine is its parent's */
    bool newborn; /* CPU: has run no Python; the interpreter does not know of the fork yet */
    uint32_t waiters;  /* host: threads that have given the interpreter up inside a wait */
    uint32_t *natives; /* guest: the machine's number of each of ours + 1; NULL: the same */
    struct func_table sent;
    bool sends_ipis;    /* its controller leaves sending IPIs of domains to the core */
    bool sending;       /* functions have been sent */
    uint32_t *irq_held; /* by irq and NMI handler: the function it is, + 1 (py/irq.c) */
    struct nmi_sending *nmi_sending; /* of the thread that sends an NMI IPI: the innermost */
    struct func_cache *received;
    struct begun *begun;   /* CPU: iterators of tasks of the scheduler, by their index */
    struct unsent *unsent; /* results that wait for room: self.unsent of them, oldest first */
    uint32_t unsent_room;
    PyObject *early;         /* results read before they were asked for: local index -> bytes */
    PyObject *on_cancel;     /* CPU: of the task, see on_task_cancel */
    PyThreadState *released; /* CPU: the interpreter was given up by the core's hook */
    uint64_t *late;          /* what other threads of a CPU's process freed: shi_late */
    uint32_t nlate, late_room;
    uint64_t checked_ns; /* CPU: since when steps may have changed its signals, 0: none */
    uint32_t pickling;   /* depth: tasks of the scheduler do not come on top (shi_unmixed) */
    uint64_t array_top;  /* where the arrays end that this process has made */
    uint64_t put_off;    /* signals of the task's that came during a handler: 1 << number - 1 */
    bool raised;         /* they have been raised again, and the interpreter has to look */
    struct shi_watch *watch; /* firmware: what its watchdog saw */
    uint64_t looked_ns;      /* and when */
} Machine;

/* From Python, looked up once (bind(), py/base.c). */
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
    PyObject *Warning, *BootError, *CancelledError, *TaskInterrupt, *GroupError;
    PyObject *TableError, *MmError, *FaultError, *NoTaskError, *AffinityError;
};
extern struct shi_python shi_py;

extern PyTypeObject *shi_machine_type; /* made in py/module.c */
/* The machine module-level functions act on; borrowed. */
extern Machine *shi_current;
/* Why there is none, for people. */
extern const char *shi_absence;
#define SHI_NO_CLUSTER                                                                         \
    "no Cluster is open in this process (with several, each has its cluster.smp)"
#define SHI_CHILD "this process is a fork's child of a machine's, and part of none"

/* The Python half, imported when it is first needed.  0, or -1. */
int shi_bound(void);
/* PyImport_ImportModule() in whatever frame an interrupt, or a task, finds itself. */
PyObject *shi_import(const char *name);

/* ---- errors: every errno of the core becomes a typed exception here -------------- */
PyObject *shi_raise(PyObject *kind, int err, int cpu, const char *format, ...);
/*
 * shi_py.dumps, loads or publish of one object.  Pickling takes locks and is in the middle of
 * tables: a task that came on top of it, and pickled, would wait for what is below it.
 */
PyObject *shi_unmixed(Machine *machine, PyObject *function, PyObject *object);
/* A plain OSError. */
PyObject *shi_os_error(int err, const char *what);
/* For a call to `cpu` that failed with -errno. */
PyObject *shi_raise_errno(Machine *machine, int err, int cpu);
/* For a csd that was unlocked by the reaper; its lock word says how the CPU ended. */
PyObject *shi_raise_died(Machine *machine, int cpu, uint64_t lock);
/* Give a ShmipiWarning; -1 when it was turned into an error. */
int shi_warn_once(bool *given, const char *text);
/* The exception that is set, taken: new reference. */
PyObject *shi_take_exception(void);
/* Raise `error`, a reference that is taken over; NULL: nothing. */
void shi_put_exception(PyObject *error);

/* ---- using a machine ------------------------------------------------------------- */
/* Not this process's any more: closed, or a fork's child of its process, which Python may not
 * have heard of.  What stands in shared memory and in the sender is another's then. */
static inline bool shi_gone(const Machine *machine)
{
    return machine->closed || machine->foreign || machine->self.left;
}

/* 0 when this thread may use the machine, else -1 with an exception. */
int shi_use(Machine *machine);
Machine *shi_use_current(void);
/* The current machine where this process is a CPU of it; NULL: ClusterStateError says `why`
 * the host is not asked. */
Machine *shi_use_cpu(const char *why);
/* 0 on a CPU, else -1 with that exception. */
int shi_refuse_host(const Machine *machine, const char *why);
#define SHI_ONLY_CPU "this only means something on a CPU of the machine"
/* A function's number or a csd freed on another thread of a CPU: given back later. */
bool shi_other_thread(const Machine *machine);
void shi_late(Machine *machine, uint32_t index, bool csd);

/* ---- arguments ------------------------------------------------------------------- */
/* Arguments by position or keyword: fills `out[0..n)`, NULL where absent. */
int shi_parse(const char *function, const char *const *names, int required, int total,
              PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, PyObject **out);
int shi_as_cpu(PyObject *object, int64_t *cpu);
/* A number below `limit`: 0, or -1 with ValueError. */
int shi_as_slot(PyObject *object, uint32_t limit, uint32_t *slot);
int shi_as_bool(PyObject *object, int otherwise);
/* None or seconds >= 0: 0 for none, or when that is by shi_now_ns().  0, or -1. */
int shi_as_deadline(PyObject *timeout, uint64_t *deadline);
/* CPU numbers of a mask argument (NULL: all), ascending; PyMem_Free them. */
int shi_as_mask(Machine *machine, PyObject *mask, uint32_t **cpus, uint32_t *n);

/* ---- methods of Machine ---------------------------------------------------------- */
#define MACHINE(object) ((Machine *)(object))
#define METHOD(name) static PyObject *machine_##name(PyObject *object, PyObject *arg)
#define NOARGS(name, text) { #name, machine_##name, METH_NOARGS, #name "()\n--\n\n" text }
#define ONE(name, text) { #name, machine_##name, METH_O, text }
#define MANY(name, text) { #name, machine_##name, METH_VARARGS, text }
#define FAST(function) ((PyCFunction)(void (*)(void))(function))

/* One of the smp_call_function family, on the machine it is given. */
typedef PyObject *shi_smp_function(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                   PyObject *kwnames);

extern PyMethodDef shi_base_functions[]; /* of the module */

#endif
