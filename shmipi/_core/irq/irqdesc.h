/* SPDX-License-Identifier: MIT */
/*
 * irq descriptors: who handles a line that an IPI domain gave out.  The table lies in
 * the segment and is the machine's; it is changed under a lock that outlives nobody: who
 * finds its holder dead takes it over.
 */
#ifndef SHI_IRQDESC_H
#define SHI_IRQDESC_H

#include "base/machine.h"

static inline uint64_t shi_line_count_offset(const struct shi_machine *m)
{
    return m->irq_offset + sizeof(struct shi_irq_area);
}

static inline uint64_t shi_affinity_offset(const struct shi_machine *m)
{
    return shi_line_count_offset(m) + shi_line_count_bytes(m->ncpus);
}

struct shi_irqdesc *shi_irqdesc(const struct shi_machine *m, uint32_t virq);

/* Take the lock of the tables, interrupts off: 0, -EAGAIN when a live process holds it.  What
 * a holder has left half made, or half freed, is freed: by who takes it from the dead, and by
 * a holder that gives it back because something failed. */
int shi_irq_trylock(struct shi_self *self);
void shi_irq_unlock(struct shi_self *self);
/* Free the descriptors, and their lines, that `undo` names.  The lock is held. */
void shi_irq_free_undo(struct shi_self *self);

/* Publish or withdraw the handler.  The table's lock is held. */
void shi_irqdesc_set_native(struct shi_irqdesc *desc, uint32_t native, uint32_t kind,
                            uint64_t info, uint32_t stride);
void shi_irqdesc_set_python(struct shi_self *self, struct shi_irqdesc *desc, uint32_t func,
                            uint32_t serial);
/* Whoever it comes to does what taking `line` means there. */
void shi_irqdesc_set_line(struct shi_irqdesc *desc, uint32_t line);
void shi_irqdesc_clear(struct shi_irqdesc *desc);
/* Who handles it, all of one request: action, func, serial, src, src_gen, kind, info and
 * stride; nothing else of `seen` is filled.  False, and nobody: it is being replaced, and who
 * does that is slow, or dead. */
bool shi_irqdesc_read(const struct shi_irqdesc *desc, struct shi_irqdesc *seen);

/* Does the process that requested it with a Python handler live?  Of what _read gave. */
bool shi_irqdesc_requester_lives(const struct shi_machine *m, const struct shi_irqdesc *desc);
/* Before a line is given to `virq`, and when it is given back: masked and not pending, and
 * counted from zero; at every CPU, or at those of the irq where others have the line at
 * other CPUs. */
void shi_irqdesc_reset_line(struct shi_self *self, uint32_t line, uint32_t virq);
/* How often `cpu` has taken a line since it was given to its irq. */
uint64_t shi_irqdesc_taken(const struct shi_machine *m, uint32_t cpu, uint32_t line);
/* Whose a line is at this CPU: its irq, or 0. */
uint32_t shi_irqdesc_virq(const struct shi_self *self, uint32_t line);

/* Lines of irqs are this file's.  Native: run; Python: run, or put off, and then the line is
 * ended later, by shi_chip_end. */
void shi_irqdesc_register(struct shi_machine *m);
/* Run the native handler of what _read gave: false when it has none. */
bool shi_irqdesc_run_native(struct shi_self *self, const struct shi_irqdesc *desc);
/* The next line whose Python handler was put off, or SHI_NO_LINE. */
uint32_t shi_irqdesc_pop(struct shi_self *self);
/* Is that line the same irq's as when its handler was put off? */
bool shi_irqdesc_still(const struct shi_self *self, uint32_t line);

/* Interrupt the coprocessor whose irq is `virq`: 0, or -ENXIO when it is not there. */
int shi_coproc_raise(struct shi_self *self, uint32_t coproc, uint32_t virq);
/* The firmware: a coprocessor's process has been waited for. */
void shi_coproc_ended(const struct shi_self *self, uint32_t pid);
/* The machine stops: let each of them look. */
void shi_coproc_ring_all(const struct shi_machine *m);

#endif
