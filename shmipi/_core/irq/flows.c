/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <string.h>

#include "irq/chip.h"
#include "irq/flows.h"

static const struct shi_flow *const flows[SHI_NFLOWS] = {
    [SHI_FLOW_VECTOR] = &shi_flow_vector, [SHI_FLOW_MAILBOX] = &shi_flow_mailbox,
    [SHI_FLOW_MUX] = &shi_flow_mux,       [SHI_FLOW_SGI] = &shi_flow_sgi,
    [SHI_FLOW_SHARED] = &shi_flow_shared, [SHI_FLOW_ESB] = &shi_flow_esb,
};

const struct shi_flow *shi_flow_of(uint32_t kind)
{
    return kind < SHI_NFLOWS ? flows[kind] : NULL;
}

int shi_chip_check(const struct shi_chip *chip, uint32_t ncpus)
{
    uint32_t span = chip->per_cpu ? ncpus : 1;
    const uint32_t lines[] = { chip->call_single, chip->call, chip->reschedule };
    size_t i;
    if (!shi_flow_of(chip->flow) || !chip->name[0] ||
        !memchr(chip->name, 0, sizeof chip->name) || chip->nlines > SHI_NLINES ||
        chip->nrows > SHI_NROWS || span > SHI_NLINES)
        return -EINVAL;
    for (i = 0; i < sizeof lines / sizeof *lines; i++)
        if (lines[i] >= chip->nlines || lines[i] + span > chip->nlines)
            return -EINVAL;
    if (chip->nmi != SHI_NO_LINE &&
        (chip->nmi >= chip->nlines || chip->nmi + span > chip->nlines))
        return -EINVAL;
    /* What each flow keeps per line. */
    if ((chip->flow == SHI_FLOW_SGI && chip->nlines > 16) ||
        (chip->flow == SHI_FLOW_ESB && chip->nlines > SHI_ESB_LINES) ||
        (chip->banked && (chip->flow != SHI_FLOW_SGI || ncpus > 8)))
        return -EINVAL;
    return 0;
}
