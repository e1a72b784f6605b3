// What the CUDA kernels share: how a record of a packed weight (kernels/gemv_layout.py) is read.
//
// Comes before the text of a kernel. Compiled for BITS (2, 3, 4, 8), GROUP (32, 64, 128, 256), ZERO (0 or 1), BF16
// (0: fp16) and OVERLAP (1: a kernel starts before the one that makes its inputs has ended). Knows nothing of torch,
// and includes nothing.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int TILE = 16, STEP = 256, SLABS = STEP / 32;     // outputs and inputs of a record; a slab is 32 inputs
constexpr int GROUPS = STEP / GROUP;                        // of a record
constexpr int ZERO_BITS = !ZERO ? 0 : GROUPS > 2 ? (BITS > 4 ? 8 : 4) : 16 / GROUPS;
constexpr int ZERO_WORDS = GROUPS * ZERO_BITS / 16;         // for a pair of outputs
constexpr int CODES = 512 * BITS, SCALES = 32 * GROUPS, ZEROS = 32 * ZERO_WORDS;
constexpr int RECORD = CODES + SCALES + ZEROS;              // bytes
constexpr int FIELDS = 16 / BITS;                           // codes that half a word holds

// arithmetic of decoding is fp16, or bf16 where that is exact
constexpr bool SHORT = BF16 && BITS <= 4;
constexpr int MANTISSA = SHORT ? 7 : 10, BIAS = SHORT ? 127 : 15;
constexpr u32 FIRST = (u32)(BIAS + MANTISSA << MANTISSA) * 0x10001;  // a pair of 2^MANTISSA; a code in it adds to it

#ifndef EMULATED  // the tests compile kernels for a CPU, with these functions of their own

extern __shared__ __align__(1024) uint4 shared[];

__device__ __forceinline__ char* shared_memory() { return (char*)shared; }
__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void wait_for_inputs() {
#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// a number in the shared memory of a block of the cluster, where `at` is in this one's
__device__ __forceinline__ float remote(const float* at, int rank) {
    float value;
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];}"
                 : "=f"(value) : "r"(shared_address(at)), "r"(rank) : "memory");
    return value;
}

__device__ __forceinline__ float shuffle(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

__device__ __forceinline__ float from_half(u32 low) {
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(low));
    return value;
}

__device__ __forceinline__ u32 two_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// a b + c of pairs of 16-bit numbers, rounded once
__device__ __forceinline__ u32 fma_pairs(u32 a, u32 b, u32 c) {
    u32 pair;
    if (SHORT) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
    return pair;
}

// one half of a pair in both; the compiler makes it part of what uses it
__device__ __forceinline__ u32 twice(u32 pair, int half) {
    u32 both;
    if (half) asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(both) : "r"(pair));
    else asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(both) : "r"(pair));
    return both;
}

// two numbers in the dtype of x
__device__ __forceinline__ u32 two_rounded(float low, float high) {
#if BF16
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return two_halves(low, high);
#endif
}

__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }

#endif

// a 16-bit number of the dtype of x
__device__ __forceinline__ float widened(u32 bits) { return BF16 ? as_float(bits << 16) : from_half(bits); }
__device__ __forceinline__ u32 rounded(float value) { return two_rounded(value, 0.0f) & 0xffff; }

// of the codes that half a word holds, those that a mantissa of ROOM bits takes unshifted
template <int ROOM>
__device__ __forceinline__ constexpr int direct() { return ROOM == 10 && BITS == 2 ? 4 : ROOM / BITS; }

// where the pair of codes `pair` of a record (4 a slab) lies in half a word, once shifted into a mantissa
template <int ROOM>
__device__ __forceinline__ constexpr int position(int pair) {
    return (BITS == 3 ? (pair % 16 == 15 ? 0 : pair % 16 % FIELDS) : pair % FIELDS) % direct<ROOM>() * BITS;
}

// that pair, alone in its word; words of two outputs alternate
template <int ROOM>
__device__ __forceinline__ u32 codes_of(const u32* words, int pair, int output) {
    if (BITS == 3 && pair % 16 == 15) {  // the bits that five codes leave over in three words
        const u32* unit = words + 6 * (pair / 16) + output;
        return (unit[0] >> 15 & 0x10001) | (unit[2] >> 14 & 0x20002) | (unit[4] >> 13 & 0x40004);
    }
    int field = (BITS == 3 ? pair % 16 : pair) % FIELDS;
    int word = BITS == 3 ? pair / 16 * 3 + pair % 16 / FIELDS : pair / FIELDS;
    u32 bits = words[2 * word + output] >> field / direct<ROOM>() * direct<ROOM>() * BITS;
    return bits & ((1u << BITS) - 1) * 0x10001 << position<ROOM>(pair);
}

// zeros of a group, of outputs g and g + 8, as integers in the halves of a word; `zeros`: the lane's
__device__ __forceinline__ u32 zeros_of(const u32* zeros, int group) {
    constexpr u32 mask = ZERO_BITS > 8 ? 255 : (1u << ZERO_BITS) - 1;
    int at = group * ZERO_BITS;
    return zeros[at / 16] >> at % 16 & mask * 0x10001;
}

// a pair of a whole number that a mantissa and its hidden bit hold, in the arithmetic of decoding
__device__ __forceinline__ constexpr u32 pair_of(int number) {
    int exponent = 0;
    while (number >> exponent > 1) exponent++;
    return number ? ((exponent + BIAS << MANTISSA) + (number << MANTISSA - exponent) % (1 << MANTISSA)) * 0x10001u : 0;
}

// what a lane needs of a group to decode it, of outputs g and g + 8 side by side
struct Grid {
    u32 scale, rest;               // s; where arithmetic is bf16, s rounded, and what that leaves over
    u32 shift[direct<MANTISSA>()];  // -(2^(MANTISSA - p) + z) for a code at position p = i * BITS
};

// `first`: FIRST. An argument of kernels, since the compiler would load a constant again and again
__device__ __forceinline__ Grid grid_of(const char* record, int lane, int group, u32 first) {
    Grid grid;
    grid.scale = ((const u32*)(record + CODES))[lane / 4 * GROUPS + group];
    if (SHORT) {
        float low = from_half(grid.scale & 0xffff), high = from_half(grid.scale >> 16);
        grid.scale = two_rounded(low, high);
        grid.rest = two_rounded(low - widened(grid.scale & 0xffff), high - widened(grid.scale >> 16));
    }
    u32 zero = (1u << (BITS - 1)) * 0x10001;
    if (ZERO) zero = zeros_of((const u32*)(record + CODES + SCALES) + lane / 4 * ZERO_WORDS, group);
    const u32 minus_one = FIRST - MANTISSA * (0x10001 << MANTISSA) | 0x80008000;
#pragma unroll
    for (int i = 0; i < direct<MANTISSA>(); i++)
        grid.shift[i] = fma_pairs(zero | first, minus_one, pair_of((1 << MANTISSA) - (1 << MANTISSA - i * BITS)));
    return grid;
}

// a pair of weights in the dtype of x: s (Q - z), rounded once. Of s, 11 bits long, bf16 holds 8; a code of 4 bits
// times the other 3 is exact, so that it is added to the product with the 8 before that is rounded
__device__ __forceinline__ u32 weights_of(const u32* words, int pair, int output, const Grid& grid, u32 first) {
    const int p = position<MANTISSA>(pair);
    const u32 power = FIRST - (MANTISSA + p) * (0x10001 << MANTISSA), minus_zero = 0x80008000;
    u32 codes = codes_of<MANTISSA>(words, pair, output) | first;
    u32 steps = fma_pairs(codes, power, twice(grid.shift[p / BITS], output));
    u32 rest = SHORT ? fma_pairs(steps, twice(grid.rest, output), minus_zero) : minus_zero;
    if (SHORT || !BF16) return fma_pairs(steps, twice(grid.scale, output), rest);
    const float scale = from_half(output ? grid.scale >> 16 : grid.scale & 0xffff);
    return two_rounded(scale * from_half(steps & 0xffff), scale * from_half(steps >> 16));
}

// 16 bytes into a row of y that has `width` numbers, as far as it goes
__device__ __forceinline__ void write(u16* row, int at, int width, uint4 v) {
    if (at >= width) return;
    if (width % 8 == 0) {
        *(uint4*)(row + at) = v;
        return;
    }
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (at + i < width) row[at + i] = (u16)(pairs[i / 2] >> i % 2 * 16);
}
