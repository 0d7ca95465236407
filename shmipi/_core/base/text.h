/* SPDX-License-Identifier: MIT */
/* Text that is made where nothing may be called: in signal handlers. */
#ifndef SHI_TEXT_H
#define SHI_TEXT_H

#include "base/sys.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* What does not fit is cut off. */
struct shi_text {
    char *at;
    size_t room, used;
};

static inline void shi_text_add(struct shi_text *t, const char *s, size_t n)
{
    size_t left = t->room - t->used;
    if (n > left)
        n = left;
    memcpy(t->at + t->used, s, n);
    t->used += n;
}

static inline void shi_text_str(struct shi_text *t, const char *s)
{
    shi_text_add(t, s, strlen(s));
}

/* Of a field of the segment: no longer than that, and printable. */
static inline void shi_text_field(struct shi_text *t, const char *s, size_t most)
{
    for (; most-- && *s; s++)
        shi_text_add(t, (unsigned char)*s < ' ' || *s == 0x7f ? "?" : s, 1);
}

static inline void shi_text_num(struct shi_text *t, uint64_t value, unsigned base)
{
    char digits[20];
    size_t i = sizeof digits;
    do {
        digits[--i] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value && i);
    shi_text_add(t, digits + i, sizeof digits - i);
}

#endif
