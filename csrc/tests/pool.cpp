#include "cuda/pool.h"

#include "cuda/pool_large_windows.h"
#include "cuda/pool_rows.h"
#include "cuda/pool_squares.h"
#include "cuda/pool_staged.h"
#include "tests/module.h"

namespace fastnn::tests {
namespace {

using Ints = std::vector<int64_t>;

// inputs, outputs, kernel, stride, padding, dilation; a kernel of 0 is an adaptive axis.
PoolAxis axis_of(const Ints& a) { return {a[0], a[1], a[2], a[3], a[4], a[5], a[2] == 0}; }

PoolShape shape_of(int64_t n, int64_t c, const Ints& rows, const Ints& columns, bool channels_last) {
  return {n, c, axis_of(rows), axis_of(columns), channels_last};
}

// At the levels "staged", "squares", "rows" and "large windows" by those kernels for GPUs, or not at all.
template <class Args>
void run(const Kernel<Args>& kernel, const std::string& level, int threads, const Args& args) {
  const char* wrong = nullptr;
  bool taken = false;
  if (level == "staged") {
    taken = cuda::pool_staged(args, nullptr, wrong);
  } else if (level == "squares") {
    taken = cuda::pool_squares(args, nullptr, wrong);
  } else if (level == "rows") {
    taken = cuda::pool_rows(args, nullptr, wrong);
  } else if (level == "large windows") {
    if constexpr (requires { cuda::pool_large_windows(args, nullptr, wrong); }) {
      taken = cuda::pool_large_windows(args, nullptr, wrong);
    }
  } else {
    return kernel(level, threads, args);
  }
  if (!taken) throw py::value_error("not for the kernels called " + level);
  if (wrong != nullptr) throw std::runtime_error(wrong);
}

void max_forward(const std::string& level, int threads, int64_t n, int64_t c, const Ints& rows,
                 const Ints& columns, bool channels_last, const py::array& x, py::array y,
                 const py::object& locations, const py::object& indices) {
  constexpr Kernel<MaxPoolArgs> kernel{{FASTNN_LEVELS(max_pool_forward)}, cuda::max_pool_forward};
  run(kernel, level, threads,
      {dtype_of(x), shape_of(n, c, rows, columns, channels_last), x.data(), y.mutable_data(),
       static_cast<uint8_t*>(out(locations)), static_cast<int64_t*>(out(indices))});
}

void max_backward(const std::string& level, int threads, int64_t n, int64_t c, const Ints& rows,
                  const Ints& columns, bool channels_last, const py::array& grad, const py::object& locations,
                  const py::object& indices, py::array grad_x) {
  constexpr Kernel<MaxPoolBackwardArgs> kernel{{FASTNN_LEVELS(max_pool_backward)}, cuda::max_pool_backward};
  run(kernel, level, threads,
      {dtype_of(grad), shape_of(n, c, rows, columns, channels_last), grad.data(),
       static_cast<const uint8_t*>(in(locations)), static_cast<const int64_t*>(in(indices)),
       grad_x.mutable_data()});
}

void avg_forward(const std::string& level, int threads, int64_t n, int64_t c, const Ints& rows,
                 const Ints& columns, bool channels_last, bool count_include_pad, int64_t divisor,
                 const py::array& x, py::array y) {
  constexpr Kernel<AvgPoolArgs> kernel{{FASTNN_LEVELS(avg_pool_forward)}, cuda::avg_pool_forward};
  run(kernel, level, threads,
      {dtype_of(x), shape_of(n, c, rows, columns, channels_last), count_include_pad, divisor, x.data(),
       y.mutable_data()});
}

void avg_backward(const std::string& level, int threads, int64_t n, int64_t c, const Ints& rows,
                  const Ints& columns, bool channels_last, bool count_include_pad, int64_t divisor,
                  const py::array& grad, py::array grad_x) {
  constexpr Kernel<AvgPoolBackwardArgs> kernel{{FASTNN_LEVELS(avg_pool_backward)}, cuda::avg_pool_backward};
  run(kernel, level, threads,
      {dtype_of(grad), shape_of(n, c, rows, columns, channels_last), count_include_pad, divisor, grad.data(),
       grad_x.mutable_data()});
}

}  // namespace

void bind_pool(py::module_& m) {
  m.def("max_pool_forward", &max_forward);
  m.def("max_pool_backward", &max_backward);
  m.def("avg_pool_forward", &avg_forward);
  m.def("avg_pool_backward", &avg_backward);
}

}  // namespace fastnn::tests
