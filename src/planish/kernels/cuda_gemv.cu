// One to sixteen rows of activations times a packed weight, as fast as the memory gives the weight.
//
//     y[m, n] = sum_g s[n, g] * (sum_{k in g} x[m, k] Q[n, k] - z[n, g] * sum_{k in g} x[m, k]) + b[n]
//
// A warp takes a record (kernels/gemv_layout.py): 16 outputs by 256 inputs, read once through a ring in shared
// memory that is filled ahead. A pair of codes becomes a pair of fp16 numbers by one AND: bits at position p of a
// half with a zero exponent are the number Q * 2^(p - 24), exactly. x is brought to fp16 by a power of two for
// each row, which loses nothing, and divided by 2^p; each block does that for itself, or `bring` once for all. So
// tensor cores multiply codes by x, and sum in fp32. Scale and zero enter once a group. The warps of a team share a
// strip's inputs, and blocks may share them too; their sums are added in a fixed order, the latter's by `combine`, or by
// those of a cluster for each other.
//
// Compiled as cuda_records.cu says, which comes before this, and for COLUMNS (1, 8, 16: the most rows of x), WARPS and
// TEAMS of a block, STAGES of the ring, BLOCKS on a multiprocessor, TALL (tiles of a strip, which a warp takes at
// once), APART (1: x comes from `bring`), CLUSTER (1: blocks that share a strip are one). Knows nothing of torch, and
// includes nothing.

constexpr int THREADS = 32 * WARPS, MEMBERS = WARPS / TEAMS, HEIGHT = TALL * TILE;  // a strip's outputs
constexpr int PITCH = HEIGHT + 4;                           // numbers from a column's sums to the next, in other banks
constexpr int MMAS = COLUMNS > 8 ? 2 : 1;                   // of 8 columns each
constexpr int CHAINS = TALL * MMAS > 2 ? 1 : 2;             // sums of a group, so that an mma waits for few others
constexpr float UNIT = 1.0f / 16777216.0f;                  // what a 1 in the last place of a half is worth: 2^-24

#ifndef EMULATED  // the tests compile this for a CPU, with these functions of their own

__device__ __forceinline__ void fetch(void* shared, const void* global) {
    u32 at = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(global) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// d [16, 8] = a [16, 16] b [16, 8] + c
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ u32 warp_max(u32 value) { return __reduce_max_sync(0xffffffffu, value); }

#endif

// adds what a group gives a tile; dot: sums of codes times x; sum: of x over the group
__device__ __forceinline__ void close_group(
    const char* record, int group, const float (&dot)[MMAS][CHAINS][4], const float* sum, int lane,
    float (&total)[MMAS][4]) {
    const u32 pair = ((const u32*)(record + CODES) + lane / 4 * GROUPS)[group];
    const float scale[2] = {from_half(pair & 0xffff), from_half(pair >> 16)};
    float zero[2] = {(1 << (BITS - 1)) * UNIT, (1 << (BITS - 1)) * UNIT};
    if (ZERO) {
        const u32 both = zeros_of((const u32*)(record + CODES + SCALES) + lane / 4 * ZERO_WORDS, group);
        zero[0] = from_half(both & 0xffff), zero[1] = from_half(both >> 16);  // Q's unit
    }
#pragma unroll
    for (int n = 0; n < MMAS; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (COLUMNS == 1 && i % 2) continue;  // all columns are the same
            const float x = sum[COLUMNS == 1 ? 0 : 8 * n + lane % 4 * 2 + i % 2];
            const float both = CHAINS == 2 ? dot[n][0][i] + dot[n][CHAINS - 1][i] : dot[n][0][i];
            total[n][i] += scale[i / 2] * (both - zero[i / 2] * x);
        }
    }
}

// adds what a strip's records of a step give; x: the lane's columns of its inputs; sums: of x over its groups
__device__ __forceinline__ void multiply(
    const char* record, const char* const (&x)[MMAS], const float* sums, int lane, float (&total)[TALL][MMAS][4]) {
    u32 words[TALL][4 * BITS];
#pragma unroll
    for (int i = 0; i < TALL * BITS; i++) {
        uint4 part = *(const uint4*)(record + i / BITS * RECORD + 512 * (i % BITS) + 16 * lane);
        u32* to = words[i / BITS] + 4 * (i % BITS);
        to[0] = part.x, to[1] = part.y, to[2] = part.z, to[3] = part.w;
    }
    float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float dot[TALL][MMAS][CHAINS][4];
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        uint4 column[MMAS];
#pragma unroll
        for (int n = 0; n < MMAS; n++) column[n] = *(const uint4*)(x[n] + 64 * slab);
#pragma unroll
        for (int r = 0; r < TALL; r++) {
            u32 low[4], high[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                low[i] = codes_of<10>(words[r], 4 * slab + i / 2, i % 2);
                high[i] = codes_of<10>(words[r], 4 * slab + 2 + i / 2, i % 2);
            }
            const bool fresh = slab * 32 % GROUP == 0;
#pragma unroll
            for (int n = 0; n < MMAS; n++) {
                mma(dot[r][n][0], low, column[n].x, column[n].y, fresh ? none : dot[r][n][0]);
                float(&other)[4] = dot[r][n][CHAINS - 1];
                mma(other, high, column[n].z, column[n].w, fresh && CHAINS == 2 ? none : other);
            }
        }
        const int group = slab * 32 / GROUP;
        if ((slab + 1) * 32 % GROUP != 0) continue;
#pragma unroll
        for (int r = 0; r < TALL; r++)
            close_group(record + r * RECORD, group, dot[r], sums + group * COLUMNS, lane, total[r]);
    }
}

// eight neighbouring inputs of row m, zeros past the end
__device__ __forceinline__ uint4 octet(const u16* x, int m, int k, int in_features) {
    const u16* at = x + (long long)m * in_features + k;
    u32 pairs[4] = {0, 0, 0, 0};
    if (in_features % 8 == 0 && (unsigned long long)x % 16 == 0) {
        if (k < in_features) return *(const uint4*)at;
    } else {
        for (int i = 0; i < 8; i++)
            if (k + i < in_features) pairs[i / 2] |= (u32)at[i] << i % 2 * 16;
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// 2 to the power that brings x of which the largest is `peak` below 2^15, or back and out of the unit of Q
__device__ __forceinline__ float power_for(u32 peak, bool back) {
    u32 exponent = BF16 ? peak >> 7 : (peak >> 10) + 112;  // as fp32 has it
    exponent = exponent < 15 ? 15 : exponent > 244 ? 244 : exponent;
    return as_float((back ? exponent + 10 : 268 - exponent) << 23);
}

__device__ __forceinline__ void swap(u32& a, u32& b) {
    u32 kept = a;
    a = b, b = kept;
}

__device__ __forceinline__ u32 peak_of(uint4 v) {
    u32 pairs[4] = {v.x, v.y, v.z, v.w}, peak = 0;
    for (int i = 0; i < 4; i++) peak = max(peak, max(pairs[i] & 0x7fff, pairs[i] >> 16 & 0x7fff));
    return warp_max(peak);
}

// A record's inputs of one row, an octet a lane, as fp16 at `to`, and their sums over groups, COLUMNS apart. Of a
// slab's four octets, lane t of a tensor core's operand wants pair t of each, side by side. Lanes write their pairs in
// different orders, so that those of a warp fall into different banks
__device__ __forceinline__ void convert(uint4 v, float power, char* to, float* sums, int lane) {
    const float share = power / (1 << position<10>(lane));
    const int turn = lane / 8;
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.0f;
    for (int i = 0; i < 4; i++) {
        float low = widened(pairs[i] & 0xffff), high = widened(pairs[i] >> 16);
        sum += low * power + high * power;
        pairs[i] = two_halves(low * share, high * share);
    }
    char* slab = to + lane / 4 * 64 + lane % 4 * 4;
    if (turn & 1) swap(pairs[0], pairs[1]), swap(pairs[2], pairs[3]);
    if (turn & 2) swap(pairs[0], pairs[2]), swap(pairs[1], pairs[3]);
    for (int i = 0; i < 4; i++) *(u32*)(slab + (i ^ turn) * 16) = pairs[i];
    for (int mask = 1; mask < GROUP / 8; mask *= 2) sum += shuffle(sum, mask);
    if (lane % (GROUP / 8) == 0) sums[lane / (GROUP / 8) * COLUMNS] = sum;
}

// x of a block's inputs as fp16 in shared memory, each row `stride` bytes, its sums over groups and largest values;
// first as it is, all of it on its way at once, then in place
__device__ void stage(
    const u16* x, char* staged, float* sums, u32* peaks, int stride, int rows, int in_features, int first, int width) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool whole = in_features % 8 == 0 && (unsigned long long)x % 16 == 0;
    for (int item = warp; item < rows * width; item += WARPS) {
        const int m = item / width, k = (first + item % width) * STEP + 8 * lane;
        char* to = staged + m * stride + item % width * 2 * STEP + 16 * lane;
        if (whole && k < in_features) fetch(to, x + (long long)m * in_features + k);
        else *(uint4*)to = octet(x, m, k, in_features);
    }
    commit();
    wait<0>();
    for (int item = warp; item < rows * width; item += WARPS) {
        u32 peak = peak_of(*(const uint4*)(staged + item / width * stride + item % width * 2 * STEP + 16 * lane));
        if (lane == 0) atomicMax(peaks + item / width, peak);
    }
    __syncthreads();
#pragma unroll 4
    for (int item = warp; item < rows * width; item += WARPS) {
        const int m = item / width, step = item % width;
        char* at = staged + m * stride + step * 2 * STEP;
        uint4 v = *(const uint4*)(at + 16 * lane);
        __syncwarp();  // all have read what is overwritten now
        convert(v, power_for(peaks[m], false), at, sums + step * GROUPS * COLUMNS + m, lane);
    }
}

// the same from what `bring` left
__device__ void take(
    const char* ready, char* staged, float* sums, u32* peaks, int stride, int rows, int steps, int first, int width) {
    const char* sums_from = ready + (long long)rows * steps * 2 * STEP;
    const u32* peaks_from = (const u32*)(sums_from + (long long)steps * GROUPS * COLUMNS * 4);
    for (int i = threadIdx.x; i < rows * width * 32; i += THREADS) {
        const int m = i / (width * 32), part = i % (width * 32) * 16;
        fetch(staged + m * stride + part, ready + ((long long)m * steps + first) * 2 * STEP + part);
    }
    for (int i = threadIdx.x; i < width * GROUPS * COLUMNS / 4; i += THREADS)
        fetch(sums + 4 * i, sums_from + (first * GROUPS * COLUMNS + 4 * i) * 4);
    if (threadIdx.x < rows) peaks[threadIdx.x] = peaks_from[threadIdx.x];
    commit();
    wait<0>();
}

// x [rows, in_features] as blocks want it, a block a row: fp16 [rows, steps, STEP], then fp32 sums
// [steps, GROUPS, COLUMNS], then the largest value of each row
extern "C" __global__ void __launch_bounds__(512) bring(
    const u16* x, char* ready, int rows, int in_features, int steps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = blockIdx.x;
    float* sums = (float*)(ready + (long long)rows * steps * 2 * STEP);
    u32* peaks = (u32*)(sums + steps * GROUPS * COLUMNS);
    u32* peak = (u32*)shared_memory();
    if (threadIdx.x == 0) *peak = 0;
    wait_for_inputs();
    __syncthreads();
#pragma unroll 4
    for (int step = warp; step < steps; step += 16) {
        u32 own = peak_of(octet(x, m, step * STEP + 8 * lane, in_features));
        if (lane == 0) atomicMax(peak, own);
    }
    __syncthreads();
    const float power = power_for(*peak, false);
#pragma unroll 4
    for (int step = warp; step < steps; step += 16) {
        uint4 v = octet(x, m, step * STEP + 8 * lane, in_features);
        convert(v, power, ready + ((long long)m * steps + step) * 2 * STEP, sums + step * GROUPS * COLUMNS + m, lane);
    }
    if (threadIdx.x == 0) peaks[m] = *peak;
}

// records: [tiles, steps, RECORD] bytes; x: [rows, in_features], or what `bring` made of it; y: [rows, out_features].
// Of `slices` neighbouring blocks each takes `width` steps of every tile; unless they are a cluster, sums: fp32 [slices,
// rows, out_features] takes their results
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemv(
    const char* records, const u16* x, const u16* bias, u16* y, float* sums_out, int rows, int in_features,
    int out_features, int tiles, int steps, int width, int slices) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp / MEMBERS, member = warp % MEMBERS;
    const int slice = blockIdx.x % slices, place = blockIdx.x / slices, across = gridDim.x / slices;
    const int first = slice * width, last = min(first + width, steps), strips = (tiles + TALL - 1) / TALL;
    const int stride = width * 2 * STEP + 64;  // rows of x lie in other banks
    char* ring = shared_memory() + warp * STAGES * TALL * RECORD;
    char* staged = shared_memory() + WARPS * STAGES * TALL * RECORD;
    float* sums = (float*)(staged + rows * stride);
    float* parts = sums + width * GROUPS * COLUMNS;  // of warps: [2, WARPS, COLUMNS, PITCH]
    u32* peaks = (u32*)(parts + 2 * WARPS * COLUMNS * PITCH);
    if (!APART && threadIdx.x < 16) peaks[threadIdx.x] = 0;

    int next_strip = place * TEAMS + team, next_step = first + member;
    auto fetch_next = [&](int slot) {
        if (next_strip < strips && next_step < last) {
            for (int r = 0; r < TALL; r++) {
                const int tile = next_strip * TALL + r;
                if (TALL > 1 && tile >= tiles) break;
                const char* from = records + ((long long)tile * steps + next_step) * RECORD + 16 * lane;
                char* to = ring + (slot * TALL + r) * RECORD + 16 * lane;
                for (int i = 0; i < BITS; i++) fetch(to + 512 * i, from + 512 * i);
                if (16 * lane < SCALES + ZEROS) fetch(to + CODES, from + CODES);
            }
            next_step += MEMBERS;
            if (next_step >= last) next_step = first + member, next_strip += across * TEAMS;
        }
        commit();
    };
    for (int slot = 0; slot < STAGES - 1; slot++) fetch_next(slot);
    wait_for_inputs();
    __syncthreads();
    if (APART) take((const char*)x, staged, sums, peaks, stride, rows, steps, first, last - first);
    else stage(x, staged, sums, peaks, stride, rows, in_features, first, last - first);
    __syncthreads();

    const char* columns[MMAS];
    for (int n = 0; n < MMAS; n++)
        columns[n] = staged + (COLUMNS == 1 ? 0 : min(8 * n + lane / 4, rows - 1)) * stride + lane % 4 * 16;
    int slot = 0, turn = 0;
    for (int strip = place * TEAMS; strip < strips; strip += across * TEAMS, turn ^= 1) {
        float total[TALL][MMAS][4] = {};
        for (int step = strip + team < strips ? first + member : last; step < last; step += MEMBERS) {
            wait<STAGES - 2>();
            __syncwarp();  // other lanes fetched the scales; and all have read what is overwritten now
            fetch_next(slot == 0 ? STAGES - 1 : slot - 1);
            const char* at[MMAS];
            for (int n = 0; n < MMAS; n++) at[n] = columns[n] + (step - first) * 2 * STEP;
            multiply(ring + slot * TALL * RECORD, at, sums + (step - first) * GROUPS * COLUMNS, lane, total);
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        float* own = parts + (turn * WARPS + warp) * COLUMNS * PITCH + lane / 4;
        for (int r = 0; r < TALL; r++)
            for (int n = 0; n < MMAS; n++)
                for (int i = 0; i < 4; i++) {
                    const int m = COLUMNS == 1 ? 0 : 8 * n + lane % 4 * 2 + i % 2;
                    if (COLUMNS > 1 || (lane % 4 == 0 && i % 2 == 0))  // blocks of a cluster may differ in peaks
                        own[m * PITCH + r * TILE + i / 2 * 8] = total[r][n][i] * power_for(peaks[m], true);
                }
        if (CLUSTER) meet_cluster();
        else __syncthreads();
        const int share = CLUSTER ? slice : 0, sharers = CLUSTER ? slices : 1;  // of what is added up
        for (int i = share * THREADS + threadIdx.x; i < TEAMS * HEIGHT * rows; i += sharers * THREADS) {
            const int m = i / (TEAMS * HEIGHT), output = i % (TEAMS * HEIGHT), n = strip * HEIGHT + output;
            if (n >= out_features) continue;
            const float* part =
                parts + ((turn * WARPS + output / HEIGHT * MEMBERS) * COLUMNS + m) * PITCH + output % HEIGHT;
            float value = 0.0f;
            for (int other = 0; other < sharers; other++)
                for (int w = 0; w < MEMBERS; w++) {
                    const float* at = part + w * COLUMNS * PITCH;
                    value += CLUSTER ? remote(at, other) : *at;
                }
            const long long at = (long long)m * out_features + n;
            if (!CLUSTER && slices > 1) sums_out[(long long)slice * rows * out_features + at] = value;
            else y[at] = rounded(value + (bias ? widened(bias[n]) : 0.0f));
        }
    }
    if (CLUSTER) meet_cluster();  // others may still read what this block has
    wait<0>();
}

// y [rows, out_features] = sum of sums [slices, rows, out_features] + b, four numbers a thread
extern "C" __global__ void __launch_bounds__(128) combine(
    const float* sums, const u16* bias, u16* y, int slices, int rows, int out_features) {
    wait_for_inputs();
    const int first = 4 * (blockIdx.x * 128 + threadIdx.x), size = rows * out_features;
    if (first >= size) return;
    const bool whole = size % 4 == 0;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int slice = 0; slice < slices; slice++) {
        const float* from = sums + (long long)slice * size + first;
        if (whole) {
            float4 four = *(const float4*)from;
            values[0] += four.x, values[1] += four.y, values[2] += four.z, values[3] += four.w;
        } else {
            for (int i = 0; i < 4 && first + i < size; i++) values[i] += from[i];
        }
    }
    for (int i = 0; i < 4 && first + i < size; i++)
        y[first + i] = rounded(values[i] + (bias ? widened(bias[(first + i) % out_features]) : 0.0f));
}
