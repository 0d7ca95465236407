/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>

#include "irq/chip.h"
#include "irq/ipi.h"
#include "irq/irqdesc.h"

/* enum irq_domain_flags of linux/irqdomain.h, as shmipi/irq/table.py stores them. */
#define DOMAIN_IPI_PER_CPU (1u << 2)
#define DOMAIN_IPI_SINGLE (1u << 3)

/* What a send needs of a descriptor, its domain and that one's parents. */
struct ipi {
    const struct shi_irqdesc *desc;
    const shi_a64 *affinity;
    uint32_t epoch, base, count, offset, coproc;
    bool per_cpu;
};

/* Fields that are filled while nobody may use them.  Acquire: `still` below is looked at
 * after them, so that what was read of an irq that was there before and after is its own. */
static uint32_t field(const uint32_t *at)
{
    return shi_load_acquire((const shi_a32 *)at);
}

/* Is every level above `domain` one that sends (irq_chip_send_ipi), up to the controller? */
static bool root_is_reached(const struct shi_irq_area *area, const struct shi_irqdomain *domain)
{
    uint32_t depth, parent = field(&domain->parent);
    for (depth = 0; parent && parent <= SHI_NDOMAINS && depth < SHI_NDOMAINS; depth++) {
        const struct shi_irqdomain *above = &area->domain[parent - 1];
        if (!shi_load_acquire(&above->used) || field(&above->coproc))
            return false;
        parent = field(&above->parent);
        if (!parent)
            return true; /* the controller's own: it raises the line */
        if (!(field(&above->flags) & (DOMAIN_IPI_PER_CPU | DOMAIN_IPI_SINGLE)))
            return false;
    }
    return false;
}

static bool look_up(const struct shi_machine *m, uint32_t virq, struct ipi *ipi)
{
    const struct shi_irq_area *area = shi_irq_area(m);
    const struct shi_irqdesc *desc = virq ? shi_irqdesc(m, virq) : NULL;
    /* Stored last when an irq is made, and first when it is freed. */
    if (!desc || !shi_load_acquire(&desc->used))
        return false;
    uint32_t place = field(&desc->domain);
    ipi->desc = desc;
    ipi->epoch = field(&desc->epoch);
    ipi->base = field(&desc->ipi_base);
    ipi->count = field(&desc->ipi_nr);
    ipi->offset = field(&desc->ipi_offset);
    ipi->affinity = (const shi_a64 *)(m->base + shi_affinity_offset(m)) +
                    (uint64_t)virq * shi_affinity_words(m->ncpus);
    if (ipi->base != virq || !ipi->count || ipi->count > SHI_NR_IRQS - virq || !place ||
        place > SHI_NDOMAINS)
        return false;
    const struct shi_irqdomain *domain = &area->domain[place - 1];
    uint32_t flags = field(&domain->flags);
    if (!shi_load_acquire(&domain->used) || !(flags & (DOMAIN_IPI_PER_CPU | DOMAIN_IPI_SINGLE)))
        return false;
    ipi->per_cpu = flags & DOMAIN_IPI_PER_CPU;
    ipi->coproc = field(&domain->coproc);
    return ipi->coproc ? !field(&domain->parent) && !ipi->per_cpu
                       : root_is_reached(area, domain);
}

/* Is it the reservation that was looked up?  Then all that was read is of that one. */
static bool still(const struct ipi *ipi)
{
    return field(&ipi->desc->epoch) == ipi->epoch && shi_load_acquire(&ipi->desc->used);
}

static uint64_t affinity_word(const struct ipi *ipi, const struct shi_machine *m, uint32_t word)
{
    return word < shi_affinity_words(m->ncpus) ? shi_load_acquire(&ipi->affinity[word]) : 0;
}

/* The line that interrupts `cpu`: SHI_NO_LINE for a gap, false when there is damage. */
static bool line_for(const struct shi_machine *m, const struct ipi *ipi, uint32_t cpu,
                     uint32_t *line)
{
    uint32_t place = ipi->per_cpu ? cpu - ipi->offset : 0;
    if (place >= ipi->count)
        return false;
    *line = field(&ipi->desc[place].hwirq);
    return *line < m->chip.nlines || (*line == SHI_NO_LINE && ipi->per_cpu);
}

/* `group`: of the CPU before, which a write of the same line has reached; or none. */
static void raise_line(struct shi_self *self, uint32_t cpu, uint32_t line, uint32_t *group)
{
    uint32_t per = self->m->chip.group, own = per ? cpu / per : 0;
    if (line == SHI_NO_LINE)
        return;
    if (!group || *group != own)
        shi_count(self, SHI_C_chip_writes);
    if (group)
        *group = own;
    shi_irq_raise(self, cpu, line);
}

int shi_ipi_send_single(struct shi_self *self, uint32_t virq, uint32_t cpu)
{
    const struct shi_machine *m = self->m;
    struct ipi ipi;
    uint32_t line = SHI_NO_LINE;
    if (!look_up(m, virq, &ipi) || !(affinity_word(&ipi, m, cpu / 64) >> (cpu % 64) & 1))
        return -EINVAL;
    if (ipi.coproc)
        return still(&ipi) && !shi_coproc_raise(self, ipi.coproc - 1, virq) ? 0 : -EINVAL;
    if (cpu >= m->ncpus || !line_for(m, &ipi, cpu, &line) || !still(&ipi))
        return -EINVAL;
    raise_line(self, cpu, line, NULL);
    return 0;
}

/* Bits of word `word` of what is sent to; false when the irq is not for some of them. */
static bool wanted(const struct shi_machine *m, const struct ipi *ipi, const uint64_t *mask,
                   uint32_t words, uint32_t word, uint64_t *bits)
{
    uint64_t allowed = affinity_word(ipi, m, word);
    *bits = !mask ? allowed : word < words ? mask[word] : 0;
    return !(*bits & ~allowed);
}

int shi_ipi_send_mask(struct shi_self *self, uint32_t virq, const uint64_t *mask,
                      uint32_t words, bool by_groups)
{
    const struct shi_machine *m = self->m;
    uint32_t word, cpu, line, n = 0, group = UINT32_MAX, most = shi_affinity_words(m->ncpus);
    uint64_t bits;
    struct ipi ipi;
    if (!look_up(m, virq, &ipi))
        return -EINVAL;
    /* All of it is verified before the first CPU is sent to. */
    for (word = 0; word < (words > most ? words : most); word++) {
        if (!wanted(m, &ipi, mask, words, word, &bits))
            return -EINVAL;
        n += (uint32_t)__builtin_popcountll(bits);
        for (; bits; bits &= bits - 1) {
            cpu = word * 64 + (uint32_t)__builtin_ctzll(bits);
            if (!ipi.coproc && (cpu >= m->ncpus || !line_for(m, &ipi, cpu, &line)))
                return -EINVAL;
        }
    }
    if (!still(&ipi))
        return -EINVAL;
    if (ipi.coproc)
        return n && shi_coproc_raise(self, ipi.coproc - 1, virq) ? -EINVAL : 0;
    for (word = 0; word < most; word++) {
        wanted(m, &ipi, mask, words, word, &bits);
        for (; bits; bits &= bits - 1) {
            cpu = word * 64 + (uint32_t)__builtin_ctzll(bits);
            /* Once more: of an irq that is destroyed just now nothing else may be raised. */
            if (cpu < m->ncpus && line_for(m, &ipi, cpu, &line))
                raise_line(self, cpu, line, by_groups && !ipi.per_cpu ? &group : NULL);
        }
    }
    return 0;
}
