// Flash decoding of one strip (see native.h) and the merge of partial results. Included after simd.h, once per
// instruction set.
//
// A strip goes through its tokens in blocks that stay in the first-level cache: scores of all rows against the keys,
// one update of the running softmax, weights times values. Rows are taken a few at a time, as many as there are
// registers for, so that K and V leave memory once however many rows read them. Codes of a byte are read as they are;
// of four bits, a block is decoded first, once for all rows (SmolLM2's shape, 8k tokens, Zen 3: 390 us, int8 320).

// Where the tokens of a block lie, in elements from the head's first slot.
struct Block {
    int64_t tokens;
    int64_t keys[kMaxBlock], values[kMaxBlock];
};

// A strip is read at several places at a time. With four FMAs to each vector that is read, two cores of Zen 3 take
// 25 GB/s from one place each, 33 from two, 46 from four and 27 from eight.
constexpr int64_t kStreams = 4;

// Keys are fetched this many blocks ahead of their use, values one less.
constexpr int64_t kBlocksAhead = 2;

struct Streams {
    Cursor at[kStreams];

    // The strip's tokens in `count` equal pieces.
    Streams(const Strip &strip, const Run *runs, int64_t count) {
        const int64_t each = (strip.tokens + count - 1) / count;
        Cursor rest = {runs + strip.run, strip.skip, strip.tokens};
        for (Cursor &stream : at) {
            const int64_t tokens = rest.left < each ? rest.left : each;
            stream = {rest.run, rest.skip, tokens};
            rest = forward(rest, tokens);
        }
    }
};

// Takes tokens from each stream in turn. A token takes `key_size` and `value_size` elements.
static void next_block(Streams &streams, int64_t most, int64_t key_size, int64_t value_size, Block &block) {
    int64_t i = 0;
    while (i < most) {
        Cursor *going[kStreams];
        int64_t count = 0, each = most;  // tokens that every stream has before its run ends
        for (Cursor &at : streams.at) {
            if (!at.left) continue;
            const int64_t rest = at.run->tokens - at.skip, here = rest < at.left ? rest : at.left;
            each = here < each ? here : each;
            going[count++] = &at;
        }
        if (!count) break;
        if (count > most - i) count = most - i;
        if (each > (most - i) / count) each = (most - i) / count;
        for (int64_t n = 0; n < count; ++n) {
            Cursor &at = *going[n];
            const int64_t slot = at.run->slot + at.skip;
            int64_t *key = block.keys + i + n, *value = block.values + i + n;
            for (int64_t j = 0; j < each; ++j) {
                key[j * count] = (slot + j) * key_size;
                value[j * count] = (slot + j) * value_size;
            }
            at.left -= each, at.skip += each;
            if (at.skip == at.run->tokens) ++at.run, at.skip = 0;
        }
        i += each * count;
    }
    block.tokens = i;
    // Tokens are scored four at a time; the weights of these are not used.
    for (; i & 3; ++i) block.keys[i] = block.keys[i - 1];
}

// What is read some blocks later: fetched meanwhile, line by line between the arithmetic, so that the fetches never queue
// up. Into the second-level cache, as the first one has fewer lines on their way (two cores of Zen 4, float32, multiples
// of a plain read: 1.07 to 1.44 instead of 1.27 to 1.87); codes of a byte, where arithmetic takes longer than memory, into
// the first.
struct Ahead {
    const char *base;
    const int64_t *elements;
    int64_t tokens, element_bytes, row_bytes;

    // Where the token's row is; `other` where there is none.
    HFP_INLINE const char *row(int64_t token, const void *other) const {
        return token < tokens ? base + elements[token] * element_bytes : (const char *)other;
    }
};

template <class Storage>
static HFP_INLINE void prefetch(const char *line) {
    if (sizeof(Storage) == 1) __builtin_prefetch(line);
    else __builtin_prefetch(line, 0, 2);
}

// Scores of `rows` rows against a block's tokens, to `scores[row * kMaxBlock + token]`. Tokens are taken four at a
// time, or two and two where four rows would need more registers than there are.
template <class Type, int rows>
static void score(const Attention &call, const float *query, const typename Type::Storage *keys, const Block &block,
                  float *scores, const Ahead &ahead) {
    typedef typename Type::Storage Storage;
    constexpr int width = rows < 4 || HFP_REGISTERS >= 32 ? 4 : 2;
    for (int64_t t = 0; t < block.tokens; t += 4) {
        Floats pairs[rows][2];
        for (int begin = 0; begin < 4; begin += width) {
            const Storage *key[width];
            const char *next[width];
            for (int i = 0; i < width; ++i) {
                key[i] = keys + block.keys[t + begin + i];
                next[i] = ahead.row(t + begin + i, key[i]);
            }
            Floats sums[rows][width];
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < width; ++i) sums[r][i] = Floats{};
            for (int64_t d = 0; d < call.key_dim; d += Type::channels) {
                const int64_t at = d * (int64_t)sizeof(Storage);
                if (at % 64 == 0 && at < ahead.row_bytes)
                    for (int i = 0; i < width; ++i) prefetch<Storage>(next[i] + at);
                typename Type::Numbers q[rows];
                for (int r = 0; r < rows; ++r) q[r] = Type::read_query(query + r * call.key_dim, d);
                for (int i = 0; i < width; ++i) {
                    const typename Type::Numbers k = Type::read(key[i] + d);
                    for (int r = 0; r < rows; ++r) sums[r][i] = Type::add_product(sums[r][i], q[r], k);
                }
            }
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < width; i += 2) pairs[r][(begin + i) / 2] = add_pairs(sums[r][i], sums[r][i + 1]);
        }
        for (int r = 0; r < rows; ++r) store_sums(scores + r * kMaxBlock + t, pairs[r][0], pairs[r][1]);
    }
}

// Adds weights times values to `sums`, which are scaled first: `width` vectors from dim `d` on.
template <class Type, int rows, int width>
static void weigh_columns(const Attention &call, const float *weights, const float *scales,
                          const typename Type::Storage *values, const Block &block, int64_t d, float *sums,
                          const Ahead &ahead) {
    typedef typename Type::Storage Storage;
    const int64_t at = d * (int64_t)sizeof(Storage), bytes = width * HFP_LANES * sizeof(Storage);
    Floats x[rows][width];
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < width; ++j)
            x[r][j] = load(sums + r * call.value_dim + d + j * HFP_LANES) * splat(scales[r]);
    for (int64_t t = 0; t < block.tokens; t += Type::tokens) {
        const Storage *value[Type::tokens];
        for (int64_t i = 0; i < Type::tokens; ++i) {
            value[i] = t + i < block.tokens ? values + block.values[t + i] + d : (const Storage *)kZeros;
            if (at >= ahead.row_bytes) continue;
            const char *next = ahead.row(t + i, value[i]);
            for (int64_t line = 0; line < bytes; line += 64) prefetch<Storage>(next + at + line);
        }
        typename Type::Numbers weight[rows];
        for (int r = 0; r < rows; ++r) weight[r] = Type::read_weight(weights + r * kMaxBlock, t);
        for (int j = 0; j < width; j += Type::vectors) {
            typename Type::Numbers v[Type::vectors];
            if constexpr (Type::is_paired) Type::read_values(value, j * HFP_LANES, v);
            else v[0] = Type::read(value[0] + j * HFP_LANES);
            for (int i = 0; i < Type::vectors; ++i)
                for (int r = 0; r < rows; ++r) x[r][j + i] = Type::add_product(x[r][j + i], weight[r], v[i]);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < width; ++j) store(sums + r * call.value_dim + d + j * HFP_LANES, x[r][j]);
}

template <class Type, int rows>
static void weigh(const Attention &call, const float *weights, const float *scales,
                  const typename Type::Storage *values, const Block &block, float *sums, const Ahead &ahead) {
    constexpr int width = rows == 1 ? 8 : rows < 4 || HFP_REGISTERS >= 32 ? 4 : 2;
    int64_t d = 0;
    for (; d + width * HFP_LANES <= call.value_dim; d += width * HFP_LANES)
        weigh_columns<Type, rows, width>(call, weights, scales, values, block, d, sums, ahead);
    for (; d + 2 * HFP_LANES <= call.value_dim; d += 2 * HFP_LANES)
        weigh_columns<Type, rows, 2>(call, weights, scales, values, block, d, sums, ahead);
    for (; d < call.value_dim; d += Type::vectors * HFP_LANES)
        weigh_columns<Type, rows, Type::vectors>(call, weights, scales, values, block, d, sums, ahead);
}

// What a product of query and key becomes before the softmax, which is in powers of two.
struct Softmax {
    float factor, cap;

    explicit Softmax(const Attention &call)
        : factor((float)(call.softcap > 0 ? call.scale / call.softcap * 2.8853900817779268
                                          : call.scale * 1.4426950408889634)),
          cap((float)(call.softcap * 1.4426950408889634)) {}

    HFP_INLINE Floats scaled(Floats product) const {
        const Floats x = product * splat(factor);
        return cap > 0 ? splat(cap) - splat(2 * cap) / (exp2_of(x) + 1.0f) : x;
    }
};

// The tokens that query `i` of a strip sees of `tokens` from `begin` on: up to `first + i`, `window` of them.
struct Visible {
    int64_t begin, stop;

    HFP_INLINE Visible(const Strip &strip, int64_t i, int64_t from, int64_t tokens) {
        const int64_t last = strip.first + i - from;
        stop = last + 1 > tokens ? tokens : last + 1 < 0 ? 0 : last + 1;
        begin = strip.window > last ? 0 : last - strip.window + 1;
        begin = begin > stop ? stop : begin;
    }
};

// Scores to weights of one row, and the running softmax: largest score and sum of weights, both in powers of two.
// Tokens of the block that are not visible get weight 0. Returns the factor for what was summed before.
static float soften(const Softmax &softmax, float *scores, int64_t tokens, Visible visible, float *most, float *total) {
    const int64_t padded = (tokens + HFP_LANES - 1) / HFP_LANES * HFP_LANES;
    for (int64_t t = 0; t < padded; t += HFP_LANES) store(scores + t, softmax.scaled(load(scores + t)));
    for (int64_t t = 0; t < visible.begin; ++t) scores[t] = -INFINITY;
    for (int64_t t = visible.stop; t < padded; ++t) scores[t] = -INFINITY;
    Floats top = splat(-INFINITY);
    for (int64_t t = 0; t < padded; t += HFP_LANES) top = larger(top, load(scores + t));
    float highest = largest_of(top);
    if (!(highest > *most)) highest = *most;
    if (highest == -INFINITY) {
        bool is_nan = false;  // NaN is larger than nothing, but must show in the result
        for (int64_t t = 0; t < tokens; ++t) is_nan |= scores[t] != scores[t];
        if (!is_nan) {
            for (int64_t t = 0; t < padded; t += HFP_LANES) store(scores + t, Floats{});
            return 1.0f;
        }
        highest = 0;
    }
    Floats sums = {};
    for (int64_t t = 0; t < padded; t += HFP_LANES) {
        Floats weight = exp2_of(load(scores + t) - splat(highest));
        store(scores + t, weight);
        sums += weight;
    }
    float scale = exp2_of(splat(*most - highest))[0];
    *total = *total * scale + sum_of(sums);
    *most = highest;
    return scale;
}

// Calls `call.template run<n>(row)` for rows `[0, count)` in steps of as many rows as the registers hold.
template <class Step>
static HFP_INLINE void in_tiles(int64_t count, const Step &step) {
    int64_t row = 0;
    while (row < count) {
        const int64_t left = count - row;
        if (left >= 4 && (HFP_REGISTERS >= 32 || left % 3)) step.template run<4>(row), row += 4;
        else if (left >= 3) step.template run<3>(row), row += 3;
        else if (left == 2) step.template run<2>(row), row += 2;
        else step.template run<1>(row), row += 1;
    }
}

// Scores or weights times what the codes of the tokens they belong to are in units of; nothing where there are no codes.
template <class Type>
static void rescale(const typename Type::Storage *tokens, const int64_t *at, int64_t count, int64_t dim, int64_t rows,
                    float *weights) {
    if constexpr (Type::is_scaled) {
        float scales[kMaxBlock] = {};
        for (int64_t t = 0; t < count; ++t) scales[t] = Type::scale((const char *)(tokens + at[t]) + dim);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t t = 0; t < count; t += HFP_LANES) {
                float *here = weights + row * kMaxBlock + t;
                store(here, load(here) * load(scales + t));
            }
    }
}

// What scores and sums are made from: the tokens themselves, or the floats that they are decoded to.
template <class Type, bool is_decoded = Type::is_decoded>
struct Readable {
    typedef Type Read;
    static const typename Type::Storage *of(const typename Type::Storage *tokens, const int64_t *, int64_t, int64_t,
                                            int64_t, float *) {
        return tokens;
    }
};
template <class Type>
struct Readable<Type, true> {
    typedef Float32 Read;
    static const float *of(const typename Type::Storage *tokens, const int64_t *at, int64_t count, int64_t dim,
                           int64_t group, float *into) {
        const int64_t each = group_of(dim, group);
        for (int64_t t = 0; t < count; ++t) Type::decode(tokens + at[t], dim, each, into + t * dim);
        return into;
    }
};

// Where decoded tokens lie.
static void lay_out_decoded(int64_t tokens, int64_t key_dim, int64_t value_dim, Block &block) {
    block.tokens = tokens;
    for (int64_t t = 0; t < (tokens + 3) / 4 * 4; ++t) {
        const int64_t used = t < tokens ? t : tokens - 1;
        block.keys[t] = used * key_dim, block.values[t] = used * value_dim;
    }
}

template <class Type>
struct Scoring {
    const Attention &call;
    const float *query;
    const typename Type::Storage *keys;
    const Block &block;
    float *weights;
    Ahead ahead;
    template <int rows>
    HFP_INLINE void run(int64_t row) const {
        const Ahead nothing = {nullptr, nullptr, 0, 0, 0};
        score<Type, rows>(call, query + row * call.key_dim, keys, block, weights + row * kMaxBlock,
                          row ? nothing : ahead);
    }
};

template <class Type>
struct Weighing {
    const Attention &call;
    const float *weights, *scales;
    const typename Type::Storage *values;
    const Block &block;
    float *sums;
    Ahead ahead;
    template <int rows>
    HFP_INLINE void run(int64_t row) const {
        const Ahead nothing = {nullptr, nullptr, 0, 0, 0};
        weigh<Type, rows>(call, weights + row * kMaxBlock, scales + row, values, block, sums + row * call.value_dim,
                          row ? nothing : ahead);
    }
};

template <class Type>
static void read_query(const Attention &call, int64_t at, float *into) {
    const typename Type::Storage *query = (const typename Type::Storage *)call.query + at;
    for (int64_t d = 0; d < call.key_dim; d += HFP_LANES) store(into + d, Type::read(query + d));
}

static void (*const kReadQuery[kDtypes])(const Attention &, int64_t at, float *into) = {
    read_query<Float32>, read_query<BFloat16>, read_query<Float16>};

// Rows come query by query, the heads of the group inside.
template <class Read>
static void read_queries(const Attention &call, const Strip &strip, int64_t head, int64_t rows, float *into) {
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = (strip.query + row / call.group) * call.query_stride +
                           (head * call.group + row % call.group) * call.query_head_stride;
        float *query = into + row * call.key_dim;
        if constexpr (Read::is_paired) {
            typedef typename Read::Storage Storage;
            memcpy(query, (const Storage *)call.query + at, call.key_dim * sizeof(Storage));
        } else {
            kReadQuery[call.dtype](call, at, query);
        }
        if (is_rotated(call.storage)) rotate(query, call.key_dim);
    }
}

// `partial` holds sums `[rows, value_dim]`, then the largest
// scores `[rows]`, then the sums of weights `[rows]`.
template <class Type>
static void attend_strip(const Attention &call, const Strip &strip, int64_t head, float *partial,
                         const Scratch &scratch) {
    typedef typename Type::Storage Storage;
    typedef typename Readable<Type>::Read Read;
    const int64_t rows = (strip.query_stop - strip.query) * call.group;
    const int64_t key_size = Type::size(call.key_dim, kKeyGroup), value_size = Type::size(call.value_dim, kValueGroup);
    const Storage *keys = (const Storage *)call.keys + head * call.key_head_stride;
    const Storage *values = (const Storage *)call.values + head * call.value_head_stride;
    const Softmax softmax(call);
    float *most = partial + rows * call.value_dim, *total = most + rows;
    memset(partial, 0, sizeof(float) * rows * call.value_dim);
    read_queries<Read>(call, strip, head, rows, scratch.query);
    for (int64_t row = 0; row < rows; ++row) most[row] = -INFINITY, total[row] = 0;
    const int64_t key_bytes = key_size * sizeof(Storage), value_bytes = value_size * sizeof(Storage);
    const int64_t widest = call.key_dim > call.value_dim ? call.key_dim : call.value_dim;
    int64_t most_tokens = Type::is_decoded ? kDecodedFloats / widest : 16384 / key_bytes;
    most_tokens = most_tokens > kMaxBlock ? kMaxBlock : most_tokens;

    Block blocks[kBlocksAhead + 1], decoded;
    // Where some row does not see all tokens, these come in order.
    const int64_t last_row = strip.query_stop - strip.query - 1;
    const bool sees_all = strip.first - strip.begin >= strip.tokens - 1 &&
                          strip.first + last_row - strip.begin - strip.window < 0;
    Streams streams(strip, call.runs, sees_all ? kStreams : 1);
    for (int64_t i = 0; i < kBlocksAhead; ++i) next_block(streams, most_tokens, key_size, value_size, blocks[i]);
    if (Type::is_decoded) lay_out_decoded(most_tokens, call.key_dim, call.value_dim, decoded);
    int64_t begin = strip.begin;
    for (int64_t i = 0; blocks[i % (kBlocksAhead + 1)].tokens; ++i) {
        const Block &block = blocks[i % (kBlocksAhead + 1)];
        const Block &later = blocks[(i + kBlocksAhead - 1) % (kBlocksAhead + 1)];
        Block &last = blocks[(i + kBlocksAhead) % (kBlocksAhead + 1)];
        next_block(streams, most_tokens, key_size, value_size, last);
        const int64_t size = sizeof(Storage);
        const Ahead later_values = {(const char *)values, later.values, later.tokens, size, value_bytes};
        const Ahead last_keys = {(const char *)keys, last.keys, last.tokens, size, key_bytes};
        if (Type::is_decoded && block.tokens < decoded.tokens)
            lay_out_decoded(block.tokens, call.key_dim, call.value_dim, decoded);
        const Block &readable = Type::is_decoded ? decoded : block;
        const auto *read_keys =
            Readable<Type>::of(keys, block.keys, block.tokens, call.key_dim, kKeyGroup, scratch.decoded);
        in_tiles(rows, Scoring<Read>{call, scratch.query, read_keys, readable, scratch.weights, later_values});
        rescale<Type>(keys, block.keys, block.tokens, call.key_dim, rows, scratch.weights);
        for (int64_t row = 0; row < rows; ++row) {
            float *weights = scratch.weights + row * kMaxBlock;
            const Visible visible(strip, row / call.group, begin, block.tokens);
            scratch.scales[row] = soften(softmax, weights, block.tokens, visible, most + row, total + row);
            if constexpr (Read::is_paired) Read::pair_weights(weights, block.tokens);
        }
        rescale<Type>(values, block.values, block.tokens, call.value_dim, rows, scratch.weights);
        const auto *read_values =
            Readable<Type>::of(values, block.values, block.tokens, call.value_dim, kValueGroup, scratch.decoded);
        in_tiles(rows,
                 Weighing<Read>{call, scratch.weights, scratch.scales, read_values, readable, partial, last_keys});
        begin += block.tokens;
    }
    if constexpr (Read::is_paired) Read::order_channels(partial, rows * call.value_dim);
}

template <class Type>
static void merge_partials(const Attention &call, int64_t query, int64_t head, const PartialRows *partials,
                           int64_t count) {
    typedef typename Type::Storage Storage;
    for (int64_t g = 0; g < call.group; ++g) {
        const int64_t query_head = head * call.group + g;
        Storage *out = (Storage *)call.out + (query * call.kv_heads * call.group + query_head) * call.value_dim;
        const float sink = call.sinks ? call.sinks[query_head] * 1.44269504f : -INFINITY;
        float most = sink, sums[kMaxDim] = {};
        for (int64_t i = 0; i < count; ++i) most = most > partials[i].most[g] ? most : partials[i].most[g];
        if (most == -INFINITY) most = 0;  // nothing is seen: the result is 0
        float total = exp2_of(splat(sink - most))[0];
        for (int64_t i = 0; i < count; ++i) {
            const float share = exp2_of(splat(partials[i].most[g] - most))[0];
            total += partials[i].total[g] * share;
            for (int64_t d = 0; d < call.value_dim; d += HFP_LANES)
                store(sums + d, load(sums + d) + load(partials[i].sums + g * call.value_dim + d) * splat(share));
        }
        const Floats inverse = splat(total == 0 ? 0 : 1 / total);
        for (int64_t d = 0; d < call.value_dim; d += HFP_LANES) Type::write(out + d, load(sums + d) * inverse);
    }
}
