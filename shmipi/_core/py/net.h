/* SPDX-License-Identifier: MIT */
/* What the bindings of RPS, cpumap and the block layer have in common: numbers in, numbers out. */
#ifndef SHI_PY_NET_H
#define SHI_PY_NET_H

#include "py/base.h"

#include "users/net.h"

#define METHOD_FAST(name)                                                                      \
    static PyObject *name(Machine *machine, PyObject *const *args, Py_ssize_t nargs)
#define ENTRY(name, text) { #name, FAST(name), METH_FASTCALL, text }

/* Numbers from 0 on, `n` of them: 0, or -1 with an exception. */
int shi_numbers(Machine *machine, PyObject *const *args, Py_ssize_t nargs, Py_ssize_t n,
                uint64_t *out);
/* The same of what works on the own CPU; with its packets, unless `net` is NULL. */
int shi_numbers_here(Machine *machine, PyObject *const *args, Py_ssize_t nargs, Py_ssize_t n,
                     uint64_t *out, struct shi_net **net);
/* A tuple of numbers. */
PyObject *shi_words(const uint64_t *from, size_t n);

/* The program of a cpumap's entry, on a packet: enum shi_xdp. */
uint32_t shi_run_xdp(Machine *machine, uint64_t entry, uint32_t hash, uint64_t data);

#endif
