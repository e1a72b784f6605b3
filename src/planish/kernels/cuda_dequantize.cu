// A packed weight -> W_hat [out_features, in_features], as fast as the memory takes it.
//
//     W_hat = s (Q - z), rounded once to the dtype that BF16 says
//
// A warp decodes a record (kernels/gemv_layout.py), 16 outputs by 256 inputs, half of it at a time: a lane's pairs of
// weights are put together in shared memory, so that rows are written in pieces of 256 bytes.
//
// Compiled as cuda_records.cu says, which comes before this. Knows nothing of torch, and includes nothing.

constexpr int WARPS = 8, HALF = STEP / 2, ROW = HALF * 2 + 16;  // bytes of half a record's row, in banks of its own

// y: [out_features, in_features]; records: [tiles, steps, RECORD] bytes
extern "C" __global__ void __launch_bounds__(32 * WARPS) dequantize(
    const char* records, u16* y, int in_features, int out_features, int tiles, int steps,
    u32 first) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x * WARPS + warp;
    wait_for_inputs();
    if (number >= tiles * steps) return;
    const char* record = records + (long long)number * RECORD;
    char* staged = shared_memory() + warp * TILE * ROW;
    u32 words[4 * BITS];
#pragma unroll
    for (int i = 0; i < BITS; i++) {
        uint4 part = *(const uint4*)(record + 512 * i + 16 * lane);
        words[4 * i] = part.x, words[4 * i + 1] = part.y, words[4 * i + 2] = part.z, words[4 * i + 3] = part.w;
    }
    Grid grid;
#pragma unroll
    for (int pair = 0; pair < STEP / 8; pair++) {
        if (pair * 8 % GROUP == 0) grid = grid_of(record, lane, pair * 8 / GROUP, first);
        char* at = staged + lane / 4 * ROW + pair * 8 % HALF * 2 + lane % 4 * 4;
        *(u32*)at = weights_of(words, pair, 0, grid, first);
        *(u32*)(at + 8 * ROW) = weights_of(words, pair, 1, grid, first);
        if ((pair + 1) * 8 % HALF != 0) continue;
        __syncwarp();
        const int input = number % steps * STEP + pair * 8 / HALF * HALF + lane % 16 * 8;
#pragma unroll
        for (int row = lane / 16; row < TILE; row += 2) {
            const int output = number / steps * TILE + row;
            const uint4 v = *(const uint4*)(staged + row * ROW + lane % 16 * 16);
            if (output < out_features) write(y + (long long)output * in_features, input, in_features, v);
        }
        __syncwarp();  // all have read what is overwritten now
    }
}
