/* SPDX-License-Identifier: MIT */
/* Packets, and cpumap: shmipi/users/cpumap.py. */
#include "py/net.h"

#include "users/cpumap.h"
#include "py/handler.h"
#include "py/tables.h"

int shi_numbers(Machine *machine, PyObject *const *args, Py_ssize_t nargs, Py_ssize_t n,
                uint64_t *out)
{
    Py_ssize_t i;
    if (shi_use(machine) < 0)
        return -1;
    if (nargs != n) {
        PyErr_Format(PyExc_TypeError, "%zd numbers", n);
        return -1;
    }
    for (i = 0; i < n; i++) {
        out[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

int shi_numbers_here(Machine *machine, PyObject *const *args, Py_ssize_t nargs, Py_ssize_t n,
                     uint64_t *out, struct shi_net **net)
{
    if (shi_numbers(machine, args, nargs, n, out) < 0 ||
        shi_refuse_host(machine, "the host is no CPU: it gets no packets") < 0)
        return -1;
    if (net && !(*net = shi_net(&machine->m))) {
        shi_raise(shi_py.StateError, 0, -1,
                  "this machine has no packets: cluster.users makes "
                  "what uses them");
        return -1;
    }
    return 0;
}

PyObject *shi_words(const uint64_t *from, size_t n)
{
    size_t i;
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (i = 0; tuple && i < n; i++) {
        PyObject *one = PyLong_FromUnsignedLongLong(from[i]);
        if (!one)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, one);
    }
    return tuple;
}

static struct shi_cpumap *map_at(Machine *machine, uint64_t at)
{
    struct shi_cpumap *map = shi_cpumap(&machine->m, at);
    if (!map)
        shi_raise(shi_py.LayoutError, 0, -1, "no cpumap can be there: the segment is damaged");
    return map;
}

/* ---- packets ---------------------------------------------------------------------- */

METHOD_FAST(net_bytes)
{
    uint64_t a[2];
    return shi_numbers(machine, args, nargs, 2, a) < 0
               ? NULL
               : PyLong_FromUnsignedLongLong(
                     shi_net_bytes(&machine->m, (uint32_t)a[0], (uint32_t)a[1]));
}

METHOD_FAST(net_init)
{
    uint64_t a[3];
    if (shi_numbers(machine, args, nargs, 3, a) < 0)
        return NULL;
    return PyLong_FromLongLong(shi_net_init(&machine->m, a[0], (uint32_t)a[1], (uint32_t)a[2]));
}

/* net_sockets(on): is what is delivered kept for tasks to read? */
METHOD_FAST(net_sockets)
{
    uint64_t a[1];
    if (shi_numbers(machine, args, nargs, 1, a) < 0)
        return NULL;
    struct shi_net *net = shi_net(&machine->m);
    if (net)
        shi_store_relaxed(&net->sockets, a[0] != 0);
    Py_RETURN_NONE;
}

METHOD_FAST(net_recv)
{
    uint32_t hash[64], got, i;
    uint64_t a[1], data[64];
    struct shi_net *net;
    if (shi_numbers_here(machine, args, nargs, 1, a, &net) < 0)
        return NULL;
    got = shi_net_recv(&machine->self, net, hash, data, a[0] < 64 ? (uint32_t)a[0] : 64);
    PyObject *list = PyList_New(got);
    for (i = 0; list && i < got; i++) {
        PyObject *one = Py_BuildValue("IK", hash[i], (unsigned long long)data[i]);
        if (!one)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, one);
    }
    return list;
}

/* net_flow(hash) -> (sent, delivered, disorder, doubles) */
METHOD_FAST(net_flow)
{
    uint64_t a[1];
    if (shi_numbers(machine, args, nargs, 1, a) < 0)
        return NULL;
    struct shi_net *net = shi_net(&machine->m);
    struct shi_net_flow *flow = net ? shi_net_flow(&machine->m, net, (uint32_t)a[0]) : NULL;
    if (!flow)
        return Py_BuildValue("KKKK", 0ull, 0ull, 0ull, 0ull);
    return Py_BuildValue("KKKK", (unsigned long long)shi_load_relaxed(&flow->sent),
                         (unsigned long long)shi_load_relaxed(&flow->delivered),
                         (unsigned long long)shi_load_relaxed(&flow->disorder),
                         (unsigned long long)shi_load_relaxed(&flow->doubles));
}

METHOD_FAST(net_nobufs)
{
    uint64_t a[1];
    if (shi_numbers(machine, args, nargs, 1, a) < 0)
        return NULL;
    struct shi_net *net = shi_net(&machine->m);
    return PyLong_FromUnsignedLongLong(
        net && a[0] < machine->m.ncpus ? shi_load_relaxed(&net->cpu[a[0]].nobufs) : 0);
}

/* ---- cpumap ----------------------------------------------------------------------- */

METHOD_FAST(cpumap_bytes)
{
    uint64_t a[1];
    if (shi_numbers(machine, args, nargs, 1, a) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(shi_cpumap_bytes(&machine->m, (uint32_t)a[0]));
}

METHOD_FAST(cpumap_entry_bytes)
{
    uint64_t a[1];
    if (shi_numbers(machine, args, nargs, 1, a) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(shi_cpumap_entry_bytes(&machine->m, (uint32_t)a[0]));
}

METHOD_FAST(cpumap_init)
{
    uint64_t a[2];
    if (shi_numbers(machine, args, nargs, 2, a) < 0)
        return NULL;
    return PyLong_FromLongLong(shi_cpumap_init(&machine->m, a[0], (uint32_t)a[1]));
}

METHOD_FAST(cpumap_check)
{
    uint64_t a[4];
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 4, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    return PyLong_FromLongLong(shi_cpumap_check(&machine->m, map, a[1], a[2], a[3]));
}

METHOD_FAST(cpumap_claim)
{
    uint64_t a[2];
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 2, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    struct shi_net *net = shi_net(&machine->m);
    if (net)
        shi_cpumap_collect(&machine->self, net, map);
    return PyLong_FromLongLong(shi_cpumap_claim(&machine->self, map, (uint32_t)a[1]));
}

METHOD_FAST(cpumap_add)
{
    uint64_t a[3];
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 3, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    return PyLong_FromLongLong(shi_cpumap_add(&machine->self, map, a[1], (uint32_t)a[2]));
}

/* cpumap_install(map, key, entry, qsize, program?): __cpu_map_entry_alloc and _replace */
METHOD_FAST(cpumap_install)
{
    uint64_t a[5];
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 5, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    if (a[1] >= map->max_entries)
        return PyLong_FromLongLong(-E2BIG);
    int err = shi_cpumap_setup(&machine->self, a[2], (uint32_t)a[1], (uint32_t)a[3], a[4] != 0);
    if (!err)
        shi_cpumap_replace(&machine->self, map, (uint32_t)a[1], a[2]);
    return PyLong_FromLongLong(err);
}

/* cpumap_program(entry) -> its number, 0: none */
METHOD_FAST(cpumap_program)
{
    uint64_t a[1];
    if (shi_numbers(machine, args, nargs, 1, a) < 0)
        return NULL;
    const struct shi_cpumap_entry *e = shi_cpumap_entry(&machine->m, a[0]);
    return PyLong_FromUnsignedLong(e ? shi_load_acquire(&e->prog) : 0);
}

/* The program of shmipi/users/cpumap.py: what it says, and with an exception ABORTED. */
uint32_t shi_run_xdp(Machine *machine, uint64_t entry, uint32_t hash, uint64_t data)
{
    static PyObject *function;
    struct handler_scope scope;
    shi_softirq_begin(machine, &scope);
    if (!function) {
        PyObject *module = shi_import("shmipi.users.cpumap");
        function = module ? PyObject_GetAttrString(module, "_run") : NULL;
        Py_XDECREF(module);
    }
    PyObject *verdict = function ? PyObject_CallFunction(function, "OKIK", (PyObject *)machine,
                                                         (unsigned long long)entry, hash,
                                                         (unsigned long long)data)
                                 : NULL;
    shi_leave_if_forked(machine, verdict);
    unsigned long said = verdict ? PyLong_AsUnsignedLong(verdict) : SHI_XDP_ABORTED;
    if (PyErr_Occurred()) { /* trace_xdp_exception() */
        shi_count(&machine->self, SHI_C_unraisable);
        PyErr_WriteUnraisable(function);
        said = SHI_XDP_ABORTED;
    }
    Py_XDECREF(verdict);
    shi_softirq_end(machine, &scope);
    return said < SHI_NXDP ? (uint32_t)said : SHI_XDP_ABORTED;
}

METHOD_FAST(cpumap_delete)
{
    uint64_t a[2];
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 2, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    if (a[1] >= map->max_entries)
        return PyLong_FromLongLong(-EINVAL);
    shi_cpumap_replace(&machine->self, map, (uint32_t)a[1], 0);
    return PyLong_FromLongLong(0);
}

/* cpumap_lookup(map, key) -> (qsize, thread); 0: no entry, no thread */
METHOD_FAST(cpumap_lookup)
{
    uint64_t a[2];
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 2, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    uint64_t at = a[1] < map->max_entries ? shi_load_acquire(&map->entry[a[1]]) : 0;
    struct shi_cpumap_entry *e = at ? shi_cpumap_entry(&machine->m, at) : NULL;
    /* Acquire pairs with start's release: the task is there. */
    const uint64_t all[] = { e ? shi_load_relaxed(&e->qsize) : 0,
                             e ? shi_load_acquire(&e->kthread) : 0 };
    return shi_words(all, 2);
}

/* A CPU hands packets in: `n` numbers, of which the first is the map's place. */
static struct shi_cpumap *map_here(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                                   Py_ssize_t n, uint64_t *a, struct shi_net **net)
{
    return shi_numbers_here(machine, args, nargs, n, a, net) < 0 ? NULL : map_at(machine, a[0]);
}

/* (map, key, flow, a number): to one entry. */
typedef int64_t to_entry(struct shi_self *self, struct shi_net *net, struct shi_cpumap *map,
                         uint32_t key, uint32_t hash, uint64_t number);

static PyObject *redirect(Machine *machine, PyObject *const *args, Py_ssize_t nargs,
                          to_entry *function)
{
    uint64_t a[4];
    struct shi_net *net;
    struct shi_cpumap *map = map_here(machine, args, nargs, 4, a, &net);
    if (!map)
        return NULL;
    if (a[1] >= map->max_entries)
        return PyLong_FromLongLong(-ENOENT);
    return PyLong_FromLongLong(
        function(&machine->self, net, map, (uint32_t)a[1], (uint32_t)a[2], a[3]));
}

METHOD_FAST(cpumap_enqueue)
{
    return redirect(machine, args, nargs, shi_cpumap_enqueue);
}

METHOD_FAST(cpumap_flush)
{
    uint64_t a[1];
    struct shi_net *net;
    struct shi_cpumap *map = map_here(machine, args, nargs, 1, a, &net);
    return map ? PyLong_FromLongLong(shi_cpumap_flush(&machine->self, net, map)) : NULL;
}

METHOD_FAST(cpumap_generate)
{
    return redirect(machine, args, nargs, shi_cpumap_generate);
}

METHOD_FAST(cpumap_collect)
{
    uint64_t a[1];
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 1, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    struct shi_net *net = shi_net(&machine->m);
    if (net)
        shi_cpumap_collect(&machine->self, net, map);
    Py_RETURN_NONE;
}

METHOD_FAST(cpumap_stats)
{
    uint64_t a[1];
    struct shi_cpumap_stats s;
    struct shi_cpumap *map;
    if (shi_numbers(machine, args, nargs, 1, a) < 0 || !(map = map_at(machine, a[0])))
        return NULL;
    shi_cpumap_stats(&machine->m, map, &s);
    const uint64_t all[] = { s.in,
                             s.delivered,
                             s.dropped,
                             s.died,
                             s.queued,
                             s.flushes,
                             s.wakes,
                             s.sleeps,
                             s.runs,
                             s.entries,
                             s.xdp[SHI_XDP_PASS],
                             s.xdp[SHI_XDP_DROP],
                             s.xdp[SHI_XDP_REDIRECT],
                             s.xdp[SHI_XDP_ABORTED] };
    return shi_words(all, sizeof all / sizeof *all);
}

PyMethodDef shi_net_methods[] = {
    ENTRY(net_bytes, "net_bytes(slice, nflows) -> int"),
    ENTRY(net_init, "net_init(at, slice, nflows) -> 0 or -errno"),
    ENTRY(net_sockets, "net_sockets(on): is what is delivered kept for tasks to read?"),
    ENTRY(net_recv, "net_recv(n) -> [(hash, data), ...]"),
    ENTRY(net_flow, "net_flow(hash) -> (sent, delivered, disorder, doubles)"),
    ENTRY(net_nobufs, "net_nobufs(cpu) -> int"),
    ENTRY(cpumap_bytes, "cpumap_bytes(max_entries) -> int"),
    ENTRY(cpumap_entry_bytes, "cpumap_entry_bytes(qsize) -> int"),
    ENTRY(cpumap_init, "cpumap_init(at, max_entries) -> 0 or -errno"),
    ENTRY(cpumap_check, "cpumap_check(map, key, qsize, flags) -> 0 or -errno"),
    ENTRY(cpumap_claim, "cpumap_claim(map, qsize) -> entry or -errno"),
    ENTRY(cpumap_add, "cpumap_add(map, entry, qsize) -> 0 or -errno"),
    ENTRY(cpumap_install, "cpumap_install(map, key, entry, qsize, program?) -> 0 or -errno"),
    ENTRY(cpumap_program, "cpumap_program(entry) -> its number, 0: none"),
    ENTRY(cpumap_delete, "cpumap_delete(map, key) -> 0 or -errno"),
    ENTRY(cpumap_lookup, "cpumap_lookup(map, key) -> (qsize, thread), 0: none"),
    ENTRY(cpumap_enqueue, "cpumap_enqueue(map, key, hash, data) -> 0 or -errno"),
    ENTRY(cpumap_flush, "cpumap_flush(map) -> how many threads were told"),
    ENTRY(cpumap_generate, "cpumap_generate(map, key, hash, n) -> how many, or -errno"),
    ENTRY(cpumap_collect, "cpumap_collect(map)"),
    ENTRY(cpumap_stats, "cpumap_stats(map) -> tuple"),
    { NULL, NULL, 0, NULL },
};
