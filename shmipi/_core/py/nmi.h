/* SPDX-License-Identifier: MIT */
/* The Python handlers of NMIs. */
#ifndef SHI_PY_NMI_H
#define SHI_PY_NMI_H

#include "py/base.h"

/* Those of the NMI that is in service, and of those after it. */
void shi_run_nmi(Machine *machine);
/* A CPU waits in a context that takes no NMIs: if an NMI IPI asks for it, enter that. */
void shi_run_nmi_ipi(Machine *machine);

#endif
