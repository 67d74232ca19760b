#include "cpu/isa.h"

#include <atomic>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastnn {
namespace {

// Linux saves the tile registers of a process only from when it asks for them: arch_prctl(2).
[[maybe_unused]] bool tile_registers_allowed() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) {
    return Isa::portable;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return Isa::avx2;
  }
  if (!(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))) return Isa::avx512;
  return __builtin_cpu_supports("amx-bf16") && tile_registers_allowed() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::portable;
#endif
}

std::atomic<int>& level() {
  static std::atomic<int> value{static_cast<int>(detected_isa())};
  return value;
}

}  // namespace

const char* isa_name(Isa level) {
  constexpr const char* names[kIsaLevels] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[static_cast<int>(level)];
}

Isa detected_isa() {
  static const Isa detected = detect();
  return detected;
}

Isa current_isa() { return static_cast<Isa>(level().load(std::memory_order_relaxed)); }

bool set_isa(Isa wanted) {
  if (static_cast<int>(wanted) < 0 || static_cast<int>(wanted) > static_cast<int>(detected_isa()))
    return false;
  level().store(static_cast<int>(wanted), std::memory_order_relaxed);
  return true;
}

}  // namespace fastnn
