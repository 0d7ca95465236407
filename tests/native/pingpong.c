/* SPDX-License-Identifier: MIT */
/*
 * Ping-pong between two pinned processes, written without a line of shmipi: what the raw
 * limits of `shmipi bench limits` are checked against (`shmipi doctor --agree`).
 *
 *     pingpong KIND CORE CORE CALLS GAP_NS     prints ns of a round trip, the median
 *     pingpong                                 a few trips of every kind: the test
 *
 * tight, floor and mailbox run in batches without a clock inside, over several places in
 * memory; floor and mailbox with each back-off, of which the best counts.  In the others the
 * target sleeps in the one system call, and the sender spins for its answer in shared memory
 * after it has let GAP_NS pass; in pipe_park and futex_park it sleeps too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <mqueue.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SKIP 77
#define PLACES 16
#define BATCH 250
#define BACKOFFS 4

struct line {
    _Alignas(64) _Atomic uint32_t bell;
    _Atomic uint32_t answer;
    _Atomic uint64_t load[3];
};

static struct shared {
    _Alignas(128) _Atomic uint32_t ready;
    _Alignas(128) _Atomic uint32_t word; /* rung */
    _Alignas(128) _Atomic uint32_t reply;
    _Alignas(128) _Atomic uint32_t done;
    _Alignas(128) sem_t sem;
    struct line lines[PLACES * 2 * 67];
} *sh;

static const unsigned backoffs[BACKOFFS] = { 0, 25, 50, 100 };
static double rounds_per_ns;
static int pipes[2][2], event;
static mqd_t queue = -1;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set)) {
        perror("sched_setaffinity");
        exit(SKIP);
    }
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void burn(unsigned rounds)
{
    while (rounds) {
        __asm__ volatile("" ::: "memory");
        rounds--;
    }
}

static void calibrate(void)
{
    int i;
    for (i = 0; i < 7; i++) {
        uint64_t from = now();
        burn(30000);
        double per_ns = 30000.0 / (double)(now() - from + 1);
        rounds_per_ns = per_ns > rounds_per_ns ? per_ns : rounds_per_ns;
    }
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double middle(double *values, unsigned n)
{
    qsort(values, n, sizeof *values, by_size);
    return n % 2 ? values[n / 2] : (values[n / 2] + values[n / 2 - 1]) / 2;
}

/* ---- lines ------------------------------------------------------------------------------- */

enum way { TIGHT, FLOOR, MAILBOX };

/* Where a place is, and apart from all others by more than a pair of lines. */
static struct line *line_at(unsigned place, int second)
{
    return &sh->lines[(place * 2 + (unsigned)second) * 67];
}

static void answer_line(enum way way, unsigned place, uint32_t first, uint32_t n, unsigned work)
{
    struct line *bell = line_at(place, 0), *box = way == MAILBOX ? line_at(place, 1) : bell;
    uint32_t i;
    for (i = first; i < first + n; i++) {
        if (way == TIGHT) {
            while (atomic_load_explicit(&bell->bell, memory_order_acquire) != 2 * i + 1)
                ;
            atomic_store_explicit(&bell->bell, 2 * i + 2, memory_order_release);
            continue;
        }
        while (atomic_load_explicit(&bell->bell, memory_order_acquire) != i + 1)
            ;
        uint64_t sum = 0;
        int k;
        for (k = 0; k < 3; k++)
            sum += atomic_load_explicit(&box->load[k], memory_order_relaxed);
        if (sum != 3 * (uint64_t)(i + 1))
            exit(1);
        burn(work);
        atomic_store_explicit(&box->answer, i + 1, memory_order_release);
    }
}

static void ask_line(enum way way, unsigned place, uint32_t first, uint32_t n, unsigned work,
                     unsigned backoff)
{
    struct line *bell = line_at(place, 0), *box = way == MAILBOX ? line_at(place, 1) : bell;
    uint32_t i;
    for (i = first; i < first + n; i++) {
        if (way == TIGHT) {
            atomic_store_explicit(&bell->bell, 2 * i + 1, memory_order_release);
            while (atomic_load_explicit(&bell->bell, memory_order_acquire) != 2 * i + 2)
                ;
            continue;
        }
        int k;
        for (k = 0; k < 3; k++)
            atomic_store_explicit(&box->load[k], i + 1, memory_order_relaxed);
        atomic_store_explicit(&bell->bell, i + 1, memory_order_release);
        burn(backoff);
        while (atomic_load_explicit(&box->answer, memory_order_acquire) != i + 1)
            ;
        burn(work);
    }
}

/* Each place with each back-off in turn, `batches` times; the first is to warm up. */
static double lines(enum way way, int target, unsigned batches)
{
    unsigned work = (unsigned)(10 * rounds_per_ns), turns = way == TIGHT ? 1 : BACKOFFS;
    static double taken[BACKOFFS][PLACES][64];
    double of_places[PLACES], best = 0;
    unsigned place, turn, b;
    pid_t child = fork();
    batches = batches > 64 ? 64 : batches;
    if (child < 0)
        fail("fork");
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(target);
        atomic_store(&sh->ready, 1);
        for (place = 0; place < PLACES; place++)
            answer_line(way, place, 0, BATCH * (1 + batches * turns), work);
        _exit(0);
    }
    while (!atomic_load(&sh->ready))
        sched_yield();
    for (place = 0; place < PLACES; place++) {
        uint32_t first = BATCH;
        ask_line(way, place, 0, BATCH, work, 0);
        for (b = 0; b < batches; b++)
            for (turn = 0; turn < turns; turn++, first += BATCH) {
                uint64_t from = now();
                unsigned backoff = (unsigned)(backoffs[turn] * rounds_per_ns);
                ask_line(way, place, first, BATCH, work, backoff);
                taken[turn][place][b] = (double)(now() - from) / BATCH;
            }
    }
    waitpid(child, NULL, 0);
    for (turn = 0; turn < turns; turn++) {
        for (place = 0; place < PLACES; place++)
            of_places[place] = middle(taken[turn][place], batches);
        double found = middle(of_places, PLACES);
        best = !turn || found < best ? found : best;
    }
    return best;
}

/* ---- doorbells --------------------------------------------------------------------------- */

static long futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    return syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

static void futex_sleep(_Atomic uint32_t *word, uint32_t n)
{
    while (atomic_load(word) != n)
        futex(word, FUTEX_WAIT, n - 1);
}

static void futex_ring(_Atomic uint32_t *word, uint32_t n)
{
    atomic_store(word, n);
    futex(word, FUTEX_WAKE, 1);
}

static void target_sleeps(const char *kind, uint32_t n)
{
    char byte[8];
    siginfo_t info;
    sigset_t set;
    if (!strncmp(kind, "futex", 5)) {
        futex_sleep(&sh->word, n);
    } else if (!strcmp(kind, "sem")) {
        while (sem_wait(&sh->sem))
            ;
    } else if (!strcmp(kind, "sigwait")) {
        sigemptyset(&set);
        sigaddset(&set, SIGRTMIN);
        while (sigwaitinfo(&set, &info) < 0)
            ;
    } else if (!strcmp(kind, "eventfd")) {
        if (read(event, byte, 8) != 8)
            _exit(1);
    } else if (!strcmp(kind, "mqueue")) {
        if (mq_receive(queue, byte, 8, NULL) < 0)
            _exit(1);
    } else if (read(pipes[0][0], byte, 1) != 1) {
        _exit(1);
    }
}

static void ring(const char *kind, uint32_t n, pid_t child)
{
    const uint64_t one = 1;
    if (!strncmp(kind, "futex", 5)) {
        futex_ring(&sh->word, n);
    } else if (!strcmp(kind, "sem")) {
        sem_post(&sh->sem);
    } else if (!strcmp(kind, "sigwait")) {
        syscall(SYS_tgkill, child, child, SIGRTMIN);
    } else if (!strcmp(kind, "eventfd")) {
        if (write(event, &one, 8) != 8)
            exit(1);
    } else if (!strcmp(kind, "mqueue")) {
        if (mq_send(queue, "x", 1, 0))
            exit(1);
    } else if (write(pipes[0][1], "x", 1) != 1) {
        exit(1);
    }
}

static void open_all(void)
{
    struct mq_attr of = { .mq_maxmsg = 2, .mq_msgsize = 8 };
    char name[64];
    sigset_t set;
    snprintf(name, sizeof name, "/pingpong.%d", (int)getpid());
    queue = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &of);
    mq_unlink(name);
    event = eventfd(0, 0);
    if (pipe(pipes[0]) || pipe(pipes[1]) || event < 0 || sem_init(&sh->sem, 1, 0))
        fail("doorbells");
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &set, NULL);
}

static double bells(const char *kind, int target, uint32_t calls, uint64_t gap_ns)
{
    int parks = strstr(kind, "_park") != NULL, by_pipe = !strncmp(kind, "pipe", 4);
    uint32_t warmup = calls < 20 ? calls : 20, n;
    double *taken = calloc(calls, sizeof *taken);
    char byte;
    pid_t child;
    if (!strcmp(kind, "mqueue") && queue == (mqd_t)-1) {
        fprintf(stderr, "no message queue: %s\n", strerror(errno));
        exit(SKIP);
    }
    child = fork();
    if (child < 0 || !taken)
        fail("fork");
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(target);
        atomic_store(&sh->ready, 1);
        for (n = 1; n <= warmup + calls; n++) {
            target_sleeps(kind, n);
            if (parks && by_pipe) {
                if (write(pipes[1][1], "y", 1) != 1)
                    _exit(1);
            } else if (parks) {
                futex_ring(&sh->reply, n);
            } else {
                atomic_store_explicit(&sh->reply, n, memory_order_release);
            }
        }
        _exit(0);
    }
    while (!atomic_load(&sh->ready))
        sched_yield();
    for (n = 1; n <= warmup + calls; n++) {
        uint64_t from = now();
        while (gap_ns && now() - from < gap_ns)
            ;
        from = now();
        ring(kind, n, child);
        if (parks && by_pipe) {
            if (read(pipes[1][0], &byte, 1) != 1)
                exit(1);
        } else if (parks) {
            futex_sleep(&sh->reply, n);
        } else {
            while (atomic_load_explicit(&sh->reply, memory_order_acquire) != n)
                ;
        }
        if (n > warmup)
            taken[n - warmup - 1] = (double)(now() - from);
    }
    waitpid(child, NULL, 0);
    double found = middle(taken, calls);
    free(taken);
    return found;
}

static double measure(const char *kind, int sender, int target, uint32_t calls, uint64_t gap_ns)
{
    sh = mmap(NULL, sizeof *sh, PROT_READ | PROT_WRITE,
              MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (sh == MAP_FAILED)
        fail("mmap");
    pin(sender);
    calibrate();
    if (!strcmp(kind, "tight"))
        return lines(TIGHT, target, calls);
    if (!strcmp(kind, "floor"))
        return lines(FLOOR, target, calls);
    if (!strcmp(kind, "mailbox"))
        return lines(MAILBOX, target, calls);
    open_all();
    return bells(kind, target, calls, gap_ns);
}

static const char *const kinds[] = { "tight", "floor",      "mailbox",  "futex",
                                     "sem",   "sigwait",    "eventfd",  "mqueue",
                                     "pipe",  "futex_park", "pipe_park" };

static int is_kind(const char *kind)
{
    size_t i;
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kind, kinds[i]))
            return 1;
    return 0;
}

/* Each kind in a process of its own, on the first two cores that there are. */
static int test(void)
{
    int cores[2] = { -1, -1 }, found = 0, core;
    cpu_set_t set;
    size_t i;
    sched_getaffinity(0, sizeof set, &set);
    for (core = 0; core < CPU_SETSIZE && found < 2; core++)
        if (CPU_ISSET(core, &set))
            cores[found++] = core;
    if (found < 2) {
        printf("needs two cores\n");
        return SKIP;
    }
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        int status;
        pid_t child = fork();
        if (!child) {
            alarm(20);
            int on_lines = i < 3;
            double ns = measure(kinds[i], cores[0], cores[1], on_lines ? 2 : 20, 1000);
            printf("%-10s %.0f ns\n", kinds[i], ns);
            fflush(stdout);
            _exit(ns > 0 ? 0 : 1);
        }
        if (child < 0 || waitpid(child, &status, 0) != child)
            fail("fork");
        if (!WIFEXITED(status) || (WEXITSTATUS(status) && WEXITSTATUS(status) != SKIP)) {
            printf("%s: status %x\n", kinds[i], (unsigned)status);
            return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 1)
        return test();
    if (argc != 6 || !is_kind(argv[1]) || atoi(argv[4]) < 1) {
        fprintf(stderr, "usage: pingpong KIND CORE CORE CALLS GAP_NS\n");
        return 2;
    }
    alarm(60);
    printf("%.1f\n", measure(argv[1], atoi(argv[2]), atoi(argv[3]), (uint32_t)atoi(argv[4]),
                             strtoull(argv[5], NULL, 10)));
    return 0;
}
