// Attention of one query a row, as in a step of decoding, over what a static cache holds and the token that is new.
//
//     out[h] = sum_t softmax_t(scale q[h] . k[t]) v[t],   t = 0 .. filled
//
// The new token's k and v are put into the cache at `filled` on the way. A block takes HEADS query heads that share one
// of keys and values, and a part of the tokens; LANES threads take a token at a time, eight of its numbers each, and
// keep a running softmax in fp32. Those of a block are joined through shared memory, those of a head's blocks by their
// cluster, or by `join` where there is none; always in the same order. Only tokens that are there are read.
//
// Compiled as cuda_records.cu says, which comes before this (it decodes nothing here), and for DIM, HEADS, WARPS,
// CLUSTER (1: the blocks of a head are one). Knows nothing of torch, and includes nothing.

constexpr int LANES = DIM <= 64 ? 8 : DIM <= 128 ? 16 : 32;  // for a token; of 96 numbers, four have none
constexpr int WORKERS = 32 * WARPS / LANES;                  // tokens that a block takes at once
constexpr int AHEAD = 4;                                     // tokens that a worker reads before it needs them
constexpr int PREFETCHED = 16;                               // that it asks the L2 cache for
constexpr int STATE = DIM + 2;                               // of a head: sums, then the largest score, then the total
constexpr float LOWEST = -1e30f;                             // below any score

#ifndef EMULATED  // the tests compile this for a CPU, with this function of their own

__device__ __forceinline__ void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

#endif

__device__ __forceinline__ void widen(uint4 v, float (&to)[8]) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = widened(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff);
}

// a running softmax: sums of p v, the largest score, the total of p
struct Softmax {
    float sum[8], most, total;

    __device__ __forceinline__ void lift(float score) {
        const float top = score > most ? score : most, power = exp2f(most - top);
        most = top, total *= power;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] *= power;
    }

    // joins lanes that have the same numbers of other tokens
    __device__ __forceinline__ void exchange(int mask) {
        const float other = shuffle(most, mask), top = other > most ? other : most;
        lift(top);
        total += shuffle(total, mask);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += shuffle(sum[i], mask);
    }
};

// joins the states of heads that `read(part, place)` gives, for every so many of their numbers; write(number, sum, most,
// total) takes them
template <class Read, class Write>
__device__ __forceinline__ void join_parts(int parts, int first, int every, Read read, Write write) {
    for (int i = first; i < HEADS * DIM; i += every) {
        const int state = i / DIM * STATE;
        float most = LOWEST, total = 0.0f, sum = 0.0f;
        for (int part = 0; part < parts; part++) {
            const float own = read(part, state + DIM);
            most = own > most ? own : most;
        }
        for (int part = 0; part < parts; part++) {
            const float power = exp2f(read(part, state + DIM) - most);
            sum += power * read(part, state + i % DIM), total += power * read(part, state + DIM + 1);
        }
        write(i, sum, most, total);
    }
}

// q: [batch, heads, DIM]; k, v: [batch, kv_heads, DIM], of the new token; keys, values: [batch, kv_heads, length, DIM];
// filled: tokens in them, which the new one isn't; out: [batch, heads, DIM]. Of `parts` neighbouring blocks each takes
// its share of the tokens; unless they are a cluster, states: fp32 [blocks, HEADS, STATE] takes what they found
extern "C" __global__ void __launch_bounds__(32 * WARPS) attend(
    const u16* q, const u16* k, const u16* v, u16* keys, u16* values, const long long* filled, u16* out, float* states,
    float scale, int shared_by, int length, int parts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = lane % LANES * 8;
    const int part = blockIdx.x % parts, place = blockIdx.x / parts, sharers = shared_by / HEADS;
    const int row = place / sharers;  // of batch and kv_heads
    const int first_head = row * shared_by + place % sharers * HEADS;
    u16* const own_keys = keys + (long long)row * length * DIM;
    u16* const own_values = values + (long long)row * length * DIM;
    const bool some = at < DIM;  // numbers are this lane's

    // What was written by the kernel ahead may not be read yet, and `filled` may be an older one: it only decides what
    // comes nearer
    int known = min((int)*filled + 1, length), width = (known + parts - 1) / parts;
    for (int i = 0; i < PREFETCHED; i++) {
        const int token = part * width + i * WORKERS + threadIdx.x / LANES;
        if (token >= known || token >= (part + 1) * width || !some || at % 16) break;
        prefetch(own_keys + (long long)token * DIM + at);
        prefetch(own_values + (long long)token * DIM + at);
    }
    wait_for_inputs();

    const int newest = min((int)*filled, length - 1);
    width = (newest + parts) / parts;
    const int first = part * width, last = min(first + width, newest + 1);
    float query[HEADS][8];
    Softmax found[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const u16* from = q + (long long)(first_head + h) * DIM + at;
        widen(some ? *(const uint4*)from : uint4{0, 0, 0, 0}, query[h]);
        found[h].most = LOWEST, found[h].total = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) query[h][i] *= scale, found[h].sum[i] = 0.0f;
    }
    for (int base = first + warp * (32 / LANES); base < last; base += AHEAD * WORKERS) {  // alike in a warp's lanes
        uint4 key[AHEAD], value[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int token = base + i * WORKERS + lane / LANES;
            const long long place_of = (long long)token * DIM + at, place_of_new = (long long)row * DIM + at;
            key[i] = value[i] = uint4{0, 0, 0, 0};
            if (token < last && some) {
                const bool fresh = token == newest;
                key[i] = *(const uint4*)(fresh ? k + place_of_new : own_keys + place_of);
                value[i] = *(const uint4*)(fresh ? v + place_of_new : own_values + place_of);
                if (fresh && place % sharers == 0) {
                    *(uint4*)(own_keys + place_of) = key[i];
                    *(uint4*)(own_values + place_of) = value[i];
                }
            }
        }
        float score[HEADS][AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float wide[8];
            widen(key[i], wide);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float dot = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; j++) dot += query[h][j] * wide[j];
#pragma unroll
                for (int mask = 1; mask < LANES; mask *= 2) dot += shuffle(dot, mask);
                score[h][i] = dot;
            }
        }
        const int left = (last - base - lane / LANES + WORKERS - 1) / WORKERS;  // tokens of these that are there
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float top = LOWEST;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) top = i < left && score[h][i] > top ? score[h][i] : top;
            found[h].lift(top);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) score[h][i] = i < left ? exp2f(score[h][i] - found[h].most) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float wide[8];
            widen(value[i], wide);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                found[h].total += score[h][i];
#pragma unroll
                for (int j = 0; j < 8; j++) found[h].sum[j] += score[h][i] * wide[j];
            }
        }
    }

    float* warps = (float*)shared_memory();       // [WARPS, HEADS, STATE]
    float* own = warps + WARPS * HEADS * STATE;   // [HEADS, STATE], of the block
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int mask = LANES; mask < 32; mask *= 2) found[h].exchange(mask);
        float* to = warps + (warp * HEADS + h) * STATE;
        if (lane < LANES && some) {
#pragma unroll
            for (int i = 0; i < 8; i++) to[at + i] = found[h].sum[i];
            if (lane == 0) to[DIM] = found[h].most, to[DIM + 1] = found[h].total;
        }
    }
    __syncthreads();
    if (!CLUSTER && parts > 1) own = states + (long long)blockIdx.x * HEADS * STATE;
    u16* const result = out + (long long)first_head * DIM;
    join_parts(WARPS, threadIdx.x, 32 * WARPS,
        [&](int one, int i) { return warps[one * HEADS * STATE + i]; },
        [&](int i, float sum, float most, float total) {
            if (parts == 1) {
                result[i] = (u16)rounded(sum / total);
                return;
            }
            float* to = own + i / DIM * STATE;
            to[i % DIM] = sum;
            if (i % DIM == 0) to[DIM] = most, to[DIM + 1] = total;
        });
    if (!CLUSTER) return;
    meet_cluster();
    join_parts(parts, part * 32 * WARPS + threadIdx.x, parts * 32 * WARPS,
        [&](int one, int i) { return remote(own + i, one); },
        [&](int i, float sum, float, float total) { result[i] = (u16)rounded(sum / total); });
    meet_cluster();  // others may still read what this block has
}

// out of states [places, parts, HEADS, STATE], a block a place
extern "C" __global__ void __launch_bounds__(128) join(const float* states, u16* out, int parts) {
    wait_for_inputs();
    const float* own = states + (long long)blockIdx.x * parts * HEADS * STATE;
    u16* const result = out + (long long)blockIdx.x * HEADS * DIM;
    join_parts(parts, threadIdx.x, 128,
        [&](int one, int i) { return own[one * HEADS * STATE + i]; },
        [&](int i, float sum, float, float total) { result[i] = (u16)rounded(sum / total); });
}
