/* SPDX-License-Identifier: MIT */
/* An event count: many threads, of many processes, may sleep on one. */
#ifndef SHI_EVENT_H
#define SHI_EVENT_H

#include "base/atomics.h"

void shi_event_ring(shi_a32 *event);
void shi_event_wake(shi_a32 *event); /* without counting */
/* Sleep while it is `seen`, until `timeout_ns` (< 0: for ever): 0, -EINTR, -ETIMEDOUT. */
int shi_event_wait(shi_a32 *event, uint32_t seen, int64_t timeout_ns);

#endif
