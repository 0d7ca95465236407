/* SPDX-License-Identifier: MIT */
/* The completion of block requests: shmipi/users/blk.py. */
#include "py/net.h"

#include "users/blk.h"
#include "py/tables.h"

static struct shi_blk *blk_of(Machine *machine)
{
    struct shi_blk *q = shi_blk(&machine->m);
    if (!q)
        shi_raise(shi_py.StateError, 0, -1,
                  "this machine has no block device: cluster.users.blk makes it");
    return q;
}

static PyObject *blk_bytes(Machine *machine, PyObject *unused)
{
    (void)unused;
    return shi_use(machine) < 0 ? NULL
                                : PyLong_FromUnsignedLongLong(shi_blk_bytes(&machine->m));
}

METHOD_FAST(blk_set)
{
    uint64_t a[2];
    if (shi_numbers(machine, args, nargs, 2, a) < 0)
        return NULL;
    struct shi_blk *q = shi_user(&machine->m, SHI_USER_blk, shi_blk_bytes(&machine->m));
    if (!q)
        return blk_of(machine) ? NULL : NULL;
    return PyLong_FromLongLong(
        shi_blk_set(q, a[0] < 255 ? (uint32_t)a[0] : 255, (uint32_t)a[1]));
}

METHOD_FAST(blk_submit)
{
    uint64_t a[1];
    struct shi_blk *q;
    if (shi_numbers_here(machine, args, nargs, 1, a, NULL) < 0 || !(q = blk_of(machine)))
        return NULL;
    return PyLong_FromLongLong(shi_blk_submit(&machine->self, q, a[0]));
}

METHOD_FAST(blk_complete)
{
    uint64_t a[1];
    struct shi_blk *q;
    if (shi_numbers_here(machine, args, nargs, 1, a, NULL) < 0 || !(q = blk_of(machine)))
        return NULL;
    return PyLong_FromLongLong(
        a[0] < UINT32_MAX ? shi_blk_complete(&machine->self, q, (uint32_t)a[0]) : -EINVAL);
}

METHOD_FAST(blk_interrupt)
{
    uint64_t a[1];
    struct shi_blk *q;
    if (shi_numbers_here(machine, args, nargs, 1, a, NULL) < 0 || !(q = blk_of(machine)))
        return NULL;
    return PyLong_FromLongLong(shi_blk_interrupt(&machine->self, q, (uint32_t)a[0]));
}

METHOD_FAST(blk_generate)
{
    uint64_t a[1];
    struct shi_blk *q;
    if (shi_numbers_here(machine, args, nargs, 1, a, NULL) < 0 || !(q = blk_of(machine)))
        return NULL;
    return PyLong_FromLongLong(shi_blk_generate(&machine->self, q, a[0]));
}

/* blk_end() -> [(tag, data, the CPU that has completed it), ...] */
METHOD_FAST(blk_end)
{
    uint32_t tags[SHI_BLK_DEPTH], on[SHI_BLK_DEPTH], n, i;
    uint64_t a[1], data[SHI_BLK_DEPTH];
    struct shi_blk *q;
    if (shi_numbers_here(machine, args, nargs, 0, a, NULL) < 0 || !(q = blk_of(machine)))
        return NULL;
    n = shi_blk_end(&machine->self, q, tags, data, on, SHI_BLK_DEPTH);
    PyObject *list = PyList_New(n);
    for (i = 0; list && i < n; i++) {
        PyObject *one = Py_BuildValue("IKi", tags[i], (unsigned long long)data[i], (int)on[i]);
        if (!one)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, one);
    }
    return list;
}

METHOD_FAST(blk_counts)
{
    uint64_t a[1];
    struct shi_blk *q;
    struct shi_blk_stats s;
    if (shi_numbers(machine, args, nargs, 1, a) < 0 || !(q = blk_of(machine)))
        return NULL;
    if (a[0] >= machine->m.ncpus)
        return PyErr_Format(PyExc_ValueError, "no CPU %llu", (unsigned long long)a[0]);
    shi_blk_stats(&machine->m, q, (uint32_t)a[0], &s);
    const uint64_t all[] = { s.submitted, s.completed, s.ended,      s.elsewhere,
                             s.wrong,     s.ipis,      s.interrupts, s.reported,
                             s.in_flight, s.waiting,   s.doubles };
    return shi_words(all, sizeof all / sizeof *all);
}

PyMethodDef shi_blk_methods[] = {
    { "blk_bytes", (PyCFunction)blk_bytes, METH_NOARGS, "blk_bytes() -> int" },
    ENTRY(blk_set, "blk_set(flags, nr_hw_queues) -> 0 or -errno"),
    ENTRY(blk_submit, "blk_submit(data) -> tag or -errno"),
    ENTRY(blk_complete, "blk_complete(tag) -> 0, 1 or -errno"),
    ENTRY(blk_interrupt, "blk_interrupt(n) -> how many"),
    ENTRY(blk_generate, "blk_generate(n) -> how many were submitted"),
    ENTRY(blk_end, "blk_end() -> [(tag, data, cpu), ...]"),
    ENTRY(blk_counts, "blk_counts(cpu) -> tuple"),
    { NULL, NULL, 0, NULL },
};
