/* SPDX-License-Identifier: MIT */
/* Timers and tick broadcast: users/tick.c for Python. */
#ifndef SHI_PY_TICK_H
#define SHI_PY_TICK_H

#include "py/base.h"

/* Run the functions of timers that have expired and are Python's. */
void shi_run_timers(Machine *machine);

#endif
