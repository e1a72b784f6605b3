// A way to call the kernel of cuda_dequantize.cu, which needs no functions of its own.

#include "cuda_emulator.h"
#include KERNEL

extern "C" void run_dequantize(
    const char* records, u16* y, int in_features, int out_features, int tiles, int steps, u32 first) {
    emulator::body = [=] { dequantize(records, y, in_features, out_features, tiles, steps, first); };
    emulator::run((tiles * steps + WARPS - 1) / WARPS, 1, 32 * WARPS);
}
