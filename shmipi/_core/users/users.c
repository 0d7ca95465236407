/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include "smp/ksoftirqd.h"
#include "smp/sched.h"
#include "users/rcu.h"
#include "users/backtrace.h"
#include "users/blk.h"
#include "users/cpumap.h"
#include "users/crash.h"
#include "users/rps.h"
#include "users/stop.h"
#include "users/tick.h"
#include "users/icache.h"
#include "users/membarrier.h"
#include "users/tlb.h"
#include "users/users.h"

void shi_users_init(void)
{
    shi_sched_init();
    shi_ksoftirqd_init();
    shi_tick_natives();
    shi_tlb_handlers();
    shi_membarrier_handlers();
    shi_icache_handlers();
    shi_rcu_natives();
    shi_cpumap_register();
    shi_rps_register();
    shi_blk_register();
    shi_send_stop_init();
}

/* Who of them is in the list of NMI_LOCAL: first who does not return. */
static uint32_t nmi_local(struct shi_self *self)
{
    shi_crash_nmi(self);
    shi_send_stop_nmi(self);
    return shi_backtrace_nmi(self);
}

/* Last first, as a CPU goes down.  The kernel's cpumap has no such state: what its threads leave
 * waits for them, unless they have died. */
static const struct shi_users_state states[] = {
    { 32, "net/dev:dead", shi_rps_cpu_dead },
    { 21, "block/softirq:dead", shi_blk_cpu_dead },
};

const struct shi_users_state *shi_users_state(uint32_t i)
{
    return i < sizeof states / sizeof *states ? &states[i] : NULL;
}

void shi_users_died(struct shi_self *self, uint32_t cpu)
{
    const struct shi_users_state *state;
    uint32_t i;
    shi_cpumap_died(self, cpu);
    for (i = 0; (state = shi_users_state(i)) != NULL; i++)
        state->teardown(self, cpu, true);
}

void shi_users_online(struct shi_self *self, bool born)
{
    if (born) {
        shi_cpumap_online(self);
        shi_send_stop_born(self);
    } else {
        shi_membarrier_online(self);
    }
    shi_rps_online(self);
    shi_blk_online(self);
}

void shi_users_register(struct shi_machine *m)
{
    m->nmi_local = nmi_local;
    shi_send_stop_register(m);
    shi_tick_register(m);
    m->mm_idle = shi_mm_idle;
    shi_icache_register(m);
}
