// What products on Hopper's tensor cores (sm_90a) share: how a packed weight and activations come to them, how work is
// cut, and how results leave.
//
// A block computes OUTPUTS outputs for COLUMNS rows of x. One warp of a first warpgroup brings tiles of x through a
// tensor map, 128 bytes of each row at a time, another brings records (kernels/gemv_layout.py) of 256 inputs; each has
// a ring in shared memory. Two more warpgroups multiply: weights are made in registers and are the left operand of
// `wgmma`, which reads x from shared memory while the next weights are made. Where tiles are few, the SPLIT blocks of
// a cluster share a tile's inputs; each adds up, in a fixed order, its share of the rows in its shared memory.
//
// Comes after `wgmma` of COLUMNS, with the type of its sums, Sum, how assembly holds one, REGISTER, and INPUT_BYTES of
// an input, and after cuda_records.cu; before the text of a kernel, which says how weights are made (`multiply`) and
// what becomes of sums (a class Ends). Compiled for COLUMNS (8 divides it; at most 256), BLOCKS (of 64 outputs that a
// warpgroup has), SPLIT (1, 2, 4, 8), TILES and RECORDS (stages of the rings). Knows nothing of torch, and includes
// nothing.

constexpr int GROUP_THREADS = 128, WORKERS = 2, THREADS = GROUP_THREADS * (WORKERS + 1);
constexpr int OUTPUTS = 64 * BLOCKS * WORKERS, HELD = OUTPUTS / TILE;  // of a block; its records at a time
constexpr int CHUNK = 128 / INPUT_BYTES, CHUNKS = STEP / CHUNK, TILE_BYTES = COLUMNS * 128;
constexpr int SHARE = COLUMNS / SPLIT;                      // rows of x that a block of a cluster writes
constexpr int PIECE = SHARE < 32 ? SHARE : 32;              // rows that are written at a time
constexpr int STAGED = 64 * 2 + 16;                         // bytes of a row before it is written, in banks of its own
constexpr int RASTER = 2048 / COLUMNS;                      // tiles of rows that blocks side by side take

// of shared memory, from its start; what a cluster exchanges lies where the rings were
constexpr int RECORDS_AT = TILES * TILE_BYTES, RINGS = RECORDS_AT + RECORDS * HELD * RECORD;
constexpr int EXCHANGED = SPLIT > 1 ? OUTPUTS * COLUMNS * 4 : 0;
constexpr int STAGED_AT = RINGS > EXCHANGED ? RINGS : EXCHANGED;
constexpr int BARRIERS_AT = STAGED_AT + WORKERS * PIECE * STAGED;

#ifndef EMULATED

struct __align__(64) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// four sums into the shared memory of a block of the cluster, where `at` is in this one's
__device__ __forceinline__ void store_remote(void* at, int rank, const Sum (&v)[4]) {
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
                 "st.shared::cluster.v4.b32 [there], {%2, %3, %4, %5};}"
                 ::"r"(shared_address(at)), "r"(rank), REGISTER(v[0]), REGISTER(v[1]), REGISTER(v[2]), REGISTER(v[3])
                 : "memory");
}

__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barriers_are_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 phase) {
    asm volatile("{.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;}"
                 ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}

// COLUMNS rows and CHUNK inputs of x; what lies outside is zero
__device__ __forceinline__ void fetch_tile(void* to, const TensorMap& map, int input, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(&map), "r"(input), "r"(row), "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void fetch_record(void* to, const void* from, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "n"(RECORD), "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// two 8 x 8 matrices of 16-bit numbers, transposed; the lanes' `at`: eight rows of the first, eight of the second
__device__ __forceinline__ void store_transposed(void* at, u32 first, u32 second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                 ::"r"(shared_address(at)), "r"(first), "r"(second) : "memory");
}

__device__ __forceinline__ void worker_sync(int worker) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + worker), "n"(GROUP_THREADS) : "memory");
}

template <int COUNT>
__device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

#endif

// of wgmma's right operand: rows of 128 bytes, 16-byte parts swizzled over eight rows, the next eight 1024 bytes on
__device__ __forceinline__ u64 descriptor_of(u32 address) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (address & 0x3ffff) >> 4;
}

// a place in a ring, and how often the ring was gone round
template <int SLOTS>
struct Place {
    int slot = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
    __device__ __forceinline__ int before() const { return slot ? slot - 1 : SLOTS - 1; }
};

struct Barriers {  // a slot of a ring is full, or empty again
    u64 tile_full[TILES], tile_empty[TILES], record_full[RECORDS], record_empty[RECORDS];
};

struct Problem {
    int rows, in_features, out_features, tiles, steps;  // tiles and steps: of records
};

// a block's piece of y, and the steps that it takes
struct Work {
    int row, output, first, last;
};

__device__ __forceinline__ int pieces(const Problem& of) {
    return ((of.rows + COLUMNS - 1) / COLUMNS) * ((of.out_features + OUTPUTS - 1) / OUTPUTS);
}

// blocks side by side take some tiles of rows of a few tiles of outputs, so that both come from the L2 cache
__device__ __forceinline__ Work work_of(int piece, int rank, const Problem& of) {
    const int high = (of.rows + COLUMNS - 1) / COLUMNS, wide = (of.out_features + OUTPUTS - 1) / OUTPUTS;
    const int band = piece / (RASTER * wide), within = piece % (RASTER * wide);
    const int height = min(RASTER, high - band * RASTER);
    return {(band * RASTER + within % height) * COLUMNS, within / height * OUTPUTS,
            of.steps * rank / SPLIT, of.steps * (rank + 1) / SPLIT};
}

// pieces of this block, one after the other
#define EACH_PIECE(piece, of) for (int piece = blockIdx.x / SPLIT; piece < pieces(of); piece += gridDim.x / SPLIT)

__device__ void bring_tiles(const TensorMap& map, Barriers& barriers, const Problem& of, int rank) {
    Place<TILES> place;
    wait_for_inputs();
    EACH_PIECE(piece, of) {
        const Work work = work_of(piece, rank, of);
        for (int chunk = work.first * CHUNKS; chunk < work.last * CHUNKS; chunk++, place.next()) {
            wait(&barriers.tile_empty[place.slot], place.phase ^ 1);
            u64* full = &barriers.tile_full[place.slot];
            arrive_and_expect(full, TILE_BYTES);
            fetch_tile(shared_memory() + place.slot * TILE_BYTES, map, chunk * CHUNK, work.row, full);
        }
    }
}

__device__ void bring_records(const char* records, Barriers& barriers, const Problem& of, int rank) {
    Place<RECORDS> place;
    EACH_PIECE(piece, of) {
        const Work work = work_of(piece, rank, of);
        const int tile = work.output / TILE, count = min(HELD, of.tiles - tile);
        for (int step = work.first; step < work.last; step++, place.next()) {
            wait(&barriers.record_empty[place.slot], place.phase ^ 1);
            u64* full = &barriers.record_full[place.slot];
            arrive_and_expect(full, count * RECORD);
            char* to = shared_memory() + RECORDS_AT + place.slot * HELD * RECORD;
            for (int i = 0; i < count; i++)
                fetch_record(to + i * RECORD, records + ((long long)(tile + i) * of.steps + step) * RECORD, full);
        }
    }
}

// a worker's way through a piece
struct Worker {
    Place<TILES> tile;
    Place<RECORDS> record;
    int lane, warp;      // of the warpgroup: 0 to 3
    const char* own;     // the first of its records in the ring's first slot
    u32 first;           // FIRST
};

struct __align__(16) Four { Sum x, y, z, w; };

// adds the products of a step; `started`: products of a step before are under way. The kernel's own
__device__ __forceinline__ void multiply(Worker&, Barriers&, bool started, Sum (&)[BLOCKS][COLUMNS / 2]);

// adds those of 64 bytes of each row of x, which weights were made for
__device__ __forceinline__ void multiply_part(
    Worker& self, Barriers& barriers, int part, bool started, const u32 (&weights)[BLOCKS][2][4],
    Sum (&sum)[BLOCKS][COLUMNS / 2]) {
    if (part % 2 == 0) wait(&barriers.tile_full[self.tile.slot], self.tile.phase);
    u64 right = descriptor_of(shared_address(shared_memory() + self.tile.slot * TILE_BYTES + part % 2 * 64));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) wgmma(sum[block], weights[block][i], right + 2 * i);
    wgmma_commit();
    wgmma_wait<1>();  // those before these have read their weights, and x
    if (part % 2) self.tile.next();
    else if (self.lane == 0 && (part || started)) arrive(&barriers.tile_empty[self.tile.before()]);
}

// all lanes have read the records of a step
__device__ __forceinline__ void leave_records(Worker& self, Barriers& barriers) {
    __syncwarp();
    if (self.lane == 0) arrive(&barriers.record_empty[self.record.slot]);
    self.record.next();
}

// sums of the blocks of a cluster -> those of this block's share of the rows, added in the order of the blocks
__device__ __forceinline__ void exchange(
    const Sum (&sum)[BLOCKS][COLUMNS / 2], int rank, Sum (&share)[BLOCKS][SHARE / 2]) {
    constexpr int EACH = SHARE / 8, PARTS = BLOCKS * EACH;  // four numbers a thread
    const int thread = threadIdx.x - GROUP_THREADS;
    Four* held = (Four*)shared_memory() + thread;
    cluster_sync();  // all have read their rings for the last time
#pragma unroll
    for (int i = 0; i < BLOCKS * COLUMNS / 8; i++) {
        const int block = i / (COLUMNS / 8), eight = i % (COLUMNS / 8);
        const Sum* from = sum[block] + 4 * eight;
        const Sum four[4] = {from[0], from[1], from[2], from[3]};
        store_remote(held + (rank * PARTS + block * EACH + eight % EACH) * WORKERS * GROUP_THREADS, eight / EACH, four);
    }
    cluster_sync();
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        Sum* to = share[i / EACH] + i % EACH * 4;
        to[0] = to[1] = to[2] = to[3] = 0;
        for (int other = 0; other < SPLIT; other++) {
            const Four part = held[(other * PARTS + i) * WORKERS * GROUP_THREADS];
            to[0] += part.x, to[1] += part.y, to[2] += part.z, to[3] += part.w;
        }
    }
}

// a worker's 64 outputs of SHARE rows -> y, turned in shared memory so that rows are written in pieces of 128 bytes
template <class Ends>
__device__ __forceinline__ void write_block(
    const Sum (&share)[SHARE / 2], const Worker& self, int worker, u16* y, const Ends& ends, const Problem& of,
    int row, int output) {
    const int thread = threadIdx.x % GROUP_THREADS;
    const auto outputs = ends.outputs(output + self.warp * 16 + self.lane / 4, of);
    char* staged = shared_memory() + STAGED_AT + worker * PIECE * STAGED;
    char* turned = staged + self.lane % 8 * STAGED + self.warp * 32 + self.lane / 8 % 2 * 16;
#pragma unroll
    for (int first = 0; first < SHARE; first += PIECE) {
        worker_sync(worker);  // what was staged before is written
#pragma unroll
        for (int i = 0; i < PIECE / 8; i++) {
            u32 pairs[2];
            ends.finish(share + first / 2 + 4 * i, outputs, row + first + 8 * i + self.lane % 4 * 2, of, pairs);
            store_transposed(turned + 8 * i * STAGED, pairs[0], pairs[1]);
        }
        worker_sync(worker);
        for (int i = thread; i < PIECE * 8; i += GROUP_THREADS) {
            const int m = row + first + i / 8, n = output + i % 8 * 8;
            const uint4 v = *(const uint4*)(staged + i / 8 * STAGED + i % 8 * 16);
            if (m < of.rows) write(y + (long long)m * of.out_features, n, of.out_features, v);
        }
    }
}

template <class Ends>
__device__ __forceinline__ void work(
    Barriers& barriers, u16* y, const Ends& ends, const Problem& of, int rank, u32 first) {
    const int worker = threadIdx.x / GROUP_THREADS - 1;
    Worker self;
    self.lane = threadIdx.x % 32, self.warp = threadIdx.x % GROUP_THREADS / 32;
    self.own = shared_memory() + RECORDS_AT + (worker * BLOCKS * 4 + self.warp) * RECORD;
    self.first = first;
    wait_for_inputs();  // what is written may be read by kernels ahead
    EACH_PIECE(piece, of) {
        const Work work = work_of(piece, rank, of);
        Sum sum[BLOCKS][COLUMNS / 2];
#pragma unroll
        for (int i = 0; i < BLOCKS * COLUMNS / 2; i++) sum[i / (COLUMNS / 2)][i % (COLUMNS / 2)] = 0;
        for (int step = work.first; step < work.last; step++) multiply(self, barriers, step > work.first, sum);
        wgmma_wait<0>();
        if (self.lane == 0 && work.first < work.last) arrive(&barriers.tile_empty[self.tile.before()]);
        const int output = work.output + worker * BLOCKS * 64;
#if SPLIT > 1
        Sum share[BLOCKS][SHARE / 2];
        exchange(sum, rank, share);
#else
        auto& share = sum;
#endif
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            write_block(share[block], self, worker, y, ends, of, work.row + rank * SHARE, output + block * 64);
    }
}

// map: of x [rows, in_features]; records: [tiles, steps, RECORD] bytes; y: [rows, out_features]; `first`: FIRST. Blocks
// are at most SPLIT times the pieces, and exactly so many where SPLIT isn't 1
template <class Ends>
__device__ __forceinline__ void product(
    const TensorMap& map, const char* records, u16* y, const Ends& ends, const Problem& of, u32 first) {
    Barriers& barriers = *(Barriers*)(shared_memory() + BARRIERS_AT);
    const int rank = SPLIT > 1 ? rank_in_cluster() : 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < TILES; i++)
            init_barrier(&barriers.tile_full[i], 1), init_barrier(&barriers.tile_empty[i], WORKERS * 4);
        for (int i = 0; i < RECORDS; i++)
            init_barrier(&barriers.record_full[i], 1), init_barrier(&barriers.record_empty[i], WORKERS * 4);
        barriers_are_ready();
    }
    __syncthreads();
    if (threadIdx.x < GROUP_THREADS) {
        fewer_registers<40>();
        if (threadIdx.x == 0) bring_tiles(map, barriers, of, rank);
        if (threadIdx.x == 32) bring_records(records, barriers, of, rank);
        __syncwarp();
        if (SPLIT > 1) cluster_sync(), cluster_sync();  // as in `exchange`
    } else {
        more_registers<232>();
        work(barriers, y, ends, of, rank, first);
    }
}
