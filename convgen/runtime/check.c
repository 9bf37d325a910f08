/* Compares outputs on machines without NumPy, and draws inputs there: a library of its own in a bundle of candidates.
 *
 * convgen/check/drawn.py has the same functions as those that draw, digest and sample. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#define EXPORT __attribute__((visibility("default")))

enum { F32, F16, BF16, I8, U8 };

typedef struct {
    uint64_t wrong; /* elements */
    uint64_t first; /* index of the first of them */
    double expected, found; /* there */
} convgen_difference;

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float from_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
    if (exponent == 0x1f) /* infinity and NaN */
        return from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent != 0)
        return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
}

static float element(const void *array, uint64_t i, int dtype)
{
    switch (dtype) {
    case F32:
        return ((const float *)array)[i];
    case F16:
        return from_half(((const uint16_t *)array)[i]);
    case I8:
        return ((const int8_t *)array)[i];
    case U8:
        return ((const uint8_t *)array)[i];
    default:
        return from_bits((uint32_t)((const uint16_t *)array)[i] << 16);
    }
}

/* Elements of `found` further from `expected` than `bound` (NULL: not equal); NaN is too far. */
EXPORT void convgen_compare(const void *found, const void *expected, const float *bound, uint64_t count, int dtype,
                            convgen_difference *result)
{
    *result = (convgen_difference){0};
    for (uint64_t i = 0; i < count; ++i) {
        const float x = element(found, i, dtype), y = element(expected, i, dtype);
        if (x == y || fabsf(x - y) <= (bound != NULL ? bound[i] : 0))
            continue;
        if (result->wrong++ == 0) {
            result->first = i;
            result->expected = y;
            result->found = x;
        }
    }
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t drawn(uint64_t seed, uint64_t i) { return mix(seed << 40 | i) >> 32; }

static uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The bits of a whole number below 2048 in f16. */
static uint16_t half_of(int64_t whole)
{
    const uint32_t bits = to_bits((float)whole);
    return bits << 1 ? (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)) : 0;
}

/* Whole numbers from `low` to `high`. */
EXPORT void convgen_draw(void *array, uint64_t count, int dtype, uint64_t seed, int64_t low, int64_t high)
{
    for (uint64_t i = 0; i < count; ++i) {
        const int64_t whole = (int64_t)(drawn(seed, i) * (uint64_t)(high - low + 1) >> 32) + low;
        if (dtype == F32)
            ((float *)array)[i] = (float)whole;
        else if (dtype == F16)
            ((uint16_t *)array)[i] = half_of(whole);
        else if (dtype == BF16)
            ((uint16_t *)array)[i] = (uint16_t)(to_bits((float)whole) >> 16);
        else
            ((uint8_t *)array)[i] = (uint8_t)whole;
    }
}

/* A number for every `part` elements in a row, of their values; -0 is 0. */
EXPORT void convgen_digest(const void *array, uint64_t count, int dtype, uint64_t part, uint64_t *digests)
{
    for (uint64_t i = 0; i < count; ++i) {
        if (i % part == 0)
            digests[i / part] = 0;
        digests[i / part] += mix((uint64_t)to_bits(element(array, i, dtype) + 0.0f) << 32 | i % part);
    }
}

/* One element of every count / samples in a row, of `bytes` bytes; `at` says which. */
EXPORT void convgen_sample(const void *array, uint64_t count, uint64_t bytes, uint64_t seed, uint64_t samples, void *to,
                           uint64_t *at)
{
    for (uint64_t i = 0; i < samples; ++i) {
        const uint64_t begin = i * count / samples, end = (i + 1) * count / samples;
        at[i] = begin + (drawn(seed, i) * (end - begin) >> 32);
        memcpy((char *)to + i * bytes, (const char *)array + at[i] * bytes, bytes);
    }
}

/* A fixed piece of arithmetic: its time tells whether the machine is as fast as it was. */
EXPORT float convgen_reference_kernel(void)
{
    float sums[256];
    for (int i = 0; i < 256; ++i)
        sums[i] = (float)i;
    for (int round = 0; round < 20000; ++round)
        for (int i = 0; i < 256; ++i)
            sums[i] = sums[i] * 0.999f + 0.5f;
    float sum = 0;
    for (int i = 0; i < 256; ++i)
        sum += sums[i];
    return sum;
}
