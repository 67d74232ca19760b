// What a kernel is handed beside its arguments: threads and scratch memory, from whoever calls it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastnn {

struct Context {
  // Most workers that run() may be asked for.
  int threads = 1;
  // Work below this is not worth waking another thread for: about 5 us of products, as long as the wake.
  double cost_per_worker = 256 * 1024;
  // Whether products of bf16 go through the processor's tile registers.
  bool tile_registers = false;
  // Calls task(closure, worker) once for each worker in [0, workers), possibly at the same time, and returns
  // when all are done.
  void (*run)(void* self, int workers, void (*task)(void* closure, int worker), void* closure) = nullptr;
  // Uninitialised memory, aligned to 64 bytes, that lives until the kernel returns. Not to be called from a
  // task.
  void* (*allocate)(void* self, size_t bytes) = nullptr;
  void* self = nullptr;

  template <class T>
  __attribute__((always_inline)) T* scratch(int64_t count) const {
    return static_cast<T*>(allocate(self, static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)));
  }

  // f(task, worker) for every task in [0, tasks), on at most `workers` workers, each taking the next task
  // that is left. Which worker runs a task is left to chance, so f may use `worker` only to choose scratch
  // memory.
  template <class F>
  void for_each(int64_t tasks, int64_t workers, const F& f) const {
    if (workers > tasks) workers = tasks;
    if (workers > threads) workers = threads;
    if (workers <= 1) {
      for (int64_t task = 0; task < tasks; ++task) f(task, 0);
      return;
    }
    struct Closure {
      const F* f;
      int64_t tasks;
      alignas(64) int64_t next;
    } closure{&f, tasks, 0};
    run(
        self, static_cast<int>(workers),
        [](void* opaque, int worker) {
          auto* c = static_cast<Closure*>(opaque);
          for (;;) {
            const int64_t task = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
            if (task >= c->tasks) return;
            (*c->f)(task, worker);
          }
        },
        &closure);
  }

  template <class F>
  void for_each(int64_t tasks, const F& f) const {
    for_each(tasks, threads, f);
  }
};

// How many workers to use. `cost` is an estimate in floating-point operations or bytes moved.
static inline int64_t workers_for(double cost, const Context& context) {
  const double wanted = cost / context.cost_per_worker;
  if (wanted >= static_cast<double>(context.threads)) return context.threads;
  return wanted < 1 ? 1 : static_cast<int64_t>(wanted);
}

static inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fastnn
