#include "tests/host/block.h"

namespace fastnn::cuda {
namespace host {
namespace {

#ifdef FASTNN_THREADS
#define FASTNN_GUARD(x) const std::lock_guard<std::mutex> guard((x).mutex)
#else
#define FASTNN_GUARD(x)
#endif

// Shared memory does not begin at address 0, nor where tiles may begin.
constexpr uint32_t kSharedBase = 1024 + 128;

CountingBarrier& find(Block& block, const uint64_t* place) {
  for (CountingBarrier& b : block.counting) {
    if (b.place == place) return b;
  }
  block.fail("a barrier that nobody made");
  return block.counting.emplace_back();
}
CountingBarrier& find(const uint64_t* place) { return find(*block_now, place); }

// What lies in another block of the cluster where this lies in the calling thread's.
template <class P>
P* in_block(const Block& block, P* place) {
  auto* mine = reinterpret_cast<const unsigned char*>(place);
  return reinterpret_cast<P*>(block.shared + (mine - block_now->shared));
}

void end_phase_if_complete(CountingBarrier& b) {
  if (b.left != 0 || b.bytes != 0) return;
  ++b.phase;
  b.left = b.arrivals;
}

void arrive_with(CountingBarrier& b, int bytes) {
  FASTNN_GUARD(b);
  if (b.left == 0) block_now->fail("more arrivals at a barrier than it counts");
  b.bytes += bytes;
  --b.left;
  end_phase_if_complete(b);
}

unsigned char* at(const Block& block, uint32_t address) { return block.shared + (address - kSharedBase); }
unsigned char* at(uint32_t address) { return at(*block_now, address); }
// Where what would lie at an address lies instead.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

float number(bool is_bf16, uint16_t bits) {
  return is_bf16 ? __uint_as_float(uint32_t{bits} << 16) : from_f16(bits);
}

struct Descriptor {
  uint32_t address, across, down;
  explicit Descriptor(uint64_t bits)
      : address(static_cast<uint32_t>(bits & 0x3fff) << 4),
        across(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        down(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) block_now->fail("an operand of another layout");
  }
  // The element of a row (or column) and a depth of a tile [row][depth] or [depth][row].
  uint16_t element(bool depth_inside, int row, int depth) const {
    return depth_inside ? load(row / 8 * down + row % 8 * kPartPitch + 2 * depth)
                        : load(row / 64 * across + depth / 8 * down + depth % 8 * kPartPitch + row % 64 * 2);
  }

 private:
  uint16_t load(uint32_t offset) const {
    const uint32_t place = swizzled(address + offset);
    if (block_now->hidden[place - kSharedBase])
      block_now->fail("an operand that was not shown to the tensor cores");
    uint16_t bits;
    std::memcpy(&bits, at(place), 2);
    return bits;
  }
};

void compute(const PendingProduct& p) {
  constexpr int kDepth = 16;
  const int g = lane_id() / 4, t = lane_id() % 4, warp = static_cast<int>(threadIdx.x) / kWarp % 4;
  float a[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < kDepth; ++k) {
      uint16_t bits;
      if (p.a_in_registers) {
        bits = static_cast<uint16_t>(p.a[k % 8 / 2][half + k / 8 * 2] >> k % 2 * 16);
      } else {
        bits = Descriptor(p.a_tile).element(p.a_depth_inside, 16 * warp + g + 8 * half, k);
      }
      a[half][k] = number(p.is_bf16, bits);
    }
  }
  const Descriptor b(p.b_tile);
  for (int column = 0; column < p.columns; ++column) {
    if (column % 8 / 2 != t) continue;
    float* d = p.d + column / 8 * 4 + column % 2;
    if (!p.accumulate) d[0] = d[2] = 0;
    for (int k = 0; k < kDepth; ++k) {
      const float y = number(p.is_bf16, b.element(p.b_depth_inside, column, k));
      d[0] += a[0][k] * y;
      d[2] += a[1][k] * y;
    }
  }
  if (p.a_in_registers && std::memcmp(p.a_now, p.a[t], sizeof p.a[t]) != 0) {
    block_now->fail("an operand's registers changed while its product was under way");
  }
}

}  // namespace

void start_product(PendingProduct product) {
  Thread& t = block_now->threads[thread_now];
  if (!t.may_multiply) block_now->fail("a product without begin_products()");
  t.products.emplace_back(t.product_group, product);
}

}  // namespace host

const char* make_tensor_map(TensorMap* to, const MappedTensor& t) {
  bool right = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.tile_rows > 0 && t.tile_rows <= 256;
  for (const int64_t size : t.sizes) right &= size > 0 && size <= int64_t{1} << 32;
  for (const int64_t stride : t.strides) right &= stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39;
  if (!right) return "the driver refused a tensor's map";
  to->tensor = t;
  return nullptr;
}

uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - host::block_now->shared) +
         host::kSharedBase;
}

void make_barrier(uint64_t* barrier, int arrivals) {
  auto& b = host::block_now->counting.emplace_back();
  b.place = barrier;
  b.arrivals = b.left = arrivals;
}
namespace {
void arrive_and_let_others(host::CountingBarrier& b) {
  host::arrive_with(b, 0);
#ifndef FASTNN_THREADS
  // All others go on first, with what they take to be free now; or else this thread, as far as it gets.
  if (host::copies_arrive_at_once) return;
  host::wait_until([first = true]() mutable { return !std::exchange(first, false); });
#endif
}
}  // namespace
void arrive(uint64_t* barrier) { arrive_and_let_others(host::find(barrier)); }
void arrive_and_expect(uint64_t* barrier, int bytes) { host::arrive_with(host::find(barrier), bytes); }
void arrive_at(uint64_t* barrier, int block) {
  host::Block& other = *host::block_now->cluster[static_cast<size_t>(block)];
  arrive_and_let_others(host::find(other, host::in_block(other, barrier)));
}
int block_of_cluster() { return static_cast<int>(host::block_now->rank); }

void wait(uint64_t* barrier, int parity) {
  host::CountingBarrier& b = host::find(barrier);
  host::wait_until([&b, parity] {
    FASTNN_GUARD(b);
    for (const auto& copy : b.copies) copy();
    b.copies.clear();
    host::end_phase_if_complete(b);
    return static_cast<int>(b.phase % 2) != parity;
  });
}

void show_to_tensor_cores() {
  host::Thread& t = host::block_now->threads[host::thread_now];
  for (const auto& [place, bytes] : t.hidden) std::memset(host::block_now->hidden.data() + place, 0, bytes);
  t.hidden.clear();
}

namespace {
void announce(host::NumberedBarrier& b, int threads) {
  FASTNN_GUARD(b);
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.phase;
  }
}
void meet(host::NumberedBarrier& b, int threads) {
  unsigned phase;
  {
    FASTNN_GUARD(b);
    phase = b.phase;
  }
  announce(b, threads);
  host::wait_until([&b, phase] {
    FASTNN_GUARD(b);
    return b.phase != phase;
  });
}
}  // namespace
void announce(int number, int threads) { announce(host::block_now->numbered[number], threads); }
void meet(int number, int threads) { meet(host::block_now->numbered[number], threads); }
void meet_cluster() {
  const auto& cluster = host::block_now->cluster;
  meet(cluster[0]->together, static_cast<int>(cluster.size() * cluster[0]->threads.size()));
}

namespace host {
namespace {

// Has a copy arrive, and its bytes counted, at once or when the barrier is waited for.
template <class F>
void arrive_later(CountingBarrier& b, int bytes, const F& copy) {
  const auto arrival = [&b, bytes, copy] {
    copy();
    b.bytes -= bytes;
  };
  FASTNN_GUARD(b);
#ifndef FASTNN_THREADS
  // The threads that wait have the copies arrive.
  if (!copies_arrive_at_once) {
    b.copies.push_back(arrival);
    return;
  }
#endif
  arrival();
  end_phase_if_complete(b);
}

}  // namespace
}  // namespace host

namespace {
void copy_tile_to(host::Block& block, void* to, const TensorMap* map, uint64_t* barrier, int column, int row,
                  int head, int batch) {
  using namespace host;
  const MappedTensor& t = map->tensor;
  const uint32_t address = shared_address(to);
  if (address % 128 != 0) block_now->fail("a tile that is not aligned");
  CountingBarrier& b = find(block, in_block(block, barrier));
  arrive_later(b, t.tile_rows * kPartPitch, [&t, &block, address, column, row, head, batch] {
    const auto* from = static_cast<const uint16_t*>(t.data) + head * t.strides[1] + batch * t.strides[2];
    const bool there = head >= 0 && head < t.sizes[2] && batch >= 0 && batch < t.sizes[3];
    for (int r = 0; r < t.tile_rows; ++r) {
      for (int c = 0; c < kPartColumns; ++c) {
        const bool inside = there && row + r >= 0 && row + r < t.sizes[1] && column + c < t.sizes[0];
        const uint16_t bits = inside ? from[(row + r) * t.strides[0] + column + c] : 0;
        std::memcpy(at(block, swizzled(address + r * kPartPitch + 2 * c)), &bits, 2);
      }
    }
  });
}
}  // namespace

void copy_tile(void* to, const TensorMap* map, uint64_t* barrier, int column, int row, int head, int batch) {
  copy_tile_to(*host::block_now, to, map, barrier, column, row, head, batch);
}
void copy_tile_to_all(void* to, const TensorMap* map, uint64_t* barrier, int column, int row, int head,
                      int batch, int blocks) {
  if (static_cast<size_t>(blocks) != host::block_now->cluster.size())
    host::block_now->fail("another cluster");
  for (host::Block* block : host::block_now->cluster) {
    copy_tile_to(*block, to, map, barrier, column, row, head, batch);
  }
}

void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  using namespace host;
  if (shared_address(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) {
    block_now->fail("bytes that are not aligned");
  }
  arrive_later(find(barrier), bytes,
               [to, from, bytes] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}

void begin_products() { host::block_now->threads[host::thread_now].may_multiply = true; }
void commit_products() {
  host::Thread& t = host::block_now->threads[host::thread_now];
  ++t.product_group;
  t.may_multiply = false;
}
void wait_for_products(int groups_in_flight) {
  host::Thread& t = host::block_now->threads[host::thread_now];
  size_t done = 0;
  while (done < t.products.size() && t.products[done].first < t.product_group - groups_in_flight) {
    host::compute(t.products[done++].second);
  }
  t.products.erase(t.products.begin(), t.products.begin() + static_cast<std::ptrdiff_t>(done));
  // The lanes of a warp wait together.
  host::exchange("wgmma.wait_group", 0);
}

}  // namespace fastnn::cuda
