// Numbers to records of codes and a scale, bit for bit what `formats.py` makes of them. It takes far less time than
// reading the cache does, so that the portable vectors are good enough.
#pragma once

#include "variants.h"

namespace hfp {

constexpr int64_t kEncodedLanes = 4;  // of the portable variant

typedef void (*Encode)(const char *numbers, int64_t dim, char *record);

struct ToInt8 {
    static constexpr float largest = kLargestInt8;
    static HFP_INLINE portable::Words code(portable::Floats x) {
        const portable::Floats magic = portable::splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
        return (portable::Words)(x + magic) - (portable::Words)magic;
    }
};

struct ToFloat8 {
    static constexpr float largest = kLargestFloat8;
    static HFP_INLINE portable::Words code(portable::Floats x) {
        const portable::Words sign = ((portable::Words)x >> 24) & 0x80, bits = (portable::Words)x & 0x7fffffff;
        const portable::Words normal = (bits - 0x3c000000 + 0x7ffff + ((bits >> 20) & 1)) >> 20;
        // Adding 2^14 leaves a subnormal code, rounded, at the low end of the sum.
        const portable::Words subnormal = (portable::Words)((portable::Floats)bits + 16384.0f) - 0x46800000;
        return sign | (bits < 0x3c800000 ? subnormal : normal);
    }
};

template <class Type, class To>
static void encode(const char *numbers, int64_t dim, char *record) {
    using namespace portable;
    const typename Type::Storage *from = (const typename Type::Storage *)numbers;
    Floats most = {}, odd = {};  // `odd`: 0, or NaN where a number is not finite
    for (int64_t d = 0; d < dim; d += kEncodedLanes) {
        const Floats x = Type::read(from + d);
        most = larger(most, larger(x, -x));
        odd += x - x;
    }
    float scale = largest_of(most) / To::largest + sum_of(odd);
    if (scale < kLeastScale) scale = 0;
    const Floats divisor = splat(scale == 0 ? 1 : scale);
    for (int64_t d = 0; d < dim; d += kEncodedLanes) {
        const Floats x = Type::read(from + d) / divisor;
        const Words codes = To::code(x == x ? x : Floats{});
        for (int i = 0; i < kEncodedLanes; ++i) record[d + i] = (char)codes[i];
    }
    memcpy(record + dim, &scale, sizeof scale);
}

static const Encode kEncodes[kStorages - kDtypes][kDtypes] = {
    {encode<portable::Float32, ToInt8>, encode<portable::BFloat16, ToInt8>, encode<portable::Float16, ToInt8>},
    {encode<portable::Float32, ToFloat8>, encode<portable::BFloat16, ToFloat8>, encode<portable::Float16, ToFloat8>},
};

}  // namespace hfp
