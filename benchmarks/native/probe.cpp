// What this machine can do at most: multiply-adds and memory traffic, on any number of threads.
//
// Loops of independent operations with nothing else in them; each instruction set is a function of its own,
// so that the file needs no flag and runs everywhere. Rates are the best of several short trials: a limit is
// what is possible, not what is usual.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The compiler must believe that the value is used.
template <typename T>
void keep(T& value) {
  asm volatile("" : "+m"(value) : : "memory");
}

// Two units with a latency of 4 to 5 cycles keep 10 chains busy; 12, and 2 operands, fit into the 16
// registers of AVX2.
constexpr int kChains = 12;
constexpr int kSteps = 4096;

#if defined(__x86_64__)

// Named variables, since the compiler keeps an array that asm touches in memory; the empty asm stops it from
// merging steps.
#define PEAK(NAME, TARGET, VECTOR, ZERO, OPERANDS, STEP)                                             \
  __attribute__((target(TARGET), noinline)) void NAME() {                                            \
    OPERANDS;                                                                                        \
    VECTOR c0 = ZERO, c1 = ZERO, c2 = ZERO, c3 = ZERO, c4 = ZERO, c5 = ZERO, c6 = ZERO, c7 = ZERO,   \
           c8 = ZERO, c9 = ZERO, c10 = ZERO, c11 = ZERO;                                             \
    for (int s = 0; s < kSteps; ++s) {                                                               \
      c0 = STEP(c0);                                                                                 \
      c1 = STEP(c1);                                                                                 \
      c2 = STEP(c2);                                                                                 \
      c3 = STEP(c3);                                                                                 \
      c4 = STEP(c4);                                                                                 \
      c5 = STEP(c5);                                                                                 \
      c6 = STEP(c6);                                                                                 \
      c7 = STEP(c7);                                                                                 \
      c8 = STEP(c8);                                                                                 \
      c9 = STEP(c9);                                                                                 \
      c10 = STEP(c10);                                                                               \
      c11 = STEP(c11);                                                                               \
      asm volatile(""                                                                                \
                   : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), \
                     "+v"(c8), "+v"(c9), "+v"(c10), "+v"(c11));                                      \
    }                                                                                                \
  }

#define STEP(c) _mm512_fmadd_ps(a, a, c)
PEAK(fp32_avx512, "avx512f", __m512, _mm512_setzero_ps(), __m512 a = _mm512_set1_ps(0.5f), STEP)
#undef STEP
#define STEP(c) _mm512_fmadd_pd(a, a, c)
PEAK(fp64_avx512, "avx512f", __m512d, _mm512_setzero_pd(), __m512d a = _mm512_set1_pd(0.5), STEP)
#undef STEP
#define STEP(c) _mm512_dpbf16_ps(c, a, a)
PEAK(bf16_avx512, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
     __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f)), STEP)
#undef STEP
#define STEP(c) _mm512_dpbusd_epi32(c, a, a)
PEAK(int8_avx512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), __m512i a = _mm512_set1_epi8(1),
     STEP)
#undef STEP
#define STEP(c) _mm256_fmadd_ps(a, a, c)
PEAK(fp32_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), __m256 a = _mm256_set1_ps(0.5f), STEP)
#undef STEP
#define STEP(c) _mm256_fmadd_pd(a, a, c)
PEAK(fp64_avx2, "avx2,fma", __m256d, _mm256_setzero_pd(), __m256d a = _mm256_set1_pd(0.5), STEP)
#undef STEP
#define STEP(c) _mm_add_ps(_mm_mul_ps(a, c), a)
PEAK(fp32_sse, "sse2", __m128, _mm_setzero_ps(), __m128 a = _mm_set1_ps(0.5f), STEP)
#undef STEP
#define STEP(c) _mm_add_pd(_mm_mul_pd(a, c), a)
PEAK(fp64_sse, "sse2", __m128d, _mm_setzero_pd(), __m128d a = _mm_set1_pd(0.5), STEP)
#undef STEP

// Four tile registers of sums, 16 x 16 each, and two operands.
#define TILE_PEAK(NAME, INSTRUCTION)                                                                         \
  __attribute__((noinline)) void NAME() {                                                                    \
    alignas(64) uint8_t shapes[64] = {1};                                                                    \
    for (int tile = 0; tile < 6; ++tile) shapes[16 + 2 * tile] = 64, shapes[48 + tile] = 16;                 \
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");                                                   \
    for (int s = 0; s < kSteps; ++s)                                                                         \
      asm volatile(INSTRUCTION " %tmm5, %tmm4, %tmm0\n\t" INSTRUCTION " %tmm5, %tmm4, %tmm1\n\t" INSTRUCTION \
                               " %tmm5, %tmm4, %tmm2\n\t" INSTRUCTION " %tmm5, %tmm4, %tmm3");               \
    asm volatile("tilerelease");                                                                             \
  }
TILE_PEAK(bf16_amx, "tdpbf16ps")
TILE_PEAK(int8_amx, "tdpbssd")
#undef TILE_PEAK
constexpr int kTiles = 4, kTileSums = 16 * 16;

// Linux lets a process use the tile registers once it has asked: arch_prctl(2).
bool tile_registers_allowed() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#else

template <typename T>
__attribute__((noinline)) void generic() {
  typedef T Vector __attribute__((vector_size(16)));
  Vector c[kChains] = {}, a = {}, b = {};
  keep(a);
  keep(b);
  for (int s = 0; s < kSteps; ++s)
    for (int i = 0; i < kChains; ++i) c[i] += a * b;
  for (int i = 0; i < kChains; ++i) keep(c[i]);
}

#endif

struct Peak {
  void (*run)() = nullptr;
  double operations = 0;  // of one run: a multiply-add is two
  const char* name = "";
};

// The fastest instructions of this machine for an element type; `run` is null if it has none of its own.
Peak find_peak(const std::string& type) {
  auto peak = [](void (*run)(), int lanes, const char* name) {
    return Peak{run, 2.0 * lanes * kChains * kSteps, name};
  };
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (type == "fp32")
    return avx512 ? peak(fp32_avx512, 16, "AVX-512 FMA")
           : avx2 ? peak(fp32_avx2, 8, "AVX2 FMA")
                  : peak(fp32_sse, 4, "SSE2");
  if (type == "fp64")
    return avx512 ? peak(fp64_avx512, 8, "AVX-512 FMA")
           : avx2 ? peak(fp64_avx2, 4, "AVX2 FMA")
                  : peak(fp64_sse, 2, "SSE2");
  const auto tiles = [](void (*run)(), int depth, const char* name) {
    return Peak{run, 2.0 * depth * kTileSums * kTiles * kSteps, name};
  };
  if (type == "bf16" && __builtin_cpu_supports("amx-bf16") && tile_registers_allowed())
    return tiles(bf16_amx, 32, "AMX BF16 tile product");
  if (type == "int8" && __builtin_cpu_supports("amx-int8") && tile_registers_allowed())
    return tiles(int8_amx, 64, "AMX INT8 tile product");
  if (type == "bf16")
    return avx512 && __builtin_cpu_supports("avx512bf16") ? peak(bf16_avx512, 32, "AVX-512 BF16 dot product")
                                                          : Peak{};
  if (type == "int8")
    return avx512 && __builtin_cpu_supports("avx512vnni") ? peak(int8_avx512, 64, "AVX-512 VNNI dot product")
                                                          : Peak{};
#else
  if (type == "fp32") return peak(generic<float>, 4, "128-bit vectors");
  if (type == "fp64") return peak(generic<double>, 2, "128-bit vectors");
  if (type == "bf16" || type == "int8") return Peak{};
#endif
  throw std::invalid_argument("expected fp32, fp64, bf16 or int8, got " + type);
}

// Runs `work(thread)` over and over on each thread for `seconds`, all at once; returns the runs of all per
// second.
double rate(int threads, double seconds, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<double> rates(threads);
  auto body = [&](int thread) {
    work(thread);  // warm-up: pages, caches, clock
    ++ready;
    while (!go) std::this_thread::yield();
    const auto start = Clock::now();
    int64_t runs = 0;
    double elapsed = 0;
    do {
      work(thread);
      ++runs;
      elapsed = seconds_since(start);
    } while (elapsed < seconds);
    rates[thread] = runs / elapsed;
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  std::thread starter([&] {
    while (ready < threads) std::this_thread::yield();
    go = true;
  });
  body(0);
  starter.join();
  for (auto& t : others) t.join();
  double sum = 0;
  for (double r : rates) sum += r;
  return sum;
}

double best_of(int trials, const std::function<double()>& measure) {
  double best = 0;
  for (int i = 0; i < trials; ++i) best = std::max(best, measure());
  return best;
}

// What is read must be used: 64-bit additions, of which there can be many more than loads. Named sums, as
// above.
#define READ(NAME, TARGET, VECTOR, LOAD, ADD)                                                    \
  __attribute__((target(TARGET), noinline)) void NAME(const char* from, std::size_t bytes) {     \
    VECTOR s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{};                                       \
    for (std::size_t i = 0; i < bytes; i += 8 * sizeof(VECTOR)) {                                \
      auto* p = reinterpret_cast<const VECTOR*>(from + i);                                       \
      s0 = ADD(s0, LOAD(p)), s1 = ADD(s1, LOAD(p + 1)), s2 = ADD(s2, LOAD(p + 2)),               \
      s3 = ADD(s3, LOAD(p + 3));                                                                 \
      s4 = ADD(s4, LOAD(p + 4)), s5 = ADD(s5, LOAD(p + 5)), s6 = ADD(s6, LOAD(p + 6)),           \
      s7 = ADD(s7, LOAD(p + 7));                                                                 \
    }                                                                                            \
    asm volatile("" : : "m"(s0), "m"(s1), "m"(s2), "m"(s3), "m"(s4), "m"(s5), "m"(s6), "m"(s7)); \
  }
#define COPY(NAME, TARGET, VECTOR, LOAD, STORE)                                                           \
  __attribute__((target(TARGET), noinline)) void NAME(char* to, const char* from, std::size_t bytes) {    \
    for (std::size_t i = 0; i < bytes; i += 4 * sizeof(VECTOR)) {                                         \
      auto* p = reinterpret_cast<const VECTOR*>(from + i);                                                \
      auto* q = reinterpret_cast<VECTOR*>(to + i);                                                        \
      STORE(q, LOAD(p)), STORE(q + 1, LOAD(p + 1)), STORE(q + 2, LOAD(p + 2)), STORE(q + 3, LOAD(p + 3)); \
    }                                                                                                     \
    asm volatile("" : : "r"(to) : "memory");                                                              \
  }

#if defined(__x86_64__)
READ(read_avx512, "avx512f", __m512i, _mm512_load_si512, _mm512_add_epi64)
READ(read_avx2, "avx2", __m256i, _mm256_load_si256, _mm256_add_epi64)
READ(read_sse, "sse2", __m128i, _mm_load_si128, _mm_add_epi64)
COPY(copy_avx512, "avx512f", __m512i, _mm512_load_si512, _mm512_store_si512)
COPY(copy_avx2, "avx2", __m256i, _mm256_load_si256, _mm256_store_si256)
COPY(copy_sse, "sse2", __m128i, _mm_load_si128, _mm_store_si128)
#else
typedef std::uint64_t Words __attribute__((vector_size(16)));
Words load_words(const Words* p) { return *p; }
void store_words(Words* p, Words v) { *p = v; }
Words add_words(Words a, Words b) { return a + b; }
READ(read_generic, "default", Words, load_words, add_words)
COPY(copy_generic, "default", Words, load_words, store_words)
#endif

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer make_buffer(std::size_t bytes) {
  Buffer buffer(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
  if (!buffer) throw std::bad_alloc();
  std::fill_n(buffer.get(), bytes, 1);
  return buffer;
}

double bandwidth(const std::string& kind, std::size_t bytes, int threads, double seconds) {
  if (kind != "read" && kind != "copy") throw std::invalid_argument("expected read or copy, got " + kind);
  if (threads < 1)
    throw std::invalid_argument("expected at least one thread, got " + std::to_string(threads));
  bytes = std::max<std::size_t>(4096, bytes / 4096 * 4096);
  void (*read)(const char*, std::size_t);
  void (*copy)(char*, const char*, std::size_t);
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f"), avx2 = __builtin_cpu_supports("avx2");
  read = avx512 ? read_avx512 : avx2 ? read_avx2 : read_sse;
  copy = avx512 ? copy_avx512 : avx2 ? copy_avx2 : copy_sse;
#else
  read = read_generic;
  copy = copy_generic;
#endif
  std::vector<Buffer> buffers;
  for (int t = 0; t < threads; ++t) buffers.push_back(make_buffer(bytes));
  // A copy's two halves share the size that was asked for. Small buffers many times per look at the clock.
  const std::size_t half = bytes / 2;
  const int repeat = static_cast<int>(std::max<std::size_t>(1, (std::size_t{1} << 20) / bytes));
  return best_of(3, [&] {
    const double runs = rate(threads, seconds, [&](int t) {
      char* p = buffers[t].get();
      for (int r = 0; r < repeat; ++r) {
        if (kind == "read")
          read(p, bytes);
        else
          copy(p + half, p, half);
      }
    });
    return runs * repeat * static_cast<double>(bytes);
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  m.def(
      "peak",
      [](const std::string& type, int threads, double seconds) -> py::object {
        if (threads < 1)
          throw std::invalid_argument("expected at least one thread, got " + std::to_string(threads));
        const Peak peak = find_peak(type);
        if (!peak.run) return py::none();
        double best;
        {
          py::gil_scoped_release release;
          best = best_of(3, [&] { return rate(threads, seconds, [&](int) { peak.run(); }); });
        }
        return py::make_tuple(best * peak.operations, peak.name);
      },
      py::arg("type"), py::arg("threads"), py::arg("seconds"),
      "Operations per second of an element type (a multiply-add is two) and the name of the instructions, or "
      "None.");
  m.def("bandwidth", &bandwidth, py::arg("kind"), py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "Bytes per second that `threads` threads read, or read and write, each in a buffer of its own of "
        "`bytes`.");
}
