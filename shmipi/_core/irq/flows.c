/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <string.h>

#include "irq/chip.h"
#include "irq/flows.h"

#define X(kind, name) extern const struct shi_flow shi_flow_##name;
SHI_FLOWS(X)
#undef X

static const struct shi_flow *const flows[SHI_NFLOWS] = {
#define X(kind, name) [SHI_FLOW_##kind] = &shi_flow_##name,
    SHI_FLOWS(X)
#undef X
};

const struct shi_flow *shi_flow_of(uint32_t kind)
{
    return kind < SHI_NFLOWS ? flows[kind] : NULL;
}

int shi_chip_check(const struct shi_chip *chip, uint32_t ncpus)
{
    const struct shi_flow *flow = shi_flow_of(chip->flow);
    uint32_t span = chip->per_cpu ? ncpus : 1;
    const uint32_t lines[] = { chip->call_single, chip->call, chip->reschedule };
    size_t i;
    if (!flow || !chip->name[0] || !memchr(chip->name, 0, sizeof chip->name) ||
        chip->nlines > flow->max_lines || chip->nrows > SHI_NROWS || span > SHI_NLINES)
        return -EINVAL;
    for (i = 0; i < sizeof lines / sizeof *lines; i++)
        if (lines[i] >= chip->nlines || lines[i] + span > chip->nlines)
            return -EINVAL;
    if (chip->nmi != SHI_NO_LINE &&
        (chip->nmi >= chip->nlines || chip->nmi + span > chip->nlines))
        return -EINVAL;
    if (chip->banked && (!flow->banked || ncpus > flow->banked))
        return -EINVAL;
    return 0;
}
