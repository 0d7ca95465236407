/* SPDX-License-Identifier: MIT */
/* What ps shows of a CPU, written by its process without Python. */
#ifndef SHI_PY_TITLE_H
#define SHI_PY_TITLE_H

#include <stdint.h>

/* In the firmware, after it has been given a title (shmipi/machine/title.py): find out where
 * that stands.  Where it cannot be found, CPUs bear the firmware's. */
void shi_title_find(void);
/* In a CPU's process. */
void shi_title_show(const char *machine, uint32_t cpu);

#endif
