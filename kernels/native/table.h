// What an instruction set has to offer. Included last of its headers.

#if defined(HFP_BF16)

// With the instructions for bfloat16 where dims are multiples of their vectors; all else is as with AVX-512 alone.
static bool suits(const Attention &call) {
    return call.key_dim % BFloat16Pairs::channels == 0 && call.value_dim % BFloat16Pairs::channels == 0;
}

static void attend_bfloat16(const Attention &call, const Strip &strip, int64_t head, float *partial,
                            const Scratch &scratch) {
    (suits(call) ? attend_strip<BFloat16Pairs> : avx512::attend_strip<avx512::BFloat16>)(call, strip, head, partial, scratch);
}

static void attend_tiles_bfloat16(const Attention &call, const Strip &strip, int64_t head, float *partial,
                                  const Scratch &scratch) {
    (suits(call) ? attend_tiles<BFloat16Pairs> : avx512::attend_tiles<avx512::BFloat16>)(call, strip, head, partial,
                                                                                        scratch);
}

static const Kernel kKernel = {
    {avx512::attend_strip<avx512::Float32>, attend_bfloat16, avx512::attend_strip<avx512::Float16>,
     avx512::attend_strip<avx512::Int8>, avx512::attend_strip<avx512::Float8>, avx512::attend_strip<avx512::Int4>},
    {avx512::attend_tiles<avx512::Float32>, attend_tiles_bfloat16, avx512::attend_tiles<avx512::Float16>,
     avx512::attend_tiles<avx512::Int8>, avx512::attend_tiles<avx512::Float8>, avx512::attend_tiles<avx512::Int4>},
    {avx512::merge_partials<avx512::Float32>, avx512::merge_partials<avx512::BFloat16>,
     avx512::merge_partials<avx512::Float16>},
    {{avx512::multiply_linear<avx512::Float32, avx512::Float32>, nullptr, HFP_LANES},
     {multiply_linear<BFloat16Pairs, BFloat16>, nullptr, BFloat16Pairs::channels},
     {avx512::multiply_linear<avx512::Float16, avx512::Float16>, avx512::widen<avx512::Float16>, HFP_LANES}},
};

#else

static const Kernel kKernel = {
    {attend_strip<Float32>, attend_strip<BFloat16>, attend_strip<Float16>, attend_strip<Int8>, attend_strip<Float8>,
     attend_strip<Int4>},
    {attend_tiles<Float32>, attend_tiles<BFloat16>, attend_tiles<Float16>, attend_tiles<Int8>, attend_tiles<Float8>,
     attend_tiles<Int4>},
    {merge_partials<Float32>, merge_partials<BFloat16>, merge_partials<Float16>},
    {{multiply_linear<Float32, Float32>, nullptr, HFP_LANES},
     {multiply_linear<BFloat16, BFloat16>, widen<BFloat16>, HFP_LANES},
     {multiply_linear<Float16, Float16>, widen<Float16>, HFP_LANES}},
};

#endif
