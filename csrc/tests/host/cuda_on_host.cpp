#include "tests/host/block.h"

namespace fastnn::cuda::host {

bool copies_arrive_at_once = false;

namespace {

#ifndef FASTNN_THREADS
// Stacks are kept: there are as many as the largest block had threads.
struct Stacks {
  std::vector<unsigned char*> all;
  unsigned char* get(size_t i) {
    while (all.size() <= i) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      all.push_back(static_cast<unsigned char*>(memory));
    }
    return all[i];
  }
};
thread_local Stacks stacks;
#endif

}  // namespace

#ifdef FASTNN_THREADS

void Block::begin() {
  barrier = std::make_unique<std::barrier<>>(static_cast<std::ptrdiff_t>(threads.size()));
  warp_barriers.clear();
  for (size_t w = 0; w < warps.size(); ++w)
    warp_barriers.push_back(std::make_unique<std::barrier<>>(lanes(w)));
  const dim3 size = blockDim, grid = gridDim;
  for (size_t i = 0; i < threads.size(); ++i) {
    running.emplace_back([this, i, size, grid] {
      block_now = this;
      thread_now = static_cast<int>(i);
      threadIdx = threads[i].index;
      blockIdx = index;
      blockDim = size;
      gridDim = grid;
      body(closure);
      barrier->arrive_and_drop();
    });
  }
}
bool Block::turn() { return false; }
void Block::end() {
  for (auto& t : running) t.join();
  running.clear();
}

namespace {
void run_together(std::vector<std::unique_ptr<Block>>& blocks) {
  for (auto& b : blocks) b->begin();
  for (auto& b : blocks) b->end();
}
}  // namespace

#else

namespace {

#if defined(__x86_64__)
// Keeps the registers that a call keeps on the stack, and the stack pointer in *save; goes on from `load`.
extern "C" void fastnn_switch_stack(void** save, void* load);
asm(R"(
.text
.type fastnn_switch_stack, @function
fastnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastnn_switch_stack, .-fastnn_switch_stack
)");
#endif

void enter();

void to_thread(Block& b, int i) {
  Thread& t = b.threads[i];
  block_now = &b;
  thread_now = i;
  threadIdx = t.index;
  blockIdx = b.index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack, kStack);
#endif
#if defined(__x86_64__)
  fastnn_switch_stack(&b.scheduler, t.stack_pointer);
#else
  swapcontext(&b.scheduler_context, &t.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void to_scheduler(bool for_good = false) {
  Block& b = *block_now;
  Thread& t = b.threads[thread_now];
  (void)for_good;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, b.stack_bottom, b.stack_size);
#endif
#if defined(__x86_64__)
  fastnn_switch_stack(&t.stack_pointer, b.scheduler);
#else
  swapcontext(&t.context, &b.scheduler_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &b.stack_bottom, &b.stack_size);
#endif
}

void enter() {
  Block& b = *block_now;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.stack_bottom, &b.stack_size);
#endif
  b.body(b.closure);
  b.threads[thread_now].state = Thread::kDone;
  ++b.done;
  to_scheduler(true);
}

}  // namespace

void Block::begin() {
  const int count = static_cast<int>(threads.size());
  at_barrier = done = 0;
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.state = Thread::kReady;
    t.stack = stacks.get(rank * threads.size() + i);
#if defined(__x86_64__)
    // As if it had been called: the return address of `enter`, and six registers.
    void** top = reinterpret_cast<void**>(t.stack + kStack) - 2;
    *top = reinterpret_cast<void*>(&enter);
    t.stack_pointer = top - 6;
    std::memset(t.stack_pointer, 0, 6 * sizeof(void*));
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStack;
    makecontext(&t.context, enter, 0);
#endif
  }
  for (Warp& w : warps) w.arrived = 0;
}

bool Block::turn() {
  const int count = static_cast<int>(threads.size());
  // Whole warps may have their turns from the last to the first.
  const bool backwards = copies_arrive_at_once && count % kWarp == 0;
  bool moved = false;
  for (int i = 0; i < count; ++i) {
    const int number = backwards ? count - 1 - i : i;
    Thread& t = threads[number];
    if (t.state == Thread::kWaiting) {
      block_now = this;
      thread_now = number;
      if (t.waits_for()) t.state = Thread::kReady;
    }
    // Lanes that came together at a collective go on together: a warp as far as it gets, then the next.
    while (t.state == Thread::kReady) {
      moved = true;
      to_thread(*this, number);
    }
    if ((i + 1) % kWarp == 0 || i + 1 == count) {
      const int first = i / kWarp * kWarp, warp = number / kWarp * kWarp;
      bool again = false;
      for (int j = 0; j <= i - first; ++j) again |= threads[warp + j].state == Thread::kReady;
      if (again) i = first - 1;
    }
  }
  if (at_barrier != count) return moved;
  at_barrier = 0;
  for (Thread& t : threads) t.state = Thread::kReady;
  return true;
}

void Block::end() {
  // Fibers that hang are left where they stand; nothing of theirs needs to be taken down but their copies.
  fail("threads wait for others that never come: a barrier or a collective that not all reach");
  for (Thread& t : threads) {
    t.open.clear();
    t.groups.clear();
    t.products.clear();
  }
  counting.clear();
}

namespace {
void run_together(std::vector<std::unique_ptr<Block>>& blocks) {
  for (auto& b : blocks) b->begin();
  const auto is_done = [](const auto& b) { return b->done == static_cast<int>(b->threads.size()); };
  while (!std::all_of(blocks.begin(), blocks.end(), is_done)) {
    bool moved = false;
    for (auto& b : blocks) moved |= !is_done(b) && b->turn();
    if (!moved) {
      for (auto& b : blocks) b->end();
      return;
    }
  }
}
}  // namespace

#endif

const Slot* exchange(const char* name, const void* mine, size_t size) {
  Block& b = *block_now;
  Thread& t = b.threads[thread_now];
  const size_t number = static_cast<size_t>(thread_now) / kWarp;
  Warp& w = b.warps[number];
  Collective& c = w.collectives[t.collectives++ % 2];
  c.names[thread_now % kWarp] = name;
  std::memcpy(c.slots[thread_now % kWarp].bytes, mine, size);
  const int lanes = b.lanes(number);
#ifdef FASTNN_THREADS
  b.warp_barriers[number]->arrive_and_wait();
#else
  t.state = Thread::kAtCollective;
  if (++w.arrived == lanes) {
    w.arrived = 0;
    for (int lane = 0; lane < lanes; ++lane) b.threads[number * kWarp + lane].state = Thread::kReady;
  }
  to_scheduler();
#endif
  if (lanes != kWarp || std::strcmp(c.names[0], name) != 0) {
#ifdef FASTNN_THREADS
    const std::lock_guard<std::mutex> guard(b.mutex);
#endif
    b.fail("the lanes of a warp are not all at the same collective");
  }
  return c.slots;
}

void wait_until(std::function<bool()> ready) {
#ifdef FASTNN_THREADS
  while (!ready()) std::this_thread::yield();
#else
  if (ready()) return;
  Thread& t = block_now->threads[thread_now];
  t.waits_for = std::move(ready);
  t.state = Thread::kWaiting;
  to_scheduler();
#endif
}

void* shared_memory() { return block_now->shared; }

namespace {

void arrive(const Copy& c) {
  Thread& t = block_now->threads[thread_now];
  if (c.valid != 0) std::memcpy(c.to, c.from, c.valid);
  std::memset(static_cast<unsigned char*>(c.to) + c.valid, 0, c.bytes - c.valid);
  const auto place = static_cast<size_t>(static_cast<unsigned char*>(c.to) - block_now->shared);
  std::memset(block_now->hidden.data() + place, 1, c.bytes);
  t.hidden.emplace_back(place, c.bytes);
}

}  // namespace

void copy_later(void* to, const void* from, size_t bytes, size_t valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    block_now->fail("an asynchronous copy that is not aligned");
  }
  const Copy copy{to, from, bytes, valid};
  if (copies_arrive_at_once) {
    arrive(copy);
  } else {
    block_now->threads[thread_now].open.push_back(copy);
  }
}

void commit_copies() {
  Thread& t = block_now->threads[thread_now];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void wait_for_copies(int groups_in_flight) {
  Thread& t = block_now->threads[thread_now];
  while (static_cast<int>(t.groups.size()) > groups_in_flight) {
    for (const Copy& c : t.groups.front()) arrive(c);
    t.groups.pop_front();
  }
}

const char* run(dim3 grid, dim3 block, unsigned cluster, size_t shared, void (*body)(void*), void* closure) {
  // The limits of the architectures that the kernels are built for: 163 KiB of shared memory on sm_80, and
  // 227 KiB for those that only GPUs with counting barriers run.
  constexpr size_t kLeastShared = 163 * 1024, kMostShared = 227 * 1024;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      block.x * block.y * block.z > 1024 || block.x * block.y * block.z == 0 || shared > kMostShared ||
      grid.x % cluster != 0) {
    return "invalid configuration argument";
  }
  gridDim = grid;
  blockDim = block;
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned rank = 0; rank < cluster; ++rank) {
    blocks.push_back(std::make_unique<Block>(block, shared, body, closure));
    blocks.back()->rank = rank;
  }
  for (auto& b : blocks) {
    for (auto& other : blocks) b->cluster.push_back(other.get());
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (auto& b : blocks) {
          b->clear();
          b->index = {x + static_cast<unsigned>(b->rank), y, z};
        }
        run_together(blocks);
        for (auto& b : blocks) {
          if (b->wrong != nullptr) return b->wrong;
          if (shared > kLeastShared && b->counting.empty()) return "invalid configuration argument";
        }
      }
  for (auto& b : blocks) {
    b->clear();
    if (b->wrong != nullptr) return b->wrong;
  }
  return nullptr;
}

}  // namespace fastnn::cuda::host

void __syncthreads() {
  using namespace fastnn::cuda::host;
  Block& b = *block_now;
#ifdef FASTNN_THREADS
  b.barrier->arrive_and_wait();
#else
  b.threads[thread_now].state = Thread::kAtBarrier;
  ++b.at_barrier;
  to_scheduler();
#endif
}
