/* SPDX-License-Identifier: MIT */
/*
 * The only file of shmipi that names a memory order.
 *
 * An ACQUIRE load guarantees that what stands after it sees everything that the
 * releasing side did before its RELEASE.  A FULL read-modify-write (seq_cst) is
 * used wherever a store must be seen before a later load of another location
 * (store-load order).  The core never uses a stand-alone fence for that:
 * ThreadSanitizer does not understand fences, and a read-modify-write costs the
 * same on x86 and less on arm.
 */
#ifndef SHI_ATOMICS_H
#define SHI_ATOMICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#if ATOMIC_LLONG_LOCK_FREE != 2 || ATOMIC_INT_LOCK_FREE != 2
#error "shmipi needs lock-free 32-bit and 64-bit atomics (they cross processes)"
#endif

typedef _Atomic uint64_t shi_a64;
typedef _Atomic uint32_t shi_a32;
typedef _Atomic uint16_t shi_a16;
typedef _Atomic uint8_t shi_a8;

#define shi_load_relaxed(p) atomic_load_explicit((p), memory_order_relaxed)
#define shi_load_acquire(p) atomic_load_explicit((p), memory_order_acquire)
#define shi_load_full(p) atomic_load_explicit((p), memory_order_seq_cst)
#define shi_store_relaxed(p, v) atomic_store_explicit((p), (v), memory_order_relaxed)
#define shi_store_release(p, v) atomic_store_explicit((p), (v), memory_order_release)
#define shi_store_full(p, v) atomic_store_explicit((p), (v), memory_order_seq_cst)

#define shi_xchg_full(p, v) atomic_exchange_explicit((p), (v), memory_order_seq_cst)
#define shi_fetch_add_full(p, v) atomic_fetch_add_explicit((p), (v), memory_order_seq_cst)
#define shi_fetch_add_relaxed(p, v) atomic_fetch_add_explicit((p), (v), memory_order_relaxed)
#define shi_fetch_or_full(p, v) atomic_fetch_or_explicit((p), (v), memory_order_seq_cst)
#define shi_fetch_and_full(p, v) atomic_fetch_and_explicit((p), (v), memory_order_seq_cst)
#define shi_fetch_sub_full(p, v) atomic_fetch_sub_explicit((p), (v), memory_order_seq_cst)
#define shi_fetch_xor_full(p, v) atomic_fetch_xor_explicit((p), (v), memory_order_seq_cst)
#define shi_cas_full(p, expected, desired)                                                     \
    atomic_compare_exchange_strong_explicit((p), (expected), (desired), memory_order_seq_cst,  \
                                            memory_order_seq_cst)
#define shi_cas_weak_full(p, expected, desired)                                                \
    atomic_compare_exchange_weak_explicit((p), (expected), (desired), memory_order_seq_cst,    \
                                          memory_order_seq_cst)

/* For users' own protocols (shmipi.smp) and membarrier: the core's own have none of these. */
#ifdef __SANITIZE_THREAD__
/* It does not understand fences; of a read-modify-write it does. */
static inline void shi_fence_full(void)
{
    static shi_a32 nobodys;
    atomic_fetch_add_explicit(&nobodys, 0, memory_order_seq_cst);
}
#else
#define shi_fence_full() atomic_thread_fence(memory_order_seq_cst)
#endif
#define shi_fence_acquire() atomic_thread_fence(memory_order_acquire)
#define shi_fence_release() atomic_thread_fence(memory_order_release)

/* Orders plain stores before a signal handler of the same thread may run, and back. */
#define shi_signal_fence() atomic_signal_fence(memory_order_seq_cst)

/* A hint that this is a spin loop; never a memory barrier. */
static inline void shi_cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#endif
}

/*
 * The kernel's local_t: atomic to what interrupts this thread, its signal handlers, and not
 * to other CPUs, who only read it.  One instruction without the lock on the bus.
 */
static inline uint64_t shi_local_fetch_add(shi_a64 *p, uint64_t n)
{
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
    __asm__ __volatile__("xaddq %0, %1" : "+r"(n), "+m"(*(volatile uint64_t *)p)::"cc");
    return n;
#else
    return shi_fetch_add_relaxed(p, n);
#endif
}

/* The same: *p becomes `desired` if it is *expected, else *expected becomes *p. */
static inline bool shi_local_cas(shi_a64 *p, uint64_t *expected, uint64_t desired)
{
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
    bool done;
    __asm__ __volatile__("cmpxchgq %3, %1"
                         : "=@cce"(done), "+m"(*(volatile uint64_t *)p), "+a"(*expected)
                         : "r"(desired)
                         : "memory");
    return done;
#else
    return shi_cas_weak_full(p, expected, desired);
#endif
}

/*
 * Ask for the line in the writable state, so that load-then-CAS is one transfer.  The
 * instruction itself: for plain x86-64 compilers make of the builtin one that asks for the
 * line to read, and the store asks again.  Each x86-64 processor that runs our Linux takes
 * it; those of Intel before Broadwell do nothing.
 */
#if defined(__x86_64__)
#define shi_prefetch_write(p)                                                                  \
    __asm__ __volatile__("prefetchw %0" : : "m"(*(const volatile char *)(p)))
#else
#define shi_prefetch_write(p) __builtin_prefetch((const void *)(p), 1, 3)
#endif

#endif
