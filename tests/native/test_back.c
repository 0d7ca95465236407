/* SPDX-License-Identifier: MIT */
/* Allocating a range of the segment's file, while signals come all the time. */
#include "rig.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>

static uint32_t tries;
static bool stopped; /* by a signal that cannot be blocked */

/* In the place of libc's: of a kernel that undoes what a signal interrupts (shmem_fallocate),
 * where the next signal is always there before it is done. */
int fallocate(int fd, int mode, off_t offset, off_t length)
{
    sigset_t mask;
    (void)fd;
    (void)mode;
    (void)offset;
    CHECK(++tries < 100);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &mask) == 0);
    if (stopped || !sigismember(&mask, 40) || !sigismember(&mask, SIGPROF)) {
        stopped = false;
        errno = EINTR;
        return -1;
    }
    if (length > 1 << 20) {
        errno = ENOSPC;
        return -1;
    }
    return 0;
}

int main(void)
{
    struct shi_machine m;
    sigset_t mask;
    memset(&m, 0, sizeof m);
    struct stat file;
    m.fd = memfd_create("test_back", MFD_CLOEXEC);
    CHECK(m.fd >= 0 && fstat(m.fd, &file) == 0);
    m.dev = file.st_dev;
    m.ino = file.st_ino;
    CHECK(shi_machine_back(&m, 0, SHI_PAGE) == 0);
    CHECK(tries == 2);
    stopped = true;
    CHECK(shi_machine_back(&m, 0, SHI_PAGE) == 0);
    CHECK(shi_machine_back(&m, 0, 2 << 20) == -ENOSPC);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &mask) == 0);
    CHECK(!sigismember(&mask, 40) && !sigismember(&mask, SIGPROF));
    return 0;
}
