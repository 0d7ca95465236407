/* SPDX-License-Identifier: MIT */
/* The segment's file: made, and grown by arrays. */
#include "py/segment.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "irq/flows.h"
#include "py/chip.h"
#include "py/tables.h"

/* Before a descriptor's text: where the data is, how long that and the text are (arrays.py). */
#define SHI_ARRAY_HEAD 20u

static int size_file(int fd, const struct shi_header *plan)
{
    if (ftruncate(fd, (off_t)plan->array_offset))
        return -errno;
    if (fallocate(fd, 0, 0, (off_t)shi_layout_fixed(plan)))
        return -errno;
    return 0;
}

static PyObject *format_segment(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "fd",        "name",   "cores",       "idle",
                             "doorbell",  "kick",   "kick_signal", "nmi_signal",
                             "chip",      "cookie", "sum_key",     "oversubscribed",
                             "boot_time", "steps",  "arena_bytes", NULL };
    int fd, kick, oversubscribed, steps = 0;
    const char *name;
    PyObject *cores, *chip;
    unsigned idle, doorbell, kick_signal, nmi_signal, cookie;
    unsigned long long sum_key, boot_time, arena_bytes = 0;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "isO!IIpIIOIKpK|pK:format_segment", names,
                                     &fd, &name, &PyList_Type, &cores, &idle, &doorbell, &kick,
                                     &kick_signal, &nmi_signal, &chip, &cookie, &sum_key,
                                     &oversubscribed, &boot_time, &steps, &arena_bytes))
        return NULL;
    Py_ssize_t ncpus = PyList_GET_SIZE(cores), i;
    struct shi_header *plan = PyMem_Calloc(1, sizeof *plan);
    if (!plan)
        return PyErr_NoMemory();
    PyObject *result = NULL;
    if (shi_chip_from_python(chip, &plan->chip) < 0)
        goto out;
    int err = ncpus > SHI_MAX_CPUS || strlen(name) >= sizeof plan->name ||
                      shi_chip_check(&plan->chip, (uint32_t)ncpus)
                  ? -EINVAL
                  : shi_layout_plan(plan, (uint32_t)ncpus, arena_bytes, 0);
    if (!err)
        err = size_file(fd, plan);
    if (err) {
        shi_os_error(-err, name);
        goto out;
    }
    strcpy(plan->name, name);
    plan->doorbell = doorbell;
    plan->kick = (uint32_t)kick;
    plan->kick_signal = kick_signal;
    plan->nmi_signal = nmi_signal;
    plan->cookie = cookie;
    plan->sum_key = sum_key;
    plan->oversubscribed = (uint32_t)oversubscribed;
    plan->boot_time_ns = boot_time;
    shi_clock_calibrate(&plan->clock);
    uint8_t *base =
        mmap(NULL, shi_layout_fixed(plan), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        shi_os_error(errno, name);
        goto out;
    }
    struct shi_header *h = (struct shi_header *)base;
    for (i = 0; i < ncpus; i++) {
        struct shi_slot *slot =
            (struct shi_slot *)(base + plan->slot_offset + (uint64_t)i * SHI_SLOT_BYTES);
        shi_store_relaxed(&slot->core,
                          (uint32_t)PyLong_AsUnsignedLong(PyList_GET_ITEM(cores, i)));
        shi_store_relaxed(&slot->idle, idle);
    }
    memcpy((char *)h + sizeof h->magic, (char *)plan + sizeof h->magic,
           offsetof(struct shi_header, machine_state) - sizeof h->magic);
    shi_store_relaxed(&h->steps, (uint32_t)steps);
    shi_store_relaxed(&h->csd_lock_timeout, SHI_CSD_LOCK_TIMEOUT);
    shi_store_relaxed(&h->host_pid, (uint32_t)getpid());
    shi_store_full(&h->machine_state, SHI_M_NEW);
    /* The magic last: without it nobody takes this for a machine. */
    memcpy(h->magic, plan->magic, sizeof h->magic);
    munmap(base, shi_layout_fixed(plan));
    if (!PyErr_Occurred())
        result = Py_NewRef(Py_None);
out:
    PyMem_Free(plan);
    return result;
}

/* segment_bytes(ncpus, arena_bytes): what a machine of this shape maps. */
static PyObject *segment_bytes(PyObject *module, PyObject *args)
{
    unsigned ncpus;
    unsigned long long arena_bytes, total = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "IK", &ncpus, &arena_bytes))
        return NULL;
    struct shi_header *plan = PyMem_Calloc(1, sizeof *plan);
    if (!plan)
        return PyErr_NoMemory();
    if (!shi_layout_plan(plan, ncpus, arena_bytes, 0))
        total = plan->total_bytes;
    PyMem_Free(plan);
    return PyLong_FromUnsignedLongLong(total);
}

/* ---- arrays ---------------------------------------------------------------------------- */

/* back(offset, length): allocate a range of the file, OSError ENOSPC when it is full. */
METHOD(back)
{
    unsigned long long offset, length;
    if (!PyArg_ParseTuple(arg, "KK", &offset, &length))
        return NULL;
    int err = shi_machine_back(&MACHINE(object)->m, offset, length);
    if (err)
        return shi_os_error(-err, "/dev/shm");
    Py_RETURN_NONE;
}

/* Arrays are allocated one after the other at the end of the file: where it ends now. */
static uint64_t file_end(const struct shi_machine *m)
{
    struct stat file;
    if (m->fd < 0) /* a fork's child has closed it */
        return m->total_bytes;
    return fstat(shi_machine_fd(m), &file) ? 0 : (uint64_t)file.st_size;
}

uint64_t shi_arrays_end(const struct shi_machine *m)
{
    uint64_t end = shi_array_end(m), file = file_end(m);
    return end < file ? end : file;
}

/* add_array(nbytes) -> (index, offset) of a new, zeroed, page-aligned range. */
METHOD(add_array)
{
    struct shi_machine *m = &MACHINE(object)->m;
    unsigned long long bytes = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    uint64_t used = shi_load_acquire(&m->header->array_used);
    uint32_t n = shi_load_acquire(&m->header->narrays);
    /* Anything else is damage, and would put this array where another one is, or leave a
     * hole before it. */
    if (used % SHI_PAGE || used > m->array_bytes || used < MACHINE(object)->array_top ||
        (used && m->array_offset + used > file_end(m)))
        return shi_raise(
            shi_py.LayoutError, 0, -1,
            "no array can be made any more: the header of this machine is damaged");
    if (bytes > m->array_bytes || used > m->array_bytes - bytes) {
        PyErr_Format(PyExc_MemoryError, "arrays of a machine may have %llu bytes together",
                     (unsigned long long)m->array_bytes);
        return NULL;
    }
    if (n >= SHI_MAX_ARRAYS) {
        PyErr_Format(PyExc_MemoryError, "a machine may have %u arrays", SHI_MAX_ARRAYS);
        return NULL;
    }
    uint64_t end = (used + bytes + SHI_PAGE - 1) / SHI_PAGE * SHI_PAGE;
    int err = shi_machine_back(m, m->array_offset + used, end - used);
    if (err)
        return shi_os_error(-err, "/dev/shm");
    MACHINE(object)->array_top = end;
    shi_store_relaxed(&m->header->array_used, end);
    return Py_BuildValue("(IK)", n, (unsigned long long)(m->array_offset + used));
}

/* publish_array(index, offset): after its descriptor is written. */
METHOD(publish_array)
{
    struct shi_machine *m = &MACHINE(object)->m;
    unsigned index;
    unsigned long long offset;
    if (!PyArg_ParseTuple(arg, "IK", &index, &offset))
        return NULL;
    if (index >= SHI_MAX_ARRAYS) {
        PyErr_SetString(PyExc_ValueError, "index");
        return NULL;
    }
    shi_store_relaxed(&m->header->arrays[index], offset);
    /* Release: who reads the count finds the descriptors. */
    shi_store_release(&m->header->narrays, index + 1);
    Py_RETURN_NONE;
}

/* find_array(about) -> offset of the first descriptor whose text begins so, -1: none has it;
 * LayoutError: one is not where arrays are. */
METHOD(find_array)
{
    struct shi_machine *m = &MACHINE(object)->m;
    /* Acquire pairs with publish_array's release: the descriptors. */
    uint32_t n = shi_load_acquire(&m->header->narrays), i;
    uint64_t end = shi_arrays_end(m);
    Py_ssize_t length;
    char *about;
    if (PyBytes_AsStringAndSize(arg, &about, &length) < 0)
        return NULL;
    for (i = 0; i < n && i < SHI_MAX_ARRAYS; i++) {
        uint64_t at = shi_load_relaxed(&m->header->arrays[i]);
        /* Beyond the end the file may end, and a look there is a SIGBUS. */
        if (at < m->array_offset || at > end || end - at < SHI_ARRAY_HEAD)
            return shi_raise(
                shi_py.LayoutError, 0, -1,
                "the description of a shared array is damaged: outside the arrays");
        if ((uint64_t)length <= end - at - SHI_ARRAY_HEAD &&
            !memcmp(m->base + at + SHI_ARRAY_HEAD, about, (size_t)length))
            return PyLong_FromUnsignedLongLong(at);
    }
    return PyLong_FromLong(-1);
}

/* Offset of an address in the mapping, or -1. */
METHOD(offset_of)
{
    struct shi_machine *m = &MACHINE(object)->m;
    unsigned long long address = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    uint64_t base = (uint64_t)(uintptr_t)m->base;
    if (address < base || address >= base + m->total_bytes)
        return PyLong_FromLong(-1);
    return PyLong_FromUnsignedLongLong(address - base);
}

PyMethodDef shi_segment_methods[] = {
    MANY(back, "back(offset, length)"),
    ONE(add_array, "add_array(nbytes) -> (index, offset)"),
    MANY(publish_array, "publish_array(index, offset)"),
    ONE(find_array, "find_array(about) -> offset of the descriptor that begins so, or -1"),
    ONE(offset_of, "offset_of(address) -> offset or -1"),
    { NULL, NULL, 0, NULL },
};

PyMethodDef shi_segment_functions[] = {
    { "segment_bytes", segment_bytes, METH_VARARGS,
      "segment_bytes(ncpus, arena_bytes) -> int" },
    { "format_segment", (PyCFunction)(void (*)(void))format_segment,
      METH_VARARGS | METH_KEYWORDS,
      "Size the file of a new machine, allocate its fixed part, write its header." },
    { NULL, NULL, 0, NULL },
};
