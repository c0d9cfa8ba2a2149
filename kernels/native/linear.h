// Linear layers of few rows, as decode steps have: bound by reading the weights, so these are read once, in the order in
// which they lie in memory. Included after tiles.h, once per instruction set.
//
// Outputs are so many at a time, for so many rows, as there are registers for sums. The weights of the next ones are
// fetched meanwhile, one line of the caches after the other: several outputs read at once are as many streams, in which
// the hardware reads ahead less well than in one. They go to the second-level cache: beside inputs and sums, what four
// outputs need is often too much for the first. A sum takes the same steps however many rows there are.

constexpr int kInputRows = HFP_REGISTERS >= 32 ? 6 : 2;
// Inputs that are multiplied by some weights before these are read again: half of a second-level cache holds both.
constexpr int64_t kInputBytes = 1 << 17;
// Where `__builtin_prefetch` puts what it fetches.
constexpr int kSecondLevel = 2;

// Sums of `rows` rows for outputs [output, output + outputs).
template <class Type, class Plain, int rows, int outputs>
static HFP_INLINE void multiply_outputs(const Linear &call, int64_t row, int64_t output) {
    typedef typename TileNumbers<Type, Type::is_paired>::Read Read;
    const auto *weights = (const typename Type::Storage *)call.weights + output * call.inputs;
    const auto *input = (const typename Read::Storage *)call.input + row * call.inputs;
    const char *next = (const char *)(weights + outputs * call.inputs);
    Floats sums[rows][outputs] = {};
    for (int64_t i = 0; i < call.inputs; i += Type::channels) {
        typename Type::Numbers weight[outputs];
        for (int j = 0; j < outputs; ++j) {
            weight[j] = Type::read(weights + j * call.inputs + i);
            __builtin_prefetch(next, 0, kSecondLevel);
            next += Type::channels * sizeof(typename Type::Storage);
        }
        for (int r = 0; r < rows; ++r) {
            const typename Type::Numbers x = Read::read(input + r * call.inputs + i);
            for (int j = 0; j < outputs; ++j) sums[r][j] = Type::add_product(sums[r][j], weight[j], x);
        }
    }
    float bias[HFP_LANES] = {};
    typename Plain::Storage numbers[HFP_LANES] = {};
    if (call.bias) {
        memcpy(numbers, (const typename Plain::Storage *)call.bias + output, outputs * sizeof *numbers);
        store(bias, Plain::read(numbers));
    }
    for (int r = 0; r < rows; ++r) {
        float results[HFP_LANES] = {};
        for (int j = 0; j < outputs; ++j) results[j] = sum_of(sums[r][j]) + bias[j];
        Plain::write(numbers, load(results));
        auto *out = (typename Plain::Storage *)call.out + (row + r) * call.outputs + output;
        memcpy(out, numbers, outputs * sizeof *numbers);
    }
}

// The last few rows.
template <class Type, class Plain, int outputs, int rows = kInputRows - 1>
static HFP_INLINE void multiply_rest(const Linear &call, int64_t row, int64_t stop, int64_t output) {
    if constexpr (rows > 0) {
        if (stop - row == rows) multiply_outputs<Type, Plain, rows, outputs>(call, row, output);
        else multiply_rest<Type, Plain, outputs, rows - 1>(call, row, stop, output);
    }
}

template <class Type, class Plain, int outputs>
static HFP_INLINE void multiply_rows(const Linear &call, int64_t row, int64_t stop, int64_t output) {
    for (; row + kInputRows <= stop; row += kInputRows)
        multiply_outputs<Type, Plain, kInputRows, outputs>(call, row, output);
    multiply_rest<Type, Plain, outputs>(call, row, stop, output);
}

// Outputs [begin, end). The input of what is no bfloat16 pair is floats.
template <class Type, class Plain>
static void multiply_linear(const Linear &call, int64_t begin, int64_t end) {
    const int64_t row_bytes = call.inputs * (Type::is_paired ? 2 : 4), fitting = kInputBytes / row_bytes;
    const int64_t rows = fitting > kInputRows ? fitting / kInputRows * kInputRows : kInputRows;
    for (int64_t row = 0; row < call.rows; row += rows) {
        const int64_t stop = row + rows < call.rows ? row + rows : call.rows;
        int64_t output = begin;
        for (; output + kOutputs <= end; output += kOutputs) multiply_rows<Type, Plain, kOutputs>(call, row, stop, output);
        for (; output < end; ++output) multiply_rows<Type, Plain, 1>(call, row, stop, output);
    }
}

// `count` numbers to floats.
template <class Type>
static void widen(const void *numbers, int64_t count, float *into) {
    for (int64_t i = 0; i < count; i += HFP_LANES) store(into + i, Type::read((const typename Type::Storage *)numbers + i));
}
