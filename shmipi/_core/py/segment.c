/* SPDX-License-Identifier: MIT */
/* Making the segment of a new machine. */
#include "py/shi.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "irq/chip.h"
#include "base/clock.h"
#include "base/trace.h"

static int size_file(int fd, const struct shi_header *plan)
{
    uint64_t bytes = plan->trace_offset + (uint64_t)(plan->ncpus + SHI_EXTRA_SLOTS) *
                                              plan->trace_records *
                                              sizeof(struct shi_trace_record);
    if (ftruncate(fd, (off_t)bytes))
        return -errno;
    if (fallocate(fd, 0, 0, (off_t)shi_layout_fixed(plan)))
        return -errno;
    if (plan->trace_records &&
        fallocate(fd, 0, (off_t)plan->trace_offset, (off_t)(bytes - plan->trace_offset)))
        return -errno;
    return 0;
}

static PyObject *format_segment(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "fd",
                             "name",
                             "cores",
                             "idle",
                             "doorbell",
                             "kick",
                             "kick_signal",
                             "nmi_signal",
                             "chip",
                             "cookie",
                             "sum_key",
                             "oversubscribed",
                             "trace_records",
                             "boot_time",
                             "steps",
                             "arena_bytes",
                             NULL };
    int fd, kick, oversubscribed, steps = 0;
    const char *name;
    PyObject *cores, *chip;
    unsigned idle, doorbell, kick_signal, nmi_signal, cookie, trace_records;
    unsigned long long sum_key, boot_time, arena_bytes = 0;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "isO!IIpIIOIKpIK|pK:format_segment", names, &fd, &name, &PyList_Type,
            &cores, &idle, &doorbell, &kick, &kick_signal, &nmi_signal, &chip, &cookie,
            &sum_key, &oversubscribed, &trace_records, &boot_time, &steps, &arena_bytes))
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
                  : shi_layout_plan(plan, (uint32_t)ncpus, trace_records, arena_bytes, 0);
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

/* segment_bytes(ncpus, trace_records, arena_bytes): what a machine of this shape maps. */
static PyObject *segment_bytes(PyObject *module, PyObject *args)
{
    unsigned ncpus, trace_records;
    unsigned long long arena_bytes, total = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "IIK", &ncpus, &trace_records, &arena_bytes))
        return NULL;
    struct shi_header *plan = PyMem_Calloc(1, sizeof *plan);
    if (!plan)
        return PyErr_NoMemory();
    if (!shi_layout_plan(plan, ncpus, trace_records, arena_bytes, 0))
        total = plan->total_bytes;
    PyMem_Free(plan);
    return PyLong_FromUnsignedLongLong(total);
}

PyMethodDef shi_segment_functions[] = {
    { "segment_bytes", segment_bytes, METH_VARARGS,
      "segment_bytes(ncpus, trace_records, arena_bytes) -> int" },
    { "format_segment", (PyCFunction)(void (*)(void))format_segment,
      METH_VARARGS | METH_KEYWORDS,
      "Size the file of a new machine, allocate its fixed part, write its header." },
    { NULL, NULL, 0, NULL },
};
