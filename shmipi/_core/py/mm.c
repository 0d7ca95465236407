/* SPDX-License-Identifier: MIT */
/* Address spaces: shmipi/users/tlb.py. */
#include "py/base.h"

#include <errno.h>
#include <signal.h>

#include "base/clock.h"
#include "py/entry.h"
#include "py/signals.h"
#include "py/tables.h"
#include "py/wait.h"
#include "users/mmap.h"

#define LOCK_NS 5000000000ull

/* An address space as Python has it: its number, and which of those that had the number. */
#define HANDLE_SHIFT 6
_Static_assert(SHI_MMS <= 1u << HANDLE_SHIFT, "a handle has room for a number");

#define METHOD_FAST(name)                                                                      \
    static PyObject *name(Machine *machine, PyObject *const *args, Py_ssize_t nargs)

/* ---- errors ---------------------------------------------------------------------------- */

static PyObject *raise_fault(const Machine *machine, const struct shi_fault *fault)
{
    char at[32];
    snprintf(at, sizeof at, "0x%llx", (unsigned long long)fault->addr);
    shi_raise(shi_py.FaultError, EFAULT, (int)machine->self.id, "%s of %s: %s",
              fault->write ? "store" : "load", at,
              fault->si_code == SEGV_ACCERR ? "it is mapped, but not for that"
                                            : "nothing is mapped there");
    PyObject *error = shi_take_exception();
    PyObject *address = PyLong_FromUnsignedLongLong(fault->addr);
    PyObject *access = PyUnicode_FromString(fault->write ? "write" : "read");
    PyObject *code = PyLong_FromUnsignedLong(fault->si_code);
    if (address && access && code) {
        PyObject_SetAttrString(error, "address", address);
        PyObject_SetAttrString(error, "access", access);
        PyObject_SetAttrString(error, "si_code", code);
    }
    Py_XDECREF(address);
    Py_XDECREF(access);
    Py_XDECREF(code);
    shi_put_exception(error);
    return NULL;
}

static const char *words(int err)
{
    switch (-err) {
    case EINVAL:
        return "the range is empty, not page-aligned, or no part of the address space; or "
               "there is no such protection";
    case ENOMEM:
        return "out of physical pages, of room, or part of the range is not mapped";
    case EEXIST:
        return "part of the range is mapped already";
    case EBUSY:
        return "a task of a CPU uses this address space";
    case ESRCH:
        return "this address space is gone";
    case ENOSYS:
        return "the machine was booted by another version, without address spaces";
    default:
        return strerror(-err);
    }
}

/* -EINTR: an exception is set already. */
static PyObject *raise_mm(Machine *machine, const char *what, int err)
{
    if (err == -EINTR)
        return NULL;
    if (err == -EINVAL || err == -ENOMEM || err == -EEXIST || err == -ESRCH || err == -EBUSY ||
        err == -ENOSYS)
        return shi_raise(shi_py.MmError, -err, -1, "%s: %s", what, words(err));
    return shi_raise_errno(machine, err, -1);
}

/* ---- who is asked ------------------------------------------------------------------------ */

static int view(Machine *machine, struct shi_vm_view *v)
{
    if (shi_use(machine) < 0)
        return -1;
    if (shi_vm_view(&machine->m, v))
        return 0;
    shi_raise(shi_py.StateError, 0, -1,
              "this machine has no address spaces: make them with cluster.users.tlb");
    return -1;
}

static struct shi_flusher by(Machine *machine)
{
    return (struct shi_flusher){ machine->natives, &shi_python_waiter, machine };
}

/* Tasks and hosts: who waits for others must let them interrupt it. */
static int may_wait(const Machine *machine)
{
    const struct shi_self *self = &machine->self;
    if (self->host || !(self->in_nmi || self->in_irq || self->irqs_off || !self->in_task))
        return 0;
    shi_raise(shi_py.StateError, 0, (int)self->id,
              "address spaces are changed by tasks with interrupts enabled: others are waited "
              "for");
    return -1;
}

/* ---- the lock of an address space -------------------------------------------------------- */

static int take_lock(Machine *machine, const struct shi_vm_view *v, uint32_t mm)
{
    struct shi_allowance allowed = shi_allow(LOCK_NS);
    uint64_t releases = shi_load_relaxed(&v->mms[mm].releases), seen;
    uint32_t turn = 0;
    int got;
    while ((got = shi_mm_trylock(&machine->self, v, mm)) == -EAGAIN) {
        if (shi_wait_turn(machine, ++turn) < 0)
            return -1;
        uint64_t held = shi_load_relaxed(&v->mms[mm].lock);
        if ((seen = shi_load_relaxed(&v->mms[mm].releases)) != releases) {
            releases = seen; /* others were quicker: nobody has it for long */
            allowed = shi_allow(LOCK_NS);
        } else if (held && shi_allowance_over(&allowed)) {
            uint32_t slot = shi_holder_slot(held);
            shi_raise(shi_py.TimeoutError, ETIMEDOUT, slot < machine->m.ncpus ? (int)slot : -1,
                      "the page tables of %s have been locked by %s %u for 5 s: is it stopped?",
                      v->mms[mm].name, slot < machine->m.ncpus ? "CPU" : "the host in slot",
                      slot);
            return -1;
        }
    }
    if (got == 1) {
        struct shi_flusher f = by(machine);
        int err = shi_mm_recover(&machine->self, v, mm, &f);
        if (err) {
            shi_mm_unlock(&machine->self, v, mm, false);
            raise_mm(machine, "what a dead process has left", err);
            return -1;
        }
    }
    return 0;
}

/* The one that a handle names, with its lock: its number, or -1. */
static int64_t lock(Machine *machine, const struct shi_vm_view *v, PyObject *handle)
{
    uint64_t number = PyLong_AsUnsignedLongLong(handle);
    if (PyErr_Occurred() || may_wait(machine) < 0)
        return -1;
    uint32_t mm = (uint32_t)(number & (SHI_MMS - 1));
    if (take_lock(machine, v, mm) < 0)
        return -1;
    if (shi_load_acquire(&v->mms[mm].ctx_id) == number >> HANDLE_SHIFT)
        return mm;
    shi_mm_unlock(&machine->self, v, mm, true);
    raise_mm(machine, "an mm", -ESRCH);
    return -1;
}

static PyObject *handle_of(const struct shi_vm_view *v, uint32_t mm)
{
    return PyLong_FromUnsignedLongLong(shi_load_acquire(&v->mms[mm].ctx_id) << HANDLE_SHIFT |
                                       mm);
}

/* Arguments: `n` in all, the first a handle; the rest numbers, to `out`.  The mm, locked. */
static int64_t begin(Machine *machine, struct shi_vm_view *v, PyObject *const *args,
                     Py_ssize_t nargs, Py_ssize_t n, uint64_t *out)
{
    Py_ssize_t i;
    if (view(machine, v) < 0)
        return -1;
    if (nargs != n) {
        PyErr_Format(PyExc_TypeError, "an mm and %zd more arguments", n - 1);
        return -1;
    }
    for (i = 1; i < n; i++) {
        out[i - 1] = PyLong_AsUnsignedLongLong(args[i]);
        if (PyErr_Occurred()) {
            if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
                PyErr_Clear();
                raise_mm(machine, "an address", -EINVAL);
            }
            return -1;
        }
    }
    return lock(machine, v, args[0]);
}

static PyObject *end(Machine *machine, const struct shi_vm_view *v, int64_t mm,
                     const char *what, int64_t result)
{
    shi_mm_unlock(&machine->self, v, (uint32_t)mm, true);
    return result < 0 ? raise_mm(machine, what, (int)result) : PyLong_FromLongLong(result);
}

/* ---- making and ending them ---------------------------------------------------------------- */

METHOD(vm_bytes)
{
    unsigned long n = PyLong_AsUnsignedLong(arg);
    return PyErr_Occurred()
               ? NULL
               : PyLong_FromUnsignedLongLong(shi_vm_bytes(&MACHINE(object)->m, (uint32_t)n));
}

METHOD(vm_init)
{
    unsigned long n = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || shi_use(MACHINE(object)) < 0)
        return NULL;
    int err = shi_vm_init(&MACHINE(object)->m, (uint32_t)n);
    if (err)
        return raise_mm(MACHINE(object), "physical memory", err);
    Py_RETURN_NONE;
}

METHOD(mm_find)
{
    struct shi_vm_view v;
    const char *name = PyUnicode_AsUTF8(arg);
    uint32_t i;
    if (!name || view(MACHINE(object), &v) < 0)
        return NULL;
    for (i = 0; i < SHI_MMS; i++)
        if (shi_load_acquire(&v.mms[i].ctx_id) &&
            !strncmp(v.mms[i].name, name, sizeof v.mms[i].name))
            return handle_of(&v, i);
    return PyLong_FromLong(0);
}

/* mm_make(name): a new one. */
METHOD(mm_make)
{
    Machine *machine = MACHINE(object);
    struct shi_vm_view v;
    const char *name = PyUnicode_AsUTF8(arg);
    uint32_t i;
    if (!name || view(machine, &v) < 0 || may_wait(machine) < 0)
        return NULL;
    for (i = 1; i < SHI_MMS; i++) {
        if (shi_load_acquire(&v.mms[i].ctx_id))
            continue;
        if (take_lock(machine, &v, i) < 0)
            return NULL;
        int err = shi_mm_make(&machine->self, &v, i, name);
        shi_mm_unlock(&machine->self, &v, i, true);
        if (!err)
            return handle_of(&v, i);
        if (err != -EEXIST)
            return raise_mm(machine, "a new address space", err);
    }
    return shi_raise(shi_py.MmError, ENOMEM, -1, "there are %u address spaces: end some",
                     SHI_MMS - 1);
}

METHOD_FAST(mm_end)
{
    struct shi_vm_view v;
    struct shi_flusher f = by(machine);
    int64_t mm = begin(machine, &v, args, nargs, 1, NULL);
    return mm < 0 ? NULL
                  : end(machine, &v, mm, "exit_mmap",
                        mm ? shi_mm_end(&machine->self, &v, (uint32_t)mm, &f) : -EBUSY);
}

/* ---- mmap and the like ------------------------------------------------------------------------ */

METHOD_FAST(mm_mmap)
{
    struct shi_vm_view v;
    uint64_t a[3];
    struct shi_flusher f = by(machine);
    int64_t mm = begin(machine, &v, args, nargs, 4, a);
    if (mm < 0)
        return NULL;
    int err = shi_mmap(&machine->self, &v, (uint32_t)mm, &a[0], a[1],
                       a[2] > UINT32_MAX ? UINT32_MAX : (uint32_t)a[2], &f);
    PyObject *none = end(machine, &v, mm, "mmap", err);
    Py_XDECREF(none);
    return none ? PyLong_FromUnsignedLongLong(a[0]) : NULL;
}

/* (mm, address, length): what takes something out of the page tables. */
typedef int over_range(struct shi_self *self, const struct shi_vm_view *v, uint32_t mm,
                       uint64_t at, uint64_t length, const struct shi_flusher *by);

static PyObject *take_out(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                          over_range *function, const char *what)
{
    struct shi_vm_view v;
    uint64_t a[2];
    struct shi_flusher f = by(machine);
    int64_t mm = begin(machine, &v, args, nargs, 3, a);
    return mm < 0 ? NULL
                  : end(machine, &v, mm, what,
                        function(&machine->self, &v, (uint32_t)mm, a[0], a[1], &f));
}

METHOD_FAST(mm_munmap)
{
    return take_out(machine, args, nargs, shi_munmap, "munmap");
}

METHOD_FAST(mm_mprotect)
{
    struct shi_vm_view v;
    uint64_t a[3];
    struct shi_flusher f = by(machine);
    int64_t mm = begin(machine, &v, args, nargs, 4, a);
    return mm < 0 ? NULL
                  : end(machine, &v, mm, "mprotect",
                        shi_mprotect(&machine->self, &v, (uint32_t)mm, a[0], a[1],
                                     a[2] > UINT32_MAX ? UINT32_MAX : (uint32_t)a[2], &f));
}

METHOD_FAST(mm_try_to_unmap)
{
    return take_out(machine, args, nargs, shi_try_to_unmap, "try_to_unmap");
}

/* A flush or a reclaim that needs no lock. */
typedef int whole(struct shi_self *self, const struct shi_vm_view *v,
                  const struct shi_flusher *by);

static PyObject *without_lock(PyObject *object, whole *function, const char *what)
{
    Machine *machine = MACHINE(object);
    struct shi_vm_view v;
    if (view(machine, &v) < 0 || may_wait(machine) < 0)
        return NULL;
    struct shi_flusher f = by(machine);
    int n = function(&machine->self, &v, &f);
    return n < 0 ? raise_mm(machine, what, n) : PyLong_FromLong(n);
}

METHOD(mm_try_to_unmap_flush)
{
    (void)arg;
    return without_lock(object, shi_try_to_unmap_flush, "try_to_unmap_flush");
}

METHOD(mm_reclaim)
{
    (void)arg;
    return without_lock(object, shi_mm_reclaim, "reclaim");
}

METHOD(tlb_remove_table_sync_one)
{
    (void)arg;
    return without_lock(object, shi_tlb_remove_table_sync_one, "tlb_remove_table_sync_one");
}

/* mm_flush(mm, start, pages, freed_tables); mm 0's is flush_tlb_kernel_range. */
METHOD_FAST(mm_flush)
{
    struct shi_vm_view v;
    uint64_t a[3];
    struct shi_flusher f = by(machine);
    int64_t mm = begin(machine, &v, args, nargs, 4, a);
    if (mm < 0)
        return NULL;
    uint32_t pages = a[1] < SHI_FLUSH_ALL ? (uint32_t)a[1] : SHI_FLUSH_ALL;
    int err = a[0] % SHI_MM_PAGE || !pages ? -EINVAL
              : mm ? shi_flush_tlb_mm_range(&machine->self, &v, (uint32_t)mm, a[0], pages,
                                            a[2] != 0, &f)
                   : shi_flush_tlb_kernel_range(&machine->self, &v, a[0], pages, &f);
    return end(machine, &v, mm, "flush_tlb_range", err);
}

/* mm_access(mm, addr, bytes or how many): as a debugger does. */
METHOD_FAST(mm_access)
{
    struct shi_vm_view v;
    uint64_t addr = 0;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "mm_access(mm, addr, data)");
        return NULL;
    }
    bool write = PyBytes_Check(args[2]);
    uint64_t size = write ? (uint64_t)PyBytes_GET_SIZE(args[2])
                          : PyLong_AsUnsignedLongLong(args[2]);
    if (!write && PyErr_Occurred())
        return NULL;
    if (view(machine, &v) < 0)
        return NULL;
    uint64_t most = (uint64_t)v.nframes << SHI_MM_PAGE_SHIFT;
    PyObject *bytes =
        write ? Py_NewRef(args[2])
              : PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(size < most ? size : most));
    int64_t mm = bytes ? begin(machine, &v, args, 2, 2, &addr) : -1;
    if (mm < 0) {
        Py_XDECREF(bytes);
        return NULL;
    }
    int64_t n = shi_mm_access(&v, (uint32_t)mm, addr, PyBytes_AS_STRING(bytes),
                              (uint64_t)PyBytes_GET_SIZE(bytes), write);
    shi_mm_unlock(&machine->self, &v, (uint32_t)mm, true);
    if ((uint64_t)n < size) {
        struct shi_fault fault = { addr + (uint64_t)n, SEGV_MAPERR, write };
        Py_DECREF(bytes);
        return raise_fault(machine, &fault);
    }
    return bytes;
}

/* mm_ceiling(pages): -1 asks. */
METHOD(mm_ceiling)
{
    struct shi_vm_view v;
    long long n = PyLong_AsLongLong(arg);
    if ((n == -1 && PyErr_Occurred()) || view(MACHINE(object), &v) < 0)
        return NULL;
    if (n >= (long long)SHI_FLUSH_ALL || n < -1)
        return raise_mm(MACHINE(object), "tlb_single_page_flush_ceiling", -EINVAL);
    if (n >= 0)
        shi_store_full(&v.vm->ceiling, (uint32_t)n);
    return PyLong_FromUnsignedLong(shi_load_relaxed(&v.vm->ceiling));
}

/* ---- what there is ---------------------------------------------------------------------------- */

static PyObject *cpus_of(const struct shi_vm_view *v, const shi_a64 *mask, uint32_t ncpus)
{
    PyObject *list = PyList_New(0);
    uint32_t cpu;
    (void)v;
    for (cpu = 0; list && cpu < ncpus; cpu++) {
        if (!(shi_load_full(&mask[cpu / 64]) >> (cpu % 64) & 1))
            continue;
        PyObject *number = PyLong_FromUnsignedLong(cpu);
        if (!number || PyList_Append(list, number) < 0)
            Py_CLEAR(list);
        Py_XDECREF(number);
    }
    return list;
}

METHOD(mm_state)
{
    Machine *machine = MACHINE(object);
    struct shi_vm_view v;
    uint64_t number = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred() || view(machine, &v) < 0)
        return NULL;
    uint32_t i = (uint32_t)(number & (SHI_MMS - 1));
    const struct shi_mm *mm = &v.mms[i];
    if (shi_load_acquire(&mm->ctx_id) != number >> HANDLE_SHIFT)
        return raise_mm(machine, "an mm", -ESRCH);
    uint32_t batch = shi_load_relaxed(&mm->tlb_flush_batched);
    return Py_BuildValue(
        "{s:s,s:K,s:K,s:N,s:I,s:I,s:I,s:O}", "name", mm->name, "ctx_id",
        shi_load_relaxed(&mm->ctx_id), "tlb_gen", shi_load_relaxed(&mm->tlb_gen), "cpumask",
        cpus_of(&v, shi_mm_cpumask(&v, i), machine->m.ncpus), "pending", batch & 0x7fff,
        "flushed", batch >> 16, "membarrier_state", shi_load_relaxed(&mm->membarrier_state),
        "torn", shi_load_relaxed(&mm->torn) ? Py_True : Py_False);
}

static const char *const event_names[] = {
#define X(name) #name,
    SHI_TLB_EVENTS(X)
#undef X
};

METHOD(tlb_state)
{
    struct shi_vm_view v;
    uint32_t slot, i;
    if (shi_as_slot(arg, MACHINE(object)->m.nslots, &slot) < 0 || view(MACHINE(object), &v) < 0)
        return NULL;
    const struct shi_tlb_cpu *row = &v.cpus[slot];
    uint32_t asid = shi_load_relaxed(&row->asid) % SHI_MM_ASIDS;
    PyObject *state = Py_BuildValue(
        "{s:I,s:I,s:I,s:I,s:K,s:I,s:I}", "loaded_mm", shi_load_full(&row->loaded_mm), "is_lazy",
        shi_load_full(&row->is_lazy), "mm", shi_load_full(&row->mm), "asid", asid, "tlb_gen",
        shi_load_relaxed(&row->ctxs[asid].tlb_gen), "rseq", shi_load_relaxed(&row->rseq),
        "membarrier_state", shi_load_relaxed(&row->membarrier_state));
    for (i = 0; state && i < SHI_TLB_NEVENTS; i++) {
        PyObject *n = PyLong_FromUnsignedLongLong(shi_load_relaxed(&row->events[i]));
        if (!n || PyDict_SetItemString(state, event_names[i], n) < 0)
            Py_CLEAR(state);
        Py_XDECREF(n);
    }
    return state;
}

METHOD(vm_state)
{
    struct shi_vm_view v;
    unsigned long count[8] = { 0 };
    uint32_t i;
    (void)arg;
    if (view(MACHINE(object), &v) < 0)
        return NULL;
    for (i = 1; i < v.nframes; i++)
        count[shi_frame_state(shi_load_relaxed(&v.frames[i])) & 7]++;
    return Py_BuildValue(
        "{s:I,s:k,s:k,s:k,s:k,s:k,s:k,s:K,s:K}", "frames", v.nframes - 1, "free",
        count[SHI_FR_FREE], "pages", count[SHI_FR_PAGE], "tables", count[SHI_FR_TABLE], "limbo",
        count[SHI_FR_LIMBO] + count[SHI_FR_TABLE_LIMBO], "waiting", count[SHI_FR_TABLE_WAITS],
        "held", count[SHI_FR_HELD] + count[SHI_FR_TABLE_HELD], "torn_found",
        shi_load_relaxed(&v.vm->torn_found), "frames_found",
        shi_load_relaxed(&v.vm->frames_found));
}

#define ENTRY(name, text) { #name, FAST(name), METH_FASTCALL, text }
PyMethodDef shi_mm_methods[] = {
    ONE(vm_bytes, "vm_bytes(frames): what the state of address spaces takes."),
    ONE(vm_init, "vm_init(frames): that state is there; make init_mm in it."),
    NOARGS(vm_state, "Frames by what they are, and what deaths have left: dict."),
    ONE(mm_find, "mm_find(name) -> handle, or 0"),
    ONE(mm_make, "mm_make(name) -> handle"),
    ENTRY(mm_end, "mm_end(mm): exit_mmap"),
    ENTRY(mm_mmap, "mm_mmap(mm, addr, bytes, prot) -> addr; addr 0: where there is room"),
    ENTRY(mm_munmap, "mm_munmap(mm, addr, bytes)"),
    ENTRY(mm_mprotect, "mm_mprotect(mm, addr, bytes, prot)"),
    ENTRY(mm_try_to_unmap, "mm_try_to_unmap(mm, addr, bytes) -> pages, whose flush is put off"),
    NOARGS(mm_try_to_unmap_flush, "Flush, and free those pages: how many."),
    NOARGS(mm_reclaim, "Free what waits, and what dead CPUs held: how many frames."),
    NOARGS(tlb_remove_table_sync_one, "Interrupt all CPUs: who walked a table has ended."),
    ENTRY(mm_flush, "mm_flush(mm, start, pages, freed_tables)"),
    ENTRY(mm_access, "mm_access(mm, addr, bytes, or how many) -> bytes"),
    ONE(mm_ceiling, "mm_ceiling(pages) -> pages; -1 only asks"),
    ONE(mm_state, "mm_state(mm) -> dict"),
    ONE(tlb_state, "tlb_state(slot) -> dict"),
    { NULL, NULL, 0, NULL },
};

/* ---- on a CPU --------------------------------------------------------------------------------- */

static Machine *here(void)
{
    return shi_use_cpu("the host has no TLB: mm.read() and mm.write() go by the page tables");
}

/* mm_use(handle): 0 is no address space. */
static PyObject *mm_use(PyObject *Py_UNUSED(module), PyObject *handle)
{
    Machine *machine = here();
    struct shi_vm_view v;
    uint64_t number = machine ? PyLong_AsUnsignedLongLong(handle) : 0;
    if (!machine || PyErr_Occurred() || view(machine, &v) < 0)
        return NULL;
    uint32_t mm = (uint32_t)(number & (SHI_MMS - 1));
    struct shi_self *self = &machine->self;
    if (!self->in_task || self->in_irq || self->in_nmi)
        return shi_raise(shi_py.StateError, 0, (int)self->id,
                         "a task uses an address space, not a handler");
    if (number && (!mm || shi_load_acquire(&v.mms[mm].ctx_id) != number >> HANDLE_SHIFT))
        return raise_mm(machine, "use_mm", mm ? -ESRCH : -EINVAL);
    int err = shi_mm_use(self, mm);
    if (err)
        return raise_mm(machine, "use_mm", err == -EINVAL ? -ESRCH : err);
    Py_RETURN_NONE;
}

static PyObject *mm_current(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Machine *machine = here();
    struct shi_vm_view v;
    if (!machine || view(machine, &v) < 0)
        return NULL;
    uint32_t mm = shi_mm_current(&machine->self);
    return mm ? handle_of(&v, mm) : PyLong_FromLong(0);
}

static PyObject *raise_access(Machine *machine, int err, const struct shi_fault *fault)
{
    if (err == -EFAULT)
        return raise_fault(machine, fault);
    struct shi_vm_view v;
    return view(machine, &v) < 0 ? NULL : raise_mm(machine, "an access", err);
}

static int as_addr(PyObject *object, uint64_t *addr)
{
    *addr = PyLong_AsUnsignedLongLong(object);
    return *addr == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static PyObject *mm_load(PyObject *Py_UNUSED(module), PyObject *addr_arg)
{
    Machine *machine = here();
    struct shi_fault fault;
    uint64_t addr, value;
    if (!machine || as_addr(addr_arg, &addr) < 0)
        return NULL;
    int err = shi_tlb_load(&machine->self, addr, &value, &fault);
    return err ? raise_access(machine, err, &fault) : PyLong_FromUnsignedLongLong(value);
}

static PyObject *mm_store(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Machine *machine = here();
    struct shi_fault fault;
    uint64_t addr, value;
    if (!machine)
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "store(address, value)");
        return NULL;
    }
    if (as_addr(args[0], &addr) < 0 || as_addr(args[1], &value) < 0)
        return NULL;
    int err = shi_tlb_store(&machine->self, addr, value, &fault);
    if (err)
        return raise_access(machine, err, &fault);
    Py_RETURN_NONE;
}

static PyObject *mm_load_bytes(PyObject *Py_UNUSED(module), PyObject *const *args,
                               Py_ssize_t nargs)
{
    Machine *machine = here();
    struct shi_vm_view v;
    struct shi_fault fault;
    uint64_t addr, n, done;
    if (!machine || view(machine, &v) < 0)
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "load_bytes(address, n)");
        return NULL;
    }
    if (as_addr(args[0], &addr) < 0 || as_addr(args[1], &n) < 0)
        return NULL;
    if (n > (uint64_t)v.nframes << SHI_MM_PAGE_SHIFT)
        return raise_mm(machine, "load_bytes", -ENOMEM);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    if (!bytes)
        return NULL;
    int err =
        shi_tlb_copy(&machine->self, addr, PyBytes_AS_STRING(bytes), n, false, &done, &fault);
    if (!err)
        return bytes;
    Py_DECREF(bytes);
    return raise_access(machine, err, &fault);
}

static PyObject *mm_store_bytes(PyObject *Py_UNUSED(module), PyObject *const *args,
                                Py_ssize_t nargs)
{
    Machine *machine = here();
    struct shi_fault fault;
    uint64_t addr, done;
    Py_buffer data;
    if (!machine)
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "store_bytes(address, data)");
        return NULL;
    }
    if (as_addr(args[0], &addr) < 0 || PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE) < 0)
        return NULL;
    int err =
        shi_tlb_copy(&machine->self, addr, data.buf, (uint64_t)data.len, true, &done, &fault);
    PyBuffer_Release(&data);
    if (err)
        return raise_access(machine, err, &fault);
    Py_RETURN_NONE;
}

PyMethodDef shi_mm_functions[] = {
    { "mm_use", mm_use, METH_O, "mm_use(mm): use_mm() of this CPU's task; 0: unuse_mm()" },
    { "mm_current", mm_current, METH_NOARGS, "mm_current() -> handle, or 0" },
    { "mm_load", mm_load, METH_O,
      "load(address)\n--\n\nThe 8 bytes there, as an unsigned number, through this CPU's "
      "TLB." },
    { "mm_store", FAST(mm_store), METH_FASTCALL,
      "store(address, value)\n--\n\nStore 8 bytes there, through this CPU's TLB." },
    { "mm_load_bytes", FAST(mm_load_bytes), METH_FASTCALL,
      "load_bytes(address, n)\n--\n\nThe bytes there." },
    { "mm_store_bytes", FAST(mm_store_bytes), METH_FASTCALL,
      "store_bytes(address, data)\n--\n\nStore them there; those before a page that faults are "
      "stored." },
    { NULL, NULL, 0, NULL },
};
