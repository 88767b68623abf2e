// Quantizing to Q4_K, Q5_K and Q6_K, eight groups of weights at a time.
//
// ggml searches each group's scale (and minimum) by trying some twenty, one after another, and adds
// up the error of each try in a chain of float additions, whose order is part of the result: a
// compiler may not make vectors of it. The groups of a block know nothing of each other, though. So
// each lane of a vector here searches one group, in ggml's own order of operations, and the file is
// the same to the last bit (tests/export/test_kquants.py) in a fraction of the time
// (bench/results/gguf.md).
//
// Linked in place of ggml's functions by the linker's --wrap. With an importance matrix, ggml's own
// are called, whose search is another one.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ggml.h"
#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#define LANES 8

typedef float   floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints   __attribute__((vector_size(4 * LANES)));  // also masks: -1 is true, 0 false

#define CONSTANT(value) ((floats){} + (value))

static inline floats choose(ints mask, floats yes, floats no) {
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

static inline ints choose_ints(ints mask, ints yes, ints no) {
    return (mask & yes) | (~mask & no);
}

static inline ints clamp(ints value, int low, int high) {
    const ints lows = (ints){} + low, highs = (ints){} + high;
    value = choose_ints(value > highs, highs, value);
    return choose_ints(value < lows, lows, value);
}

static inline int any(ints mask) {
    int found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
    return found != 0;
}

// Rounds half to even. Adding 1.5 * 2^23 leaves the whole number in the mantissa's low bits; ggml
// rounds so, and beyond 2^22 its result is another than that of a rounding instruction.
static inline ints nearest(floats value) {
    return ((ints)(value + 12582912.f) & 0x007fffff) - 0x00400000;
}

static inline int nearest_one(float value) {
    const float shifted = value + 12582912.f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

static inline floats to_floats(ints value) {
    return __builtin_convertvector(value, floats);
}

// out[i] holds weight i of each of LANES groups that follow one another in x.
static inline void load(int size, const float * x, floats * out) {
    for (int i = 0; i < size; ++i) {
        for (int lane = 0; lane < LANES; ++lane) out[i][lane] = x[size * lane + i];
    }
}

// ---------------------------------------------------------------- scale and minimum: Q4_K and Q5_K

#define GROUP 32  // weights that share a scale and a minimum

struct affine {
    floats scale;    // weight = scale * level - low
    floats low;
    floats start;    // the levels found are round(inverse * (weight - start))
    floats inverse;
};

static inline ints levels_of(floats x, floats start, floats inverse, int top) {
    return clamp(nearest(inverse * (x - start)), 0, top);
}

// Weighted least squares over levels 0..top, for a first rounding and `tries` + 1 coarser to finer.
static inline struct affine search_affine(const floats * x, int top, float first, int tries) {
    floats weight[GROUP], level[GROUP];

    floats squares = {};
    for (int i = 0; i < GROUP; ++i) squares += x[i] * x[i];
    squares /= (float)GROUP;
    floats spread;
    for (int lane = 0; lane < LANES; ++lane) spread[lane] = sqrtf(squares[lane]);
    for (int i = 0; i < GROUP; ++i) weight[i] = spread + (floats)((ints)x[i] & 0x7fffffff);

    floats min = x[0], max = x[0];
    floats sum_w = weight[0], sum_x = weight[0] * x[0];
    for (int i = 1; i < GROUP; ++i) {
        min = choose(x[i] < min, x[i], min);
        max = choose(x[i] > max, x[i], max);
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    min = choose(min > 0.f, CONSTANT(0.f), min);

    // All the same: no scale, and the weight is the minimum. The lane goes along with levels of 0.
    const ints flat = max == min;
    floats range = choose(flat, CONSTANT(1.f), max - min);

    struct affine best = {.start = min, .inverse = (float)top / range};
    best.scale = 1.f / best.inverse;
    floats best_error = {};
    for (int i = 0; i < GROUP; ++i) {
        const floats l = to_floats(levels_of(x[i], min, best.inverse, top));
        const floats miss = best.scale * l + min - x[i];
        best_error += weight[i] * (miss * miss);
    }

    for (int try = 0; try <= tries; ++try) {
        const floats inverse = (first + 0.1f * (float)try + (float)top) / range;
        floats sum_l = {}, sum_l2 = {}, sum_xl = {};
        for (int i = 0; i < GROUP; ++i) {
            const floats l = to_floats(levels_of(x[i], min, inverse, top));
            const floats wl = weight[i] * l;
            level[i] = l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
        }
        const floats determinant = sum_w * sum_l2 - sum_l * sum_l;
        floats try_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        floats try_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const ints above = try_min > 0.f;
        try_scale = choose(above, sum_xl / sum_l2, try_scale);
        try_min = choose(above, CONSTANT(0.f), try_min);

        floats error = {};
        for (int i = 0; i < GROUP; ++i) {
            const floats miss = try_scale * level[i] + try_min - x[i];
            error += weight[i] * (miss * miss);
        }
        const ints better = (determinant > 0.f) & (error < best_error);
        best_error = choose(better, error, best_error);
        best.scale = choose(better, try_scale, best.scale);
        best.inverse = choose(better, inverse, best.inverse);
        best.start = choose(better, min, best.start);
        // The next try starts from the minimum found here.
        min = choose(better, try_min, min);
        range = choose(better, max - min, range);
    }
    best.scale = choose(flat, CONSTANT(0.f), best.scale);
    best.low = -min;
    return best;
}

// The scales and minima of eight groups in twelve bytes of 6-bit numbers, the layout of Q4_K and Q5_K.
static inline void pack_scales(const uint8_t * scale, const uint8_t * low, uint8_t * out) {
    for (int j = 0; j < 4; ++j) {
        out[j] = (uint8_t)(scale[j] | (scale[j + 4] >> 4) << 6);
        out[j + 4] = (uint8_t)(low[j] | (low[j + 4] >> 4) << 6);
        out[j + 8] = (uint8_t)((scale[j + 4] & 15) | (low[j + 4] & 15) << 4);
    }
}

// One block: its scales, and into `level` the level of each weight, group after group.
static inline void quantize_affine(const float * weights, int top, float first, int tries, ggml_half * d,
                                   ggml_half * dmin, uint8_t * packed, uint8_t * level) {
    floats x[GROUP];
    load(GROUP, weights, x);
    const struct affine found = search_affine(x, top, first, tries);

    float max_scale = 0, max_low = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        if (found.scale[lane] > max_scale) max_scale = found.scale[lane];
        if (found.low[lane] > max_low) max_low = found.low[lane];
    }
    const float scale_inverse = max_scale > 0 ? 63.f / max_scale : 0.f;
    const float low_inverse = max_low > 0 ? 63.f / max_low : 0.f;
    uint8_t scale[LANES], low[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        scale[lane] = (uint8_t)nearest_one(scale_inverse * found.scale[lane]);
        low[lane] = (uint8_t)nearest_one(low_inverse * found.low[lane]);
        if (scale[lane] > 63) scale[lane] = 63;
        if (low[lane] > 63) low[lane] = 63;
    }
    pack_scales(scale, low, packed);
    *d = ggml_fp32_to_fp16(max_scale / 63.f);
    *dmin = ggml_fp32_to_fp16(max_low / 63.f);

    // The levels again, for the scales as they are stored; a group whose scale became 0 keeps those
    // of the search.
    const float unit = ggml_fp16_to_fp32(*d), low_unit = ggml_fp16_to_fp32(*dmin);
    floats step, offset;
    for (int lane = 0; lane < LANES; ++lane) {
        step[lane] = unit * (float)scale[lane];
        offset[lane] = low_unit * (float)low[lane];
    }
    const ints no_scale = step == 0.f;
    const int mixed = any(no_scale);
    for (int i = 0; i < GROUP; ++i) {
        ints l = clamp(nearest((x[i] + offset) / step), 0, top);
        if (mixed) l = choose_ints(no_scale, levels_of(x[i], found.start, found.inverse, top), l);
        for (int lane = 0; lane < LANES; ++lane) level[GROUP * lane + i] = (uint8_t)l[lane];
    }
}

static void quantize_row_q4_K(const float * x, block_q4_K * y, int64_t blocks) {
    uint8_t level[QK_K];
    for (; blocks > 0; --blocks, x += QK_K, ++y) {
        quantize_affine(x, 15, -1.f, 20, &y->d, &y->dmin, y->scales, level);
        for (int pair = 0; pair < QK_K / 64; ++pair) {
            const uint8_t * low = level + 64 * pair, * high = low + 32;
            for (int i = 0; i < 32; ++i) y->qs[32 * pair + i] = (uint8_t)(low[i] | high[i] << 4);
        }
    }
}

static void quantize_row_q5_K(const float * x, block_q5_K * y, int64_t blocks) {
    uint8_t level[QK_K];
    for (; blocks > 0; --blocks, x += QK_K, ++y) {
        quantize_affine(x, 31, -0.5f, 15, &y->d, &y->dmin, y->scales, level);
        memset(y->qh, 0, sizeof y->qh);
        for (int pair = 0; pair < QK_K / 64; ++pair) {
            const uint8_t * low = level + 64 * pair, * high = low + 32;
            for (int i = 0; i < 32; ++i) {
                y->qs[32 * pair + i] = (uint8_t)((low[i] & 15) | (high[i] & 15) << 4);
                y->qh[i] |= (uint8_t)((low[i] >> 4) << (2 * pair) | (high[i] >> 4) << (2 * pair + 1));
            }
        }
    }
}

// ------------------------------------------------------------------------------- scale alone: Q6_K

#define SMALL_GROUP 16
#define ALL_ZERO 1e-15f  // ggml's GROUP_MAX_EPS: weights below are no weights

struct scaled {
    floats scale;
    floats inverse;  // the levels found are round(inverse * weight)
    ints   zero;     // no weight in the group
};

// Least squares weighted by the weights' squares, over levels -32..31.
static inline struct scaled search_scale(const floats * x) {
    floats square[SMALL_GROUP], cube[SMALL_GROUP];
    floats max = {}, largest = {};
    for (int i = 0; i < SMALL_GROUP; ++i) {
        const floats size = (floats)((ints)x[i] & 0x7fffffff);
        const ints larger = size > largest;
        largest = choose(larger, size, largest);
        max = choose(larger, x[i], max);
        square[i] = x[i] * x[i];
        cube[i] = square[i] * x[i];
    }
    struct scaled best = {.zero = largest < ALL_ZERO};
    max = choose(best.zero, CONSTANT(1.f), max);

    floats best_fit = {};
    for (int try = 0; try < 19; ++try) {
        const int finer = try == 0 ? 0 : try <= 9 ? try - 10 : try - 9;  // 0 first, then -9..9 without it
        const floats inverse = -(32.f + 0.1f * (float)finer) / max;
        floats sum_xl = {}, sum_l2 = {};
        for (int i = 0; i < SMALL_GROUP; ++i) {
            const floats l = to_floats(clamp(nearest(inverse * x[i]), -32, 31));
            sum_xl += cube[i] * l;
            sum_l2 += square[i] * l * l;
        }
        const floats scale = sum_xl / sum_l2;
        if (try == 0) {
            best.scale = choose(sum_l2 != 0.f, scale, CONSTANT(0.f));
            best.inverse = inverse;
            best_fit = best.scale * sum_xl;
            continue;
        }
        const ints better = (sum_l2 > 0.f) & (sum_xl * sum_xl > best_fit * sum_l2);
        best.scale = choose(better, scale, best.scale);
        best.inverse = choose(better, inverse, best.inverse);
        best_fit = choose(better, scale * sum_xl, best_fit);
    }
    best.scale = choose(best.zero, CONSTANT(0.f), best.scale);
    return best;
}

static void quantize_row_q6_K(const float * weights, block_q6_K * y, int64_t blocks) {
    enum { HALVES = QK_K / (SMALL_GROUP * LANES) };
    uint8_t level[QK_K];
    for (; blocks > 0; --blocks, weights += QK_K, ++y) {
        floats x[HALVES][SMALL_GROUP];
        struct scaled found[HALVES];
        float max_scale = 0, largest = 0;
        for (int half = 0; half < HALVES; ++half) {
            load(SMALL_GROUP, weights + half * SMALL_GROUP * LANES, x[half]);
            found[half] = search_scale(x[half]);
            for (int lane = 0; lane < LANES; ++lane) {
                const float size = fabsf(found[half].scale[lane]);
                if (size > largest) {
                    largest = size;
                    max_scale = found[half].scale[lane];
                }
            }
        }
        if (largest < ALL_ZERO) {
            memset(y, 0, sizeof *y);
            continue;
        }
        const float inverse = -128.f / max_scale;
        y->d = ggml_fp32_to_fp16(1 / inverse);
        const float unit = ggml_fp16_to_fp32(y->d);
        for (int half = 0; half < HALVES; ++half) {
            floats step;
            for (int lane = 0; lane < LANES; ++lane) {
                const int scale = nearest_one(inverse * found[half].scale[lane]);
                y->scales[half * LANES + lane] = (int8_t)(scale > 127 ? 127 : scale);
                step[lane] = unit * (float)y->scales[half * LANES + lane];
            }
            const ints no_scale = step == 0.f;
            const int mixed = any(no_scale);
            for (int i = 0; i < SMALL_GROUP; ++i) {
                ints l = clamp(nearest(x[half][i] / step), -32, 31) + 32;
                if (mixed) {
                    const ints kept = clamp(nearest(found[half].inverse * x[half][i]), -32, 31) + 32;
                    l = choose_ints(no_scale, ~found[half].zero & kept, l);
                }
                uint8_t * out = level + half * SMALL_GROUP * LANES + i;
                for (int lane = 0; lane < LANES; ++lane) out[SMALL_GROUP * lane] = (uint8_t)l[lane];
            }
        }
        for (int half = 0; half < QK_K / 128; ++half) {
            const uint8_t * l = level + 128 * half;
            for (int i = 0; i < 32; ++i) {
                y->ql[64 * half + i] = (uint8_t)((l[i] & 15) | (l[i + 64] & 15) << 4);
                y->ql[64 * half + i + 32] = (uint8_t)((l[i + 32] & 15) | (l[i + 96] & 15) << 4);
                y->qh[32 * half + i] = (uint8_t)(l[i] >> 4 | (l[i + 32] >> 4) << 2 | (l[i + 64] >> 4) << 4 |
                                                 (l[i + 96] >> 4) << 6);
            }
        }
    }
}

// ------------------------------------------------------------------------ in place of ggml's functions

#define IN_PLACE_OF(name, block)                                                                            \
    size_t __real_quantize_##name(const float *, void *, int64_t, int64_t, const float *);                  \
    size_t __wrap_quantize_##name(const float *, void *, int64_t, int64_t, const float *);                  \
    size_t __wrap_quantize_##name(const float * x, void * out, int64_t rows, int64_t columns,               \
                                  const float * importance) {                                               \
        if (importance) return __real_quantize_##name(x, out, rows, columns, importance);                   \
        const int64_t blocks = rows * columns / QK_K;                                                       \
        quantize_row_##name(x, (block *)out, blocks);                                                       \
        return (size_t)blocks * sizeof(block);                                                              \
    }

IN_PLACE_OF(q4_K, block_q4_K)
IN_PLACE_OF(q5_K, block_q5_K)
IN_PLACE_OF(q6_K, block_q6_K)
