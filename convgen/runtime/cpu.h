/* Whether this CPU has the instructions a kernel was compiled to.
 *
 * The processor itself is asked, or the system where only that can tell. C compilers have a function for it, but know
 * more names with every release. */
#ifndef CONVGEN_CPU_H
#define CONVGEN_CPU_H

#include <stdatomic.h>

#ifdef __x86_64__
#include <cpuid.h>

enum { CONVGEN_EAX, CONVGEN_EBX, CONVGEN_ECX, CONVGEN_EDX };

/* Whether all of `bits` are set in what CPUID answers. */
static inline int convgen_cpu_tells(unsigned leaf, unsigned subleaf, int word, unsigned bits)
{
    unsigned words[4];
    if (__get_cpuid_max(leaf & 0x80000000, 0) < leaf)
        return 0;
    if (subleaf > 0) { /* leaf 7 answers how many it has */
        __cpuid_count(leaf, 0, words[0], words[1], words[2], words[3]);
        if (words[CONVGEN_EAX] < subleaf)
            return 0;
    }
    __cpuid_count(leaf, subleaf, words[0], words[1], words[2], words[3]);
    return (words[word] & bits) == bits;
}

/* Whether the system lets this process use matrix tiles, of which it keeps 8 KiB for each thread that does. Linux wants
 * to be asked, once for all threads there are or will be, and refuses where a thread's signal stack is too small. */
static inline int convgen_system_permits_tiles(void)
{
    const long arch_prctl = 158, request_permission = 0x1023, tile_data = 18;
    long answer;
    __asm__ volatile("syscall"
                     : "=a"(answer)
                     : "a"(arch_prctl), "D"(request_permission), "S"(tile_data)
                     : "rcx", "r11", "memory");
    return answer == 0;
}

/* Whether the system keeps these registers (bits of XCR0) for each thread: without it, CPUs refuse to touch them. */
static inline int convgen_system_saves(unsigned state)
{
    const unsigned can_be_asked = 1u << 27; /* OSXSAVE */
    const unsigned tiles = 1u << 18;
    unsigned low, high;
    if (!convgen_cpu_tells(1, 0, CONVGEN_ECX, can_be_asked))
        return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & state) == state && (!(state & tiles) || convgen_system_permits_tiles());
}
#endif

#ifdef __aarch64__
#include <sys/auxv.h>

/* Whether all of `bits` are set in a word of Linux's hardware capabilities. */
static inline int convgen_cpu_tells(unsigned long word, unsigned long bits) { return (getauxval(word) & bits) == bits; }
#endif

/* Defines cpu_supported(). The answer is kept, because every run wants it and a hypervisor may take its time. */
#define CONVGEN_CPU_SUPPORTED(expression)                                                                   \
    static int cpu_supported(void)                                                                          \
    {                                                                                                       \
        static atomic_int known; /* 0: not asked yet; 1: no; 2: yes */                                      \
        int answer = atomic_load_explicit(&known, memory_order_relaxed);                                    \
        if (answer == 0) {                                                                                  \
            answer = (expression) ? 2 : 1;                                                                  \
            atomic_store_explicit(&known, answer, memory_order_relaxed);                                    \
        }                                                                                                   \
        return answer == 2;                                                                                 \
    }

#endif
