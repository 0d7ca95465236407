/* SPDX-License-Identifier: MIT */
/*
 * Code that is changed while CPUs run it: a table of functions in the state of the user
 * "icache", and in each process what it has fetched of that, which is its instruction cache.
 *
 * A call goes by what is cached.  Who replaces a function writes the new one beside the old,
 * publishes its version, has every CPU drop what it has cached (by the controller's line for
 * that, where it has one, else by a call), and then waits for calls that began before.  So
 * nobody runs the old one when the replacement has returned.
 */
#ifndef SHI_ICACHE_H
#define SHI_ICACHE_H

#include "users/tlb.h"

#define SHI_TEXTS 64u
#define SHI_TEXT_BYTES 4000u /* of a function that is Python: its pickle */

struct shi_text {
    _Alignas(SHI_PAIR) shi_a64 version; /* 0: no such function; its code is in [version & 1] */
    shi_a32 named;                      /* 1: the name stands */
    uint32_t reserved;
    char name[48];
    struct {
        uint32_t native; /* 1 + its number in the machine, 0: Python */
        uint32_t bytes;
        unsigned char pickle[SHI_TEXT_BYTES];
    } code[2];
};

struct shi_icache_cpu {
    _Alignas(SHI_PAIR) shi_a64 seen; /* the last flush that it has taken */
    shi_a64 running; /* 0, or 1 + what it had seen when its outermost call began */
    shi_a32 gen;
    shi_a32 stale; /* others: a flush has passed it by, because it was offline */
    shi_a64 flushes, fetches;
};

struct shi_icache {
    _Alignas(SHI_PAIR) shi_a64 lock;  /* text_mutex */
    _Alignas(SHI_PAIR) shi_a64 epoch; /* flushes so far */
    struct shi_text texts[SHI_TEXTS];
    struct shi_icache_cpu cpus[];
};

void shi_icache_handlers(void);
/* Its line, where the controller has one. */
void shi_icache_register(struct shi_machine *m);

uint64_t shi_icache_bytes(const struct shi_machine *m);
struct shi_icache *shi_icache(const struct shi_machine *m);

/* ---- who calls: on a CPU ------------------------------------------------------------------ */

/* A call of `text` begins: the version that this CPU has, fetched if it has none.  0: there is
 * no such function, and nothing has begun. */
uint64_t shi_icache_enter(struct shi_self *self, struct shi_icache *ic, uint32_t text);
void shi_icache_exit(struct shi_self *self);
bool shi_icache_inside(const struct shi_self *self);

/* ---- who replaces: with ic->lock ----------------------------------------------------------- */

/* Write the next version and publish it: its number.  -E2BIG. */
int64_t shi_text_write(struct shi_icache *ic, uint32_t text, uint32_t native,
                       const void *pickle, uint64_t bytes);
/* flush_icache_range: have all drop what they have.  The flush's number, or -errno. */
int64_t shi_icache_flush(struct shi_self *self, struct shi_icache *ic,
                         const struct shi_flusher *by);
/* Who has not taken flush `epoch` yet, or is in a call that began before: a CPU, or -1. */
int64_t shi_icache_behind(struct shi_self *self, struct shi_icache *ic, uint64_t epoch);
/* It has made no progress: ring it again. */
void shi_icache_prod(struct shi_self *self, uint32_t cpu);

#endif
