// Runs the kernels of src/planish/kernels/*.cu on a CPU, so that they can be tested without a GPU.
//
// Each CUDA thread is a coroutine. It runs until it meets the others of its warp (mma, shuffles, __syncwarp) or of its
// block (__syncthreads), and goes on when all are there; if they meet in different places, or never, that is an error.
// Shared memory starts as NaN. What is fetched arrives either at once or as late as a wait allows, since a GPU may do
// either. The first warp, or the last, gets as far ahead of the others as it may. Fetches are held against the bounds
// of what they read. The blocks of a cluster run together. emulate_*.cpp say how a kernel's own functions are done.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(size) alignas(size)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y; };
static Index threadIdx, blockIdx, gridDim;

static int min(int a, int b) { return a < b ? a : b; }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static void atomicMax(unsigned* at, unsigned value) { *at = max(*at, value); }

namespace emulator {

struct Group { int size, arrived = 0, kind = 0; long met = 0; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    std::function<bool()> ready;  // what it waits for
};

static ucontext_t scheduler;
static std::vector<Thread> threads;  // of a cluster
static std::vector<Group> warps, workers, blocks;  // workers: 128 threads of a block
static Group cluster;
static int current, threads_of_block;
static bool early, backwards;
static std::vector<std::pair<const char*, const char*>> allowed;  // what may be fetched
static float numbers[256][32][12];  // what the lanes of a warp bring to a meeting
static unsigned words[256][32][8];
static std::deque<std::function<void()>> copies;  // under way

static void fail(const char* what) {
    fprintf(stderr, "cuda emulator: %s (block %d, thread %d)\n", what, blockIdx.x, current);
    abort();
}

static void wait_until(std::function<bool()> ready) {
    const int me = current;
    if (ready()) return;
    threads[me].ready = ready;
    swapcontext(&threads[me].context, &scheduler);
    threads[me].ready = nullptr;
}

static void meet(Group& group, int kind) {
    if (group.arrived && group.kind != kind) fail("threads meet in different places");
    group.kind = kind;
    const long until = group.met + 1;
    if (++group.arrived == group.size) {
        group.arrived = 0;
        group.met++;
    }
    wait_until([&group, until] { return group.met >= until; });
}

static void start(std::function<void()> copy) {
    if (early) copy();
    else copies.push_back(copy);
}

static void finish_one() {
    auto copy = backwards ? copies.back() : copies.front();
    if (backwards) copies.pop_back();
    else copies.pop_front();
    copy();
}

static Group& warp() { return warps[current / 32]; }
static unsigned (&lane_words())[8] { return words[current / 32][current % 32]; }
static float (&lane_numbers())[12] { return numbers[current / 32][current % 32]; }
static int rank() { return current / threads_of_block; }

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

static float bfloat_value(unsigned bits) {
    float value;
    bits <<= 16;
    memcpy(&value, &bits, 4);
    return value;
}

static unsigned bfloat_bits(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static unsigned fma_of(bool bf16, unsigned a, unsigned b, unsigned c) {
    auto value = bf16 ? bfloat_value : half_value;
    const float sum = (float)((double)value(a & 0xffff) * value(b & 0xffff) + value(c & 0xffff));
    return bf16 ? bfloat_bits(sum) : half_bits(sum);
}

alignas(1024) static char memories[8][256 * 1024];  // shared memory of a cluster's blocks

static void check_bounds(const void* from, int bytes) {
    for (auto [start, end] : allowed)
        if ((const char*)from >= start && (const char*)from + bytes <= end) return;
    fail("a fetch out of bounds");
}

}  // namespace emulator

static void __syncwarp() { emulator::meet(emulator::warp(), 1); }
static void __syncthreads() { emulator::meet(emulator::blocks[emulator::rank()], 2); }
static char* shared_memory() { return emulator::memories[emulator::rank()]; }
static unsigned shared_address(const void* at) { return (const char*)at - shared_memory(); }
static void wait_for_inputs() {}

static float as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float from_half(unsigned low) { return emulator::half_value(low); }
static unsigned two_halves(float low, float high) { return emulator::half_bits(low) | emulator::half_bits(high) << 16; }
static unsigned two_rounded(float low, float high) {
    return BF16 ? emulator::bfloat_bits(low) | emulator::bfloat_bits(high) << 16 : two_halves(low, high);
}

static unsigned twice(unsigned pair, int half) { return (half ? pair >> 16 : pair & 0xffff) * 0x10001; }
static unsigned fma_pairs(unsigned a, unsigned b, unsigned c) {
    const bool bf16 = BF16 && BITS <= 4;
    return emulator::fma_of(bf16, a, b, c) | emulator::fma_of(bf16, a >> 16, b >> 16, c >> 16) << 16;
}

static float shuffle(float value, int mask) {
    emulator::lane_numbers()[0] = value;
    emulator::meet(emulator::warp(), 7);
    value = emulator::numbers[emulator::current / 32][emulator::current % 32 ^ mask][0];
    emulator::meet(emulator::warp(), 8);
    return value;
}

static void meet_cluster() { emulator::meet(emulator::cluster, 9); }

static float remote(const float* at, int rank) {
    return *(const float*)(emulator::memories[rank] + ((const char*)at - shared_memory()));
}

namespace emulator {

static std::function<void()> body;

static void enter() {
    body();
    threads[current].done = true;
    swapcontext(&threads[current].context, &scheduler);
}

static void run_cluster(int first, int size, int count) {
    memset(memories, 0xff, sizeof memories);
    threads_of_block = count;
    threads = std::vector<Thread>(size * count);
    warps.assign(size * count / 32, {32});
    workers.assign(size * count / 128 + 1, {128});
    blocks.assign(size, {count});
    cluster = {size * count};
    for (auto& thread : threads) {
        thread.stack.resize(64 << 10);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, enter, 0);
    }
    for (int i = 0; i < size * count; i++) {  // always the first that can run: its warp gets as far ahead as it may
        current = backwards ? size * count - 1 - i : i;
        Thread& thread = threads[current];
        const bool can_run = !thread.done && !(thread.ready && !thread.ready());
        if (can_run) {
            threadIdx = {current % count, 0};
            blockIdx.x = first + current / count;
            swapcontext(&scheduler, &thread.context);
            i = -1;
        } else if (i == size * count - 1 && !copies.empty()) {
            finish_one();
            i = -1;
        }
    }
    for (auto& thread : threads) if (!thread.done) fail("threads wait for others that never come");
}

static void run(int across, int down, int count, int size = 1) {
    gridDim = {across, down};
    for (blockIdx.y = 0; blockIdx.y < down; blockIdx.y++)
        for (int first = 0; first < across; first += size) run_cluster(first, size, count);
}

}  // namespace emulator
