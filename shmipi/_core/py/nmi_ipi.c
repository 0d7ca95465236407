/* SPDX-License-Identifier: MIT */
/*
 * NMI IPIs: __smp_send_nmi_ipi of arch/powerpc/kernel/smp.c, also for handlers.
 *
 * One at a time for the machine: its sender holds a lock of its own (irq/nmi.h), with
 * interrupts off, until every target has entered the function, or was taken back.  Nobody who
 * waits here waits for himself, whatever interrupted what:
 *
 *   - Who holds the lock waits only until others *enter*.  A CPU that takes no NMI because it
 *     is in an NMI's handler, or has interrupts off where NMIs can be masked, and waits here
 *     for the lock, enters what it is asked for from its wait: as a powerpc takes a system
 *     reset within another, and as default_do_nmi runs a crash's callback where it waits.
 *   - An NMI's handler (or, on a host, one of Python's signal handlers) may have interrupted
 *     who holds the lock, on the same CPU and thread.  It does not wait for the lock: it has
 *     it.  It takes what is asked beneath back from those who have not entered it, sends its
 *     own, and when it has returned what is beneath asks again, by a new number.
 *   - A holder that dies loses the lock; what it has asked for is void by then (irq/nmi.h).
 */
#include "py/base.h"

#include <errno.h>
#include <time.h>

#include "base/clock.h"
#include "base/event.h"
#include "base/step.h"
#include "irq/chip.h"
#include "irq/irqdesc.h"
#include "irq/nmi.h"
#include "py/entry.h"
#include "py/func.h"
#include "py/irq.h"
#include "py/native.h"
#include "py/nmi.h"
#include "py/signals.h"
#include "py/tables.h"

#define SPIN_NS 20000u
#define NAP_NS 50000u
#define AGAIN_NS 10000000u      /* the signal may have died with somebody, or not fitted */
#define AGAIN_MAX_NS 640000000u /* a stopped target's signals pile up */
#define US_MAX (UINT64_C(1) << 50)

struct nmi_sending {
    struct nmi_sending *outer; /* what this one has interrupted */
    pthread_t thread;
    struct shi_irqdesc function;
    uint32_t number; /* 0: nobody is asked, yet or any more */
    uint32_t *waiting, nwaiting;
    bool native, safe;
    uint8_t flags; /* interrupts, before */
    uint64_t deadline, spin_until;
};

/* ---- waiting --------------------------------------------------------------------- */

/* May it go on?  0, or -1 with an exception. */
static int look(Machine *machine)
{
    struct shi_self *self = &machine->self;
    if (!self->host && self->nmi_waits && !self->in_nmi)
        shi_run_nmi(machine);
    if (PyErr_CheckSignals() < 0)
        return -1;
    /* A signal's handler has detached this guest, or forked: then this is the child. */
    if (self->left) {
        shi_raise_errno(machine, -ESHUTDOWN, -1);
        return -1;
    }
    if (shi_use(machine) < 0)
        return -1;
    if (self->leaving || shi_ended(self) ||
        (!self->host &&
         shi_load_acquire(&machine->m.header->machine_state) >= SHI_M_STOPPING)) {
        shi_raise_errno(machine, self->leaving ? -ESHUTDOWN : -EOWNERDEAD, -1);
        return -1;
    }
    return 0;
}

/* A while: an NMI ends it.  0, or -1 with an exception. */
static int pause_a_while(Machine *machine, const struct nmi_sending *s)
{
    const struct timespec nap = { .tv_nsec = NAP_NS };
    if (shi_now_ns() < s->spin_until) {
        shi_cpu_relax();
        return look(machine);
    }
    PyThreadState *mine = shi_give_up(machine);
    nanosleep(&nap, NULL);
    shi_take_back(machine, mine);
    return look(machine);
}

static bool is_late(const struct nmi_sending *s)
{
    return s->deadline && shi_now_ns() >= s->deadline;
}

/* ---- the lock -------------------------------------------------------------------- */

static bool is_beneath(const Machine *machine)
{
    const struct nmi_sending *top = machine->nmi_sending;
    return top && pthread_equal(top->thread, pthread_self());
}

static bool try_it(Machine *machine, struct nmi_sending *s)
{
    struct shi_self *self = &machine->self;
    s->flags = self->host ? 0 : shi_irq_save(self);
    if (is_beneath(machine))
        return true;
    shi_enter(self);
    int err = shi_nmi_ipi_trylock(self);
    shi_leave(self);
    if (err && !self->host)
        shi_irq_restore(self, s->flags);
    return !err;
}

/* 1: it is held, with interrupts off; 0: not in time; -1 with an exception. */
static int lock(Machine *machine, struct nmi_sending *s)
{
    struct shi_self *self = &machine->self;
    while (!try_it(machine, s)) {
        if (!self->host && (self->in_nmi || self->irqs_off) &&
            shi_load_relaxed(&self->slot->pic.nmi_request))
            shi_run_nmi_ipi(machine);
        if (is_late(s))
            return 0;
        if (!self->host) { /* interrupts are as they were before */
            shi_after_enable(machine);
            if (shi_task_interrupt(machine) < 0)
                return -1;
        }
        if (pause_a_while(machine, s) < 0)
            return -1;
    }
    return 1;
}

static void unlock(Machine *machine, const struct nmi_sending *s)
{
    struct shi_self *self = &machine->self;
    if (!s->outer) {
        shi_enter(self);
        shi_nmi_ipi_unlock(self);
        shi_leave(self);
    }
    if (!self->host)
        shi_irq_restore(self, s->flags);
}

/* ---- asking ---------------------------------------------------------------------- */

static bool is_online(const struct shi_machine *m, uint32_t cpu)
{
    return shi_word_online(shi_load_acquire(&shi_slot(m, cpu)->word));
}

/* Keep those who may still enter it. */
static void settle(const struct shi_machine *m, struct nmi_sending *s)
{
    uint32_t i, left = 0;
    for (i = 0; i < s->nwaiting; i++) {
        uint32_t cpu = s->waiting[i];
        if (s->number && shi_nmi_ipi_entered(m, cpu, s->number))
            continue;
        if (is_online(m, cpu))
            s->waiting[left++] = cpu;
        else if (s->number) /* gone, and not asked when it comes back */
            shi_nmi_ipi_take_back(m, cpu, s->number);
    }
    s->nwaiting = left;
}

/* Nobody is asked any more; those who have not entered it are left. */
static void take_back(const struct shi_machine *m, struct nmi_sending *s)
{
    uint32_t i, left = 0;
    for (i = 0; s->number && i < s->nwaiting; i++)
        if (shi_nmi_ipi_take_back(m, s->waiting[i], s->number))
            s->waiting[left++] = s->waiting[i];
    if (s->number)
        s->nwaiting = left;
    s->number = 0;
}

static void ask(Machine *machine, struct nmi_sending *s)
{
    struct shi_self *self = &machine->self;
    struct shi_irqdesc *ipi = shi_nmi_ipi(&machine->m), *f = &s->function;
    uint32_t i;
    shi_enter(self);
    s->number = shi_nmi_ipi_number(self);
    if (s->native)
        shi_irqdesc_set_native(ipi, f->func, f->kind, f->info, 0);
    else
        shi_irqdesc_set_python(self, ipi, f->func, f->serial);
    for (i = 0; i < s->nwaiting; i++)
        shi_nmi_ipi_ask(self, s->waiting[i], s->number,
                        s->safe); /* one that has gone: settle */
    SHI_STEP(self, nmi_wait);
    shi_leave(self);
}

static void ask_again(Machine *machine, const struct nmi_sending *s)
{
    uint32_t i;
    shi_enter(&machine->self);
    for (i = 0; i < s->nwaiting; i++)
        shi_irq_rering(&machine->self, s->waiting[i]);
    shi_leave(&machine->self);
}

/* Until all have entered, or it is late: 0, or -1 with an exception. */
static int await(Machine *machine, struct nmi_sending *s)
{
    uint64_t wait_ns = AGAIN_NS, again = shi_now_ns() + wait_ns;
    s->spin_until = shi_now_ns() + SPIN_NS;
    for (;;) {
        if (!s->number) { /* at first, and when one on top of this has taken it back */
            ask(machine, s);
            again = shi_now_ns() + wait_ns;
        }
        settle(&machine->m, s);
        if (!s->nwaiting || is_late(s))
            return 0;
        if (shi_now_ns() >= again) {
            ask_again(machine, s);
            wait_ns = wait_ns < AGAIN_MAX_NS ? 2 * wait_ns : wait_ns;
            again = shi_now_ns() + wait_ns;
        }
        if (pause_a_while(machine, s) < 0)
            return -1;
    }
}

/* The lock is held.  0, or -1 with an exception; those who have not entered it are left. */
static int send_it(Machine *machine, struct nmi_sending *s)
{
    const struct shi_machine *m = &machine->m;
    struct nmi_sending *below;
    s->outer = is_beneath(machine) ? machine->nmi_sending : NULL;
    for (below = s->outer; below; below = below->outer)
        take_back(m, below);
    machine->nmi_sending = s;
    int err = await(machine, s);
    machine->nmi_sending = s->outer;
    if (machine->self.left) /* all this is another's */
        return -1;
    take_back(m, s);
    shi_irqdesc_clear(shi_nmi_ipi(m));
    return err;
}

/* ---- the method ------------------------------------------------------------------ */

/* What travels: 0, or -1.  A Python function's number is held. */
static int function_of(Machine *machine, struct nmi_sending *s, PyObject *handler,
                       PyObject *info)
{
    struct shi_self *self = &machine->self;
    s->native = Py_IS_TYPE(handler, shi_native_type);
    if (s->native)
        return shi_native_request(machine, &s->function, handler, info, 0);
    if (!shi_function_by_number(handler)) {
        PyErr_SetString(PyExc_TypeError, "an NMI IPI's is a function or a NativeHandler");
        return -1;
    }
    int64_t index = shi_function_number(machine, handler);
    if (index < 0)
        return -1;
    shi_enter(self);
    shi_func_hold(self, (uint32_t)index);
    shi_leave(self);
    s->function.func = (uint32_t)index;
    s->function.serial =
        shi_load_relaxed(&shi_func_entry(&machine->m, self->id, (uint32_t)index)->serial);
    return 0;
}

static void function_done(Machine *machine, const struct nmi_sending *s)
{
    if (s->native || machine->closed || machine->self.left)
        return;
    shi_enter(&machine->self);
    shi_func_drop(&machine->self, s->function.func);
    shi_leave(&machine->self);
}

/* Those that are online now: `cpu`, or (-1) all but this one. */
static void aim(const Machine *machine, struct nmi_sending *s, int cpu)
{
    const struct shi_self *self = &machine->self;
    uint32_t i;
    for (i = 0; i < machine->m.ncpus; i++)
        if (is_online(&machine->m, i) &&
            (cpu < 0 ? self->host || i != self->id : (int)i == cpu))
            s->waiting[s->nwaiting++] = i;
}

/* nmi_ipi(cpu, handler, info, delay_us, safe) -> bool: have all entered it?  `cpu` -1: all
 * others; 0 us: no limit. */
METHOD(nmi_ipi)
{
    Machine *machine = MACHINE(object);
    struct shi_self *self = &machine->self;
    struct nmi_sending s = { .thread = pthread_self() };
    unsigned long long us;
    PyObject *handler, *info;
    int cpu, safe, held = -1;
    if (!PyArg_ParseTuple(arg, "iOOKp", &cpu, &handler, &info, &us, &safe) ||
        shi_use(machine) < 0)
        return NULL;
    uint64_t now = shi_now_ns();
    s.safe = safe;
    s.deadline = us ? now + (us < US_MAX ? us : US_MAX) * 1000 : 0;
    s.spin_until = now + SPIN_NS;
    if (!(s.waiting = PyMem_Calloc(machine->m.ncpus, sizeof *s.waiting)))
        return PyErr_NoMemory();
    if (function_of(machine, &s, handler, info) < 0) {
        PyMem_Free(s.waiting);
        return NULL;
    }
    if ((held = lock(machine, &s)) > 0) {
        aim(machine, &s, cpu);
        if (send_it(machine, &s) < 0)
            held = -1;
        if (!self->left) {
            PyObject *error = PyErr_Occurred() ? shi_take_exception() : NULL;
            unlock(machine, &s);
            function_done(machine, &s);
            if (!self->host && !machine->closed)
                shi_after_enable(machine);
            shi_put_exception(error);
        }
    } else {
        function_done(machine, &s);
    }
    PyMem_Free(s.waiting);
    if (held < 0 || (!self->host && !self->left && shi_task_interrupt(machine) < 0))
        return NULL;
    return PyBool_FromLong(held && !s.nwaiting);
}

PyMethodDef shi_nmi_ipi_methods[] = {
    MANY(nmi_ipi, "nmi_ipi(cpu, handler, info, delay_us, safe) -> bool: all have entered it"),
    { NULL, NULL, 0, NULL },
};
