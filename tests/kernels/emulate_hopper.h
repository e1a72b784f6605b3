// The functions of cuda_hopper.cu that a GPU has instructions for. Comes after the types Input, of x, and Sum.
//
// A product of `wgmma` is computed at once or when it is waited for: what it reads of shared memory must last so long.
// Shared memory holds what a tensor map's copy and the operand's descriptor say, swizzled by the address.

struct alignas(64) TensorMap { const Input* x; long rows, width; };

namespace emulator {

struct Barrier { int arrivals, missing; long bytes; unsigned phase; };
constexpr int EACH = 4 / sizeof(Input);  // numbers of a word

struct Product { Sum* d; unsigned a[4]; unsigned long long b; };

static std::map<void*, Barrier> barriers;
static std::map<int, std::deque<std::vector<Product>>> products;  // of threads: committed, and one that is open
static Product at_hand[4096];
static const char* rows_of_warp[128][32];

static void settle(Barrier& barrier) {
    if (barrier.missing < 0) fail("a barrier has too many arrivals");
    if (barrier.missing == 0 && barrier.bytes == 0) barrier.missing = barrier.arrivals, barrier.phase ^= 1;
}

static void complete(void* barrier, long bytes) {
    barriers[barrier].bytes -= bytes;
    settle(barriers[barrier]);
}

static unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

// row k, column n of the right operand
static float right_of(unsigned long long b, int k, int n) {
    const unsigned start = (b & 0x3fff) << 4, stride = (b >> 32 & 0x3fff) << 4;
    if (b >> 62 != 1 || (b >> 46 & 0xffff) || (b >> 14 & 3) || (b >> 30 & 3)) fail("a descriptor of another layout");
    Input number;
    const unsigned at = start + n / 8 * stride + n % 8 * 128 + sizeof number * k;
    memcpy(&number, memories[rank()] + swizzled(at), sizeof number);
    return value_of(number);
}

static void compute(const Product& product) {
    at_hand[current] = product;
    meet(warp(), 20);
    const int lane = current % 32;
    const Product* lanes = at_hand + current / 32 * 32;
    std::vector<Sum> sums;
    for (int i = 0; i < COLUMNS / 2; i++) {
        const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double sum = product.d[i];
        for (int k = 0; k < 8 * EACH; k++) {
            const Product& other = lanes[row % 8 * 4 + k % (4 * EACH) / EACH];
            if (other.b != product.b) fail("lanes multiply by different operands");
            const Input left = other.a[row / 8 + k / (4 * EACH) * 2] >> k % EACH * (32 / EACH);
            sum += (double)value_of(left) * right_of(product.b, k, column);
        }
        sums.push_back((Sum)sum);
    }
    meet(warp(), 21);
    for (int i = 0; i < COLUMNS / 2; i++) product.d[i] = sums[i];
}

static std::deque<std::vector<Product>>& own_products() {
    auto& own = products[current];
    if (own.empty()) own.emplace_back();
    return own;
}

}  // namespace emulator

static unsigned rank_in_cluster() { return emulator::rank(); }
static void cluster_sync() { emulator::meet(emulator::cluster, 10); }
static void worker_sync(int) { emulator::meet(emulator::workers[emulator::current / 128], 11); }
static void barriers_are_ready() {}
static void wgmma_fence() {}
static void wgmma_commit() { emulator::own_products().emplace_back(); }
template <int> static void more_registers() {}
template <int> static void fewer_registers() {}

static void store_remote(void* at, int rank, const Sum (&v)[4]) {
    memcpy(emulator::memories[rank] + shared_address(at), v, 16);
}

static void init_barrier(unsigned long long* barrier, int arrivals) {
    emulator::barriers[barrier] = {arrivals, arrivals, 0, 0};
}

static void arrive(unsigned long long* barrier) {
    emulator::barriers[barrier].missing--;
    emulator::settle(emulator::barriers[barrier]);
}

static void arrive_and_expect(unsigned long long* barrier, int bytes) {
    emulator::barriers[barrier].bytes += bytes;
    arrive(barrier);
}

static void wait(unsigned long long* barrier, unsigned phase) {
    emulator::wait_until([=] { return emulator::barriers[barrier].phase != phase; });
}

template <int LEFT>
static void wgmma_wait() {
    auto& own = emulator::own_products();
    while ((int)own.size() - 1 > LEFT) {
        for (auto& product : own.front()) emulator::compute(product);
        own.pop_front();
    }
}

static void wgmma(Sum (&d)[COLUMNS / 2], const unsigned (&a)[4], unsigned long long b) {
    emulator::Product product = {d, {a[0], a[1], a[2], a[3]}, b};
    if (emulator::early) emulator::compute(product);
    else emulator::own_products().back().push_back(product);
}

static void fetch_tile(void* to, const TensorMap& map, int input, int row, unsigned long long* barrier) {
    char* memory = shared_memory();
    const unsigned at = shared_address(to);
    if (at % 1024) emulator::fail("a tile that isn't aligned");
    emulator::start([=] {
        for (int r = 0; r < COLUMNS; r++)
            for (int i = 0; i < 128 / (int)sizeof(Input); i++) {
                const bool inside = row + r < map.rows && input + i < map.width;
                const Input v = inside ? map.x[(row + r) * map.width + input + i] : 0;
                memcpy(memory + emulator::swizzled(at + 128 * r + sizeof v * i), &v, sizeof v);
            }
        emulator::complete(barrier, COLUMNS * 128);
    });
}

static void fetch_bytes(void* to, const void* from, int bytes, unsigned long long* barrier) {
    emulator::check_bounds(from, bytes);
    if ((size_t)to % 16 || (size_t)from % 16 || bytes % 16) emulator::fail("a fetch that isn't aligned");
    emulator::start([=] {
        memcpy(to, from, bytes);
        emulator::complete(barrier, bytes);
    });
}

#define fetch_record(to, from, barrier) fetch_bytes(to, from, RECORD, barrier)

static void store_transposed(void* at, unsigned first, unsigned second) {
    auto& rows = emulator::rows_of_warp[emulator::current / 32];
    const int lane = emulator::current % 32;
    rows[lane] = (const char*)at;
    emulator::meet(emulator::warp(), 12);
    for (int i = 0; i < 4; i++) {
        const unsigned short v = (i / 2 ? second : first) >> i % 2 * 16;
        memcpy((char*)rows[i / 2 * 8 + lane % 4 * 2 + i % 2] + lane / 4 * 2, &v, 2);
    }
    emulator::meet(emulator::warp(), 13);
}
