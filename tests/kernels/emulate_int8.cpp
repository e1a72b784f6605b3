// A way to call the kernel of cuda_int8.cu.

#include "cuda_emulator.h"

typedef signed char Input;
typedef int Sum;

namespace emulator {

static int value_of(Input number) { return number; }

}  // namespace emulator

#include "emulate_hopper.h"

static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }

#include KERNEL

extern "C" void run_int8(
    const signed char* codes, const char* records, const u16* bias, const Line* outputs, const Line* tokens, u16* y,
    int rows, int width, int in_features, int out_features, int tiles, int steps, int grid, bool early,
    bool backwards) {
    const TensorMap map = {codes, rows, width};
    emulator::early = early, emulator::backwards = backwards;
    emulator::allowed = {{records, records + (long)tiles * steps * RECORD}};
    emulator::body = [=] {
        int8(map, records, bias, outputs, tokens, y, rows, in_features, out_features, tiles, steps);
    };
    emulator::run(grid, 1, THREADS, SPLIT);
}
