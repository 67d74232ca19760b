// The instruction-set levels that every CPU kernel is compiled for, and which of them runs. The last has no
// code of its own: it is the one below with tile registers, which a kernel is told of by its context.
#pragma once

namespace fastnn {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

inline constexpr int kIsaLevels = 5;

// Lower-case name, as FASTNN_ISA takes it.
const char* isa_name(Isa level);

// The highest level that this processor and its operating system can run.
Isa detected_isa();

// The level that kernels run at: the detected one, unless set lower.
Isa current_isa();

// Chooses the level; one above the detected level is refused (false, nothing changes).
bool set_isa(Isa level);

}  // namespace fastnn

// A kernel `void name(const Args&, const Context&)` has one definition per level, each in the namespace of
// the level; calling fastnn::name runs the current level's.
#if defined(__x86_64__)
#define FASTNN_KERNEL(name, Args)                                                                       \
  namespace portable {                                                                                  \
  void name(const Args&, const Context&);                                                               \
  }                                                                                                     \
  namespace avx2 {                                                                                      \
  void name(const Args&, const Context&);                                                               \
  }                                                                                                     \
  namespace avx512 {                                                                                    \
  void name(const Args&, const Context&);                                                               \
  }                                                                                                     \
  namespace avx512_bf16 {                                                                               \
  void name(const Args&, const Context&);                                                               \
  }                                                                                                     \
  inline void name(const Args& args, const Context& context) {                                          \
    using Kernel = void (*)(const Args&, const Context&);                                               \
    constexpr Kernel levels[kIsaLevels] = {portable::name, avx2::name, avx512::name, avx512_bf16::name, \
                                           avx512_bf16::name};                                          \
    levels[static_cast<int>(current_isa())](args, context);                                             \
  }
#else
#define FASTNN_KERNEL(name, Args)         \
  namespace portable {                    \
  void name(const Args&, const Context&); \
  }                                       \
  inline void name(const Args& args, const Context& context) { portable::name(args, context); }
#endif
