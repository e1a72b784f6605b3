// Runs src/planish/kernels/cuda_gemv.cu on a CPU, so that it can be tested without a GPU.
//
// Each CUDA thread is a coroutine. It runs until it meets the others of its warp (mma, shuffles, __syncwarp) or of its
// block (__syncthreads), and goes on when all are there; if they meet in different places, or never, that is an error.
// Shared memory starts as NaN. What is fetched arrives either at once or as late as a wait allows, since a GPU may do
// either. The first warp, or the last, gets as far ahead of the others as it may. Fetches are held against the bounds
// of what they read.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y; };
static Index threadIdx, blockIdx, gridDim;

static int min(int a, int b) { return a < b ? a : b; }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static void atomicMax(unsigned* at, unsigned value) { *at = max(*at, value); }

namespace emulator {

struct Group { int size, arrived = 0, kind = 0; long met = 0; };
struct Copy { void* to; const void* from; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> copies;  // committed groups, and one that is open
    bool done = false;
    Group* waits = nullptr;
    long until = 0;
};

static ucontext_t scheduler;
static std::vector<Thread> threads;
static std::vector<Group> warps;
static Group block;
static int current;
static bool early, backwards;
static std::vector<std::pair<const char*, const char*>> allowed;  // what may be fetched
static float numbers[64][32][12];  // what the lanes of a warp bring to a meeting
static unsigned words[64][32][8];

static void fail(const char* what) {
    fprintf(stderr, "cuda emulator: %s (block %d, thread %d)\n", what, blockIdx.x, current);
    abort();
}

static void meet(Group& group, int kind) {
    Thread& self = threads[current];
    if (group.arrived && group.kind != kind) fail("threads meet in different places");
    group.kind = kind;
    self.until = group.met + 1;
    if (++group.arrived == group.size) {
        group.arrived = 0;
        group.met++;
        return;
    }
    self.waits = &group;
    const int me = current;
    swapcontext(&self.context, &scheduler);
    threads[me].waits = nullptr;
}

static Group& warp() { return warps[current / 32]; }
static unsigned (&lane_words())[8] { return words[current / 32][current % 32]; }
static float (&lane_numbers())[12] { return numbers[current / 32][current % 32]; }

static float half_value(unsigned bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    return bits >> 15 & 1 ? -size : size;
}

static unsigned half_bits(float value) {
    float size = std::fabs(value);
    unsigned sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < std::ldexp(1.0f, -14)) return sign | (unsigned)std::nearbyint(std::ldexp(size, 24));
    int exponent = std::ilogb(size);
    return sign | (((exponent + 15) << 10) + (unsigned)std::nearbyint(std::ldexp(size, 10 - exponent)) - 1024);
}

}  // namespace emulator

static void __syncwarp() { emulator::meet(emulator::warp(), 1); }
static void __syncthreads() { emulator::meet(emulator::block, 2); }

static void copy_now(emulator::Copy copy) { memcpy(copy.to, copy.from, 16); }

static void fetch(void* to, const void* from) {
    bool inside = false;
    for (auto [start, end] : emulator::allowed) inside |= (const char*)from >= start && (const char*)from + 16 <= end;
    if (!inside) emulator::fail("a fetch out of bounds");
    if ((size_t)to % 16 || (size_t)from % 16) emulator::fail("a fetch that isn't aligned");
    if (emulator::early) copy_now({to, from});
    else emulator::threads[emulator::current].copies.back().push_back({to, from});
}

static void commit() { emulator::threads[emulator::current].copies.emplace_back(); }

template <int LEFT>
static void wait() {
    auto& copies = emulator::threads[emulator::current].copies;
    while ((int)copies.size() - 1 > LEFT) {
        for (auto copy : copies.front()) copy_now(copy);
        copies.erase(copies.begin());
    }
}

static void wait_for_inputs() {}

static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
    auto& own = emulator::lane_words();
    unsigned given[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int i = 0; i < 6; i++) own[i] = given[i];
    emulator::meet(emulator::warp(), 3);
    auto& lanes = emulator::words[emulator::current / 32];
    const int lane = emulator::current % 32;
    float result[4];
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; k++) {  // k 0..7 lie in the first two registers of a, and in b0
            const auto& left = lanes[row * 4 + k % 8 / 2];
            const auto& right = lanes[column * 4 + k % 8 / 2];
            const unsigned pair = left[i / 2 + k / 8 * 2], other = right[4 + k / 8];
            sum += (double)emulator::half_value(pair >> k % 2 * 16 & 0xffff) *
                   emulator::half_value(other >> k % 2 * 16 & 0xffff);
        }
        result[i] = (float)sum;
    }
    emulator::meet(emulator::warp(), 4);  // all have read
    for (int i = 0; i < 4; i++) d[i] = result[i];
}

static unsigned warp_max(unsigned value) {
    emulator::lane_words()[0] = value;
    emulator::meet(emulator::warp(), 5);
    for (auto& lane : emulator::words[emulator::current / 32]) value = max(value, lane[0]);
    emulator::meet(emulator::warp(), 6);
    return value;
}

static float shuffle(float value, int mask) {
    emulator::lane_numbers()[0] = value;
    emulator::meet(emulator::warp(), 7);
    value = emulator::numbers[emulator::current / 32][emulator::current % 32 ^ mask][0];
    emulator::meet(emulator::warp(), 8);
    return value;
}

static float as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float from_half(unsigned low) { return emulator::half_value(low); }
static unsigned two_halves(float low, float high) { return emulator::half_bits(low) | emulator::half_bits(high) << 16; }

static unsigned rounded(float value) {
    if (!BF16) return emulator::half_bits(value);
    unsigned bits;
    memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#include KERNEL

uint4 shared[256 * 1024 / 16];

namespace emulator {

static void (*body)();

static void enter() {
    body();
    threads[current].done = true;
    swapcontext(&threads[current].context, &scheduler);
}

static void run_block(int count) {
    memset(shared, 0xff, sizeof shared);
    threads = std::vector<Thread>(count);
    warps.assign(count / 32, {32});
    block = {count};
    for (auto& thread : threads) {
        thread.stack.resize(64 << 10);
        thread.copies.resize(1);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, enter, 0);
    }
    for (int i = 0; i < count; i++) {  // always the first thread that can run: its warp gets as far ahead as it may
        current = backwards ? count - 1 - i : i;
        Thread& thread = threads[current];
        if (thread.done || (thread.waits && thread.waits->met < thread.until)) continue;
        threadIdx = {current, 0};
        swapcontext(&scheduler, &thread.context);
        i = -1;
    }
    for (auto& thread : threads) if (!thread.done) fail("threads wait for others that never come");
}

static void run(int across, int down, int count) {
    gridDim = {across, down};
    for (blockIdx.y = 0; blockIdx.y < down; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < across; blockIdx.x++) run_block(count);
}

static const char* records;
static const u16 *x, *bias;
static u16* y;
static float* sums;
static int rows, in_features, out_features, tiles, steps, width, slices;

}  // namespace emulator

extern "C" void run_gemv(
    const char* records, const u16* x, const u16* bias, u16* y, float* sums, int rows, int in_features,
    int out_features, int tiles, int steps, int width, int across, int down, bool early, bool backwards) {
    using namespace emulator;
    emulator::records = records, emulator::x = x, emulator::bias = bias, emulator::y = y, emulator::sums = sums;
    emulator::rows = rows, emulator::in_features = in_features, emulator::out_features = out_features;
    emulator::tiles = tiles, emulator::steps = steps, emulator::width = width, emulator::slices = down;
    emulator::early = early, emulator::backwards = backwards;
    std::vector<char> ready(rows * steps * 2 * STEP + 4 * steps * GROUPS * COLUMNS + 4 * rows, (char)0xff);
    allowed = {{records, records + (long)tiles * steps * RECORD},
               {(const char*)x, (const char*)(x + rows * in_features)},
               {ready.data(), ready.data() + ready.size()}};
    if (APART) {
        emulator::y = (u16*)ready.data();
        body = [] { bring(emulator::x, (char*)emulator::y, emulator::rows, emulator::in_features, emulator::steps); };
        run(rows, 1, 512);
        emulator::x = (const u16*)ready.data(), emulator::y = y;
    }
    body = [] {
        using namespace emulator;
        gemv(emulator::records, emulator::x, emulator::bias, emulator::y, emulator::sums, emulator::rows,
             emulator::in_features, emulator::out_features, emulator::tiles, emulator::steps, emulator::width);
    };
    run(across, down, THREADS);
    if (down == 1) return;
    body = [] {
        using namespace emulator;
        combine(emulator::sums, emulator::bias, emulator::y, slices, emulator::rows, emulator::out_features);
    };
    run((rows * out_features + 511) / 512, 1, 128);
}
