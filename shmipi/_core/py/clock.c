/* SPDX-License-Identifier: MIT */
/* The clock of stamps. */
#include "py/base.h"

#include "base/clock.h"
#include "py/tables.h"

static PyObject *stamp(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromUnsignedLongLong(shi_stamp_to_mono(shi_stamp()));
}

static PyObject *timer_cost(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyFloat_FromDouble(shi_timer_cost_ns());
}

static PyObject *clock_source(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyUnicode_FromString(shi_clock_name((int)shi_clock_current.source));
}

/* stamp_to_mono(stamp): CLOCK_MONOTONIC ns of a stamp of this machine's clock. */
static PyObject *stamp_to_mono(PyObject *module, PyObject *arg)
{
    unsigned long long stamp = PyLong_AsUnsignedLongLong(arg);
    (void)module;
    return PyErr_Occurred() ? NULL : PyLong_FromUnsignedLongLong(shi_stamp_to_mono(stamp));
}

PyMethodDef shi_clock_functions[] = {
    { "stamp", stamp, METH_NOARGS,
      "stamp()\n--\n\nNow, in ns of CLOCK_MONOTONIC, by the cheapest clock that all CPUs of a\n"
      "machine agree on." },
    { "timer_cost_ns", timer_cost, METH_NOARGS,
      "timer_cost_ns()\n--\n\nWhat one stamp costs in ns." },
    { "clock_source", clock_source, METH_NOARGS,
      "clock_source()\n--\n\nThe clock behind stamps: tsc, cntvct or monotonic." },
    { "stamp_to_mono", stamp_to_mono, METH_O, "stamp_to_mono(stamp) -> ns" },
    { NULL, NULL, 0, NULL },
};
