// The rotation of keys before they are rounded, and of the queries that meet them: bit for bit what `rotation.py` does.
#pragma once

#include "native.h"

#include <cmath>

namespace hfp {

// Sums and differences of neighbours 1 and 2 apart, within four numbers.
static inline void rotate_four(float *x) {
    const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
}

// Rotates `dim` numbers, a multiple of 4, in blocks of the largest power of two that divides `dim`. Never inlined, so
// that no multiplication here becomes one operation with a sum elsewhere, which would round differently.
static __attribute__((noinline)) void rotate(float *numbers, int64_t dim) {
    const int64_t size = dim & -dim;
    const float scale = (float)(1 / std::sqrt((double)size));
    for (float *block = numbers; block < numbers + dim; block += size) {
        for (int64_t i = 0; i < size; i += 4) rotate_four(block + i);
        for (int64_t apart = 4; apart < size; apart *= 2)
            for (int64_t begin = 0; begin < size; begin += 2 * apart)
                for (int64_t i = begin; i < begin + apart; ++i) {
                    const float first = block[i], second = block[i + apart];
                    block[i] = first + second, block[i + apart] = first - second;
                }
        for (int64_t i = 0; i < size; ++i) block[i] *= scale;
    }
}

}  // namespace hfp
