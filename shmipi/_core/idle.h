/* SPDX-License-Identifier: MIT */
/* The idle loop of a CPU: poll, poll for a while, or halt. */
#ifndef SHI_IDLE_H
#define SHI_IDLE_H

#include "machine.h"

enum shi_idle_why {
    SHI_IDLE_TASK = 1,    /* self->tasks is not empty */
    SHI_IDLE_STOP = 2,    /* the machine is stopping */
    SHI_IDLE_OFFLINE = 3, /* asked to go offline */
    SHI_IDLE_SIGNAL = 4,  /* a signal came: let the interpreter look */
    SHI_IDLE_PYTHON = 5,  /* self->deferred is not empty */
};

/* Idle until something is to be done that is not an interrupt handler's work. */
enum shi_idle_why shi_idle(struct shi_self *self);

/* Drain, go offline, sleep until asked back.  -EINTR when a signal came meanwhile,
 * -EBUSY when Python csds must run first, -ECANCELED when the machine stops. */
int shi_cpu_offline(struct shi_self *self);

#endif
