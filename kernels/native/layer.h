// A linear layer: checked, and spread over the threads in pieces of the weights.
#pragma once

#include <cstdlib>

#include "variants.h"

namespace hfp {

// Larger sizes are a mistake, and could overflow what is computed from them.
static const int64_t kMostLinearRows = 1 << 20, kMostFeatures = 1 << 24;
// Weights that a thread takes at a time, and what is done, for each row, sooner than a second thread has begun.
static const int64_t kPieceBytes = 1 << 17, kSerialBytes = 1 << 16;

struct LinearWork {
    Linear call;
    const Kernel *kernel;
    int64_t piece, next_piece;
};

static Error check(const Linear &call) {
    if (call.variant < 0 || call.variant >= kNumVariants || call.dtype < 0 || call.dtype >= kDtypes) return kNoVariant;
    const Variant &variant = kVariants[call.variant];
    if (call.rows < 1 || call.rows > kMostLinearRows || call.inputs < 1 || call.inputs > kMostFeatures ||
        call.outputs < 1 || call.outputs > kMostFeatures || call.threads < 1 || call.threads > kMostThreads)
        return kBadSize;
    return variant.is_supported() && call.inputs % variant.kernel->linear[call.dtype].channels == 0 ? kOk : kNoVariant;
}

static void work_linear(void *data) {
    LinearWork &work = *(LinearWork *)data;
    for (;;) {
        const int64_t begin = __atomic_fetch_add(&work.next_piece, 1, __ATOMIC_RELAXED) * work.piece;
        if (begin >= work.call.outputs) return;
        const int64_t rest = work.call.outputs - begin;
        work.kernel->linear[work.call.dtype].multiply(work.call, begin, begin + (rest < work.piece ? rest : work.piece));
    }
}

static Error linear(const Linear &call) {
    const Error error = check(call);
    if (error) return error;
    LinearWork work = {call, kVariants[call.variant].kernel, 0, 0};
    const auto widen = work.kernel->linear[call.dtype].widen;
    float *floats = nullptr;
    if (widen) {
        floats = (float *)malloc(sizeof(float) * call.rows * call.inputs);
        if (!floats) return kNoMemory;
        widen(call.input, call.rows * call.inputs, floats);
        work.call.input = floats;
    }
    const int64_t row_bytes = call.inputs * (call.dtype == kFloat32 ? 4 : 2), fitting = kPieceBytes / row_bytes;
    work.piece = fitting > kOutputs ? fitting / kOutputs * kOutputs : kOutputs;
    const bool is_small = call.outputs * row_bytes < kSerialBytes / call.rows;
    if (run_parallel && call.threads > 1 && !is_small) run_parallel(work_linear, &work, (unsigned)call.threads, 0);
    else work_linear(&work);
    free(floats);
    return kOk;
}

}  // namespace hfp
