/* SPDX-License-Identifier: MIT */
/* The segment's file: made, and grown by arrays. */
#ifndef SHI_PY_SEGMENT_H
#define SHI_PY_SEGMENT_H

#include "py/base.h"

/* Where the arrays end, as the header says, but not beyond the file: a look there is a
 * SIGBUS. */
uint64_t shi_arrays_end(const struct shi_machine *m);

#endif
