/* Tensor maps of an emulated device: what the driver encodes, as far as the limits it documents allow, and what
 * kernels are given.
 *
 * Source: CUDA Driver API, "Tensor Map Object Management". Less: packed types and interleaved layouts.
 */
#pragma once
#include <cstdint>
#include <cstring>

namespace emulation {

enum { MAP_MAGIC = 0x50414d54, MOST_AXES = 5, LARGE = 1 << 21, LARGE_BYTES = 1 << 17 };

struct Map {
    uint64_t address; /* first: the driver checks what kernels are given */
    uint64_t flags;   /* bit 21: the tensor is large, as drivers up to CUDA 13.1 say of all */
    uint64_t strides[MOST_AXES - 1];
    uint32_t last[MOST_AXES]; /* sizes less one */
    uint32_t magic;
    uint16_t box[MOST_AXES]; /* in im2col mode: channels, pixels */
    int16_t lower[MOST_AXES - 2], upper[MOST_AXES - 2];
    uint8_t steps[MOST_AXES];
    uint8_t rank, bytes, swizzle, im2col; /* swizzle: bytes of its rows, 0 for none */
};
static_assert(sizeof(Map) <= 128, "more than a CUtensorMap");

/* CUtensorMapDataType */
inline int bytes_of_type(int type)
{
    static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return 0 <= type && type < 13 ? bytes[type] : 0;
}

/* What both modes have. */
inline bool encode(Map &map, int type, unsigned rank, uint64_t address, const uint64_t *sizes, const uint64_t *strides,
                   const uint32_t *steps, int interleave, int swizzle, int promotion, int fill)
{
    const bool floats = type >= 6;
    map = {};
#ifdef CONVGEN_OLD_DRIVER
    map.flags = LARGE;
#endif
    map.magic = MAP_MAGIC, map.address = address, map.rank = rank, map.bytes = bytes_of_type(type);
    map.swizzle = swizzle ? 16 << swizzle : 0;
    if (!map.bytes || rank < 1 || rank > MOST_AXES || !address || address % 16 || interleave)
        return false;
    if (swizzle < 0 || swizzle > 3 || promotion < 0 || promotion > 3 || fill < 0 || fill > floats)
        return false;
    for (unsigned i = 0; i < rank; ++i) {
        if (!sizes[i] || sizes[i] > uint64_t(1) << 32 || !steps[i] || steps[i] > 8)
            return false;
        map.last[i] = sizes[i] - 1, map.steps[i] = i ? steps[i] : 1;
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= uint64_t(1) << 40))
            return false;
        if (i + 1 < rank)
            map.strides[i] = strides[i];
    }
    return true;
}

inline bool fits_rows(const Map &map)
{
    const int row = map.box[0] * map.bytes;
    return row % 16 == 0 && (!map.swizzle || row <= map.swizzle);
}

} // namespace emulation

/* The driver's functions: 0, or CUDA_ERROR_INVALID_VALUE. */
#define CG_ENCODE extern "C" __attribute__((visibility("default"))) int

CG_ENCODE cuTensorMapEncodeTiled(void *to, int type, unsigned rank, void *address, const uint64_t *sizes,
                                 const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                                 int swizzle, int promotion, int fill)
{
    emulation::Map map;
    if ((uintptr_t)to % 64 ||
        !emulation::encode(map, type, rank, (uint64_t)address, sizes, strides, steps, interleave, swizzle, promotion, fill))
        return 1;
    for (unsigned i = 0; i < rank; ++i) {
        if (!box[i] || box[i] > 256)
            return 1;
        map.box[i] = box[i];
    }
    if (!emulation::fits_rows(map))
        return 1;
    memcpy(to, &map, sizeof map);
    return 0;
}

CG_ENCODE cuTensorMapEncodeIm2col(void *to, int type, unsigned rank, void *address, const uint64_t *sizes,
                                  const uint64_t *strides, const int *lower, const int *upper, unsigned channels,
                                  unsigned pixels, const uint32_t *steps, int interleave, int swizzle, int promotion,
                                  int fill)
{
    emulation::Map map;
    if (rank < 3 || (uintptr_t)to % 64 ||
        !emulation::encode(map, type, rank, (uint64_t)address, sizes, strides, steps, interleave, swizzle, promotion, fill))
        return 1;
    const int limit = 1 << (16 / (rank - 2) - 1);
    for (unsigned i = 0; i < rank - 2; ++i) {
        const bool fits = -limit <= lower[i] && lower[i] < limit && -limit <= upper[i] && upper[i] < limit;
        if (!fits || (int64_t)sizes[i + 1] + upper[i] <= lower[i])
            return 1;
        map.lower[i] = lower[i], map.upper[i] = upper[i];
    }
    if (!channels || channels > 256 || !pixels || pixels > 1024)
        return 1;
    map.im2col = true, map.box[0] = channels, map.box[1] = pixels;
    if (!emulation::fits_rows(map))
        return 1;
    memcpy(to, &map, sizeof map);
    return 0;
}
