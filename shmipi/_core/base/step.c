/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/step.h"

const char *const shi_step_names[SHI_STEP_COUNT] = { "none",
#define X(name) #name,
                                                     SHI_STEPS(X)
#undef X
};

void shi_step_reached(struct shi_self *self, enum shi_step step)
{
    struct shi_slot *s = self->slot;
    if (shi_load_acquire(&s->step) != (uint32_t)step)
        return;
    uint32_t skip = shi_load_relaxed(&s->step_skip);
    if (skip) {
        shi_store_relaxed(&s->step_skip, skip - 1);
        return;
    }
    shi_store_relaxed(&s->step, SHI_STEP_none); /* once */
    uint32_t action = shi_load_relaxed(&s->step_action);
    shi_store_release(&s->step_hit, (uint32_t)step);
    syscall(SYS_kill, getpid(), action == SHI_STEP_KILL ? SIGKILL : SIGSTOP);
}
