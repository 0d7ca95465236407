/* SPDX-License-Identifier: MIT */
/* Which flows there are, and what each asks of a chip's description. */
#ifndef SHI_FLOWS_H
#define SHI_FLOWS_H

#include "base/machine.h"

/* Check a description and find its flow: -EINVAL for one that cannot be. */
int shi_chip_check(const struct shi_chip *chip, uint32_t ncpus);
const struct shi_flow *shi_flow_of(uint32_t kind);

#endif
