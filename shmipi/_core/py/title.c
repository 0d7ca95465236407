/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "py/title.h"

static char *area; /* where the arguments were: what /proc/PID/cmdline shows */
static size_t room;

void shi_title_find(void)
{
    char text[1024], *p;
    unsigned long from, to;
    int fd = area ? -1 : open("/proc/self/stat", O_RDONLY | O_CLOEXEC), field;
    if (fd < 0)
        return;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    p = strrchr(text, ')'); /* the name may hold anything */
    for (field = 2; p && field < 48; field++)
        p = strchr(p + 1, ' ');
    if (!p || sscanf(p, "%lu %lu", &from, &to) != 2 || to - from < 2)
        return;
    /* Only where the library has written a title: then it is ours to write. */
    if (strncmp((char *)from, "shmipi[", to - from < 7 ? to - from : 7))
        return;
    area = (char *)from;
    room = to - from;
}

void shi_title_show(const char *machine, uint32_t cpu)
{
    char text[128];
    int n = snprintf(text, sizeof text, "shmipi[%.32s] CPU %u", machine, cpu);
    prctl(PR_SET_NAME, text, 0, 0, 0);
    if (!area)
        return;
    size_t length = (size_t)n < room - 1 ? (size_t)n : room - 1;
    memcpy(area, text, length);
    memset(area + length, 0, room - length);
}
