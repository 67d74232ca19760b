// What arguments have to fulfil, whoever hands them over: torch's ops and the records of programs. No torch
// here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/types.h"

namespace fastnn {

using Sizes = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void refuse(const Parts&... parts) {
  std::ostringstream out;
  ((out << "fastnn: ") << ... << parts);
  throw std::runtime_error(out.str());
}

// Throws std::runtime_error, which torch turns into RuntimeError, with the message parts joined.
#define FASTNN_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) [[unlikely]] { \
      ::fastnn::refuse(__VA_ARGS__); \
    }                                \
  } while (0)

// What the kernels' int64 arithmetic holds, whatever a caller says. Options are numbers of 32 bits, as those
// of torch's poolings, and tensors have fewer elements than any memory: then a padded size, a window's reach
// and a number of bytes are far from 2^63.
inline constexpr int64_t kMostOption = (int64_t{1} << 31) - 1, kMostElements = int64_t{1} << 56;

// Two numbers: height, width. Ops take each as a number of its own: a list costs a call some microseconds.
struct Pair {
  int64_t h, w;
};

// "[2, 3, 4]"
std::string shape_text(const int64_t* sizes, int64_t dims);

// Refuses options below the least or above kMostOption.
void check_option(Pair values, const char* name, int64_t least);

// The product of sizes; refuses more than kMostElements.
int64_t count_of(const Sizes& sizes);

// A window along one axis of images, of options that were checked.
struct WindowAxis {
  int64_t inputs, kernel, stride, padding, dilation;
  bool ceil_mode = false;
};
// How many outputs it has; refuses a window larger than the padded input. Strides past its end are cut to
// it, which changes nothing, and so is the dilation of a single tap: no loop runs further than sizes.
int64_t outputs_of(WindowAxis& axis, const char* op, int dimension);

// The activation that a number stands for; refuses any other.
Activation activation_of(int64_t number);

// Of a call that is told in numbers.
DType dtype_of(int64_t number);

// The algorithm that a number stands for: refuses one that stands for none, and one that does not cover the
// call: `uncovered` says why not, or null.
template <class Algorithm, size_t kCount, class Uncovered>
Algorithm algorithm_of(int64_t number, const char* const (&names)[kCount], const char* what,
                       const Uncovered& uncovered) {
  FASTNN_CHECK(number >= 0 && number < static_cast<int64_t>(kCount), what, " has algorithms from 0 to ",
               kCount - 1, ", got ", number);
  const auto algorithm = static_cast<Algorithm>(number);
  const char* reason = uncovered(algorithm);
  FASTNN_CHECK(reason == nullptr, "the algorithm ", names[number], " does not cover this call of ", what,
               ": ", reason);
  return algorithm;
}

}  // namespace fastnn
