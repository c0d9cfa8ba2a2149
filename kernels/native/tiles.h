// Attention of many rows over the same tokens (prompts, many samples): products of matrices in tiles, where decode.h is
// bound by memory. Included after decode.h, once per instruction set.
//
// A strip goes through its tokens in tiles. Keys of a tile are transposed and values laid out once for all rows of the
// strip; then a few rows at a time, as many as there are registers for, get their scores, their weights and their sums
// while all of it is in the caches (FlashAttention-2, https://arxiv.org/abs/2307.08691). Whatever is no bfloat16 pair is
// laid out as floats.

// Rows and vectors of one product that stay in registers.
constexpr int kHigh = 6;
constexpr int kWide = HFP_REGISTERS >= 32 ? 4 : 2;
static_assert(kHigh <= kMostSpare && HFP_LANES <= kMostLanes && kTile % (kWide * HFP_LANES) == 0, "as Scratch says");
// Weights of a few rows lie where those of a block do.
static_assert(kTile <= kMaxBlock, "as Scratch says");

// What a tile is multiplied as.
template <class Type, bool is_paired>
struct TileNumbers {
    typedef Float32 Read;
};
template <class Type>
struct TileNumbers<Type, true> {
    typedef Type Read;
};

// Lane `i` of what an exchange of lanes `apart` from each other leaves in the first (`odd` 0) and second vector.
constexpr int exchanged(int i, int apart, int odd) {
    return odd ? (i & apart ? i + HFP_LANES : i + apart) : i & apart ? i - apart + HFP_LANES : i;
}
template <int apart, int... i>
static HFP_INLINE void exchange(Floats &a, Floats &b, Indices<i...>) {
    const Floats first = HFP_SHUFFLE(a, b, exchanged(i, apart, 0)), second = HFP_SHUFFLE(a, b, exchanged(i, apart, 1));
    a = first, b = second;
}
template <int apart>
static HFP_INLINE void exchange_all(Floats (&x)[HFP_LANES]) {
    if constexpr (apart < HFP_LANES) {
        for (int i = 0; i < HFP_LANES; ++i)
            if (!(i & apart)) exchange<apart>(x[i], x[i + apart], typename Range<HFP_LANES>::Type());
        exchange_all<2 * apart>(x);
    }
}

// Words of kTile tokens, `depth` of each, to `[depth, kTile]`.
static void transpose(const float *const *tokens, int64_t depth, float *into) {
    for (int64_t t = 0; t < kTile; t += HFP_LANES)
        for (int64_t d = 0; d < depth; d += HFP_LANES) {
            Floats x[HFP_LANES];
            for (int i = 0; i < HFP_LANES; ++i) x[i] = load(tokens[t + i] + d);
            exchange_all<1>(x);
            for (int i = 0; i < HFP_LANES; ++i) store(into + (d + i) * kTile + t, x[i]);
        }
}

// Numbers of a token, `dim` of them.
template <class Type>
static HFP_INLINE void to_floats(const typename Type::Storage *token, int64_t dim, int64_t group, float *into) {
    if constexpr (Type::is_decoded) {
        Type::decode(token, dim, group_of(dim, group), into);
    } else {
        Floats scale = splat(1);
        if constexpr (Type::is_scaled) scale = splat(Type::scale((const char *)(token + dim)));
        for (int64_t d = 0; d < dim; d += HFP_LANES) store(into + d, Type::read(token + d) * scale);
    }
}

// The tokens of a tile, in elements from the head's first slot; kTile at most.
struct TileTokens {
    int64_t slots[kTile], count;
};

static TileTokens next_tile(Cursor &at) {
    TileTokens tile;
    int64_t i = 0;
    while (i < kTile && at.left) {
        const int64_t rest = at.run->tokens - at.skip;
        int64_t here = rest < at.left ? rest : at.left;
        here = here < kTile - i ? here : kTile - i;
        for (int64_t j = 0; j < here; ++j) tile.slots[i++] = at.run->slot + at.skip + j;
        at = forward(at, here);
    }
    tile.count = i;
    return tile;
}

// Fetches `count` tokens of the tile that comes next, from `begin` on, while this one is multiplied.
template <class Storage>
static HFP_INLINE void fetch_tokens(const Storage *tokens, int64_t size, const TileTokens &tile, int64_t begin,
                                    int64_t count) {
    const int64_t stop = begin + count < tile.count ? begin + count : tile.count;
    for (int64_t t = begin; t < stop; ++t) {
        const char *token = (const char *)(tokens + tile.slots[t] * size);
        for (int64_t at = 0; at < size * (int64_t)sizeof(Storage); at += 64) __builtin_prefetch(token + at, 0, 2);
    }
}

// Keys of a tile, `[words of a key, kTile]`; of tokens that are not there, zeros.
template <class Type>
static void lay_out_keys(const Attention &call, const typename Type::Storage *keys, const TileTokens &tile,
                         float *decoded, float *into) {
    typedef typename TileNumbers<Type, Type::is_paired>::Read Read;
    constexpr bool is_read_in_place = sizeof(typename Type::Storage) == 4 || Type::is_paired;
    const int64_t size = Type::size(call.key_dim, kKeyGroup);
    const float *tokens[kTile];
    for (int64_t t = 0; t < kTile; ++t) {
        if (t >= tile.count) {
            tokens[t] = (const float *)kZeros;
        } else if constexpr (is_read_in_place) {
            tokens[t] = (const float *)(keys + tile.slots[t] * size);
        } else {
            to_floats<Type>(keys + tile.slots[t] * size, call.key_dim, kKeyGroup, decoded + t * call.key_dim);
            tokens[t] = decoded + t * call.key_dim;
        }
    }
    transpose(tokens, call.key_dim / Read::tokens, into);
}

// Values of a tile, `[tokens, value_dim]`, or in pairs `[tokens / 2, value_dim]` and their order of channels.
template <class Type>
static void lay_out_values(const Attention &call, const typename Type::Storage *values, const TileTokens &tile,
                           float *into) {
    const int64_t size = Type::size(call.value_dim, kValueGroup);
    if constexpr (Type::is_paired) {
        const auto *const zeros = (const typename Type::Storage *)kZeros;
        for (int64_t t = 0; t < tile.count; t += 2)
            for (int64_t d = 0; d < call.value_dim; d += 2 * HFP_LANES) {
                const auto *first = values + tile.slots[t] * size + d;
                const auto *second = t + 1 < tile.count ? values + tile.slots[t + 1] * size + d : zeros;
                typename Type::Numbers both[2];
                Type::read_values({first, second}, 0, both);
                memcpy(into + t / 2 * call.value_dim + d, both, sizeof both);
            }
    } else {
        for (int64_t t = 0; t < tile.count; ++t)
            to_floats<Type>(values + tile.slots[t] * size, call.value_dim, kValueGroup, into + t * call.value_dim);
    }
}

// Adds to `sums` the products of kHigh rows with `depth` words of `width` columns each.
template <class Read, int width>
static HFP_INLINE void add_products(const float *rows, int64_t row_words, const float *columns, int64_t column_words,
                                    int64_t depth, Floats (&sums)[kHigh][width]) {
    for (int64_t k = 0; k < depth; ++k) {
        typename Read::Numbers column[width];
        for (int j = 0; j < width; ++j)
            column[j] = Read::read((const typename Read::Storage *)(columns + k * column_words + j * HFP_LANES));
        for (int r = 0; r < kHigh; ++r) {
            const typename Read::Numbers row = Read::read_weight(rows + r * row_words, k * Read::tokens);
            for (int j = 0; j < width; ++j) sums[r][j] = Read::add_product(sums[r][j], row, column[j]);
        }
    }
}

template <class Read>
static void score_tile(const float *query, int64_t key_dim, const float *keys, float *scores) {
    for (int64_t t = 0; t < kTile; t += kWide * HFP_LANES) {
        Floats sums[kHigh][kWide] = {};
        add_products<Read, kWide>(query, key_dim, keys + t, kTile, key_dim / Read::tokens, sums);
        for (int r = 0; r < kHigh; ++r)
            for (int j = 0; j < kWide; ++j) store(scores + r * kTile + t + j * HFP_LANES, sums[r][j]);
    }
}

template <class Read, int width>
static HFP_INLINE void weigh_tile_columns(const float *weights, const float *scales, const float *values,
                                          int64_t value_dim, int64_t tokens, float *into) {
    Floats sums[kHigh][width];
    for (int r = 0; r < kHigh; ++r)
        for (int j = 0; j < width; ++j) sums[r][j] = load(into + r * value_dim + j * HFP_LANES) * splat(scales[r]);
    add_products<Read, width>(weights, kTile, values, value_dim, (tokens + Read::tokens - 1) / Read::tokens, sums);
    for (int r = 0; r < kHigh; ++r)
        for (int j = 0; j < width; ++j) store(into + r * value_dim + j * HFP_LANES, sums[r][j]);
}

// Sums of kHigh rows, scaled, and weights times the values of the first `tokens` tokens.
template <class Read>
static void weigh_tile(const float *weights, const float *scales, const float *values, int64_t value_dim,
                       int64_t tokens, float *into) {
    int64_t d = 0;
    for (; d + kWide * HFP_LANES <= value_dim; d += kWide * HFP_LANES)
        weigh_tile_columns<Read, kWide>(weights, scales, values + d, value_dim, tokens, into + d);
    for (; d < value_dim; d += Read::vectors * HFP_LANES)
        weigh_tile_columns<Read, Read::vectors>(weights, scales, values + d, value_dim, tokens, into + d);
}

// As `soften`, for a whole tile; `totals [HFP_LANES]` is the running sum of weights, not yet summed up itself.
static HFP_INLINE float soften_tile(const Softmax &softmax, float *scores, Visible visible, float *most,
                                    float *totals) {
    constexpr int count = kTile / HFP_LANES;
    Floats x[count], top = splat(-INFINITY);
    for (int i = 0; i < count; ++i) x[i] = softmax.scaled(load(scores + i * HFP_LANES));
    if (visible.begin > 0 || visible.stop < kTile) {
        const Floats begin = splat((float)visible.begin), stop = splat((float)visible.stop);
        for (int i = 0; i < count; ++i) {
            const Floats token = counting() + (float)(i * HFP_LANES);
            x[i] = token >= begin ? x[i] : splat(-INFINITY);
            x[i] = token < stop ? x[i] : splat(-INFINITY);
        }
    }
    for (int i = 0; i < count; ++i) top = larger(top, x[i]);
    float highest = largest_of(top);
    if (!(highest > *most)) highest = *most;
    if (highest == -INFINITY) {
        Floats nothing = {};  // NaN where any score is: larger than nothing, but it must show in the result
        for (int i = 0; i < count; ++i) nothing += x[i] == x[i] ? Floats{} : x[i];
        if (sum_of(nothing) == 0) {
            for (int i = 0; i < count; ++i) store(scores + i * HFP_LANES, nothing);
            return 1;
        }
        highest = 0;
    }
    Floats sums = {};
    for (int i = 0; i < count; ++i) {
        const Floats weight = exp2_of(x[i] - splat(highest));
        store(scores + i * HFP_LANES, weight);
        sums += weight;
    }
    const float scale = highest == *most ? 1 : exp2_of(splat(*most - highest))[0];
    store(totals, load(totals) * splat(scale) + sums);
    *most = highest;
    return scale;
}

// As `attend_strip`, for many rows.
template <class Type>
static void attend_tiles(const Attention &call, const Strip &strip, int64_t head, float *partial,
                         const Scratch &scratch) {
    typedef typename TileNumbers<Type, Type::is_paired>::Read Read;
    const int64_t rows = (strip.query_stop - strip.query) * call.group;
    const typename Type::Storage *keys = (const typename Type::Storage *)call.keys + head * call.key_head_stride;
    const typename Type::Storage *values = (const typename Type::Storage *)call.values + head * call.value_head_stride;
    const Softmax softmax(call);
    float *most = partial + rows * call.value_dim, *total = most + rows;
    read_queries<Read>(call, strip, head, rows, scratch.query);
    memset(scratch.query + rows * call.key_dim, 0, sizeof(float) * kHigh * call.key_dim);  // rows of the last step
    memset(scratch.sums, 0, sizeof(float) * (rows + kHigh) * call.value_dim);
    memset(scratch.totals, 0, sizeof(float) * rows * HFP_LANES);
    for (int64_t row = 0; row < rows; ++row) most[row] = -INFINITY;

    const int64_t key_size = Type::size(call.key_dim, kKeyGroup), value_size = Type::size(call.value_dim, kValueGroup);
    const int64_t steps = (rows + kHigh - 1) / kHigh, fetched = (kTile + steps - 1) / steps;
    Cursor at = {call.runs + strip.run, strip.skip, strip.tokens};
    TileTokens tile, next = next_tile(at);
    for (int64_t begin = strip.begin; next.count; begin += kTile) {
        tile = next, next = next_tile(at);
        lay_out_keys<Type>(call, keys, tile, scratch.tile_values, scratch.tile_keys);
        lay_out_values<Type>(call, values, tile, scratch.tile_values);
        for (int64_t row = 0; row < rows; row += kHigh) {
            const int64_t stop = row + kHigh < rows ? row + kHigh : rows;
            fetch_tokens(keys, key_size, next, row / kHigh * fetched, fetched);
            fetch_tokens(values, value_size, next, row / kHigh * fetched, fetched);
            const int64_t seen = Visible(strip, (stop - 1) / call.group, begin, tile.count).stop;
            if (!seen || Visible(strip, row / call.group, begin, tile.count).begin >= tile.count) continue;
            float scales[kHigh] = {};
            score_tile<Read>(scratch.query + row * call.key_dim, call.key_dim, scratch.tile_keys, scratch.weights);
            for (int64_t r = row; r < stop; ++r) {
                float *weights = scratch.weights + (r - row) * kTile;
                const Visible visible(strip, r / call.group, begin, tile.count);
                scales[r - row] =
                    soften_tile(softmax, weights, visible, most + r, scratch.totals + r * HFP_LANES);
                if constexpr (Read::is_paired) Read::pair_weights(weights, kTile);
            }
            weigh_tile<Read>(scratch.weights, scales, scratch.tile_values, call.value_dim, seen,
                             scratch.sums + row * call.value_dim);
        }
    }
    if constexpr (Read::is_paired) Read::order_channels(scratch.sums, rows * call.value_dim);
    memcpy(partial, scratch.sums, sizeof(float) * rows * call.value_dim);
    for (int64_t row = 0; row < rows; ++row) total[row] = sum_of(load(scratch.totals + row * HFP_LANES));
}
