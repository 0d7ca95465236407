/* SPDX-License-Identifier: MIT */
/* Histograms for Python. */
#ifndef SHI_PY_HIST_H
#define SHI_PY_HIST_H

#include "py/base.h"

#include "base/hist.h"

typedef struct {
    PyObject_HEAD
    struct shi_hist *h;
} Hist;

/* A new, empty Hist, or NULL with an exception. */
Hist *shi_hist_make(void);
int shi_hist_types(PyObject *module);

#endif
