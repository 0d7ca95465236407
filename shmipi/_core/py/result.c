/* SPDX-License-Identifier: MIT */
/* Results, on the sender. */
#include "py/result.h"

#include <unistd.h>

#include "py/codec.h"
#include "smp/lend.h"

/* Copied by a system call: what was lent by a process that is dead may be a hole in the
 * file by now, and touching one when /dev/shm is full is a SIGBUS. */
static PyObject *read_arena(const struct shi_machine *m, const struct shi_ref *ref)
{
    uint64_t at = m->region_offset + ref->cpu * m->region_bytes + m->arena_offset + ref->offset;
    PyObject *copy = PyBytes_FromStringAndSize(NULL, ref->length);
    uint32_t done = 0;
    int fd = shi_machine_fd(m);
    while (copy && done < ref->length) {
        ssize_t n =
            pread(fd, PyBytes_AS_STRING(copy) + done, ref->length - done, (off_t)(at + done));
        if (n > 0) {
            done += (uint32_t)n;
        } else if (n == 0 || errno != EINTR) {
            int err = errno;
            Py_DECREF(copy);
            return n ? shi_os_error(err, "the machine's segment")
                     : shi_raise(shi_py.LayoutError, 0, ref->cpu,
                                 "a result is damaged (length)");
        }
    }
    return copy;
}

/* A result that `dst` lends. */
static PyObject *lent(Machine *machine, uint32_t dst, const struct shi_ref *ref)
{
    const struct shi_machine *m = &machine->m;
    struct shi_ref mine = *ref;
    if (mine.cpu != dst || !shi_payload(m, dst, &mine))
        return shi_raise(shi_py.LayoutError, 0, (int)dst, "a result lies outside its arena");
    PyObject *copy = read_arena(m, &mine);
    /* Copied first, checked second: another process in the slot writes where it likes. */
    if (!copy || shi_checksum(m, PyBytes_AS_STRING(copy), mine.length) == mine.sum)
        return copy;
    Py_DECREF(copy);
    if ((uint16_t)shi_load_acquire(&shi_slot(m, dst)->generation) != mine.gen)
        return shi_raise(shi_py.DiedError, EOWNERDEAD, (int)dst,
                         "CPU %u died after this call had run, and its result with it", dst);
    return shi_raise(shi_py.LayoutError, 0, (int)dst, "a result is damaged (checksum)");
}

/* Under the GIL from the look at the csd to the end of its copy, as whoever collects it:
 * no thread reads a block that another gives back. */
void shi_read_early(Machine *machine, uint32_t dst)
{
    struct shi_self *self = &machine->self;
    uint32_t i, top = self->sender.csd_top;
    shi_enter(self);
    shi_csd_collect(self); /* what nobody will ask for */
    shi_leave(self);
    if (!machine->early && !(machine->early = PyDict_New()))
        PyErr_Clear();
    for (i = 0; machine->early && i < top; i++) {
        struct shi_csd *csd = shi_own_csd(self, i);
        if (shi_load_acquire(&csd->lock) & (SHI_CSD_LOCK | SHI_CSD_DIED) ||
            !(shi_load_relaxed(&csd->status) & SHI_S_LENT) || csd->kind != SHI_K_PICKLE ||
            csd->value.ref.cpu != dst ||
            self->sender.notes[i]
                .left) /* unlocked since the look above: nobody would take it */
            continue;
        PyObject *bytes = lent(machine, dst, &csd->value.ref);
        PyObject *key = bytes ? PyLong_FromUnsignedLong(i) : NULL;
        if (key && PyDict_SetItem(machine->early, key, bytes) == 0) {
            csd->kind = SHI_K_EARLY;
            shi_enter(self);
            shi_lend_done(self, csd);
            shi_leave(self);
        }
        PyErr_Clear(); /* damaged, or no memory: for whoever asks for it */
        Py_XDECREF(key);
        Py_XDECREF(bytes);
    }
}

static PyObject *take_early(Machine *machine, uint32_t local)
{
    PyObject *key = machine->early ? PyLong_FromUnsignedLong(local) : NULL;
    PyObject *bytes = key ? Py_XNewRef(PyDict_GetItemWithError(machine->early, key)) : NULL;
    if (bytes && PyDict_DelItem(machine->early, key) < 0)
        Py_CLEAR(bytes);
    Py_XDECREF(key);
    return bytes;
}

void shi_drop_early(Machine *machine, uint32_t local)
{
    if (__builtin_expect(machine->early && PyDict_GET_SIZE(machine->early), 0)) {
        PyObject *pending = PyErr_Occurred() ? shi_take_exception() : NULL;
        Py_XDECREF(take_early(machine, local));
        PyErr_Clear();
        shi_put_exception(pending);
    }
}

static PyObject *result_bytes(Machine *machine, uint32_t local, uint8_t status, uint32_t dst)
{
    const struct shi_csd *csd = shi_own_csd(&machine->self, local);
    if (csd->kind == SHI_K_EARLY) {
        PyObject *bytes = take_early(machine, local);
        if (bytes || PyErr_Occurred())
            return bytes;
    }
    if (csd->kind != SHI_K_PICKLE)
        return shi_raise(shi_py.LayoutError, 0, (int)dst, "a result is damaged");
    return status & SHI_S_LENT ? lent(machine, dst, &csd->value.ref)
                               : shi_payload_bytes(machine, machine->self.id, &csd->value.ref);
}

PyObject *shi_result(Machine *machine, uint32_t local, uint32_t dst, uint8_t apply)
{
    struct shi_csd *csd = shi_own_csd(&machine->self, local);
    uint64_t lock = shi_load_relaxed(&csd->lock);
    if (lock & SHI_CSD_DIED)
        return shi_raise_died(machine, (int)dst, lock);
    uint8_t status = shi_load_relaxed(&csd->status);
    switch (status & ~SHI_S_LENT) {
    case SHI_S_DONE:
        break;
    case SHI_S_RAISED: {
        PyObject *bytes = result_bytes(machine, local, status, dst);
        if (!bytes)
            return NULL;
        PyObject *error = PyObject_CallFunction(shi_py.load_exception, "Ni", bytes, (int)dst);
        shi_put_exception(error);
        return NULL;
    }
    case SHI_S_CANCELLED:
        return shi_raise(shi_py.CancelledError, ECANCELED, (int)dst,
                         "the task on CPU %u was cancelled", dst);
    case SHI_S_GONE:
        return shi_raise(shi_py.OfflineError, ENOENT, (int)dst,
                         "CPU %u went offline before its stopper came to this: it has not run",
                         dst);
    case SHI_S_NOFUNC:
        return shi_raise(shi_py.LayoutError, 0, (int)dst, "CPU %u does not know this function",
                         dst);
    case SHI_S_UNSENT:
        return shi_raise(
            shi_py.ArenaError, ENOSPC, (int)dst,
            "the call has run on CPU %u, but there is no memory to send its result "
            "in: put large data in cluster.shared(), or make /dev/shm larger (mount "
            "-o remount,size=... /dev/shm, docker run --shm-size=...)",
            dst);
    case SHI_S_NOMEM:
        return shi_raise(
            shi_py.ArenaError, ENOMEM, (int)dst,
            "CPU %u has no memory left to take the call, or to say what it raised: "
            "it may or may not have run",
            dst);
    default:
        return shi_raise(shi_py.LayoutError, 0, (int)dst,
                         "CPU %u could not read the call: the segment is damaged", dst);
    }
    if ((apply & ~SHI_A_INLINE_FUNC) == SHI_A_INFO)
        Py_RETURN_NONE;
    if (!(status & SHI_S_LENT) && csd->kind != SHI_K_EARLY)
        return shi_decode(machine, machine->self.id, csd->kind, csd->length, &csd->value);
    PyObject *bytes = result_bytes(machine, local, status, dst);
    PyObject *object = bytes ? PyObject_CallOneArg(shi_py.loads, bytes) : NULL;
    Py_XDECREF(bytes);
    return object;
}
