// The functions of cuda_gemv.cu that a GPU has instructions for, and a way to call the kernel.

#include "cuda_emulator.h"

struct Copy { void* to; const void* from; };
static std::map<int, std::deque<std::vector<Copy>>> groups;  // of threads: committed, and one that is open

static void copy_now(Copy copy) { memcpy(copy.to, copy.from, 16); }

static std::deque<std::vector<Copy>>& own_groups() {
    auto& own = groups[emulator::current];
    if (own.empty()) own.emplace_back();
    return own;
}

static void fetch(void* to, const void* from) {
    emulator::check_bounds(from, 16);
    if ((size_t)to % 16 || (size_t)from % 16) emulator::fail("a fetch that isn't aligned");
    if (emulator::early) copy_now({to, from});
    else own_groups().back().push_back({to, from});
}

static void commit() { own_groups().emplace_back(); }

template <int LEFT>
static void wait() {
    auto& copies = own_groups();
    while ((int)copies.size() - 1 > LEFT) {
        for (auto copy : copies.front()) copy_now(copy);
        copies.pop_front();
    }
}

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

#include KERNEL

extern "C" void run_gemv(
    const char* records, const u16* x, const u16* bias, u16* y, float* sums, int rows, int in_features,
    int out_features, int tiles, int steps, int width, int across, int down, bool early, bool backwards) {
    emulator::early = early, emulator::backwards = backwards;
    std::vector<char> ready(rows * steps * 2 * STEP + 4 * steps * GROUPS * COLUMNS + 4 * rows, (char)0xff);
    emulator::allowed = {{records, records + (long)tiles * steps * RECORD},
                         {(const char*)x, (const char*)(x + rows * in_features)},
                         {ready.data(), ready.data() + ready.size()}};
    if (APART) {
        emulator::body = [=, to = ready.data()] { bring(x, to, rows, in_features, steps); };
        emulator::run(rows, 1, 512);
        x = (const u16*)ready.data();
    }
    emulator::body = [=] {
        gemv(records, x, bias, y, sums, rows, in_features, out_features, tiles, steps, width, down);
    };
    emulator::run(across * down, 1, THREADS, CLUSTER ? down : 1);
    if (down == 1 || CLUSTER) return;
    emulator::body = [=] { combine(sums, bias, y, down, rows, out_features); };
    emulator::run((rows * out_features + 511) / 512, 1, 128);
}
