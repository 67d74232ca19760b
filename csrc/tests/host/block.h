// A block of the modelled GPU: what its threads share and where each of them stands.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cuda/hopper.h"

#if defined(__SANITIZE_THREAD__)
#define FASTNN_THREADS 1
#include <barrier>
#include <mutex>
#include <thread>
#else
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#endif

namespace fastnn::cuda::host {

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

// One thread of the block.
struct Thread {
  dim3 index;
  // Copies in flight: groups that are complete, and the one that is open.
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  // The collectives it has taken part in, of which the last two are kept: a lane is at most one ahead.
  unsigned collectives = 0;
  // Products of its warpgroup under way, each with the number of its group, and the group that is open.
  std::vector<std::pair<int, PendingProduct>> products;
  int product_group = 0;
  bool may_multiply = false;
  // What it has copied into shared memory and not yet shown to the tensor cores: places and bytes.
  std::vector<std::pair<size_t, size_t>> hidden;
#ifndef FASTNN_THREADS
  enum { kReady, kAtBarrier, kAtCollective, kWaiting, kDone } state = kReady;
  std::function<bool()> waits_for;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
#endif
};

struct Collective {
  const char* names[kWarp];
  Slot slots[kWarp];
};

struct Warp {
  Collective collectives[2];
  int arrived = 0;
};

// A barrier in shared memory that counts arrivals and bytes.
struct CountingBarrier {
  const uint64_t* place = nullptr;
  int arrivals = 1, left = 1;
  int64_t bytes = 0;
  unsigned phase = 0;
  std::vector<std::function<void()>> copies;  // which have not arrived
#ifdef FASTNN_THREADS
  std::mutex mutex;
#endif
};

// A barrier of some threads, by its number.
struct NumberedBarrier {
  int arrived = 0;
  unsigned phase = 0;
#ifdef FASTNN_THREADS
  std::mutex mutex;
#endif
};

struct Block;
inline thread_local Block* block_now = nullptr;
inline thread_local int thread_now = 0;

constexpr size_t kStack = 256 * 1024;

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<uint8_t> hidden;  // of each byte of shared memory: whether it is so
  std::deque<CountingBarrier> counting;
  NumberedBarrier numbered[16];
  void (*body)(void*);
  void* closure;
  dim3 index;
  // The blocks of its cluster, itself among them, and what they meet at, which the first one has.
  std::vector<Block*> cluster;
  size_t rank = 0;
  NumberedBarrier together;
  const char* wrong = nullptr;
#ifdef FASTNN_THREADS
  std::mutex mutex;
  std::unique_ptr<std::barrier<>> barrier;
  std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
  std::vector<std::thread> running;
#else
  int at_barrier = 0, done = 0;
  void* scheduler = nullptr;
#if !defined(__x86_64__)
  ucontext_t scheduler_context;
#endif
  // What AddressSanitizer knows of the scheduler's stack.
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif

  Block(dim3 sizes, size_t bytes, void (*b)(void*), void* c) : shared_bytes(bytes), body(b), closure(c) {
    for (unsigned z = 0; z < sizes.z; ++z)
      for (unsigned y = 0; y < sizes.y; ++y)
        for (unsigned x = 0; x < sizes.x; ++x) threads.emplace_back().index = {x, y, z};
    warps.resize((threads.size() + kWarp - 1) / kWarp);
    shared = static_cast<unsigned char*>(::operator new(bytes, std::align_val_t{128}));
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { ::operator delete(shared, std::align_val_t{128}); }

  int lanes(size_t warp) const {
    return static_cast<int>(std::min<size_t>(kWarp, threads.size() - warp * kWarp));
  }
  void clear() {
    std::memset(shared, 0xff, shared_bytes);
    for (Thread& t : threads) {
      if (!t.open.empty() || !t.groups.empty()) fail("a thread ended with copies in flight");
      if (!t.products.empty()) fail("a thread ended with products under way");
      t.open.clear();
      t.groups.clear();
      t.products.clear();
      t.product_group = 0;
      t.hidden.clear();
    }
    for (CountingBarrier& b : counting) {
      if (!b.copies.empty() || b.bytes != 0) fail("a block ended with copies of tiles under way");
    }
    counting.clear();
    hidden.assign(shared_bytes, 0);
    for (NumberedBarrier& b : numbered) b.arrived = 0;
    together.arrived = 0;
  }
  void fail(const char* what) {
    if (wrong == nullptr) wrong = what;
  }
  // Starts the threads; has each go on as far as it gets, and tells whether any did; and ends them.
  void begin();
  bool turn();
  void end();
};

// Has the calling thread go on once ready() is true.
void wait_until(std::function<bool()> ready);

}  // namespace fastnn::cuda::host
