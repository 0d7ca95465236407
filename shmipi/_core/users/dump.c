/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <dlfcn.h>
#include <string.h>
#include <ucontext.h>

#include "base/native.h"
#include "base/text.h"
#include "users/dump.h"

#define ROOM_LEAST (64u << 10)
#define ROOM_CPU 1024u

static uint64_t table_bytes(uint32_t ncpus)
{
    uint64_t bytes = sizeof(struct shi_dump) +
                     ncpus * (uint64_t)sizeof(((struct shi_dump *)0)->cpu[0]);
    return (bytes + SHI_LINE - 1) / SHI_LINE * SHI_LINE;
}

uint64_t shi_dump_bytes(uint32_t ncpus)
{
    return table_bytes(ncpus) + ROOM_LEAST + (uint64_t)ncpus * ROOM_CPU;
}

void shi_dump_init(struct shi_dump *dump, uint32_t ncpus)
{
    dump->ncpus = ncpus;
    dump->room = (uint32_t)(shi_dump_bytes(ncpus) - table_bytes(ncpus));
}

static char *room_of(const struct shi_dump *dump)
{
    return (char *)dump + table_bytes(dump->ncpus);
}

void shi_dump_begin(struct shi_dump *dump)
{
    uint64_t was = shi_load_relaxed(&dump->given);
    uint32_t cpu;
    /* First: who is late finds another round, and takes no room. */
    while (!shi_cas_full(&dump->given, &was, ((was >> 32) + 1) << 32))
        ;
    for (cpu = 0; cpu < dump->ncpus; cpu++)
        shi_store_relaxed(&dump->cpu[cpu].at, 0);
}

const char *shi_dump_text(const struct shi_dump *dump, uint32_t cpu, uint32_t *length)
{
    /* Acquire pairs with the release of shi_dump_here: the text is whole. */
    uint32_t at = shi_load_acquire(&dump->cpu[cpu].at);
    *length = shi_load_relaxed(&dump->cpu[cpu].length);
    if (!at || at - 1 > dump->room || *length > dump->room - (at - 1))
        return NULL;
    return room_of(dump) + at - 1;
}

/* ---- what there is to say -------------------------------------------------------------- */

/* Does this CPU do nothing but wait for work? */
static bool idling(const struct shi_self *self)
{
    return !self->in_task && !self->in_irq && !shi_load_relaxed(&self->slot->cur_csd) &&
           !shi_load_relaxed(&self->slot->handler);
}

/* What was interrupted, in C.  dladdr() takes the loader's lock, which this thread may take
 * again, and which another holds for a moment only. */
static void say_c(const struct shi_self *self, struct shi_text *out)
{
    const ucontext_t *context = self->context;
    Dl_info info;
    uintptr_t pc;
    if (!context)
        return;
#if defined(__x86_64__)
    pc = (uintptr_t)context->uc_mcontext.gregs[REG_RIP];
#else
    pc = (uintptr_t)context->uc_mcontext.pc;
#endif
    shi_text_str(out, "  C: ");
    if (!dladdr((void *)pc, &info)) {
        shi_text_str(out, "0x");
        shi_text_num(out, pc, 16);
        shi_text_str(out, "\n");
        return;
    }
    if (info.dli_sname) {
        shi_text_str(out, info.dli_sname);
        shi_text_str(out, "+0x");
        shi_text_num(out, pc - (uintptr_t)info.dli_saddr, 16);
    } else {
        shi_text_str(out, "0x");
        shi_text_num(out, pc - (uintptr_t)info.dli_fbase, 16);
    }
    const char *slash = info.dli_fname ? strrchr(info.dli_fname, '/') : NULL;
    shi_text_str(out, " (");
    shi_text_str(out, slash ? slash + 1 : info.dli_fname ? info.dli_fname : "?");
    shi_text_str(out, ")\n");
}

static void say_state(const struct shi_self *self, struct shi_text *out)
{
    const struct shi_slot *slot = self->slot;
    uint32_t func = shi_load_relaxed(&slot->cur_csd_func);
    shi_text_str(out, "  pid ");
    shi_text_num(out, (uint64_t)self->pid, 10);
    if (self->in_task) {
        shi_text_str(out, ", task ");
        shi_text_field(out, slot->task_name, sizeof slot->task_name);
    }
    if (shi_load_relaxed(&slot->handler)) {
        shi_text_str(out, ", handler ");
        shi_text_field(out, slot->handler_name, sizeof slot->handler_name);
    } else if (shi_load_relaxed(&slot->cur_csd) && func & SHI_FUNC_NATIVE) {
        const char *name = shi_native_name_of(func & ~SHI_FUNC_NATIVE);
        shi_text_str(out, ", native handler ");
        shi_text_str(out, name ? name : "?");
    }
    /* Where the NMI is an interrupt, its own handler has disabled them. */
    if (self->irqs_off && self->m->chip.nmi == SHI_NO_LINE)
        shi_text_str(out, ", interrupts disabled");
    if (self->preempt) {
        shi_text_str(out, ", preempt count ");
        shi_text_num(out, self->preempt, 10);
    }
    shi_text_str(out, "\n");
}

void shi_dump_here(struct shi_self *self, struct shi_dump *dump, uint32_t round,
                   const char *title)
{
    static char private[SHI_DUMP_TEXT];
    struct shi_text out = { .at = private, .room = sizeof private };
    shi_text_str(&out, title);
    shi_text_num(&out, self->id, 10);
    if (idling(self)) {
        shi_text_str(&out, " skipped: idling at ");
        shi_text_str(&out, self->slot && shi_word_state(shi_load_relaxed(&self->slot->word)) ==
                                             SHI_POLLING
                               ? "poll"
                               : "halt");
        shi_text_str(&out, "\n");
    } else {
        shi_text_str(&out, "\n");
        say_state(self, &out);
        say_c(self, &out);
        if (self->hooks.stack)
            self->hooks.stack(self, &out);
    }
    uint64_t given = shi_load_relaxed(&dump->given);
    do {
        if ((uint32_t)(given >> 32) != round || self->id >= dump->ncpus)
            return;
        if ((uint32_t)given + out.used > dump->room)
            out.used = (uint32_t)given < dump->room ? dump->room - (uint32_t)given : 0;
    } while (!shi_cas_full(&dump->given, &given, given + out.used));
    memcpy(room_of(dump) + (uint32_t)given, private, out.used);
    shi_store_relaxed(&dump->cpu[self->id].length, (uint32_t)out.used);
    /* Release: who finds the place finds the text. */
    shi_store_release(&dump->cpu[self->id].at, (uint32_t)given + 1);
}
