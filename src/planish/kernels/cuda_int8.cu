// Tokens of at most 8 bits times a packed weight of 4 or 8, on Hopper's integer tensor cores (sm_90a).
//
//     y[m, n] = s[m] s[n] sum_k (u[m, k] - t[m]) (w[n, k] - d[n]) + b[n]
//             = s[m] s[n] (sum_k u w - d[n] sum_k (u[m, k] - t[m]) - t[m] sum_k w[n, k]) + b[n]
//
// u are the codes of tokens (cuda_tokens.cu), w those of the weight less half their range, t and d zeros; all are whole
// numbers of a byte, and so sums are exact. A lane's codes are its fragment of the left operand of `wgmma` as they lie:
// tokens come with each 16 (or 32, for a weight of 4 bits) inputs in the order that makes it so. A code of 4 bits is
// taken in the upper half of a byte, 16 times itself.
//
// Compiled as cuda_hopper.cu says, which comes before this, and which says how the rest is done. Knows nothing of
// torch, and includes nothing.

static_assert(BITS == 4 || BITS == 8, "codes that whole bytes are made of");
constexpr int TIMES = BITS == 4 ? 16 : 1;  // w, of itself

struct __align__(16) Line { float scale; int zero, sum, none; };  // what there is to know of an output or of a token

// 64 inputs of a record
__device__ __forceinline__ void read_weights(const char* record, int lane, int part, u32 (&fragment)[2][4]) {
    const u32 middle = 0x80808080, upper = 0xf0f0f0f0;
    const uint4* codes = (const uint4*)record + lane;
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) {
        const uint4 v = codes[32 * (part * BITS / 4 + i)];
        if (BITS == 8) {
            fragment[i][0] = v.x ^ middle, fragment[i][1] = v.y ^ middle;
            fragment[i][2] = v.z ^ middle, fragment[i][3] = v.w ^ middle;
        } else {
            fragment[0][0] = v.x << 4 & upper ^ middle, fragment[0][1] = v.y << 4 & upper ^ middle;
            fragment[0][2] = v.x & upper ^ middle, fragment[0][3] = v.y & upper ^ middle;
            fragment[1][0] = v.z << 4 & upper ^ middle, fragment[1][1] = v.w << 4 & upper ^ middle;
            fragment[1][2] = v.z & upper ^ middle, fragment[1][3] = v.w & upper ^ middle;
        }
    }
}

__device__ __forceinline__ void multiply(
    Worker& self, Barriers& barriers, bool started, Sum (&sum)[BLOCKS][COLUMNS / 2]) {
    u32 fragment[2][BLOCKS][2][4];
    const char* records = self.own + self.record.slot * HELD * RECORD;
    wait(&barriers.record_full[self.record.slot], self.record.phase);
#pragma unroll
    for (int part = 0; part < STEP / 64; part++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            read_weights(records + block * 4 * RECORD, self.lane, part, fragment[part % 2][block]);
        multiply_part(self, barriers, part, started, fragment[part % 2], sum);
    }
    leave_records(self, barriers);
}

struct Ends {
    const u16* bias;
    const Line *outputs_of, *tokens;
    struct Outputs { float scale[2], bias[2]; int zero[2], sum[2]; };

    // what becomes of a lane's outputs, `own` and the eighth after it
    __device__ __forceinline__ Outputs outputs(int own, const Problem& of) const {
        Outputs to;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int n = own + 8 * i;
            const Line line = n < of.out_features ? outputs_of[n] : Line{0.0f, 0, 0, 0};
            to.scale[i] = line.scale / TIMES, to.zero[i] = line.zero * TIMES, to.sum[i] = line.sum * TIMES;
            to.bias[i] = bias && n < of.out_features ? widened(bias[n]) : 0.0f;
        }
        return to;
    }

    // sums of two tokens by those outputs -> pairs of numbers as they are written. Every step is rounded by itself, as
    // in the definition
    __device__ __forceinline__ void finish(
        const Sum* v, const Outputs& to, int token, const Problem& of, u32 (&pairs)[2]) const {
        float value[2][2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const Line line = token + j < of.rows ? tokens[token + j] : Line{0.0f, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int sum = v[2 * i + j] - to.zero[i] * line.sum - line.zero * to.sum[i];
                value[i][j] = __fadd_rn(__fmul_rn(__fmul_rn((float)sum, line.scale), to.scale[i]), to.bias[i]);
            }
        }
        pairs[0] = two_rounded(value[0][0], value[0][1]), pairs[1] = two_rounded(value[1][0], value[1][1]);
    }
};

// map: of the tokens' codes; outputs: [out_features]; tokens: [rows]
extern "C" __global__ void __launch_bounds__(THREADS, 1) int8(
    const __grid_constant__ TensorMap map, const char* records, const u16* bias, const Line* outputs,
    const Line* tokens, u16* y, int rows, int in_features, int out_features, int tiles, int steps) {
    product(map, records, y, Ends{bias, outputs, tokens}, {rows, in_features, out_features, tiles, steps}, 0);
}
