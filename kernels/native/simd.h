// Vectors of HFP_LANES floats, and how each storage type becomes one. Included once per instruction set, inside a
// namespace of its own and between target pragmas; everything is inlined there.


typedef float Floats __attribute__((vector_size(HFP_LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(HFP_LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(HFP_LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(HFP_LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(HFP_LANES)));

static HFP_INLINE Floats splat(float x) { return x - Floats{}; }
static HFP_INLINE Floats load(const float *p) {
    Floats x;
    memcpy(&x, p, sizeof x);
    return x;
}
static HFP_INLINE void store(float *p, Floats x) { memcpy(p, &x, sizeof x); }
// 0, 1, 2, ...
static HFP_INLINE Floats counting() {
    Floats x;
    for (int i = 0; i < HFP_LANES; ++i) x[i] = (float)i;
    return x;
}
static HFP_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Keeps the compiler from loading `x` anew at each use: loads are what the inner loops have most of.
static HFP_INLINE Floats in_register(Floats x) {
#if defined(HFP_F16C) && HFP_LANES == 8
    asm("" : "+x"(x));
#endif
    return x;
}

static HFP_INLINE Words load_halves(const uint16_t *p) {
#if defined(HFP_F16C) && HFP_LANES == 8  // gcc 12 widens in two halves
    return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(HFP_F16C) && HFP_LANES == 16
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#else
    Halves x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Words);
#endif
}
static HFP_INLINE void store_halves(uint16_t *p, Words x) {
    Halves narrow = __builtin_convertvector(x, Halves);
    memcpy(p, &narrow, sizeof narrow);
}

// What is multiplied with what: a vector holds a number of each of HFP_LANES channels, and of one token.
struct OneByOne {
    static constexpr bool is_paired = false;
    static constexpr int64_t channels = HFP_LANES;  // of a vector of a query or key
    static constexpr int64_t tokens = 1, vectors = 1;  // that values are read from, and into, at a time
    typedef Floats Numbers;
    static HFP_INLINE Numbers read_query(const float *query, int64_t d) { return in_register(load(query + d)); }
    static HFP_INLINE Numbers read_weight(const float *weights, int64_t token) { return splat(weights[token]); }
    static HFP_INLINE Floats add_product(Floats sum, Numbers a, Numbers b) { return sum + a * b; }
};

// What the tokens of a storage type are: elements of `dim` numbers, in groups of `group` channels at most; whether they
// are records, with a scale behind the codes, or with several, such that they are decoded before they are read.
struct Plain : OneByOne {
    static constexpr bool is_scaled = false, is_decoded = false;
    static constexpr int64_t size(int64_t dim, int64_t) { return dim; }
};

struct Float32 : Plain {
    typedef float Storage;
    static HFP_INLINE Floats read(const float *p) { return load(p); }
    static HFP_INLINE void write(float *p, Floats x) { store(p, x); }
};

struct BFloat16 : Plain {
    typedef uint16_t Storage;
    static HFP_INLINE Floats read(const uint16_t *p) { return (Floats)(load_halves(p) << 16); }
    static HFP_INLINE void write(uint16_t *p, Floats x) {
        Words bits = (Words)x;
        Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        store_halves(p, x == x ? rounded : (bits >> 16) | 0x40);
    }
};

struct Float16 : Plain {
    typedef uint16_t Storage;
#if defined(HFP_F16C) && HFP_LANES == 8
    static HFP_INLINE Floats read(const uint16_t *p) {
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    }
    static HFP_INLINE void write(uint16_t *p, Floats x) {
        _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(HFP_F16C) && HFP_LANES == 16
    static HFP_INLINE Floats read(const uint16_t *p) {
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    }
    static HFP_INLINE void write(uint16_t *p, Floats x) {
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
    }
#else
    static HFP_INLINE Floats read(const uint16_t *p) {
        Words half = load_halves(p);
        Words magnitude = (half & 0x7fff) << 13;
        // Multiplying moves the exponent to float32's bias and makes subnormal numbers right on the way.
        Words finite = (Words)((Floats)magnitude * splat(0x1p112f));
        Words special = magnitude | 0x7f800000;
        return (Floats)(((half & 0x8000) << 16) | (magnitude >= 0x0f800000 ? special : finite));
    }
    static HFP_INLINE void write(uint16_t *p, Floats x) {
        Words sign = ((Words)x >> 16) & 0x8000, bits = (Words)x & 0x7fffffff;
        Words normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
        // Adding 0.5 leaves a subnormal half's bits, rounded, at the low end of the sum.
        Words subnormal = (Words)((Floats)bits + splat(0.5f)) - 0x3f000000;
        Words half = bits < 0x38800000 ? subnormal : normal;
        Words special = bits > 0x7f800000 ? (Words)(Words{} + 0x7e00) : (Words)(Words{} + 0x7c00);
        store_halves(p, sign | (bits >= 0x477ff000 ? special : half));
    }
#endif
};

// Records: codes, whose numbers `read` gives, and what these are in units of.
struct Record : OneByOne {
    typedef int8_t Storage;
    static constexpr bool is_scaled = true, is_decoded = false;
    static constexpr int64_t size(int64_t dim, int64_t) { return dim + kScaleBytes; }
    static HFP_INLINE float scale(const char *p) {
        float x;
        memcpy(&x, p, sizeof x);
        return x;
    }
};

struct Int8 : Record {
    static HFP_INLINE Floats read(const int8_t *p) {
#if defined(HFP_F16C) && HFP_LANES == 8
        return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#elif defined(HFP_F16C) && HFP_LANES == 16
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
        Bytes x;
        memcpy(&x, p, sizeof x);
        return __builtin_convertvector(x, Floats);
#endif
    }
};

// e4m3. Its bits, moved to where a half has its own, are a half that is 256 times too small, subnormal numbers included:
// the scale makes up for that.
struct Float8 : Record {
    static HFP_INLINE float scale(const char *p) { return Record::scale(p) * 256; }
    static HFP_INLINE Floats read(const int8_t *p) {
#if defined(HFP_F16C) && HFP_LANES == 8
        const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), 7);
        return (Floats)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbfff)));
#elif defined(HFP_F16C) && HFP_LANES == 16
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
        return (Floats)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff)));
#else
        Bytes x;
        memcpy(&x, p, sizeof x);
        const Words code = (Words)__builtin_convertvector(x, Ints);
        // As floats the bits are 2^120 times too small. Multiplying makes subnormal numbers right on the way.
        const Words magnitude = (code & 0x7f) << 20;
        return (Floats)((Words)((Floats)magnitude * splat(0x1p112f)) | (code & 0x80) << 24);
#endif
    }
};

// Codes of four bits on steps from the minimum of their group.
struct Int4 {
    typedef int8_t Storage;
    static constexpr bool is_paired = false, is_scaled = false, is_decoded = true;
    static constexpr int64_t size(int64_t dim, int64_t group) { return record_bytes(kInt4, dim, group); }

    static HFP_INLINE Ints load_bytes(const int8_t *p) {
#if defined(HFP_F16C) && HFP_LANES == 8
        return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#elif defined(HFP_F16C) && HFP_LANES == 16
        return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#else
        typedef uint8_t Unsigned __attribute__((vector_size(HFP_LANES)));
        Unsigned x;
        memcpy(&x, p, sizeof x);
        return __builtin_convertvector(x, Ints);
#endif
    }

    // Step and minimum of a group.
    struct Scales {
        float step, least;
    };
    static HFP_INLINE Scales scales(const int8_t *p) {
#if defined(HFP_F16C)
        int32_t both;
        memcpy(&both, p, sizeof both);
        const __m128 x = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
        return {x[0], x[1]};
#else
        uint16_t both[HFP_LANES] = {};
        memcpy(both, p, kGroupBytes);
        const Floats x = Float16::read(both);
        return {x[0], x[1]};
#endif
    }

    // Numbers of `dim` channels. A vector of codes lies in one group and in one half of the channels.
    static HFP_INLINE void decode(const int8_t *record, int64_t dim, int64_t group, float *into) {
        const int64_t half = dim / 2, run = half % group ? group / 2 : group;
        const int shift = __builtin_ctzll((unsigned long long)group);
        for (int64_t begin = 0; begin < half; begin += run) {
            const Scales first = scales(record + half + (begin >> shift) * kGroupBytes);
            const Scales second = scales(record + half + ((half + begin) >> shift) * kGroupBytes);
            const Floats low_step = splat(first.step), low = splat(first.least);
            const Floats high_step = splat(second.step), high = splat(second.least);
            for (int64_t d = begin; d < begin + run; d += HFP_LANES) {
                const Ints both = load_bytes(record + d);
                store(into + d, __builtin_convertvector(both & 15, Floats) * low_step + low);
                store(into + half + d, __builtin_convertvector(both >> 4, Floats) * high_step + high);
            }
        }
    }
};

// 2^x for x in [-0.5, 0.5], relative error 2e-9 before rounding: a polynomial fitted to that, 1 at 0.
static HFP_INLINE Floats exp2_of_rest(Floats x) {
    Floats y = splat(1.53533489e-4f);
    y = y * x + 1.3398875e-3f;
    y = y * x + 9.61843785e-3f;
    y = y * x + 5.55033237e-2f;
    y = y * x + 2.40226477e-1f;
    y = y * x + 6.93147182e-1f;
    return y * x + 1.0f;
}

// 2 to the power of x, relative error about 1e-7; as good as 0 below -126, which is where weights no longer matter.
static HFP_INLINE Floats exp2_of(Floats x) {
#if defined(HFP_F16C) && HFP_LANES == 16
    // The largest and smallest of two are the second where one is NaN.
    const __m512 above = _mm512_max_ps(_mm512_set1_ps(-200), (__m512)x);
    const __m512 clamped = _mm512_min_ps(_mm512_set1_ps(127), above);
    const __m512 whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT);
    return (Floats)_mm512_scalef_ps((__m512)exp2_of_rest((Floats)clamped - (Floats)whole), whole);
#else
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    Floats low = splat(-126.0f), high = splat(127.0f);
    Floats clamped = larger(x, low);
    clamped = clamped < high ? clamped : high;
    Floats shifted = clamped + magic;
    Ints whole = (Ints)shifted - (Ints)magic;
    Floats scaled = (Floats)((Ints)exp2_of_rest(clamped - (shifted - magic)) + (whole << 23));
    scaled = x < low ? Floats{} : scaled;
    return x == x ? scaled : x;
#endif
}

template <int... i>
struct Indices {};
template <int n, int... i>
struct Range : Range<n - 1, n - 1, i...> {};
template <int... i>
struct Range<0, i...> {
    typedef Indices<i...> Type;
};

// Lanes of `a` and `b` (numbered on from HFP_LANES) that a step of the transposition below puts at lane `i`.
constexpr int paired(int i, int odd) { return (i & ~1) + odd + (i & 1) * HFP_LANES; }
constexpr int quartered(int i, int odd) { return (i & ~3) + (i & 1) + 2 * odd + ((i >> 1) & 1) * HFP_LANES; }

#if defined(__clang__)
#define HFP_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, index...)
#else
#define HFP_SHUFFLE(a, b, index) __builtin_shuffle(a, b, Ints{index...})
#endif

template <int... i>
static HFP_INLINE Floats add_pairs(Floats a, Floats b, Indices<i...>) {
    return HFP_SHUFFLE(a, b, paired(i, 0)) + HFP_SHUFFLE(a, b, paired(i, 1));
}
template <int... i>
static HFP_INLINE Floats add_quarters(Floats a, Floats b, Indices<i...>) {
    return HFP_SHUFFLE(a, b, quartered(i, 0)) + HFP_SHUFFLE(a, b, quartered(i, 1));
}

static HFP_INLINE Floats add_pairs(Floats a, Floats b) { return add_pairs(a, b, Range<HFP_LANES>::Type()); }

// The sums of the lanes of four vectors, of which two pairs went through `add_pairs`, to p[0..3].
static HFP_INLINE void store_sums(float *p, Floats first_pair, Floats second_pair) {
    typedef float Four __attribute__((vector_size(16)));
    Floats sums = add_quarters(first_pair, second_pair, Range<HFP_LANES>::Type());
    Four parts[HFP_LANES / 4];
    memcpy(parts, &sums, sizeof sums);
    for (int n = HFP_LANES / 8; n; n /= 2)
        for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
    memcpy(p, parts, sizeof(Four));
}

// A quarter of the steps that going from lane to lane would take.
typedef float Quarter __attribute__((vector_size(16)));
static HFP_INLINE float sum_of(Floats x) {
    Quarter parts[HFP_LANES / 4];
    memcpy(parts, &x, sizeof x);
    for (int n = HFP_LANES / 8; n; n /= 2)
        for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}
static HFP_INLINE float largest_of(Floats x) {
    Quarter parts[HFP_LANES / 4];
    memcpy(parts, &x, sizeof x);
    for (int n = HFP_LANES / 8; n; n /= 2)
        for (int i = 0; i < n; ++i) parts[i] = parts[i] > parts[i + n] ? parts[i] : parts[i + n];
    const float low = parts[0][0] > parts[0][1] ? parts[0][0] : parts[0][1];
    const float high = parts[0][2] > parts[0][3] ? parts[0][2] : parts[0][3];
    return low > high ? low : high;
}
