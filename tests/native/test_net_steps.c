/* SPDX-License-Identifier: MIT */
/*
 * What a CPU that is gone leaves in its ring: who empties it in its place is killed at every
 * step of that, and the account is exact.  in = delivered + dropped, nothing twice.
 */
#include "rig.h"

#include <signal.h>
#include <sys/wait.h>

#include "base/step.h"
#include "smp/reap.h"
#include "users/cpumap.h"
#include "users/rps.h"

enum { SENDER = 0, GONE = 1, KILLED = 2, NCPUS = 3 };
#define PACKETS 20u
#define FLOW 0x80000001u

static struct rig rig;
static uint64_t used;
static struct shi_net *net;

static uint64_t place(uint64_t bytes)
{
    uint64_t at = rig.m.array_offset + used;
    used += (bytes + SHI_PAGE - 1) / SHI_PAGE * SHI_PAGE;
    CHECK(used <= rig.m.array_bytes);
    return at;
}

static uint64_t publish(enum shi_user user, uint64_t bytes)
{
    uint64_t at = place(bytes);
    shi_store_release(&rig.m.header->users[user], at);
    return at;
}

static void boot(void)
{
    uint32_t i;
    shi_native_init();
    rig_quiet(&rig, NCPUS);
    used = 0;
    shi_store_full(&rig.m.header->array_used, rig.m.array_bytes);
    for (i = 0; i < NCPUS; i++) {
        rig_set_state(&rig, i, SHI_POLLING);
        shi_sched_cpu_online(&rig.cpu[i]);
        rig.cpu[i].steps = true;
    }
    uint64_t at = publish(SHI_USER_net, shi_net_bytes(&rig.m, 64, 64));
    CHECK(shi_net_init(&rig.m, at, 64, 64) == 0);
    net = shi_net(&rig.m);
}

/* `work` on CPU KILLED, in a process that dies when it passes the step for the nth time: false
 * when it does not pass it so often. */
static bool killed_in(enum shi_step step, uint32_t nth, void (*work)(struct shi_self *))
{
    struct shi_slot *slot = shi_slot(&rig.m, KILLED);
    int status;
    shi_store_relaxed(&slot->step_action, SHI_STEP_KILL);
    shi_store_relaxed(&slot->step_skip, nth);
    shi_store_release(&slot->step, step);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        work(&rig.cpu[KILLED]);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status))
        return false;
    CHECK(WIFSIGNALED(status));
    shi_reap_mark(&rig.firmware, KILLED, SIGKILL);
    return true;
}

static void in_order(uint64_t delivered)
{
    const struct shi_net_flow *flow = shi_net_flow(&rig.m, net, FLOW);
    CHECK(shi_load_full(&flow->delivered) == delivered);
    CHECK(!shi_load_full(&flow->doubles) && !shi_load_full(&flow->disorder));
}

/* ---- RPS --------------------------------------------------------------------------- */

static struct shi_rps *rps;

static struct shi_rps_stats sum(void)
{
    struct shi_rps_stats all, one;
    uint32_t id;
    memset(&all, 0, sizeof all);
    for (id = 0; id < rig.m.nslots; id++) {
        shi_rps_stats(&rig.m, rps, id, &one);
        all.in += one.in;
        all.delivered += one.delivered;
        all.dropped += one.dropped;
        all.died += one.died;
        all.queued += one.queued;
    }
    return all;
}

static void take_over(struct shi_self *self)
{
    shi_rps_cpu_dead(self, GONE, false);
}

/* `room`: of the backlog that it moves to; what finds none is dropped. */
static bool mover_killed(uint32_t nth, uint32_t room)
{
    uint32_t gone = GONE, here = SENDER, i;
    boot();
    uint64_t at = publish(SHI_USER_rps, shi_rps_bytes(&rig.m, 64, 0));
    CHECK(shi_rps_init(&rig.m, at, 64, 0) == 0);
    rps = shi_rps(&rig.m);
    CHECK(shi_rps_set_map(&rig.m, rps, &gone, 1) == 0);
    struct shi_self *cpu = &rig.cpu[SENDER];
    for (i = 0; i < PACKETS; i++)
        CHECK(shi_netif_rx(cpu, net, rps, FLOW, 0, false, true) == SHI_NET_RX_SUCCESS);
    rig_set_state(&rig, GONE, SHI_OFFLINE);
    CHECK(shi_rps_set_map(&rig.m, rps, &here, 1) == 0);
    shi_store_full(&rps->max_backlog, room);
    bool killed = killed_in(SHI_STEP_requeue, nth, take_over);
    if (killed)
        shi_rps_cpu_dead(&rig.firmware, KILLED, true);
    struct shi_rps_stats s = sum();
    CHECK(s.in == PACKETS && s.queued + s.dropped == PACKETS && !s.died);
    CHECK(s.queued == (room < PACKETS ? room + 1 : PACKETS));
    shi_rps_online(cpu);
    shi_do_softirq(cpu, false);
    s = sum();
    CHECK(s.in == s.delivered + s.dropped && !s.queued && !s.died);
    in_order(s.delivered);
    rig_unquiet(&rig);
    return killed;
}

/* ---- cpumap ------------------------------------------------------------------------ */

static struct shi_cpumap *map;
static uint64_t entry_at;

static struct shi_cpumap_stats stats(void)
{
    struct shi_cpumap_stats s;
    shi_cpumap_stats(&rig.m, map, &s);
    return s;
}

static void collect(struct shi_self *self)
{
    shi_cpumap_collect(self, net, map);
}

/* A ring with packets, off the map, whose CPU is offline. */
static struct shi_cpumap_entry *off_the_map(void)
{
    boot();
    publish(SHI_USER_cpumap, sizeof(struct shi_cpumaps));
    uint64_t at = place(shi_cpumap_bytes(&rig.m, NCPUS));
    CHECK(shi_cpumap_init(&rig.m, at, NCPUS) == 0);
    map = shi_cpumap(&rig.m, at);
    entry_at = place(shi_cpumap_entry_bytes(&rig.m, 64));
    CHECK(shi_cpumap_add(&rig.host, map, entry_at, 64) == 0);
    CHECK(shi_cpumap_claim(&rig.host, map, 64) == (int64_t)entry_at);
    CHECK(shi_cpumap_setup(&rig.host, entry_at, GONE, 64, false) == 0);
    shi_cpumap_replace(&rig.host, map, GONE, entry_at);
    CHECK(shi_cpumap_generate(&rig.cpu[SENDER], net, map, GONE, FLOW, PACKETS) == PACKETS);
    rig_set_state(&rig, GONE, SHI_OFFLINE);
    shi_cpumap_replace(&rig.host, map, GONE, 0);
    CHECK(stats().queued == PACKETS);
    return shi_cpumap_entry(&rig.m, entry_at);
}

static bool purger_killed(uint32_t nth)
{
    off_the_map();
    bool killed = killed_in(SHI_STEP_purge, nth, collect);
    struct shi_cpumap_stats s = stats();
    CHECK(s.dropped + s.queued + (killed ? SHI_NET_BULK : 0) >= PACKETS);
    if (killed) {
        shi_cpumap_died(&rig.firmware, KILLED);
        s = stats();
        CHECK(s.in == PACKETS && s.dropped + s.queued == PACKETS && !s.died);
        shi_cpumap_collect(&rig.host, net, map);
    }
    s = stats();
    CHECK(s.in == PACKETS && s.dropped == PACKETS && !s.died && !s.queued && !s.entries);
    in_order(0);
    rig_unquiet(&rig);
    return killed;
}

/* The CPU is back while another empties its ring, and takes nothing from it meanwhile. */
static void back_while_it_is_emptied(void)
{
    struct shi_cpumap_entry *e = off_the_map();
    struct shi_slot *slot = shi_slot(&rig.m, KILLED);
    int status;
    shi_store_relaxed(&slot->step_action, SHI_STEP_STOP);
    shi_store_relaxed(&slot->step_skip, 2); /* with the second batch in hand */
    shi_store_release(&slot->step, SHI_STEP_purge);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        collect(&rig.cpu[KILLED]);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
    rig_set_state(&rig, GONE, SHI_POLLING);
    struct shi_self *cpu = &rig.cpu[GONE];
    shi_enter(cpu);
    shi_service(cpu);
    shi_leave(cpu);
    uint32_t i;
    for (i = 0; i < 4; i++)
        shi_schedule_one(cpu, true);
    CHECK(shi_load_full(&e->state) == SHI_CM_STOP && stats().delivered == 0);
    /* Nor does a second who would do so. */
    rig_set_state(&rig, GONE, SHI_OFFLINE);
    shi_cpumap_collect(&rig.host, net, map);
    CHECK(stats().dropped == SHI_NET_BULK);
    rig_set_state(&rig, GONE, SHI_POLLING);
    kill(pid, SIGCONT);
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    for (i = 0; i < 4; i++)
        shi_schedule_one(cpu, true);
    struct shi_cpumap_stats s = stats();
    CHECK(s.in == PACKETS && s.delivered + s.dropped == PACKETS && !s.died && !s.entries);
    in_order(s.delivered);
    rig_unquiet(&rig);
}

int main(void)
{
    uint32_t n;
    alarm(60);
    shi_native_init();
    shi_sched_init();
    shi_cpumap_register();
    shi_rps_register();
    for (n = 0; mover_killed(n, 64); n++)
        ;
    CHECK(n == 3 * PACKETS);
    for (n = 0; mover_killed(n, 4); n++)
        ;
    CHECK(n == 3 * 5);
    for (n = 0; purger_killed(n); n++)
        ;
    CHECK(n == 2 * ((PACKETS + SHI_NET_BULK - 1) / SHI_NET_BULK));
    back_while_it_is_emptied();
    return 0;
}
