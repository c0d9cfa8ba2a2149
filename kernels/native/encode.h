// Numbers to records, bit for bit what `formats.py` makes of them. It takes far less time than reading the cache does,
// so that the portable vectors are good enough.
#pragma once

#include "rotate.h"
#include "variants.h"

namespace hfp {

constexpr int64_t kEncodedLanes = 4;  // of the portable variant

// `read` makes floats of numbers of a dtype, `encode` makes a record of these, in groups of `group` channels where a
// format has groups.
typedef void (*ReadNumbers)(const char *numbers, int64_t dim, float *into);
typedef void (*Encode)(const float *numbers, int64_t dim, int64_t group, char *record);

template <class Type>
static void read_numbers(const char *numbers, int64_t dim, float *into) {
    using namespace portable;
    const typename Type::Storage *from = (const typename Type::Storage *)numbers;
    for (int64_t d = 0; d < dim; d += kEncodedLanes) store(into + d, Type::read(from + d));
}

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

// A byte a number.
template <class To>
static void encode_scaled(const float *numbers, int64_t dim, int64_t, char *record) {
    using namespace portable;
    Floats most = {}, odd = {};  // `odd`: 0, or NaN where a number is not finite
    for (int64_t d = 0; d < dim; d += kEncodedLanes) {
        const Floats x = load(numbers + d);
        most = larger(most, larger(x, -x));
        odd += x - x;
    }
    float scale = largest_of(most) / To::largest + sum_of(odd);
    if (scale < kLeastScale) scale = 0;
    const Floats divisor = splat(scale == 0 ? 1 : scale);
    for (int64_t d = 0; d < dim; d += kEncodedLanes) {
        const Floats x = load(numbers + d) / divisor;
        const Words codes = To::code(x == x ? x : Floats{});
        for (int i = 0; i < kEncodedLanes; ++i) record[d + i] = (char)codes[i];
    }
    memcpy(record + dim, &scale, sizeof scale);
}

// Steps from the smallest number of each group.
static void encode_nibbles(const float *numbers, int64_t dim, int64_t group, char *record) {
    using namespace portable;
    const int64_t groups = dim / group, half = dim / 2;
    Floats odd = {};
    for (int64_t d = 0; d < dim; d += kEncodedLanes) {
        const Floats x = load(numbers + d);
        odd += x - x;
    }
    float is_odd = sum_of(odd);
    char *scales = record + half;
    for (int64_t g = 0; g < groups; ++g) {
        const float *from = numbers + g * group;
        Floats least = load(from), most = least;
        for (int64_t d = kEncodedLanes; d < group; d += kEncodedLanes) {
            const Floats x = load(from + d);
            least = -larger(-least, -x), most = larger(most, x);
        }
        const float low = -largest_of(-least), high = largest_of(most);
        uint16_t both[kEncodedLanes];
        Float16::write(both, Floats{(high - low) / kLargestInt4, low});
        if (both[1] == 0x8000) both[1] = 0;  // no negative zeros
        memcpy(scales + g * kGroupBytes, both, kGroupBytes);
        const Floats rounded = Float16::read(both);
        const Floats step = splat(rounded[0]), first = splat(rounded[1]);
        is_odd += (rounded[0] - rounded[0]) + (rounded[1] - rounded[1]);
        for (int64_t d = 0; d < group; d += kEncodedLanes) {
            Floats counted = (load(from + d) - first) / step;
            counted = larger(counted, Floats{});
            counted = counted < splat(kLargestInt4) ? counted : splat(kLargestInt4);
            const Words codes = ToInt8::code(step > Floats{} ? counted : Floats{});
            const int64_t at = g * group + d;
            for (int i = 0; i < kEncodedLanes; ++i) {
                if (at < half) record[at + i] = (char)codes[i];
                else record[at - half + i] = (char)(record[at - half + i] | codes[i] << 4);
            }
        }
    }
    if (is_odd != is_odd) memset(scales, 0xff, groups * kGroupBytes);  // NaN as a whole
}

static const ReadNumbers kReadNumbers[kDtypes] = {read_numbers<portable::Float32>, read_numbers<portable::BFloat16>,
                                                  read_numbers<portable::Float16>};
static const Encode kEncodes[kStorages - kDtypes] = {encode_scaled<ToInt8>, encode_scaled<ToFloat8>, encode_nibbles};

}  // namespace hfp
