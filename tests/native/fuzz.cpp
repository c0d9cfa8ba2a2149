// Random calls of every variant that this CPU has, under the sanitizers: `make sanitize`. Memory is allocated to the
// byte, so that a read or write beside it is caught; results are compared with plain loops in double precision, and
// damaged calls must be refused.

#define HFP_TEST_WIDE
#include "../../kernels/native/native.cpp"

#include <cstdio>
#include <random>
#include <vector>

using namespace hfp;

#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

static std::mt19937_64 rng;
static int64_t upto(int64_t n) { return (int64_t)(rng() % (uint64_t)n); }
template <class T>
static T one_of(std::initializer_list<T> list) {
    return list.begin()[upto((int64_t)list.size())];
}
static float normal() { return (float)std::normal_distribution<double>()(rng); }

// The numbers of every dtype are chosen such that they are exact in all of them.
static void put(std::vector<char> &bytes, int64_t dtype, int64_t at, float x) {
    if (dtype == kFloat32) {
        memcpy(&bytes[at * 4], &x, 4);
    } else if (dtype == kBFloat16) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        const uint16_t half = (uint16_t)(bits >> 16);
        memcpy(&bytes[at * 2], &half, 2);
    } else {
        uint16_t half;
        const Half narrow = (Half)x;
        memcpy(&half, &narrow, 2);
        memcpy(&bytes[at * 2], &half, 2);
    }
}
static double get(const std::vector<char> &bytes, int64_t dtype, int64_t at) {
    if (dtype == kFloat32) {
        float x;
        memcpy(&x, &bytes[at * 4], 4);
        return x;
    }
    uint16_t half;
    memcpy(&half, &bytes[at * 2], 2);
    if (dtype == kBFloat16) {
        const uint32_t bits = (uint32_t)half << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    Half x;
    memcpy(&x, &half, 2);
    return (double)x;
}

// A code of the format as the number that it stands for.
static double number(int64_t storage, char code) {
    if (storage == kInt8) return (double)(int8_t)code;
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    const double magnitude = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return code & 0x80 ? -magnitude : magnitude;
}
static double half_at(const char *p) {
    Half x;
    memcpy(&x, p, sizeof x);
    return (double)x;
}
static int64_t side_group(bool is_key, int64_t dim) {
    int64_t group = is_key ? 32 : 64;
    while (dim % group) group /= 2;
    return group;
}
static int64_t token_bytes(int64_t storage, bool is_key, int64_t dim) {
    return storage == kInt4 ? dim / 2 + 4 * (dim / side_group(is_key, dim)) : dim + 4;
}
static int nibble(const char *record, int64_t dim, int64_t at) {
    return at < dim / 2 ? record[at] & 15 : (uint8_t)record[at - dim / 2] >> 4;
}
// Keys as they were rotated.
static double decoded(const char *record, int64_t storage, bool is_key, int64_t dim, int64_t at) {
    if (storage == kInt4) {
        const char *scales = record + dim / 2 + at / side_group(is_key, dim) * 4;
        return nibble(record, dim, at) * half_at(scales) + half_at(scales + 2);
    }
    float scale;
    memcpy(&scale, record + dim, sizeof scale);
    return number(storage, record[at]) * (double)scale;
}
static bool is_used(int64_t storage, int64_t code) { return storage == kInt8 ? code != 128 : (code & 0x7f) != 0x7f; }
static char a_code(int64_t storage) {
    const int64_t code = upto(256);
    return is_used(storage, code) ? (char)code : 0;
}
// Row `at` of the rotation times `x`, in double precision, and without its factor.
static double rotated_sum(const std::vector<double> &x, int64_t at) {
    const int64_t size = (int64_t)x.size() & -(int64_t)x.size(), begin = at / size * size;
    double sum = 0;
    for (int64_t i = 0; i < size; ++i)
        sum += __builtin_parityll((unsigned long long)(i & (at - begin))) ? -x[begin + i] : x[begin + i];
    return sum;
}
// Formats whose keys are rotated.
static bool rotates(int64_t storage) { return storage == kInt8 || storage == kInt4; }
static double rotation_factor(int64_t dim) { return 1 / std::sqrt((double)(dim & -dim)); }

// Whether no other code's number is nearer; of two equally near ones the even one is right.
static bool is_nearest(int64_t storage, char given, double x) {
    static std::vector<double> numbers[kStorages];
    if (numbers[storage].empty())
        for (int code = 0; code < 256; ++code) numbers[storage].push_back(number(storage, (char)code));
    const double least = std::fabs(numbers[storage][(uint8_t)given] - x);
    for (int code = 0; code < 256; ++code) {
        const double off = std::fabs(numbers[storage][code] - x);
        if (is_used(storage, code) && (off < least || (off == least && (given & 1) && !(code & 1)))) return false;
    }
    return is_used(storage, (uint8_t)given);
}

struct Case {
    Attention call = {};
    std::vector<char> query, keys, values, out;
    std::vector<float> sinks;
    std::vector<Part> parts;
    std::vector<Run> runs;

    Case() {
        call.dtype = upto(kDtypes), call.storage = one_of<int64_t>({call.dtype, call.dtype, kInt8, kFloat8, kInt4, kInt4});
        call.kv_heads = 1 + upto(3), call.group = one_of<int64_t>({1, 2, 3, 4, 5, 8, 16, 24, 71, 121});
        call.key_dim = 8 * (1 + upto(32)), call.value_dim = one_of<int64_t>({call.key_dim, 8 * (1 + upto(32))});
        if (call.storage == kInt4)
            call.key_dim = 16 * (1 + upto(16)), call.value_dim = one_of<int64_t>({call.key_dim, 16 * (1 + upto(16))});
        call.num_queries = one_of<int64_t>({1, 2, 3, 16, 40, 150}), call.num_slots = 1 + upto(700);
        call.threads = 1 + upto(4), call.scale = 0.1, call.softcap = one_of<double>({0, 4});
        for (int64_t left = upto(5); left; --left) add();
        fill(query, call.num_queries * call.kv_heads * call.group * call.key_dim);
        fill_memory(keys, true, call.key_dim);
        fill_memory(values, false, call.value_dim);
        out.resize(call.num_queries * call.kv_heads * call.group * call.value_dim * size());
        for (int64_t i = 0; i < call.kv_heads * call.group; ++i) sinks.push_back(normal());
        call.query = query.data(), call.keys = keys.data(), call.values = values.data(), call.out = out.data();
        call.sinks = upto(2) ? sinks.data() : nullptr;
        call.query_stride = call.kv_heads * call.group * call.key_dim, call.query_head_stride = call.key_dim;
        call.key_head_stride = call.num_slots * token(true, call.key_dim);
        call.value_head_stride = call.num_slots * token(false, call.value_dim);
        parts.reserve(parts.size() + 1), runs.reserve(runs.size() + 1);  // no null pointers
        call.parts = parts.data(), call.runs = runs.data();
        call.num_parts = (int64_t)parts.size(), call.num_runs = (int64_t)runs.size();
    }

    bool has_records() const { return call.storage != call.dtype; }
    int64_t token(bool is_key, int64_t dim) const {
        return has_records() ? token_bytes(call.storage, is_key, dim) : dim;
    }
    int64_t size() const { return call.dtype == kFloat32 ? 4 : 2; }

    void fill(std::vector<char> &bytes, int64_t count) {
        bytes.resize(count * size());
        for (int64_t i = 0; i < count; ++i) put(bytes, call.dtype, i, (float)(upto(65) - 32) / 16);
    }

    void fill_memory(std::vector<char> &bytes, bool is_key, int64_t dim) {
        if (!has_records()) return fill(bytes, call.kv_heads * call.num_slots * dim);
        const int64_t each = token(is_key, dim);
        bytes.resize(call.kv_heads * call.num_slots * each);
        for (size_t at = 0; at < bytes.size(); at += each) {
            if (call.storage == kInt4) {
                for (int64_t i = 0; i < dim / 2; ++i) bytes[at + i] = (char)upto(256);
                for (int64_t i = at + dim / 2; i < (int64_t)at + each; i += 4)
                    put(bytes, kFloat16, i / 2, (float)upto(8) / 32),
                        put(bytes, kFloat16, i / 2 + 1, -(float)upto(8) / 4);
                continue;
            }
            for (int64_t i = 0; i < dim; ++i) bytes[at + i] = a_code(call.storage);
            const float scale = (float)(1 + upto(8)) / (call.storage == kInt8 ? 256 : 1024);
            memcpy(&bytes[at + dim], &scale, sizeof scale);
        }
    }

    double stored(const std::vector<char> &bytes, bool is_key, int64_t head, int64_t slot, int64_t dim,
                  int64_t at) const {
        const int64_t begin = (head * call.num_slots + slot) * token(is_key, dim);
        return has_records() ? decoded(&bytes[begin], call.storage, is_key, dim, at)
                             : get(bytes, call.dtype, begin + at);
    }

    void add() {
        Part part = {upto(call.num_queries), 0, (int64_t)runs.size(), 0, INT64_MAX / 8, INT64_MAX / 4};
        part.query_stop = part.query + 1 + upto(call.num_queries - part.query);
        int64_t tokens = 0;
        for (int64_t left = upto(6); left; --left) {
            const int64_t slot = upto(call.num_slots), count = 1 + upto(call.num_slots - slot);
            runs.push_back({slot, count});
            tokens += count;
        }
        part.run_stop = (int64_t)runs.size();
        if (upto(2)) part.first = upto(tokens + 2) - 1 - upto(2) * upto(call.num_queries);
        if (upto(2)) part.window = one_of<int64_t>({1 + upto(tokens + 2), 1 + upto(20), INT64_MAX});
        parts.push_back(part);
    }

    double expected(int64_t query_index, int64_t head, int64_t d) const {
        std::vector<int64_t> slots;
        for (const Part &part : parts) {
            if (query_index < part.query || query_index >= part.query_stop) continue;
            const int64_t last = part.first + query_index - part.query;
            int64_t t = 0;
            for (int64_t run = part.run; run < part.run_stop; ++run)
                for (int64_t i = 0; i < runs[run].tokens; ++i, ++t)
                    if (t <= last && t > last - part.window) slots.push_back(runs[run].slot + i);
        }
        double total = call.sinks ? std::exp((double)sinks[head]) : 0, sum = 0;
        const int64_t kv_head = head / call.group;
        std::vector<double> meets(call.key_dim), turned(call.key_dim);
        for (int64_t i = 0; i < call.key_dim; ++i)
            meets[i] = get(query, call.dtype, query_index * call.query_stride + head * call.key_dim + i);
        for (int64_t i = 0; rotates(call.storage) && i < call.key_dim; ++i)
            turned[i] = rotated_sum(meets, i) * rotation_factor(call.key_dim);
        if (rotates(call.storage)) meets = turned;
        for (const int64_t slot : slots) {
            double score = 0;
            for (int64_t i = 0; i < call.key_dim; ++i)
                score += meets[i] * stored(keys, true, kv_head, slot, call.key_dim, i);
            score *= call.scale;
            if (call.softcap > 0) score = call.softcap * std::tanh(score / call.softcap);
            total += std::exp(score);
            sum += std::exp(score) * stored(values, false, kv_head, slot, call.value_dim, d);
        }
        return total > 0 ? sum / total : 0;
    }
};

static int64_t run(const Attention &call) {
    return hf_paged_attend(&call, call.query, call.out);
}

static bool is_right(const Case &made) {
    const double tolerance = made.call.dtype == kFloat32 ? 1e-5 : made.call.dtype == kFloat16 ? 3e-3 : 2e-2;
    for (int check = 0; check < 20; ++check) {
        const int64_t query = upto(made.call.num_queries), heads = made.call.kv_heads * made.call.group;
        const int64_t head = upto(heads), d = upto(made.call.value_dim);
        const double actual = get(made.out, made.call.dtype, (query * heads + head) * made.call.value_dim + d);
        const double expected = made.expected(query, head, d);
        if (!(std::fabs(actual - expected) <= tolerance * (1 + std::fabs(expected)))) {
            std::printf("query %ld head %ld dim %ld: %g, expected %g\n", (long)query, (long)head, (long)d, actual,
                        expected);
            return false;
        }
    }
    return true;
}

// One field of a good call becomes nonsense; the call must be refused, or be one that was right all the same.
static bool refuses_damage(Case &made) {
    const int64_t nonsense = one_of<int64_t>({-1, 0, INT64_MIN, INT64_MAX, INT64_MAX / 2, 7, 1000003});
    Attention call = made.call;
    int64_t *const fields[] = {&call.dtype,     &call.variant, &call.num_queries, &call.kv_heads, &call.storage,
                               &call.key_dim,   &call.value_dim, &call.threads,   &call.group};
    if (!made.runs.empty() && upto(2)) {
        Run &damaged = made.runs[upto((int64_t)made.runs.size())];
        const Run before = damaged;
        if (upto(3) == 0) damaged.slot = call.num_slots - damaged.tokens + 1;  // one too far
        else (upto(2) ? damaged.slot : damaged.tokens) = nonsense;
        const bool is_good = damaged.slot >= 0 && damaged.tokens >= 1 && damaged.slot < call.num_slots &&
                             damaged.tokens <= call.num_slots - damaged.slot;
        const int64_t error = run(call);
        damaged = before;
        return is_good || error;
    }
    int64_t *field = fields[upto(9)];
    if (nonsense > 0 && nonsense < 2000000) return true;  // may be good by chance, and is not checkable then
    if (nonsense == 0 && (field == &call.dtype || field == &call.variant || field == &call.storage))
        return true;
    *field = nonsense;
    return run(call) != kOk;
}

static bool store_is_right() {
    const int64_t heads = 1 + upto(3), slots = 1 + upto(60), tokens = 1 + upto(6), rows = 1 + upto(3);
    std::vector<char> memory[2], fresh[2];
    StoreCall call = {};
    for (int side = 0; side < 2; ++side) {
        const int64_t bytes = 1 + upto(40);
        memory[side].resize(heads * slots * bytes), fresh[side].resize(rows * heads * tokens * bytes);
        for (char &byte : fresh[side]) byte = (char)upto(256);
        call.sides[side] = {memory[side].data(), 0, bytes, slots * bytes, heads * tokens * bytes, tokens * bytes, bytes};
    }
    call.heads = heads, call.num_slots = slots, call.row_tokens = tokens, call.num_tokens = rows * tokens;
    const int64_t limit = slots + 10;
    const Write write = {upto(4) - 1, upto(rows * tokens + 2), upto(limit) - 5, upto(9) - 1};
    const Copy copy = {upto(limit) - 5, upto(limit) - 5, upto(limit)};
    const bool is_good = write.source >= 0 && write.tokens >= 1 && write.source + write.tokens <= rows * tokens &&
                         write.slot >= 0 && write.step >= 1 && write.slot + (write.tokens - 1) * write.step < slots &&
                         copy.tokens >= 1 && copy.source >= 0 && copy.target >= 0 &&
                         copy.source + copy.tokens <= slots && copy.target + copy.tokens <= slots;
    call.writes = &write, call.copies = &copy, call.num_writes = call.num_copies = 1;
    const int64_t error = hf_paged_store(&call, fresh[0].data(), fresh[1].data());
    if (is_good != (error == kOk)) return false;
    if (!is_good || copy.target <= write.slot + (write.tokens - 1) * write.step) return true;
    const int64_t head = upto(heads), source = write.source, bytes = call.sides[1].token_bytes;
    return !memcmp(&memory[1][(head * slots + write.slot) * bytes],
                   &fresh[1][((source / tokens * heads + head) * tokens + source % tokens) * bytes], bytes);
}

// Whether a record of codes of one byte is right.
static bool are_codes(const char *record, int64_t storage, const std::vector<float> &kept) {
    float most = 0, scale;
    for (const float x : kept) most = std::fmax(most, std::fabs(x));
    memcpy(&scale, record + kept.size(), sizeof scale);
    if (scale != most / (storage == kInt8 ? 127.0f : 448.0f)) return false;
    for (size_t i = 0; i < kept.size(); ++i)
        if (!is_nearest(storage, record[i], kept[i] / (scale == 0 ? 1 : scale))) return false;
    return true;
}

// Whether one of codes of four bits is.
static bool are_steps(const char *record, bool is_key, const std::vector<float> &kept) {
    const int64_t dim = (int64_t)kept.size(), group = side_group(is_key, dim);
    for (int64_t g = 0; g < dim / group; ++g) {
        float low = INFINITY, high = -INFINITY;
        for (int64_t i = g * group; i < (g + 1) * group; ++i)
            low = std::fmin(low, kept[i]), high = std::fmax(high, kept[i]);
        const double step = half_at(record + dim / 2 + 4 * g), least = half_at(record + dim / 2 + 4 * g + 2);
        if (step != (double)(Half)((high - low) / 15) || least != (double)(Half)low) return false;
        for (int64_t i = g * group; i < (g + 1) * group; ++i) {
            const double wanted = step == 0 ? 0 : std::fmin(std::fmax((kept[i] - least) / step, 0), 15);
            if (!(std::fabs(nibble(record, dim, i) - wanted) <= 0.5 + 1e-6)) return false;
        }
    }
    return true;
}

// One token a row is encoded into memory that ends with its record; damaged calls are refused.
static bool encodes_right() {
    StoreCall call = {};
    call.dtype = upto(kDtypes), call.storage = one_of<int64_t>({kInt8, kFloat8, kInt4});
    call.heads = 1 + upto(3), call.num_slots = 1 + upto(5), call.row_tokens = 1, call.num_tokens = 1;
    const int64_t size = call.dtype == kFloat32 ? 4 : 2;
    std::vector<char> memory[2], fresh[2];
    for (int side = 0; side < 2; ++side) {
        const int64_t dim = call.storage == kInt4 ? 16 * (1 + upto(16)) : kEncodedLanes * (1 + upto(64));
        const int64_t bytes = token_bytes(call.storage, side == 0, dim);
        memory[side].resize(call.heads * call.num_slots * bytes), fresh[side].resize(call.heads * dim * size);
        for (int64_t i = 0; i < call.heads * dim; ++i) put(fresh[side], call.dtype, i, (float)(upto(65) - 32) / 16);
        const int64_t row = call.heads * dim * size;
        call.sides[side] = {memory[side].data(), dim, bytes, call.num_slots * bytes, row, dim * size, dim * size};
    }
    const int64_t slot = upto(call.num_slots);
    call.slot = slot, call.step = 1;
    if (hf_paged_store(&call, fresh[0].data(), fresh[1].data())) return false;
    for (int side = 0; side < 2; ++side)
        for (int64_t head = 0; head < call.heads; ++head) {
            const int64_t dim = call.sides[side].dim;
            const char *record = &memory[side][(head * call.num_slots + slot) * call.sides[side].token_bytes];
            std::vector<double> given(dim);
            std::vector<float> kept(dim);  // sums of rotated keys are exact here
            for (int64_t i = 0; i < dim; ++i) given[i] = get(fresh[side], call.dtype, head * dim + i);
            for (int64_t i = 0; i < dim; ++i)
                kept[i] = side || !rotates(call.storage) ? (float)given[i]
                                                         : (float)rotated_sum(given, i) * (float)rotation_factor(dim);
            if (!(call.storage == kInt4 ? are_steps(record, side == 0, kept) : are_codes(record, call.storage, kept)))
                return false;
        }
    StoreCall damaged = call;
    StoreSide &side = damaged.sides[upto(2)];
    int64_t *const fields[] = {&damaged.dtype, &damaged.storage, &side.dim, &side.token_bytes};
    *fields[upto(4)] = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, kStorages, 3000});
    return hf_paged_store(&damaged, fresh[0].data(), fresh[1].data()) != kOk;
}

static int64_t sample(const SampleCall &call, int64_t threads, bool is_recording, int64_t *differs) {
    void *look = nullptr;
    const int64_t error = hf_paged_sample_begin(&call, threads, is_recording, &look);
    if (!error) *differs = hf_paged_sample_end(look);
    return error;
}

// Tensors of exactly as many bytes as are read; one bit that is flipped is found where it is read, and nowhere else.
static bool sample_is_right() {
    std::vector<std::vector<char>> tensors;
    std::vector<Read> reads;
    int64_t kept_bytes = 0;
    for (int64_t i = 1 + upto(6); i; --i) {
        const int64_t size = one_of<int64_t>({1, 2, 4, 8}), step = size * (1 + upto(5)), count = 1 + upto(200);
        tensors.emplace_back((count - 1) * step + size);
        for (char &byte : tensors.back()) byte = (char)upto(256);
        kept_bytes += (size - kept_bytes % size) % size;
        reads.push_back({tensors.back().data(), count, step, size, kept_bytes});
        kept_bytes += count * size;
    }
    std::vector<char> kept(kept_bytes);
    const SampleCall call = {reads.data(), (int64_t)reads.size(), kept.data(), kept_bytes};
    const int64_t threads = 1 + upto(4), at = upto((int64_t)reads.size());
    int64_t differs = 0;
    if (sample(call, threads, true, &differs) || differs) return false;
    if (sample(call, threads, false, &differs) || differs) return false;
    const int64_t byte = upto((int64_t)tensors[at].size());
    tensors[at][byte] ^= (char)(1 << upto(8));
    if (sample(call, threads, false, &differs)) return false;
    if ((differs != 0) != (byte % reads[at].step < reads[at].size)) return false;
    Read &damaged = reads[at];
    int64_t *const fields[] = {&damaged.count, &damaged.step, &damaged.size, &damaged.at};
    *fields[upto(4)] = one_of<int64_t>({-1, INT64_MIN, INT64_MAX / 2 + upto(9)});
    return damaged.step > 100000 ? true : sample(call, threads, false, &differs) == kBadSize;
}

// A linear layer of tensors of exactly as many bytes; damaged calls are refused.
static bool linear_is_right(int64_t variant, int64_t lanes) {
    Linear call = {};
    call.variant = variant, call.dtype = upto(kDtypes), call.threads = 1 + upto(4);
    call.rows = 1 + upto(20), call.inputs = 8 * (1 + upto(40)), call.outputs = one_of<int64_t>({1 + upto(12), 1 + upto(300)});
    const int64_t size = call.dtype == kFloat32 ? 4 : 2;
    std::vector<char> input, weights, bias, out(call.rows * call.outputs * size);
    const auto fill = [&](std::vector<char> &bytes, int64_t count) {
        bytes.resize(count * size);
        for (int64_t i = 0; i < count; ++i) put(bytes, call.dtype, i, (float)(upto(65) - 32) / 16);
    };
    fill(input, call.rows * call.inputs), fill(weights, call.outputs * call.inputs), fill(bias, call.outputs);
    call.input = input.data(), call.weights = weights.data(), call.out = out.data();
    call.bias = upto(2) ? bias.data() : nullptr;
    const int64_t error = hf_paged_linear(&call);
    if (error) return error == kNoVariant && call.inputs % (call.dtype == kFloat32 ? lanes : 2 * lanes);
    for (int check = 0; check < 20; ++check) {
        const int64_t row = upto(call.rows), output = upto(call.outputs);
        double sum = call.bias ? get(bias, call.dtype, output) : 0;  // exact in float32
        for (int64_t i = 0; i < call.inputs; ++i)
            sum += get(input, call.dtype, row * call.inputs + i) * get(weights, call.dtype, output * call.inputs + i);
        const double off = std::fabs(get(out, call.dtype, row * call.outputs + output) - sum);
        const double rounding = call.dtype == kFloat32 ? 0 : call.dtype == kFloat16 ? 5e-4 : 4e-3;
        if (!(off <= rounding * std::fabs(sum))) return false;
    }
    int64_t *const fields[] = {&call.variant, &call.dtype, &call.rows, &call.inputs, &call.outputs, &call.threads};
    *fields[upto(6)] = one_of<int64_t>({-1, INT64_MIN, INT64_MAX, INT64_MAX / 2, (int64_t)1 << 40});
    return hf_paged_linear(&call) != kOk;
}

// Stands in for OpenMP: real threads, as the sanitizer of threads wants to see them.
#include <thread>
static void run_with_threads(void (*body)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i) team.emplace_back(body, data);
    body(data);
    for (std::thread &member : team) member.join();
}

int main(int count, char **arguments) {
    const int rounds = count > 1 ? atoi(arguments[1]) : 500;
    hf_paged_use_threads((void *)run_with_threads);
    int64_t tried = 0, lanes;
    for (int64_t variant = 0; hf_paged_variant(variant, &lanes); ++variant) {
        if (!lanes) continue;
        for (int round = 0; round < rounds; ++round) {
            rng.seed((uint64_t)(variant * 1000003 + round));
            Case made;
            made.call.variant = variant;
            const int64_t error = run(made.call);
            const int64_t multiple = made.call.storage == kInt4 && lanes > 8 ? 2 * lanes : lanes;
            const bool fits = made.call.key_dim % multiple == 0 && made.call.value_dim % multiple == 0;
            if (fits ? error || !is_right(made) : error != kNoVariant) {
                std::printf("variant %ld, round %d: error %ld\n", (long)variant, round, (long)error);
                return 1;
            }
            if (fits && !refuses_damage(made)) {
                std::printf("variant %ld, round %d: a damaged call was not refused\n", (long)variant, round);
                return 1;
            }
            if (!store_is_right()) {
                std::printf("variant %ld, round %d: store\n", (long)variant, round);
                return 1;
            }
            if (!encodes_right()) {
                std::printf("variant %ld, round %d: encoding\n", (long)variant, round);
                return 1;
            }
            if (!linear_is_right(variant, lanes)) {
                std::printf("variant %ld, round %d: linear layer\n", (long)variant, round);
                return 1;
            }
            if (!sample_is_right()) {
                std::printf("variant %ld, round %d: sample\n", (long)variant, round);
                return 1;
            }
            ++tried;
        }
    }
    std::printf("%ld random calls: right, and nothing beside them touched\n", (long)tried);
    return 0;
}
