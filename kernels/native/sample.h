// A sample of what tensors hold: elements that lie equally far apart, kept one after the other and compared with later
// ones. Almost every element is a miss in all caches and in the TLB, so what counts is how many are asked for at once.
//
// A look is begun, goes on by itself on threads of its own, and is ended later by whoever needs the answer, who then
// lends a hand, with the threads of OpenMP. (These cannot be left alone: whoever starts a team works in it until the
// end. And they wait actively for some milliseconds after a forward, so that threads of our own get little time then.)
#pragma once

#include <pthread.h>

#include <cstdlib>

#include "native.h"

namespace hfp {

// `count` elements of `size` bytes, `step` bytes apart, from `data` on; kept from byte `at` of the sample on.
struct Read {
    const char *data;
    int64_t count, step, size, at;
};

struct SampleCall {
    const Read *reads;
    int64_t num_reads;
    char *kept;
    int64_t kept_bytes;
};

// Threads that read along. Memory gives no more from some point on, and each takes some 20 us to start.
static const int64_t kMostReaders = 7;

// What the threads of a look share.
struct SampleLook {
    SampleCall call;
    bool is_recording;
    int64_t next, differs, threads, num_readers;
    pthread_t readers[kMostReaders];
};

// Elements that are on their way from memory while one is compared. They go to the second level of the cache, which
// waits for more lines at a time than the first: 240,000 of them in 4 KiB pages, right after a forward, on Zen 4, take
// 0.9 ms on two cores and 1.5 ms on one; to the first level, or with nothing fetched ahead, 1.5 and 2.8 ms. Hardly
// any difference from 32 to 1,024 ahead. The rest is the look-up of 130,000 pages.
static const int64_t kAhead = 64;

static Error check(const SampleCall &call) {
    if (call.num_reads < 0 || call.kept_bytes < 0 || !call.kept || (call.num_reads && !call.reads)) return kBadSize;
    for (int64_t i = 0; i < call.num_reads; ++i) {
        const Read &read = call.reads[i];
        const bool is_size = read.size == 1 || read.size == 2 || read.size == 4 || read.size == 8;
        if (!read.data || !is_size || read.count < 1 || read.step < read.size || read.at < 0 ||
            read.at > call.kept_bytes || read.count > (call.kept_bytes - read.at) / read.size)
            return kBadSize;
    }
    return kOk;
}

template <class T>
static T load(const char *from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

static void fetch(const char *line) { __builtin_prefetch(line, 0, 2); }

template <class T>
static bool differs(const Read &read, const char *kept) {
    T different = 0;
    for (int64_t i = 0; i < read.count && i < kAhead; ++i) fetch(read.data + i * read.step);
    for (int64_t i = 0; i < read.count; ++i) {
        if (i < read.count - kAhead) fetch(read.data + (i + kAhead) * read.step);
        different |= load<T>(read.data + i * read.step) ^ load<T>(kept + i * sizeof(T));
    }
    return different != 0;
}

static bool differs(const Read &read, const char *kept) {
    if (read.step == read.size) return memcmp(read.data, kept, read.count * read.size) != 0;
    if (read.size == 8) return differs<uint64_t>(read, kept);
    if (read.size == 4) return differs<uint32_t>(read, kept);
    if (read.size == 2) return differs<uint16_t>(read, kept);
    return differs<uint8_t>(read, kept);
}

// What every thread does: one read after the other until none is left.
static void sample(void *data) {
    SampleLook &look = *(SampleLook *)data;
    for (;;) {
        const int64_t at = __atomic_fetch_add(&look.next, 1, __ATOMIC_RELAXED);
        if (at >= look.call.num_reads) return;
        const Read &read = look.call.reads[at];
        char *kept = look.call.kept + read.at;
        if (look.is_recording)
            for (int64_t i = 0; i < read.count; ++i) memcpy(kept + i * read.size, read.data + i * read.step, read.size);
        else if (differs(read, kept))
            __atomic_store_n(&look.differs, 1, __ATOMIC_RELAXED);
    }
}

static void *sample_apart(void *data) {
    sample(data);
    return nullptr;
}

// Null where there is no memory. Threads that cannot be had are done without.
static SampleLook *begin_look(const SampleCall &call, int64_t threads, bool is_recording) {
    SampleLook *look = (SampleLook *)calloc(1, sizeof(SampleLook));
    if (!look) return nullptr;
    look->call = call, look->is_recording = is_recording, look->threads = threads;
    const int64_t most = threads - 1 < kMostReaders ? threads - 1 : kMostReaders;
    while (look->num_readers < most && !pthread_create(&look->readers[look->num_readers], nullptr, sample_apart, look))
        ++look->num_readers;
    return look;
}

// Whether anything differs. What the look reads must be there until now.
static bool end_look(SampleLook *look) {
    if (look->threads > 1 && run_parallel) run_parallel(sample, look, (unsigned)look->threads, 0);
    else sample(look);
    for (int64_t i = 0; i < look->num_readers; ++i) pthread_join(look->readers[i], nullptr);
    const bool is_different = look->differs != 0;
    free(look);
    return is_different;
}

}  // namespace hfp
