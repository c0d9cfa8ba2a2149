// bfloat16 without widening: two numbers in each lane, multiplied and summed by one instruction (AVX512-BF16). Queries
// and weights are bfloat16 too, the latter rounded, as in torch's own attention. Included between simd.h and decode.h.

// Of scores a lane holds two channels of a token. Of values it holds a channel of two tokens, so that sums come in
// another order of channels until `order_channels`.
struct BFloat16Pairs : BFloat16 {
    static constexpr bool is_paired = true;
    static constexpr int64_t channels = 2 * HFP_LANES;
    static constexpr int64_t tokens = 2, vectors = 2;
    typedef __m512bh Numbers;

    static HFP_INLINE Numbers read(const uint16_t *p) { return (Numbers)_mm512_loadu_si512(p); }
    static HFP_INLINE Numbers read_query(const float *query, int64_t d) { return read((const uint16_t *)query + d); }
    static HFP_INLINE Numbers read_weight(const float *weights, int64_t token) {
        int32_t pair;
        memcpy(&pair, (const uint16_t *)weights + token, sizeof pair);
        return (Numbers)_mm512_set1_epi32(pair);
    }
    static HFP_INLINE void read_values(const uint16_t *const (&values)[tokens], int64_t d, Numbers (&into)[vectors]) {
        const __m512i first = _mm512_loadu_si512(values[0] + d), second = _mm512_loadu_si512(values[1] + d);
        into[0] = (Numbers)_mm512_unpacklo_epi16(first, second);
        into[1] = (Numbers)_mm512_unpackhi_epi16(first, second);
    }
    static HFP_INLINE Floats add_product(Floats sum, Numbers a, Numbers b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b);
    }

    // Weights of a row, rounded, to the begin of where they lie.
    static HFP_INLINE void pair_weights(float *weights, int64_t count) {
        for (int64_t t = 0; t < count; t += HFP_LANES) {
            const __m256i pairs = (__m256i)_mm512_cvtneps_pbh((__m512)load(weights + t));
            _mm256_storeu_si256((__m256i *)((uint16_t *)weights + t), pairs);
        }
    }
    // Sums of `vectors` that `read_values` gave, to the order of the channels.
    static HFP_INLINE void order_channels(float *sums, int64_t count) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        for (int64_t i = 0; i < count; i += channels) {
            const __m512 first = (__m512)load(sums + i), second = (__m512)load(sums + i + HFP_LANES);
            store(sums + i, (Floats)_mm512_permutex2var_ps(first, low, second));
            store(sums + i + HFP_LANES, (Floats)_mm512_permutex2var_ps(first, high, second));
        }
    }
};
