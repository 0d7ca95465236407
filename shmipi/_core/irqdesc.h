/* SPDX-License-Identifier: MIT */
/*
 * irq descriptors: who handles a line that an IPI domain gave out.  The table lies in
 * the segment and is the machine's; it is changed under a lock that outlives nobody: who
 * finds its holder dead takes it over.
 */
#ifndef SHI_IRQDESC_H
#define SHI_IRQDESC_H

#include "machine.h"

static inline uint64_t shi_affinity_offset(const struct shi_machine *m)
{
    return m->irq_offset + sizeof(struct shi_irq_area);
}

static inline uint32_t shi_affinity_words(uint32_t ncpus)
{
    return (ncpus + 63) / 64;
}

struct shi_irqdesc *shi_irqdesc(const struct shi_machine *m, uint32_t virq);

/* Take the lock of the table: 0, -EAGAIN when a live process holds it. */
int shi_irq_trylock(struct shi_self *self);
void shi_irq_unlock(struct shi_self *self);

/* Publish or withdraw the handler.  The table's lock is held. */
void shi_irqdesc_set_native(struct shi_irqdesc *desc, uint32_t native, uint32_t kind,
                            uint64_t info);
void shi_irqdesc_set_python(struct shi_self *self, struct shi_irqdesc *desc, uint32_t func,
                            uint32_t serial);
/* Whoever it comes to does what taking `line` means there. */
void shi_irqdesc_set_line(struct shi_irqdesc *desc, uint32_t line);
void shi_irqdesc_clear(struct shi_irqdesc *desc);

/* A line of an irq was taken.  Native: run; Python: run, or put off.  False: the line is
 * ended later, by shi_chip_end. */
bool shi_irqdesc_handle(struct shi_self *self, uint32_t line);
/* Run the native handler of `desc`: false when it has none. */
bool shi_irqdesc_run_native(struct shi_self *self, const struct shi_irqdesc *desc);
/* The next line whose Python handler was put off, or SHI_NO_LINE. */
uint32_t shi_irqdesc_pop(struct shi_self *self);

/* Interrupt a coprocessor: 0, or -ENXIO for one that is not there. */
int shi_coproc_raise(struct shi_self *self, uint32_t coproc);

#endif
