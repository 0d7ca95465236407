/* SPDX-License-Identifier: MIT */
/*
 * What the core asks of the platform. Every C file of the core includes this header
 * before any of the system's, so that on a platform it was not written for the build stops
 * here, with one message, and not later with a hundred.
 */
#ifndef SHI_SYS_H
#define SHI_SYS_H

/* CPU affinity, pidfd, futex and signal stack declarations of glibc and musl. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#if !defined(__linux__)
#error "shmipi runs on Linux only: its doorbells are futexes, POSIX semaphores and pidfds."
#elif !defined(__x86_64__) && !defined(__aarch64__)
#error "shmipi runs on x86-64 and aarch64 only: other memory models and clocks are untested."
#elif defined(__ILP32__)
#error "shmipi needs 64-bit pointers: build it for x86-64, not for x32 or ilp32."
#elif !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
/* The futex word is the low half of a 64-bit word: its address depends on the order. */
#error "shmipi runs on little-endian machines only."
#elif defined(__STDC_NO_ATOMICS__) || !defined(__STDC_VERSION__) || __STDC_VERSION__ < 201112L
#error "shmipi needs a C11 compiler with <stdatomic.h>: gcc 9, clang 10 or newer."
#endif

#endif /* SHI_SYS_H */
