/* SPDX-License-Identifier: MIT */
/* What is counted of requests, while they come and go. */
#include "rig.h"

#include "users/blk.h"

#define LOOKS 20000u

static struct rig rig;
static shi_a32 looked;

static void *work(void *arg)
{
    struct shi_blk *q = arg;
    while (!shi_load_acquire(&looked))
        shi_blk_generate(&rig.cpu[0], q, 8);
    return NULL;
}

int main(void)
{
    struct shi_blk_stats s;
    pthread_t thread;
    uint32_t i;
    alarm(60);
    rig_quiet(&rig, 1);
    rig_set_state(&rig, 0, SHI_POLLING);
    shi_store_full(&rig.m.header->array_used, rig.m.array_bytes);
    shi_store_full(&rig.m.header->users[SHI_USER_blk], rig.m.array_offset);
    struct shi_blk *q = (struct shi_blk *)(rig.m.base + rig.m.array_offset);
    CHECK(shi_blk_set(q, SHI_BLK_SAME_COMP | SHI_BLK_SAME_FORCE, 2) == 0);
    CHECK(shi_blk(&rig.m) == q);
    CHECK(pthread_create(&thread, NULL, work, q) == 0);
    /* None has completed twice, also when some complete while they are counted. */
    /* Both have a core for a while, however late the other thread gets one. */
    s.submitted = 0;
    for (i = 0; i < LOOKS || s.submitted <= 100; i++) {
        shi_blk_stats(&rig.m, q, 0, &s);
        CHECK(s.doubles == 0);
    }
    shi_store_release(&looked, 1);
    CHECK(pthread_join(thread, NULL) == 0);
    shi_blk_stats(&rig.m, q, 0, &s);
    CHECK(s.submitted == s.completed + s.in_flight + s.waiting && s.submitted > 100);
    /* One that did is found, whatever the count of uses came to: it comes round. */
    struct shi_request *rq = (struct shi_request *)&q->cpu[1];
    shi_fetch_add_full(&rq->completions, 1);
    shi_blk_stats(&rig.m, q, 0, &s);
    CHECK(s.doubles == 1);
    uint64_t word = shi_load_full(&rq->word);
    shi_store_full(&rq->word, (word & ~(UINT64_MAX << 40)) | 0xffffffull << 40);
    shi_store_full(&rq->completions, 0xffffffu);
    CHECK(shi_blk_submit(&rig.cpu[0], q, 0) >= 0);
    while (shi_blk_generate(&rig.cpu[0], q, 64) < 64)
        ;
    shi_blk_stats(&rig.m, q, 0, &s);
    CHECK(s.doubles == 0);
    rig_unquiet(&rig);
    return 0;
}
