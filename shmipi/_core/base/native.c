/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/native.h"

static struct {
    char name[256];
    shi_native_handler *function;
} table[SHI_NATIVE_MAX];
static uint32_t used;

/* Nothing: what a latency row measures is the interrupt. */
static void noop(void *info)
{
    (void)info;
}

/* Add one to a 64-bit word of a shared array. */
static void count(void *info)
{
    shi_fetch_add_relaxed((shi_a64 *)info, 1);
}

/* Say when the handler was entered: a stamp into the call's own cache line. */
static void stamp(void *info)
{
    uint64_t now = shi_stamp();
    memcpy(info, &now, sizeof now);
}

/* Spin for so many ns: a handler that takes as long as another one did. */
static void burn(void *info)
{
    intptr_t ns = (intptr_t)info;
    shi_spin_ns(ns > 0 ? (uint64_t)ns : 0);
}

int shi_native_register(const char *name, shi_native_handler *function)
{
    if (used == SHI_NATIVE_MAX || strlen(name) >= sizeof table[0].name)
        return -ENOSPC;
    strcpy(table[used].name, name);
    table[used].function = function;
    return (int)used++;
}

int shi_native_name(const char *name)
{
    int index = shi_native_find(name);
    return index >= 0 ? index : shi_native_register(name, NULL);
}

int shi_native_load(const char *spec, char *why, size_t room)
{
    char path[4096];
    const char *colon = strrchr(spec, ':');
    snprintf(why, room, "%s", "not of the form FILE.so:symbol");
    if (!colon || colon == spec || !colon[1] || (size_t)(colon - spec) >= sizeof path)
        return -EINVAL;
    memcpy(path, spec, (size_t)(colon - spec));
    path[colon - spec] = 0;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why, room, "%s", dlerror());
        return -ENOEXEC;
    }
    /* A function pointer is a data pointer here (POSIX: dlsym). */
    shi_native_handler *function;
    void *symbol = dlsym(library, colon + 1);
    if (!symbol) {
        snprintf(why, room, "%s", dlerror());
        dlclose(library);
        return -ESRCH;
    }
    memcpy(&function, &symbol, sizeof function);
    int index = shi_native_find(spec);
    if (index >= 0) {
        table[index].function = function;
        return index;
    }
    index = shi_native_register(spec, function);
    if (index < 0)
        snprintf(why, room, "more than %u handlers", SHI_NATIVE_MAX);
    return index;
}

int shi_native_find(const char *name)
{
    uint32_t i;
    for (i = 0; i < used; i++)
        if (strcmp(table[i].name, name) == 0)
            return (int)i;
    return -ENOENT;
}

const char *shi_native_name_of(uint32_t index)
{
    return index < used ? table[index].name : NULL;
}

shi_native_handler *shi_native_get(uint32_t index)
{
    return index < used ? table[index].function : NULL;
}

void shi_native_init(void)
{
    if (used)
        return;
    shi_native_register("noop", noop);
    shi_native_register("count", count);
    shi_native_register("stamp", stamp);
    shi_native_register("burn", burn);
}
