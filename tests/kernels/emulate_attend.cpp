// The function of cuda_attend.cu that a GPU has an instruction for, and a way to call the kernel.

#include "cuda_emulator.h"

static void prefetch(const void* from) { emulator::check_bounds(from, 16); }

#include KERNEL

extern "C" void run_attend(
    const u16* q, const u16* k, const u16* v, u16* keys, u16* values, const long long* filled, u16* out, float* states,
    float scale, int shared_by, int length, int parts, int rows, bool backwards) {
    emulator::early = true, emulator::backwards = backwards;
    const long size = (long)rows * length * DIM;
    emulator::allowed = {{(const char*)keys, (const char*)(keys + size)},
                         {(const char*)values, (const char*)(values + size)}};
    const int places = rows * (shared_by / HEADS);
    emulator::body = [=] { attend(q, k, v, keys, values, filled, out, states, scale, shared_by, length, parts); };
    emulator::run(places * parts, 1, 32 * WARPS, CLUSTER ? parts : 1);
    if (parts == 1 || CLUSTER) return;
    emulator::body = [=] { join(states, out, parts); };
    emulator::run(places, 1, 128);
}
