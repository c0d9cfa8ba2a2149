// The store of new tokens: rows of bytes to their slots, or numbers to records, K and V of a layer in one call.
#pragma once

#include "encode.h"

namespace hfp {

static const int64_t kMostGroup[2] = {kKeyGroup, kValueGroup};

static Error check(const Store &call) {
    if (call.heads < 1 || call.num_slots < 1 || call.row_tokens < 1 || call.num_tokens < 1 || call.num_writes < 0 ||
        call.num_copies < 0)
        return kBadSize;
    const bool encodes = call.storage != call.dtype;
    if (encodes && (call.dtype < 0 || call.dtype >= kDtypes || call.storage < kDtypes || call.storage >= kStorages))
        return kNoVariant;
    const int64_t multiple = call.storage == kInt4 ? 16 : kEncodedLanes;
    for (int number = 0; encodes && number < 2; ++number) {
        const StoreSide &side = call.sides[number];
        if (side.dim < multiple || side.dim % multiple || side.dim > kMaxDim ||
            side.token_bytes != record_bytes(call.storage, side.dim, kMostGroup[number]))
            return kBadSize;
    }
    for (int64_t i = 0; i < call.num_writes; ++i) {
        const Write &write = call.writes[i];
        if (write.source < 0 || write.tokens < 1 || write.tokens > call.num_tokens - write.source || write.slot < 0 ||
            write.slot >= call.num_slots || write.step < 1 ||
            write.tokens - 1 > (call.num_slots - 1 - write.slot) / write.step)
            return kBadWrite;
    }
    for (int64_t i = 0; i < call.num_copies; ++i) {
        const Copy &copy = call.copies[i];
        if (copy.tokens < 1 || copy.tokens > call.num_slots || copy.source < 0 || copy.target < 0 ||
            copy.source > call.num_slots - copy.tokens || copy.target > call.num_slots - copy.tokens)
            return kBadWrite;
    }
    return kOk;
}

static void encode_token(const Store &call, int number, const char *numbers, char *record) {
    const int64_t dim = call.sides[number].dim;
    float floats[kMaxDim];
    kReadNumbers[call.dtype](numbers, dim, floats);
    if (number == 0 && is_rotated(call.storage)) rotate(floats, dim);  // keys
    kEncodes[call.storage - kDtypes](floats, dim, group_of(dim, kMostGroup[number]), record);
}

static void store_head(const Store &call, int number, int64_t head) {
    const StoreSide &side = call.sides[number];
    char *memory = side.memory + head * side.head_stride;
    const char *fresh = call.fresh[number] + head * side.fresh_head_stride;
    for (int64_t i = 0; i < call.num_writes; ++i) {
        const Write &write = call.writes[i];
        for (int64_t token = 0; token < write.tokens; ++token) {
            const int64_t source = write.source + token;
            char *slot = memory + (write.slot + token * write.step) * side.token_bytes;
            const char *numbers = fresh + source / call.row_tokens * side.fresh_row_stride +
                                  source % call.row_tokens * side.fresh_token_stride;
            if (call.storage != call.dtype) encode_token(call, number, numbers, slot);
            else memcpy(slot, numbers, side.token_bytes);
        }
    }
    for (int64_t i = 0; i < call.num_copies; ++i) {
        const Copy &copy = call.copies[i];
        memmove(memory + copy.target * side.token_bytes, memory + copy.source * side.token_bytes,
                copy.tokens * side.token_bytes);
    }
}

static Error store(const Store &call) {
    const Error error = check(call);
    if (error) return error;
    for (int side = 0; side < 2; ++side)
        for (int64_t head = 0; head < call.heads; ++head) store_head(call, side, head);
    return kOk;
}

}  // namespace hfp
