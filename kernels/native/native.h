// What Python hands over, and what the parts of the library share. Every field of the two calls is 8 bytes wide.
#pragma once

#include <cstdint>
#include <cstring>

namespace hfp {

// Runs `body(data)` on each of the OpenMP threads that torch has loaded; null: there are none.
typedef void (*RunParallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static RunParallel run_parallel = nullptr;

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kDtypes = 3 };

// How K and V are stored: as a dtype, or as records (`formats.py` says what these are).
enum Storage : int64_t { kInt8 = kDtypes, kFloat8 = kDtypes + 1, kInt4 = kDtypes + 2, kStorages = kDtypes + 3 };
constexpr int64_t kScaleBytes = 4, kGroupBytes = 4;
constexpr int64_t kKeyGroup = 32, kValueGroup = 64;  // the most channels of a group, of int4
constexpr float kLargestInt8 = 127, kLargestFloat8 = 448, kLargestInt4 = 15;
// Smaller scales are taken for 0: dividing by them would not be exact.
constexpr float kLeastScale = 1.17549435e-38f;

// Whether records of K are of rotated numbers; queries are rotated then that meet them.
constexpr bool is_rotated(int64_t storage) { return storage == kInt8 || storage == kInt4; }

// Channels of a group: a power of two that divides `dim`.
constexpr int64_t group_of(int64_t dim, int64_t most) { return (dim & -dim) < most ? dim & -dim : most; }

// Of a record of `dim` numbers.
constexpr int64_t record_bytes(int64_t storage, int64_t dim, int64_t most_group) {
    return storage == kInt4 ? dim / 2 + dim / group_of(dim, most_group) * kGroupBytes : dim + kScaleBytes;
}

enum Error : int64_t { kOk = 0, kBadSize = 1, kBadRun = 2, kBadPart = 3, kNoVariant = 4, kNoMemory = 5, kBadWrite = 6 };

// Queries `[query, query_stop)` read the tokens of runs `[run, run_stop)`, numbered from 0 in that order. Query number
// `i` of the part sees token `t` where `first + i - window < t <= first + i`.
struct Part {
    int64_t query, query_stop, run, run_stop, first, window;
};

// `tokens` adjacent slots that begin at `slot`.
struct Run {
    int64_t slot, tokens;
};

// One layer's attention. Strides are in elements (of records: bytes); K and V are `[kv_heads, slots, dim]` or records
// `[kv_heads, slots, record bytes]` with adjacent slots, `out` is `[queries, kv_heads * group, value_dim]`. Without
// `parts`, query `i` reads `row_tokens` slots from `i * row_step` on.
struct AttentionCall {
    int64_t variant, dtype, storage;  // `dtype` of queries and results
    const Part *parts;
    const Run *runs;
    int64_t num_parts, num_runs;
    int64_t num_queries, kv_heads, group, key_dim, value_dim;
    int64_t query_stride, query_head_stride, key_head_stride, value_head_stride;
    int64_t num_slots, row_tokens, row_step;
    double scale, softcap;  // softcap 0: none
    const void *keys, *values;
    const float *sinks;
    int64_t threads;
};

// The same with what goes in and out.
struct Attention : AttentionCall {
    const void *query;
    void *out;
};

// New tokens `[source, source + tokens)`, numbered row by row, go to slots `slot, slot + step, ...`.
struct Write {
    int64_t source, tokens, slot, step;
};

// `tokens` slots from `source` on are copied to `target` on, after the writes and in order.
struct Copy {
    int64_t source, target, tokens;
};

// K or V of one layer: memory `[heads, slots, dim]`, new tokens `[rows, heads, row_tokens, dim]`. Strides in bytes; a
// slot takes `token_bytes`.
struct StoreSide {
    char *memory;
    int64_t dim, token_bytes, head_stride, fresh_row_stride, fresh_head_stride, fresh_token_stride;
};

struct StoreCall {
    StoreSide sides[2];
    int64_t dtype, storage;  // of new tokens and of memory; where these are equal, bytes are copied
    int64_t heads, num_slots, row_tokens, num_tokens;
    const Write *writes;  // null: all new tokens go to `slot, slot + step, ...`
    const Copy *copies;
    int64_t num_writes, num_copies, slot, step;
};

// The same with the new tokens of K and V.
struct Store : StoreCall {
    const char *fresh[2];
};

// Outputs `[rows, outputs]` of a linear layer: of `input [rows, inputs]`, `weights [outputs, inputs]` and `bias [outputs]`,
// which may be null. All of them are contiguous and of one dtype.
struct Linear {
    int64_t variant, dtype;
    int64_t rows, inputs, outputs;
    const void *input, *weights, *bias;
    void *out;
    int64_t threads;
};
// Outputs that are multiplied at a time.
constexpr int64_t kOutputs = 4;

// The largest head dim, and the most tokens that are scored before their values are read.
constexpr int64_t kMaxDim = 256;
constexpr int64_t kMaxBlock = 64;
// Stands for the values of a token that is not there.
alignas(64) static const char kZeros[kMaxDim * sizeof(float)] = {};
// Tokens that are decoded before they are read fill so many floats: half of a first-level cache.
constexpr int64_t kDecodedFloats = 4096;
// The tokens of a tile, of strips whose rows are so many that attention is a product of matrices; spare rows of theirs.
constexpr int64_t kTile = 64, kMostSpare = 8, kMostLanes = 16;

// Work for one thread, once per KV head: queries over `tokens` tokens of one part, from its token `begin` on, that is
// from token `skip` of run `run` on. `first` is what the first of these queries sees; `partial` says where the results
// of head 0 lie: per row (a query's head in the group) `value_dim` sums, the largest score and the sum of weights; -1
// where these are all that the queries read, so that nothing else needs them.
struct Strip {
    int64_t query, query_stop, first, window, run, skip, begin, tokens, partial;
    bool is_tiled;
};

// A place in the runs: token `skip` of `run`, and the tokens to be taken from there on.
struct Cursor {
    const Run *run;
    int64_t skip, left;
};

static inline Cursor forward(Cursor at, int64_t tokens) {
    at.left -= tokens;
    for (int64_t skip = tokens; skip;) {
        const int64_t rest = at.run->tokens - at.skip, step = skip < rest ? skip : rest;
        at.skip += step, skip -= step;
        if (at.skip == at.run->tokens) ++at.run, at.skip = 0;
    }
    return at;
}

// Partial results of one query and KV head: sums `[group, value_dim]`, largest scores and sums of weights `[group]`.
struct PartialRows {
    const float *sums, *most, *total;
};

// More threads are a mistake.
constexpr int64_t kMostThreads = 1 << 12;

// What a thread works in.
struct Scratch {
    float *query;    // [rows, key_dim]
    float *decoded;  // [kDecodedFloats]
    float *weights;  // [rows, kMaxBlock]
    float *scales;   // [rows]
    // Of strips in tiles alone, in which `query` has kMostSpare rows more, and `weights` is that of a few rows.
    float *tile_keys, *tile_values;  // [kTile, key_dim] and [kTile, the larger dim]
    float *sums, *totals, *partial;  // [rows + kMostSpare, value_dim], [rows, kMostLanes], as Strip says
};

struct Kernel {
    typedef void Attend(const Attention &, const Strip &, int64_t head, float *partial, const Scratch &);
    Attend *attend[kStorages], *attend_tiles[kStorages];
    void (*merge[kDtypes])(const Attention &, int64_t query, int64_t head, const PartialRows *partials, int64_t count);
    // Outputs [begin, end); `channels` is what the inputs must be a multiple of. Where `widen` is not null, the input is
    // to be floats, and that makes them.
    struct {
        void (*multiply)(const Linear &, int64_t begin, int64_t end);
        void (*widen)(const void *numbers, int64_t count, float *into);
        int64_t channels;
    } linear[kDtypes];
};

struct Variant {
    const char *name;
    int64_t lanes;
    bool (*is_supported)();
    const Kernel *kernel;
};

}  // namespace hfp
