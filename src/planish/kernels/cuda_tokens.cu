// Rows of activations -> whole numbers of at most 8 bits, each row (a token) by its own range, in one pass.
//
//     s = (max(x, 0) - min(x, 0)) / (2^b - 1),  z = round(-min(x, 0) / s);  symmetric: s = max |x| / (2^(b-1) - 1),
//     Q = clamp(round(x / s) + z, 0, 2^b - 1)                               z = 2^(b-1)
//
// in fp32, every division rounded to the nearest, as the definition divides. What is written is u = Q - 2^(b-1) in a
// byte, and of each row s, t = z - 2^(b-1) and the sum of u - t. Bytes lie in the order of a lane's codes of a weight
// (cuda_int8.cu): of 16 inputs, place 4 t + j has input 2 t + 8 (j % 2) + j / 2; beside a weight of 4 bits, place
// 16 h + 4 t + j of 32 has input 8 h + 2 t + 16 (j % 2) + j / 2. A row whose numbers aren't all finite has s = NaN.
//
// A block takes a row and holds it in registers: THREADS times EIGHTS times 8 numbers. Compiled for these too, as
// cuda_records.cu says, which comes before this. Knows nothing of torch, and includes nothing.

constexpr int WARPS = THREADS / 32;   // a power of two
constexpr int APART = BITS == 4 ? 2 : 1;  // eights of inputs whose codes lie side by side
constexpr float SMALLEST = 1e-12f;    // of a scale
constexpr float WHOLE = 12582912.0f;  // 1.5 2^23: a sum with this is rounded to whole numbers, half to even

#ifndef EMULATED

// pairs of numbers of the dtype of x; NaN where either is
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 pair;
    if (BF16) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    else asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

__device__ __forceinline__ u32 smaller(u32 a, u32 b) {
    u32 pair;
    if (BF16) asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    else asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

#endif

// eight numbers of a row from `at` on; zeros after its end
__device__ __forceinline__ void read_eight(const u16* row, int at, int width, u32 (&x)[4]) {
    if (width % 8 == 0) {
        const uint4 v = at < width ? *(const uint4*)(row + at) : uint4{0, 0, 0, 0};
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = at + 2 * i < width ? row[at + 2 * i] : 0;
        x[i] |= at + 2 * i + 1 < width ? (u32)row[at + 2 * i + 1] << 16 : 0;
    }
}

// over all threads of the block, by way of `room` of its own for each warp
template <class Join>
__device__ __forceinline__ u32 joined(u32 value, u32* room, Join join) {
#pragma unroll
    for (int other = 16; other; other /= 2) value = join(value, __shfl_xor_sync(~0u, value, other));
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    value = room[threadIdx.x % WARPS];
#pragma unroll
    for (int other = WARPS / 2; other; other /= 2) value = join(value, __shfl_xor_sync(~0u, value, other));
    return value;
}

struct Range {
    float scale, inverse;
    int zero, least, most;  // t, and what u may be
};

__device__ __forceinline__ Range range_of(float low, float high, int bits, bool symmetric) {
    const int half = 1 << bits - 1;
    Range range = {0.0f, 0.0f, 0, -half, half - 1};
    range.scale = symmetric ? __fdiv_rn(-low < high ? high : -low, (float)(half - 1))
                            : __fdiv_rn(__fsub_rn(high, low), (float)(2 * half - 1));
    if (range.scale < SMALLEST) range.scale = SMALLEST;
    if (!symmetric) {
        const int zero = __float_as_int(__fadd_rn(__fdiv_rn(-low, range.scale), WHOLE)) - __float_as_int(WHOLE);
        range.zero = min(zero, 2 * half - 1) - half;
    }
    range.inverse = __fdiv_rn(1.0f, range.scale);
    range.scale = __fadd_rn(range.scale, __fsub_rn(range.scale, range.scale));  // infinite: NaN
    return range;
}

// u of a number. Twice corrected, the product with the inverse is the quotient rounded to the nearest
__device__ __forceinline__ int code_of(float x, const Range& by) {
    float steps = __fmul_rn(x, by.inverse);
    steps = __fmaf_rn(__fmaf_rn(-steps, by.scale, x), by.inverse, steps);
    steps = __fmaf_rn(__fmaf_rn(-steps, by.scale, x), by.inverse, steps);
    const int code = __float_as_int(__fadd_rn(steps, WHOLE)) + (by.zero - __float_as_int(WHOLE));
    return min(max(code, by.least), by.most);
}

// codes of four numbers as bytes, `left` of them in the row; the rest is zero
__device__ __forceinline__ u32 four_codes(u32 first, u32 second, int left, const Range& by) {
    const u32 low = __byte_perm(code_of(widened(first & 0xffff), by), code_of(widened(first >> 16), by), 0x0040);
    const u32 high = __byte_perm(code_of(widened(second & 0xffff), by), code_of(widened(second >> 16), by), 0x0040);
    const u32 codes = __byte_perm(low, high, 0x5410);
    return left >= 4 ? codes : left <= 0 ? 0 : codes & (1u << 8 * left) - 1;
}

// eight codes and those of the eight inputs APART -> the half of both that this lane writes, in the order above
__device__ __forceinline__ uint2 interleaved(u32 low, u32 high, bool second) {
    const u32 other = __shfl_xor_sync(~0u, second ? low : high, APART);
    const u32 a = second ? other : low, b = second ? high : other;
    return {__byte_perm(a, b, 0x5140), __byte_perm(a, b, 0x7362)};
}

// x: [rows, width]; codes: [rows, padded], which 32 divides; lines: [rows] of s, t, the sum, nothing
extern "C" __global__ void __launch_bounds__(THREADS) tokens(
    const u16* x, char* codes, uint4* lines, int width, int padded, int bits, int symmetric) {
    u32 held[EIGHTS][4], low = 0, high = 0;
    u32* room = (u32*)shared_memory();
    wait_for_inputs();
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
        read_eight(x + (long long)blockIdx.x * width, (i * THREADS + threadIdx.x) * 8, width, held[i]);
#pragma unroll
    for (int i = 0; i < 4 * EIGHTS; i++)
        low = smaller(low, held[i / 4][i % 4]), high = larger(high, held[i / 4][i % 4]);
    low = joined(low, room, [](u32 a, u32 b) { return smaller(a, b); });
    high = joined(high, room + WARPS, [](u32 a, u32 b) { return larger(a, b); });
    low = smaller(low, low >> 16), high = larger(high, high >> 16);
    const Range range = range_of(widened(low & 0xffff), widened(high & 0xffff), bits, symmetric);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        const int eight = i * THREADS + threadIdx.x, left = width - 8 * eight;
        const u32 a = four_codes(held[i][0], held[i][1], left, range);
        const u32 b = four_codes(held[i][2], held[i][3], left - 4, range);
        sum = __dp4a((int)a, 0x01010101, __dp4a((int)b, 0x01010101, sum));
        const uint2 two = interleaved(a, b, eight / APART % 2);
        const int place = APART == 1 ? eight : eight / 4 * 4 + eight % 2 * 2 + eight / 2 % 2;
        if (8 * eight < padded) *(uint2*)(codes + (long long)blockIdx.x * padded + 8 * place) = two;
    }
    sum = joined(sum, room + 2 * WARPS, [](u32 a, u32 b) { return a + b; });
    if (threadIdx.x == 0) {
        const u32 scale = __float_as_int(range.scale);
        lines[blockIdx.x] = {scale, (u32)range.zero, (u32)(sum - width * range.zero), 0};
    }
}
