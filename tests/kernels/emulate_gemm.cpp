// A way to call the kernel of cuda_gemm.cu.

#include "cuda_emulator.h"

typedef unsigned short Input;
typedef float Sum;

namespace emulator {

static float value_of(unsigned bits) {
    static std::vector<float> values;
    if (values.empty())
        for (unsigned i = 0; i < 65536; i++) values.push_back(BF16 ? bfloat_value(i) : half_value(i));
    return values[bits & 0xffff];
}

}  // namespace emulator

#include "emulate_hopper.h"

#include KERNEL

extern "C" unsigned long long run_descriptor(unsigned address) { return descriptor_of(address); }

extern "C" void run_gemm(
    const u16* x, const char* records, const u16* bias, u16* y, int rows, int in_features, int out_features, int tiles,
    int steps, u32 first, int grid, bool early, bool backwards) {
    const TensorMap map = {x, rows, in_features};
    emulator::early = early, emulator::backwards = backwards;
    emulator::allowed = {{records, records + (long)tiles * steps * RECORD}};
    emulator::body = [=] { gemm(map, records, bias, y, rows, in_features, out_features, tiles, steps, first); };
    emulator::run(grid, 1, THREADS, SPLIT);
}
