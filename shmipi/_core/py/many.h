/* SPDX-License-Identifier: MIT */
/* smp_call_function_many_cond and everything over it. */
#ifndef SHI_PY_MANY_H
#define SHI_PY_MANY_H

#include "py/base.h"

shi_smp_function shi_call_mask, shi_call_others, shi_each_cpu, shi_each_cpu_mask;
shi_smp_function shi_each_cpu_cond_mask;

#endif
