/* Compares outputs on machines without NumPy: a library of its own in a bundle of candidates. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#define EXPORT __attribute__((visibility("default")))

enum { F32, F16, BF16, I8 };

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
