// How a call is cut up: into strips, one piece of work each for every KV head, and what these need to work in.
//
// Few rows over the same tokens are bound by memory: a strip is some tokens, read once for as many rows as the caches
// hold. Many rows are a product of matrices, done in tiles: a strip is as many rows over all that any of them sees.
#pragma once

#include "native.h"

namespace hfp {

// Strips per thread, so that threads that started late or run slowly take fewer, and the least tokens of one.
static const int64_t kStripsPerThread = 8, kLeastTokens = 128;
// Rows that share one reading of K and V; their queries and sums stay in the second-level cache.
static const int64_t kMostRows = 96;
// Parts with so many rows go in tiles; most rows of a strip of theirs, and the least tokens where few strips are cut up.
static const int64_t kTiledRows = 24, kMostTiledRows = 120, kLeastTiledTokens = 256;

// Larger partial results are a mistake.
static const int64_t kMostFloats = (int64_t)1 << 40;

static int64_t tokens_of(const Attention &call, const Part &part) {
    int64_t tokens = 0;
    for (int64_t run = part.run; run < part.run_stop; ++run) tokens += call.runs[run].tokens;
    return tokens;
}

// How a call is spread: strips, and per query the strips that it has partial results in.
struct Layout {
    const Attention *call;
    const Kernel *kernel;
    int64_t num_strips, num_entries, partial_floats, next_task, next_thread, scratch_rows, tiled_rows;
    Strip *strips;
    int64_t *first_of;   // [num_queries + 1] into `of_query`
    int64_t *of_query;   // [num_entries] strips, query by query
    int32_t *unfinished; // [num_queries, kv_heads] strips still to be done
    float *partials, *scratch;
    PartialRows *rows;   // [threads, num_strips]
};

static bool is_tiled(const Attention &call, const Part &part) {
    return (part.query_stop - part.query) * call.group >= kTiledRows;
}

static int64_t queries_per_strip(const Attention &call, bool is_tiled) {
    const int64_t queries = (is_tiled ? kMostTiledRows : kMostRows) / call.group;
    return queries > 1 ? queries : 1;
}

// Queries of a part that share strips, and the tokens `[begin, end)` of it that any of them sees.
struct Sharing {
    int64_t query, query_stop, begin, end;
};

// Tokens that nobody sees are left out in tiles alone: others have few queries.
static Sharing sharing_from(const Part &part, int64_t query, int64_t most_queries, int64_t tokens, bool is_tiled) {
    const int64_t stop = query + most_queries < part.query_stop ? query + most_queries : part.query_stop;
    if (!is_tiled) return {query, stop, 0, tokens};
    const int64_t last = part.first + query - part.query, end = part.first + stop - part.query;
    return {query, stop, part.window > last ? 0 : last - part.window + 1, end < tokens ? end : tokens};
}

// Whether each query is in one part at most: parts come in order.
static bool are_apart(const Attention &call) {
    for (int64_t i = 1; i < call.num_parts; ++i)
        if (call.parts[i].query < call.parts[i - 1].query_stop) return false;
    return true;
}

// The most tokens of a strip, of those in tiles and of others: such that all threads have several.
struct MostTokens {
    int64_t of[2];
};

static MostTokens most_tokens(const Attention &call) {
    if (call.threads == 1) return {{INT64_MAX, INT64_MAX}};
    double total[2] = {};
    int64_t strips = 0;
    for (int64_t i = 0; i < call.num_parts; ++i) {
        const Part &part = call.parts[i];
        const bool tiled = is_tiled(call, part);
        const int64_t each = queries_per_strip(call, tiled);
        const int64_t count = (part.query_stop - part.query + each - 1) / each;
        total[tiled] += (double)tokens_of(call, part) * (double)(tiled ? count : 1);
        if (tiled) strips += count;
    }
    MostTokens most;
    const int64_t least[2] = {kLeastTokens, kLeastTiledTokens};
    for (int i = 0; i < 2; ++i) {
        const double tokens = total[i] * (double)call.kv_heads / (double)(call.threads * kStripsPerThread);
        most.of[i] = tokens > (double)least[i] ? (int64_t)tokens : least[i];
    }
    // Tokens of queries in tiles are cut up, and results merged, only where there are few strips otherwise.
    if (strips * call.kv_heads >= call.threads * kStripsPerThread) most.of[1] = INT64_MAX;
    return most;
}

// Cuts the parts into strips; only counts them where there is no room for them yet. False where they are too many.
struct Cutter {
    Layout &layout;
    const MostTokens most;
    const bool is_apart;

    explicit Cutter(Layout &layout) : layout(layout), most(most_tokens(*layout.call)), is_apart(are_apart(*layout.call)) {}

    bool cut() {
        const Attention &call = *layout.call;
        layout.num_strips = layout.num_entries = layout.partial_floats = 0;
        for (int64_t i = 0; i < call.num_parts; ++i) {
            const Part &part = call.parts[i];
            const int64_t tokens = tokens_of(call, part);
            const bool tiled = is_tiled(call, part);
            const int64_t most_queries = queries_per_strip(call, tiled);
            for (int64_t query = part.query; query < part.query_stop; query += most_queries) {
                const Sharing sharing = sharing_from(part, query, most_queries, tokens, tiled);
                if (sharing.begin < sharing.end && !cut(part, sharing, tiled)) return false;
            }
        }
        return true;
    }

    bool cut(const Part &part, const Sharing &sharing, bool tiled) {
        const Attention &call = *layout.call;
        const int64_t tokens = sharing.end - sharing.begin, queries = sharing.query_stop - sharing.query;
        const int64_t pieces = 1 + (tokens - 1) / most.of[tiled];
        const bool is_alone = tiled && is_apart && pieces == 1;
        Cursor at = forward({call.runs + part.run, 0, sharing.end}, sharing.begin);
        for (int64_t piece = 0; piece < pieces; ++piece) {
            // Whole vectors of scores, in as equal pieces as that allows.
            int64_t begin = tokens * piece / pieces / 16 * 16, end = tokens * (piece + 1) / pieces / 16 * 16;
            if (piece + 1 == pieces) end = tokens;
            if (layout.strips)
                layout.strips[layout.num_strips] = {
                    sharing.query, sharing.query_stop, part.first + sharing.query - part.query, part.window,
                    at.run - call.runs, at.skip, sharing.begin + begin, end - begin,
                    is_alone ? -1 : layout.partial_floats, tiled};
            ++layout.num_strips;
            layout.num_entries += queries;
            if (!is_alone) layout.partial_floats += queries * call.group * call.kv_heads * (call.value_dim + 2);
            if (layout.partial_floats > kMostFloats) return false;
            at = forward(at, end - begin);
        }
        return true;
    }
};

// Floats that a thread works in, in whole cache lines, and where what lies.
static int64_t lay_out_scratch(const Layout &layout, float *at, Scratch *scratch) {
    const Attention &call = *layout.call;
    const int64_t rows = layout.scratch_rows, tiled = layout.tiled_rows, spare = tiled ? kMostSpare : 0;
    const int64_t most = (rows > tiled ? rows : tiled) + spare, tile = tiled ? kTile : 0;
    const int64_t widest = call.key_dim > call.value_dim ? call.key_dim : call.value_dim;
    int64_t used = 0;
    const auto take = [&](float *Scratch::*member, int64_t floats) {
        if (scratch) scratch->*member = at + used;
        used += (floats + 15) / 16 * 16;
    };
    take(&Scratch::decoded, rows ? kDecodedFloats : 0);
    take(&Scratch::query, most * call.key_dim);
    take(&Scratch::weights, (rows > spare ? rows : spare) * kMaxBlock);
    take(&Scratch::scales, rows);
    take(&Scratch::tile_keys, tile * call.key_dim);
    take(&Scratch::tile_values, tile * widest);
    take(&Scratch::sums, tiled ? (tiled + spare) * call.value_dim : 0);
    take(&Scratch::totals, tiled * kMostLanes);
    take(&Scratch::partial, tiled * (call.value_dim + 2));
    return used;
}

}  // namespace hfp
