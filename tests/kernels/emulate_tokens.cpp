// The functions of cuda_tokens.cu that a GPU has instructions for, and a way to call the kernel.

#include "cuda_emulator.h"

static int max(int a, int b) { return a > b ? a : b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

static int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static unsigned __byte_perm(unsigned a, unsigned b, unsigned chosen) {
    const unsigned long long bytes = a | (unsigned long long)b << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (chosen >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

static int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}

static unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
    emulator::lane_words()[0] = value;
    emulator::meet(emulator::warp(), 5);
    const unsigned other = emulator::words[emulator::current / 32][emulator::current % 32 ^ mask][0];
    emulator::meet(emulator::warp(), 6);
    return other;
}

static unsigned one_of(unsigned a, unsigned b, bool larger) {
    auto value = [](unsigned bits) { return BF16 ? emulator::bfloat_value(bits) : emulator::half_value(bits); };
    if (std::isnan(value(a)) || std::isnan(value(b))) return 0x7fff;
    return value(a) < value(b) == larger ? b : a;
}

static unsigned larger(unsigned a, unsigned b) {
    return one_of(a & 0xffff, b & 0xffff, true) | one_of(a >> 16, b >> 16, true) << 16;
}

static unsigned smaller(unsigned a, unsigned b) {
    return one_of(a & 0xffff, b & 0xffff, false) | one_of(a >> 16, b >> 16, false) << 16;
}

#include KERNEL

extern "C" void run_tokens(
    const u16* x, char* codes, uint4* lines, int rows, int width, int padded, int bits, int symmetric) {
    emulator::body = [=] { tokens(x, codes, lines, width, padded, bits, symmetric); };
    emulator::run(rows, 1, THREADS);
}
