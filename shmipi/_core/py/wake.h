/* SPDX-License-Identifier: MIT */
/* wake_up_if_idle, wake_up_all_idle_cpus, cpus_peek_for_pending_ipi; IPIs that are put off. */
#ifndef SHI_PY_WAKE_H
#define SHI_PY_WAKE_H

#include "py/base.h"

shi_smp_function shi_wake_if_idle, shi_wake_all_idle, shi_peek_for_pending, shi_flag_ipis,
    shi_signal_pending;

#endif
