// The kernel once per instruction set, and the table of them. To add one: a name, the lanes of a vector, the number of
// vector registers, the target options, and how to tell that the CPU has it.
#pragma once

#include "rotate.h"

#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HFP_INLINE inline __attribute__((always_inline))

namespace hfp {

// What every compiler of the platform may assume: SSE2 on x86-64, NEON on ARM.
namespace portable {
#define HFP_LANES 4
#if defined(__aarch64__)
#define HFP_REGISTERS 32
#else
#define HFP_REGISTERS 16
#endif
#include "simd.h"
#include "decode.h"
#include "tiles.h"
#include "linear.h"
#include "table.h"
#undef HFP_LANES
#undef HFP_REGISTERS
}  // namespace portable

static bool always() { return true; }

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#if defined(HFP_TEST_WIDE)  // the width of AVX-512, for tests on CPUs that do not have it
namespace wide {
#define HFP_LANES 16
#define HFP_REGISTERS 32
#include "simd.h"
#include "decode.h"
#include "tiles.h"
#include "linear.h"
#include "table.h"
#undef HFP_LANES
#undef HFP_REGISTERS
}  // namespace wide
#endif
namespace avx2 {
#define HFP_LANES 8
#define HFP_REGISTERS 16
#define HFP_F16C
#include "simd.h"
#include "decode.h"
#include "tiles.h"
#include "linear.h"
#include "table.h"
#undef HFP_LANES
#undef HFP_REGISTERS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#define HFP_LANES 16
#define HFP_REGISTERS 32
#include "simd.h"
#include "decode.h"
#include "tiles.h"
#include "linear.h"
#include "table.h"
#undef HFP_LANES
#undef HFP_REGISTERS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// Older compilers do not know the instructions, or not how to ask for them.
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 11
#define HFP_HAS_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512_bf16 {
#define HFP_LANES 16
#define HFP_REGISTERS 32
#define HFP_BF16
#include "simd.h"
#include "pairs.h"
#include "decode.h"
#include "tiles.h"
#include "linear.h"
#include "table.h"
#undef HFP_LANES
#undef HFP_REGISTERS
#undef HFP_BF16
}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef HFP_F16C

static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#if defined(HFP_HAS_BF16)
static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

static const Variant kVariants[] = {
    {"portable", 4, always, &portable::kKernel},
    {"avx2", 8, has_avx2, &avx2::kKernel},
    {"avx512", 16, has_avx512, &avx512::kKernel},
#if defined(HFP_HAS_BF16)
    {"avx512_bf16", 16, has_avx512_bf16, &avx512_bf16::kKernel},
#endif
#if defined(HFP_TEST_WIDE)
    {"wide", 16, has_avx2, &wide::kKernel},
#endif
};

#else

static const Variant kVariants[] = {
#if defined(__aarch64__)
    {"neon", 4, always, &portable::kKernel},
#else
    {"portable", 4, always, &portable::kKernel},
#endif
};

#endif

static const int64_t kNumVariants = sizeof kVariants / sizeof *kVariants;

}  // namespace hfp
