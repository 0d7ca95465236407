/* SPDX-License-Identifier: MIT */
/* Measuring for Python: what py/limit.c (histograms, clocks, raw limits) lends py/bench.c. */
#ifndef SHI_PY_BENCH_H
#define SHI_PY_BENCH_H

#include "py/shi.h"

#include "base/hist.h"

typedef struct {
    PyObject_HEAD struct shi_hist *h;
} Hist;

/* A new, empty Hist, or NULL with an exception. */
Hist *shi_hist_make(void);
extern PyMethodDef shi_limit_functions[];
int shi_limit_types(PyObject *module);

#endif
