// Many rows of activations times a packed weight, on Hopper's tensor cores (sm_90a), as fast as those multiply.
//
//     y[m, n] = sum_k x[m, k] W_hat[n, k] + b[n],   W_hat = s (Q - z) rounded once to the dtype of x
//
// Weights are decoded in registers: a lane's codes are its fragment of the left operand of `wgmma`.
//
// Compiled as cuda_hopper.cu says, which comes before this, and which says how the rest is done. Knows nothing of
// torch, and includes nothing.

// 16-byte parts of codes that so many chunks of a record need
__device__ __forceinline__ constexpr int parts_of(int chunks) { return (chunks * BITS + 3) / 4; }

__device__ __forceinline__ void read_codes(const char* record, int lane, int chunk, u32 (&words)[4 * BITS]) {
#pragma unroll
    for (int i = parts_of(chunk); i < parts_of(chunk + 1); i++) {
        uint4 part = *(const uint4*)(record + 512 * i + 16 * lane);
        words[4 * i] = part.x, words[4 * i + 1] = part.y, words[4 * i + 2] = part.z, words[4 * i + 3] = part.w;
    }
}

__device__ __forceinline__ void multiply(
    Worker& self, Barriers& barriers, bool started, Sum (&sum)[BLOCKS][COLUMNS / 2]) {
    u32 words[BLOCKS][4 * BITS], fragment[2][BLOCKS][2][4];
    Grid grid[BLOCKS];
    const char* records = self.own + self.record.slot * HELD * RECORD;
    wait(&barriers.record_full[self.record.slot], self.record.phase);
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            const char* record = records + block * 4 * RECORD;
            if (slab % 2 == 0) read_codes(record, self.lane, slab / 2, words[block]);
            if (slab * 32 % GROUP == 0) grid[block] = grid_of(record, self.lane, slab * 32 / GROUP, self.first);
#pragma unroll
            for (int i = 0; i < 8; i++)
                fragment[slab % 2][block][i / 4][i % 4] =
                    weights_of(words[block], 4 * slab + i / 2, i % 2, grid[block], self.first);
        }
        multiply_part(self, barriers, slab, started, fragment[slab % 2], sum);
    }
    leave_records(self, barriers);
}

struct Ends {
    const u16* bias;
    struct Outputs { float low, high; };

    // what a lane adds to its outputs, `own` and the eighth after it
    __device__ __forceinline__ Outputs outputs(int own, const Problem& of) const {
        return {bias && own < of.out_features ? widened(bias[own]) : 0.0f,
                bias && own + 8 < of.out_features ? widened(bias[own + 8]) : 0.0f};
    }

    // sums of two rows by those outputs -> pairs of numbers as they are written
    __device__ __forceinline__ void finish(
        const Sum* v, const Outputs& to, int row, const Problem& of, u32 (&pairs)[2]) const {
        pairs[0] = two_rounded(v[0] + to.low, v[1] + to.low), pairs[1] = two_rounded(v[2] + to.high, v[3] + to.high);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm(
    const __grid_constant__ TensorMap map, const char* records, const u16* bias, u16* y, int rows, int in_features,
    int out_features, int tiles, int steps, u32 first) {
    product(map, records, y, Ends{bias}, {rows, in_features, out_features, tiles, steps}, first);
}
