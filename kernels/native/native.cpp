// Attention over paged KV, the store of new tokens and looks at a model, for the CPU, as a plain C library: built and
// linked without Python and torch.
//
//   attend   cuts the parts of a call into strips, one piece of work per strip and KV head, and merges their partial
//            results by log-sum-exp as soon as the last one of a query is done
//   store    copies new tokens to their slots, or encodes them there
//   linear   multiplies few rows by the weights of a linear layer
//   sample   compares elements of tensors with those it has kept
//   entries  compares what stands in the dicts of modules with what stood there
//
// Work is spread over the OpenMP threads that torch has loaded: Python hands over their entry point, so that nothing is
// linked and there is never a second pool of threads. Every call checks its sizes before it reads through a pointer.

#include "native.h"

#include <cmath>
#include <cstdlib>

#include "entries.h"
#include "sample.h"
#include "variants.h"
// What follows is called through the table of variants.
#include "layer.h"
// Encodes with the vectors of the portable variant.
#include "store.h"
#include "strips.h"

namespace hfp {

// Less work than this, in rows times tokens times dims, is done sooner than a second thread has begun.
static const double kSerialWork = 200000;
// Sizes beyond these are mistakes, and could overflow what is computed from them.
static const int64_t kMostHeads = 1 << 16, kMostQueries = 1 << 22, kMostSlots = (int64_t)1 << 36;
static const int64_t kMostTokens = (int64_t)1 << 40;
static const int64_t kNeverOverflows = INT64_MAX / 4;

static bool is_dim(int64_t dim) { return dim >= 8 && dim <= kMaxDim && dim % 8 == 0; }

static Error check(const Attention &call) {
    if (call.variant < 0 || call.variant >= kNumVariants || call.dtype < 0 || call.dtype >= kDtypes) return kNoVariant;
    if (call.storage != call.dtype && (call.storage < kDtypes || call.storage >= kStorages)) return kNoVariant;
    const Variant &variant = kVariants[call.variant];
    // A vector of codes of four bits lies in one half of the channels, and in one group.
    const int64_t multiple = call.storage != kInt4 ? variant.lanes : variant.lanes < 8 ? 16 : 2 * variant.lanes;
    if (!variant.is_supported() || call.key_dim % multiple || call.value_dim % multiple) return kNoVariant;
    if (!is_dim(call.key_dim) || !is_dim(call.value_dim) || call.kv_heads < 1 || call.group < 1 ||
        call.num_queries < 1 || call.num_slots < 1 || call.threads < 1 || call.num_parts < 0 || call.num_runs < 0 ||
        call.kv_heads > kMostHeads || call.group > kMostHeads || call.num_queries > kMostQueries ||
        call.num_slots > kMostSlots || call.threads > kMostThreads)
        return kBadSize;
    for (int64_t i = 0; i < call.num_runs; ++i) {
        const Run &run = call.runs[i];
        if (run.tokens < 1 || run.slot < 0 || run.tokens > call.num_slots || run.slot > call.num_slots - run.tokens)
            return kBadRun;
    }
    int64_t tokens = 0;
    for (int64_t i = 0; i < call.num_parts; ++i) {
        const Part &part = call.parts[i];
        if (part.query < 0 || part.query >= part.query_stop || part.query_stop > call.num_queries || part.run < 0 ||
            part.run > part.run_stop || part.run_stop > call.num_runs || part.window < 1 ||
            part.first > kNeverOverflows || part.first < -kNeverOverflows)
            return kBadPart;
        for (int64_t run = part.run; run < part.run_stop; ++run)
            if ((tokens += call.runs[run].tokens) > kMostTokens) return kBadSize;
    }
    return kOk;
}

static int64_t head_floats(const Layout &layout, const Strip &strip) {
    return (strip.query_stop - strip.query) * layout.call->group * (layout.call->value_dim + 2);
}

static void merge(Layout &layout, int64_t query, int64_t head, PartialRows *rows) {
    const Attention &call = *layout.call;
    int64_t count = 0;
    for (int64_t i = layout.first_of[query]; i < layout.first_of[query + 1]; ++i) {
        const Strip &strip = layout.strips[layout.of_query[i]];
        const int64_t all = (strip.query_stop - strip.query) * call.group, row = (query - strip.query) * call.group;
        const float *partial = layout.partials + strip.partial + head * head_floats(layout, strip);
        const float *most = partial + all * call.value_dim;
        rows[count++] = {partial + row * call.value_dim, most + row, most + all + row};
    }
    layout.kernel->merge[call.dtype](call, query, head, rows, count);
}

// Results of the queries of a strip that holds all there is of them.
static void finish(const Layout &layout, const Strip &strip, int64_t head, const float *partial) {
    const Attention &call = *layout.call;
    const int64_t all = (strip.query_stop - strip.query) * call.group;
    for (int64_t query = strip.query, row = 0; query < strip.query_stop; ++query, row += call.group) {
        const float *most = partial + all * call.value_dim + row;
        const PartialRows rows = {partial + row * call.value_dim, most, most + all};
        layout.kernel->merge[call.dtype](call, query, head, &rows, 1);
    }
}

// What every thread does: strips of one KV head each until none is left, those with the most tokens first.
static void work(void *data) {
    Layout &layout = *(Layout *)data;
    const Attention &call = *layout.call;
    const int64_t thread = __atomic_fetch_add(&layout.next_thread, 1, __ATOMIC_RELAXED);
    Scratch scratch;
    const int64_t floats = lay_out_scratch(layout, nullptr, nullptr);
    lay_out_scratch(layout, layout.scratch + thread * floats, &scratch);
    for (;;) {
        const int64_t task = __atomic_fetch_add(&layout.next_task, 1, __ATOMIC_RELAXED);
        if (task >= layout.num_strips * call.kv_heads) return;
        const Strip &strip = layout.strips[layout.num_strips - 1 - task / call.kv_heads];
        const int64_t head = task % call.kv_heads;
        const bool is_alone = strip.partial < 0;
        float *partial = is_alone ? scratch.partial : layout.partials + strip.partial + head * head_floats(layout, strip);
        const auto *attend = strip.is_tiled ? layout.kernel->attend_tiles : layout.kernel->attend;
        attend[call.storage](call, strip, head, partial, scratch);
        if (is_alone) finish(layout, strip, head, partial);
        for (int64_t query = strip.query; query < strip.query_stop && !is_alone; ++query) {
            int32_t *unfinished = layout.unfinished + query * call.kv_heads + head;
            if (__atomic_sub_fetch(unfinished, 1, __ATOMIC_ACQ_REL) == 0)
                merge(layout, query, head, layout.rows + thread * layout.num_strips);
        }
    }
}

// Says which strips each query is in, and settles the queries that see nothing at all.
static void index_queries(Layout &layout) {
    const Attention &call = *layout.call;
    memset(layout.first_of, 0, sizeof(int64_t) * (call.num_queries + 2));
    int64_t *count = layout.first_of + 2;
    for (int64_t i = 0; i < layout.num_strips; ++i)
        for (int64_t q = layout.strips[i].query; q < layout.strips[i].query_stop; ++q) ++count[q];
    for (int64_t q = 1; q < call.num_queries; ++q) count[q] += count[q - 1];
    int64_t *at = layout.first_of + 1;  // moves to where the next query begins while `of_query` fills
    for (int64_t i = 0; i < layout.num_strips; ++i)
        for (int64_t q = layout.strips[i].query; q < layout.strips[i].query_stop; ++q) layout.of_query[at[q]++] = i;
    for (int64_t q = 0; q < call.num_queries; ++q) {
        const int64_t strips = layout.first_of[q + 1] - layout.first_of[q];
        for (int64_t head = 0; head < call.kv_heads; ++head) {
            layout.unfinished[q * call.kv_heads + head] = (int32_t)strips;
            if (!strips) layout.kernel->merge[call.dtype](call, q, head, nullptr, 0);
        }
    }
}

static double total_work(const Attention &call) {
    double total = 0;
    for (int64_t i = 0; i < call.num_parts; ++i)
        total += (double)tokens_of(call, call.parts[i]) * (double)(call.parts[i].query_stop - call.parts[i].query);
    return total * (double)(call.kv_heads * call.group * (call.key_dim + call.value_dim));
}

// Takes `bytes` from `*at`, in whole cache lines; adds up only, where `*at` is null.
template <class T>
static void take(char **at, int64_t *total, T **into, int64_t count) {
    const int64_t bytes = (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    if (*at) *into = (T *)*at, *at += bytes;
    *total += bytes;
}

static void carve(Layout &layout, char *memory, int64_t *total) {
    const Attention &call = *layout.call;
    take(&memory, total, &layout.strips, layout.num_strips);
    take(&memory, total, &layout.first_of, call.num_queries + 2);
    take(&memory, total, &layout.of_query, layout.num_entries);
    take(&memory, total, &layout.unfinished, call.num_queries * call.kv_heads);
    take(&memory, total, &layout.partials, layout.partial_floats);
    take(&memory, total, &layout.scratch, call.threads * lay_out_scratch(layout, nullptr, nullptr));
    take(&memory, total, &layout.rows, call.threads * layout.num_strips);
}

static Error attend(Attention call) {
    if (call.threads > 1 && (!run_parallel || total_work(call) < kSerialWork)) call.threads = 1;
    Layout layout = {};
    layout.call = &call;
    layout.kernel = kVariants[call.variant].kernel;
    for (int64_t i = 0; i < call.num_parts; ++i) {
        const bool tiled = is_tiled(call, call.parts[i]);
        (tiled ? layout.tiled_rows : layout.scratch_rows) = queries_per_strip(call, tiled) * call.group;
    }
    Cutter cutter(layout);
    if (!cutter.cut()) return kNoMemory;
    int64_t bytes = 64;
    carve(layout, nullptr, &bytes);
    char *memory = (char *)malloc(bytes);
    if (!memory) return kNoMemory;
    carve(layout, (char *)(((uintptr_t)memory + 63) / 64 * 64), &bytes);
    cutter.cut();
    index_queries(layout);
    if (call.threads > 1) run_parallel(work, &layout, (unsigned)call.threads, 0);
    else work(&layout);
    free(memory);
    return kOk;
}

// A call without parts: query `i` reads `row_tokens` slots from `i * row_step` on.
static Error attend_rows(Attention call) {
    if (call.row_tokens < 1 || call.row_step < 0 || call.row_step > kMostSlots || call.num_queries < 1 ||
        call.num_queries > kMostQueries)
        return kBadSize;
    const int64_t each = sizeof(Part) + sizeof(Run);
    char *memory = (char *)malloc(call.num_queries * each);
    if (!memory) return kNoMemory;
    Part *parts = (Part *)memory;
    Run *runs = (Run *)(parts + call.num_queries);
    for (int64_t i = 0; i < call.num_queries; ++i) {
        runs[i] = {i * call.row_step, call.row_tokens};
        parts[i] = {i, i + 1, i, i + 1, call.row_tokens - 1, INT64_MAX / 4};
    }
    call.parts = parts, call.runs = runs;
    call.num_parts = call.num_runs = call.num_queries;
    Error error = check(call);
    if (!error) error = attend(call);
    free(memory);
    return error;
}

}  // namespace hfp

#define HFP_PUBLIC extern "C" __attribute__((visibility("default")))

// `entry` is the address of OpenMP's `GOMP_parallel` in this process, or 0: one thread does everything.
HFP_PUBLIC void hf_paged_use_threads(void *entry) { hfp::run_parallel = (hfp::RunParallel)entry; }

// Name of variant `index`, null behind the last one; `lanes` is what head dims must be a multiple of, 0 where this CPU
// cannot run the variant.
HFP_PUBLIC const char *hf_paged_variant(int64_t index, int64_t *lanes) {
    if (index < 0 || index >= hfp::kNumVariants) return nullptr;
    const hfp::Variant &variant = hfp::kVariants[index];
    *lanes = variant.is_supported() ? variant.lanes : 0;
    return variant.name;
}

HFP_PUBLIC int64_t hf_paged_attend(const hfp::AttentionCall *call, const void *query, void *out) {
    const hfp::Attention attention = {*call, query, out};
    if (!call->parts) return hfp::attend_rows(attention);
    const hfp::Error error = hfp::check(attention);
    return error ? error : hfp::attend(attention);
}

HFP_PUBLIC int64_t hf_paged_linear(const hfp::Linear *call) { return hfp::linear(*call); }

HFP_PUBLIC int64_t hf_paged_store(const hfp::StoreCall *call, const char *key, const char *value) {
    hfp::Store store = {*call, {key, value}};
    const hfp::Write all = {0, call->num_tokens, call->slot, call->step};
    if (!store.writes) store.writes = &all, store.num_writes = 1;
    return hfp::store(store);
}

// Begins to keep what the reads find where `is_recording`, and to compare it with what was kept elsewhere. Reads and
// memory must stay until the end; `look` is what the end is told.
HFP_PUBLIC int64_t hf_paged_sample_begin(const hfp::SampleCall *call, int64_t threads, int64_t is_recording,
                                         void **look) {
    const hfp::Error error = threads < 1 ? hfp::kBadSize : hfp::check(*call);
    if (error) return error;
    *look = hfp::begin_look(*call, threads, is_recording != 0);
    return *look ? hfp::kOk : hfp::kNoMemory;
}

// Waits for the reads that are left; 1 where any of what they found is not as kept.
HFP_PUBLIC int64_t hf_paged_sample_end(void *look) { return hfp::end_look((hfp::SampleLook *)look); }

// Counts, records or compares what the modules below `root` hold, with Python's lock held. Their number, or -1.
HFP_PUBLIC int64_t hf_paged_entries(const hfp::EntriesCall *call, hfp::Object *root, int64_t look) {
    return hfp::look_through(*call, root, (hfp::Look)look);
}
