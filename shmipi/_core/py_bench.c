/* SPDX-License-Identifier: MIT */
#include "py_shi.h"
PyMethodDef shi_bench_methods[] = {{NULL, NULL, 0, NULL}};
PyMethodDef shi_bench_functions[] = {{NULL, NULL, 0, NULL}};
int shi_bench_types(PyObject *module)
{
    (void)module;
    return 0;
}
