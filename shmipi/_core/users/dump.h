/* SPDX-License-Identifier: MIT */
/*
 * What CPUs say of themselves from an NMI: text, into memory that they share.
 *
 * It is made in private memory and then copied to a place that nobody else has, so that CPUs
 * that dump at the same time do not wait for each other.
 */
#ifndef SHI_DUMP_H
#define SHI_DUMP_H

#include "base/machine.h"

#define SHI_DUMP_TEXT 6144u /* bytes of one CPU's, at most */

struct shi_dump {
    shi_a64 given; /* number of the round << 32 | bytes of the room given out */
    uint32_t room; /* bytes behind the table */
    uint32_t ncpus;
    struct {
        shi_a32 at; /* 1 + where, 0: it has said nothing */
        shi_a32 length;
    } cpu[];
};

/* Bytes of one for so many CPUs; a multiple of a line. */
uint64_t shi_dump_bytes(uint32_t ncpus);
void shi_dump_init(struct shi_dump *dump, uint32_t ncpus);
/* Forget all: a new round.  Who is late, of the one before, says nothing any more. */
void shi_dump_begin(struct shi_dump *dump);
/* The text of a CPU, of `length` bytes; NULL: none, or damaged. */
const char *shi_dump_text(const struct shi_dump *dump, uint32_t cpu, uint32_t *length);

/* Of this CPU, by itself.  `title` stands before its number.  `round`: of the caller's look
 * (shi_dump_round), before it knew that it is asked.  Async-signal-safe. */
void shi_dump_here(struct shi_self *self, struct shi_dump *dump, uint32_t round,
                   const char *title);
static inline uint32_t shi_dump_round(const struct shi_dump *dump)
{
    return (uint32_t)(shi_load_acquire(&dump->given) >> 32);
}

#endif
