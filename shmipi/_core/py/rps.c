/* SPDX-License-Identifier: MIT */
/* Receive packet steering: shmipi/users/rps.py. */
#include "py/net.h"

#include "users/rps.h"
#include "py/tables.h"

static struct shi_rps *rps_of(Machine *machine)
{
    struct shi_rps *rps = shi_rps(&machine->m);
    if (!rps)
        shi_raise(shi_py.StateError, 0, -1,
                  "this machine has no RPS: cluster.users.rps makes it");
    return rps;
}

METHOD_FAST(rps_bytes)
{
    uint64_t a[2];
    if (shi_numbers(machine, args, nargs, 2, a) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(
        shi_rps_bytes(&machine->m, (uint32_t)a[0], (uint32_t)a[1]));
}

METHOD_FAST(rps_init)
{
    uint64_t a[3];
    if (shi_numbers(machine, args, nargs, 3, a) < 0)
        return NULL;
    return PyLong_FromLongLong(shi_rps_init(&machine->m, a[0], (uint32_t)a[1], (uint32_t)a[2]));
}

/* rps_set_map(cpu, ...) */
METHOD_FAST(rps_set_map)
{
    struct shi_rps *rps;
    Py_ssize_t i;
    int err;
    if (shi_use(machine) < 0 || !(rps = rps_of(machine)))
        return NULL;
    uint32_t *cpus = PyMem_Calloc((size_t)nargs + 1, sizeof *cpus);
    if (!cpus)
        return PyErr_NoMemory();
    for (i = 0; i < nargs && !PyErr_Occurred(); i++) {
        unsigned long cpu = PyLong_AsUnsignedLong(args[i]);
        cpus[i] = cpu < UINT32_MAX ? (uint32_t)cpu : UINT32_MAX;
    }
    err = PyErr_Occurred() ? 0 : shi_rps_set_map(&machine->m, rps, cpus, (uint32_t)nargs);
    PyMem_Free(cpus);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(err);
}

/* rps_set(what, value): 0 sock flows, 1 dev flows, 2 max_backlog, 3 weight, 4 budget,
 * 5 flow_limit_table_len, 6 flow limit of a CPU: its number << 1 | on */
METHOD_FAST(rps_set)
{
    uint64_t a[2];
    struct shi_rps *rps;
    int err = -EINVAL;
    if (shi_numbers(machine, args, nargs, 2, a) < 0 || !(rps = rps_of(machine)))
        return NULL;
    uint32_t value = a[1] < INT32_MAX ? (uint32_t)a[1] : INT32_MAX;
    switch (a[0]) {
    case 0:
        err = shi_rps_set_sock_flows(&machine->m, rps, a[1]);
        break;
    case 1:
        err = shi_rps_set_dev_flows(&machine->m, rps, a[1]);
        break;
    case 2:
        if (value <= rps->backlog)
            shi_store_relaxed(&rps->max_backlog, value), err = 0;
        break;
    case 3:
    case 4:
        if (value)
            shi_store_relaxed(a[0] == 3 ? &rps->weight : &rps->budget, value), err = 0;
        break;
    case 5:
        err = shi_rps_flow_limit_len(rps, a[1]);
        break;
    case 6:
        err = shi_rps_flow_limit(&machine->m, rps, value >> 1, value & 1);
        break;
    }
    return PyLong_FromLongLong(err);
}

METHOD_FAST(rps_record)
{
    uint64_t a[2];
    struct shi_rps *rps;
    if (shi_numbers(machine, args, nargs, 2, a) < 0 || !(rps = rps_of(machine)))
        return NULL;
    if (a[1] < machine->m.ncpus)
        shi_rps_record(&machine->m, rps, (uint32_t)a[0], (uint32_t)a[1]);
    Py_RETURN_NONE;
}

/* rps_cpu(hash) -> what get_rps_cpu says now, -1: none */
METHOD_FAST(rps_cpu)
{
    uint64_t a[1];
    struct shi_rps *rps;
    if (shi_numbers(machine, args, nargs, 1, a) < 0 || !(rps = rps_of(machine)))
        return NULL;
    return PyLong_FromLongLong(shi_rps_cpu(&machine->m, rps, (uint32_t)a[0]));
}

/* netif_rx(hash, data, receive) -> 0, 1: dropped, or -errno */
METHOD_FAST(netif_rx)
{
    uint64_t a[3];
    struct shi_net *net;
    struct shi_rps *rps;
    if (shi_numbers_here(machine, args, nargs, 3, a, &net) < 0 || !(rps = rps_of(machine)))
        return NULL;
    return PyLong_FromLongLong(
        shi_netif_rx(&machine->self, net, rps, (uint32_t)a[0], a[1], a[2] != 0, false));
}

/* rps_generate(hash, nflows, n, receive) -> how many were handed in */
METHOD_FAST(rps_generate)
{
    uint64_t a[4];
    struct shi_net *net;
    struct shi_rps *rps;
    if (shi_numbers_here(machine, args, nargs, 4, a, &net) < 0 || !(rps = rps_of(machine)))
        return NULL;
    return PyLong_FromLongLong(shi_rps_generate(&machine->self, net, rps, (uint32_t)a[0],
                                                a[1] ? (uint32_t)a[1] : 1, a[2], a[3] != 0));
}

/* rps_queue_head(cpu, value): set both ends of its queue's count, as after so many packets */
METHOD_FAST(rps_counts)
{
    uint64_t a[1];
    struct shi_rps *rps;
    struct shi_rps_stats s;
    if (shi_numbers(machine, args, nargs, 1, a) < 0 || !(rps = rps_of(machine)))
        return NULL;
    if (a[0] >= machine->m.ncpus)
        return PyErr_Format(PyExc_ValueError, "no CPU %llu", (unsigned long long)a[0]);
    shi_rps_stats(&machine->m, rps, (uint32_t)a[0], &s);
    const uint64_t all[] = { s.in,       s.delivered,    s.dropped,      s.died,
                             s.queued,   s.ipis,         s.received_rps, s.time_squeeze,
                             s.requeued, s.flow_limited, s.processed };
    return shi_words(all, sizeof all / sizeof *all);
}

METHOD_FAST(rps_set_count)
{
    uint64_t a[2];
    struct shi_rps *rps;
    if (shi_numbers(machine, args, nargs, 2, a) < 0 || !(rps = rps_of(machine)))
        return NULL;
    return PyLong_FromLongLong(shi_rps_set_count(&machine->m, rps, (uint32_t)a[0], a[1]));
}

PyMethodDef shi_rps_methods[] = {
    ENTRY(rps_bytes, "rps_bytes(backlog, flows) -> int"),
    ENTRY(rps_init, "rps_init(at, backlog, flows) -> 0 or -errno"),
    ENTRY(rps_set_map, "rps_set_map(cpu, ...) -> 0 or -errno"),
    ENTRY(rps_set, "rps_set(what, value) -> 0 or -errno"),
    ENTRY(rps_record, "rps_record(hash, cpu)"),
    ENTRY(rps_cpu, "rps_cpu(hash) -> CPU or -1"),
    ENTRY(netif_rx, "netif_rx(hash, data, receive) -> 0, 1 or -errno"),
    ENTRY(rps_generate, "rps_generate(hash, nflows, n, receive) -> how many"),
    ENTRY(rps_counts, "rps_counts(cpu) -> tuple"),
    ENTRY(rps_set_count, "rps_set_count(cpu, count) -> 0 or -errno"),
    { NULL, NULL, 0, NULL },
};
