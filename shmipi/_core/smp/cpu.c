/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/event.h"
#include "base/step.h"
#include "base/trace.h"
#include "irq/chip.h"
#include "irq/flows.h"
#include "irq/irqdesc.h"
#include "irq/nmi.h"
#include "irq/startup.h"
#include "smp/cpu.h"
#include "smp/entry.h"
#include "smp/irq_work.h"
#include "smp/ksoftirqd.h"
#include "smp/sched.h"
#include "smp/sender.h"
#include "smp/smp.h"
#include "smp/stop.h"

int shi_machine_attach(struct shi_machine *m, void *base, uint64_t mapped, int fd)
{
    int err = shi_segment_attach(m, base, mapped, fd);
    if (err)
        return err;
    if (shi_chip_check(&m->chip, m->ncpus))
        return -EINVAL;
    m->flow = shi_flow_of(m->chip.flow);
    shi_smp_register(m);
    shi_irq_work_register(m);
    shi_sched_register(m);
    shi_ksoftirqd_register(m);
    shi_stop_register(m);
    shi_nmi_register(m);
    shi_irqdesc_register(m);
    shi_clock_adopt(&m->header->clock);
    return 0;
}

/* ---- forks ------------------------------------------------------------------------- */

/* Hosts of this process, of different machines.  The firmware is none of them: its children
 * become CPUs, or go on in its slot as coprocessors. */
static struct shi_self *hosts;
static pthread_mutex_t hosts_lock = PTHREAD_MUTEX_INITIALIZER;

/* In the child.  It may have been forked in a wait, by a signal's handler of any language,
 * and returns into it.  Whoever held the lock is not here, and stores one pointer at a time. */
static void leave_hosts(void)
{
    struct shi_self *self;
    for (self = hosts; self; self = self->next_host)
        self->left = 1;
    hosts = NULL;
    pthread_mutex_init(&hosts_lock, NULL);
}

static int add_host(struct shi_self *self)
{
    static bool hooked;
    pthread_mutex_lock(&hosts_lock);
    if (!hooked && pthread_atfork(NULL, NULL, leave_hosts)) {
        pthread_mutex_unlock(&hosts_lock);
        return -ENOMEM;
    }
    hooked = true;
    self->next_host = hosts;
    shi_signal_fence();
    hosts = self;
    pthread_mutex_unlock(&hosts_lock);
    return 0;
}

static void remove_host(struct shi_self *self)
{
    struct shi_self **at;
    pthread_mutex_lock(&hosts_lock);
    for (at = &hosts; *at && *at != self; at = &(*at)->next_host)
        ;
    if (*at)
        *at = self->next_host;
    pthread_mutex_unlock(&hosts_lock);
}

static bool is_firmware(const struct shi_self *self)
{
    return self->id == self->m->ncpus + 1;
}

int shi_self_init(struct shi_self *self, struct shi_machine *m, uint32_t id)
{
    memset(self, 0, sizeof *self);
    if (id >= m->nslots)
        return -EINVAL;
    self->m = m;
    self->id = id;
    self->slot = shi_slot(m, id);
    self->counts = self->slot->counters[SHI_CTX_TASK];
    self->host = id >= m->ncpus;
    self->guest = id >= shi_first_guest(m);
    self->gen = (uint16_t)shi_load_relaxed(&self->slot->generation);
    self->pid = getpid();
    self->tid = (pid_t)syscall(SYS_gettid);
    self->thread = pthread_self();
    self->tracing = &m->header->tracing;
    self->steps = shi_load_relaxed(&m->header->steps) != 0;
    pthread_mutex_init(&self->lock, NULL);
    pthread_mutex_init(&self->kick_lock, NULL);
    int err = shi_sender_init(self);
    return err || !self->host || is_firmware(self) ? err : add_host(self);
}

void shi_self_fini(struct shi_self *self)
{
    if (self->host)
        remove_host(self);
    shi_sender_fini(self);
    if (self->csds)
        munmap(self->csds, shi_self_csds_bytes(self->m));
    pthread_mutex_destroy(&self->lock);
    pthread_mutex_destroy(&self->kick_lock);
}

/* ---- a guest's end ---------------------------------------------------------------- */

static int make_private(void *at, uint64_t bytes)
{
    void *got = mmap(at, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return got == MAP_FAILED ? -errno : 0;
}

int shi_self_leave(struct shi_self *self)
{
    const struct shi_machine *m = self->m;
    /* A thread of this process may be in the middle of preparing a call: it ends in the
     * check of `left` before the push.  What it writes before that (a csd, a function, a
     * count) must not be the next guest's, so the slot leaves this mapping. */
    pthread_mutex_lock(&self->lock);
    pthread_mutex_lock(&self->kick_lock); /* no hazard of ours is set, nor will be */
    self->left = 1;
    int err = make_private(shi_region(m, self->id), m->region_bytes);
    if (!err)
        err = make_private(self->slot, SHI_SLOT_BYTES);
    pthread_mutex_unlock(&self->kick_lock);
    pthread_mutex_unlock(&self->lock);
    return err;
}

/* ---- online and offline ----------------------------------------------------------- */

static uint64_t own_start_time(void)
{
    char text[1024];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return 0;
    text[n] = 0;
    char *p = strrchr(text, ')'); /* the name may hold anything */
    unsigned long long start = 0;
    if (!p || sscanf(p + 1,
                     " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d"
                     " %*d %*d %llu",
                     &start) != 1)
        return 0;
    return start;
}

/* notify_cpu_starting(), with interrupts off. */
static void notify_starting(struct shi_self *self)
{
    uint8_t flags = self->irqs_off;
    if (!self->hooks.starting || !shi_load_acquire(&self->m->header->starting))
        return;
    self->irqs_off = 1;
    self->hooks.starting(self);
    self->irqs_off = flags;
}

int shi_self_online(struct shi_self *self)
{
    struct shi_slot *s = self->slot;
    shi_store_relaxed(&s->pid, (uint32_t)self->pid);
    shi_store_relaxed(&s->tid, (uint32_t)self->tid);
    shi_store_relaxed(&s->start_time, own_start_time());
    shi_store_release(&s->registered, 1);
    int err = shi_chip_wait_startup(self);
    if (err)
        return err;
    notify_starting(self);
    SHI_STEP(self, online);
    /* Identity first, online second: who sees the CPU online can ring it. */
    uint64_t w = shi_load_relaxed(&s->word), next;
    do {
        if (shi_word_online(w))
            return -EBUSY;
        next = (uint64_t)SHI_POLLING | (uint64_t)self->gen << SHI_W_GEN_SHIFT;
    } while (!shi_cas_full(&s->word, &w, next));
    SHI_TRACE(self, cpu_online, self->id, 0, 0, 0);
    /* A line set just before, whose sender saw OFFLINE and did not ring. */
    shi_chip_look(self, self->id, false);
    shi_sched_cpu_online(self);
    if (self->m->timers)
        self->m->timers->join(self);
    shi_event_ring(&self->m->header->hotplug_event);
    return 0;
}

static int disable(struct shi_self *self)
{
    struct shi_slot *slot = self->slot;
    for (;;) {
        uint32_t was = SHI_HP_ONLINE;
        uint64_t w, next;
        self->in_core++;
        shi_service(self);
        shi_irq_work_run(self); /* smpcfd_dying_cpu() */
        self->in_core--;
        if (self->deferred.head || self->nlater || self->nmi_waits)
            return -EBUSY;
        if (self->unsent)
            return -EAGAIN; /* who has to read something first is stopped */
        SHI_STEP(self, offline);
        w = shi_load_relaxed(&slot->word);
        if (shi_word_work(w))
            continue;
        next = (w & SHI_W_GEN) | SHI_OFFLINE;
        shi_store_relaxed(&slot->idle_dead, SHI_ID_NOT);
        if (!shi_cas_full(&slot->hotplug, &was, SHI_HP_OFFLINE) && was == SHI_HP_STOP)
            return -ESHUTDOWN;
        /* OFFLINE asked for first (full), whether anybody still waits for it second.  Who gives
         * up does that first and withdraws the request second: one sees the other. */
        if (shi_multi_lapsed(self)) {
            was = SHI_HP_OFFLINE;
            shi_cas_full(&slot->hotplug, &was, SHI_HP_ONLINE);
            return -ECANCELED;
        }
        /* Nothing queued at this instant, and nothing can be from now on. */
        if (shi_cas_full(&slot->word, &w, next)) {
            SHI_TRACE(self, cpu_offline, self->id, 0, 0, 0);
            self->down = true;
            self->ran = shi_word_state(w) == SHI_RUNNING;
            return 0;
        }
    }
}

int shi_cpu_disable(struct shi_self *self)
{
    int err = shi_sched_cpu_dying(self); /* its tasks go elsewhere */
    if (err)
        return err; /* and it stays inactive until the next try */
    err = disable(self);
    if (err) {
        shi_sched_cpu_online(self);
        return err;
    }
    /* stop_machine_park: behind the work that takes it down there is none any more. */
    shi_stop_flush(self);
    if (self->m->timers)
        self->m->timers->leave(self, self->id);
    shi_event_ring(&self->m->header->hotplug_event);
    return 0;
}

int shi_cpu_play_dead(struct shi_self *self)
{
    struct shi_slot *slot = self->slot;
    uint64_t w = shi_load_relaxed(&slot->word), next;
    int err = 0;
    if (self->hooks.release)
        self->hooks.release(self); /* a handler just run may have taken it back */
    while (shi_load_acquire(&slot->hotplug) == SHI_HP_OFFLINE) {
        if (shi_load_relaxed(&self->m->header->machine_state) >= SHI_M_STOPPING) {
            err = -ECANCELED;
            break;
        }
        shi_event_wait(&slot->hotplug, SHI_HP_OFFLINE, -1);
    }
    /* What was sent to it meanwhile is lost: its part of the controller starts anew. */
    shi_chip_reset_own(self);
    if (!err)
        err = shi_chip_wait_startup(self);
    next = (w & SHI_W_GEN) | (self->ran ? SHI_RUNNING : SHI_POLLING);
    if (!err)
        notify_starting(self);
    self->down = false;
    SHI_TRACE(self, cpu_online, self->id, 0, 0, 0);
    shi_store_full(&slot->word, next); /* offline: nobody else writes it */
    shi_chip_look(self, self->id, false);
    shi_sched_cpu_online(self);
    if (self->m->timers)
        self->m->timers->join(self);
    shi_event_ring(&self->m->header->hotplug_event);
    return err;
}
