// The kernels that programs alone call: element by element, copies, softmax, embeddings.
#include <algorithm>

#include "cpu/copy.h"
#include "cpu/elementwise.h"
#include "cpu/softmax.h"
#include "tests/module.h"

namespace fastnn::tests {
namespace {

using Ints = std::vector<int64_t>;

// Sizes of the loops, and each tensor's steps.
template <int kTensors>
Walk<kTensors> walk_of(const Ints& sizes, const std::vector<Ints>& steps) {
  if (sizes.empty() || sizes.size() > kMostWalkDims || steps.size() != kTensors)
    throw py::value_error("expected up to 8 loops of so many tensors");
  Walk<kTensors> walk;
  walk.dims = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), walk.sizes);
  for (int t = 0; t < kTensors; ++t) {
    if (steps[t].size() != sizes.size()) throw py::value_error("expected a step for each loop");
    std::copy(steps[t].begin(), steps[t].end(), walk.steps[t]);
  }
  return walk;
}

void arithmetic(const std::string& level, int threads, int op, const Ints& sizes,
                const std::vector<Ints>& steps, const py::array& a, const py::object& b, double number,
                py::array output) {
  constexpr Kernel<ArithmeticArgs> kernel{{FASTNN_LEVELS(arithmetic)}};
  kernel(level, threads,
         {dtype_of(a), static_cast<Arithmetic>(op), walk_of<3>(sizes, steps), a.data(), in(b), number,
          output.mutable_data()});
}

void activation(const std::string& level, int threads, const std::string& name, const Ints& sizes,
                const std::vector<Ints>& steps, const py::array& input, py::array output) {
  constexpr Kernel<ActivationArgs> kernel{{FASTNN_LEVELS(activation)}};
  kernel(level, threads,
         {dtype_of(input), activation_named(name), walk_of<2>(sizes, steps), input.data(),
          output.mutable_data()});
}

void copy(const std::string& level, int threads, const Ints& sizes, const std::vector<Ints>& steps,
          const py::array& source, py::array target) {
  constexpr Kernel<CopyArgs> kernel{{FASTNN_LEVELS(copy)}};
  kernel(
      level, threads,
      {static_cast<int>(source.itemsize()), walk_of<2>(sizes, steps), source.data(), target.mutable_data()});
}

void fill(const std::string& level, int threads, const Ints& sizes, const std::vector<Ints>& steps,
          uint64_t pattern, py::array target) {
  constexpr Kernel<FillArgs> kernel{{FASTNN_LEVELS(fill)}};
  kernel(level, threads,
         {static_cast<int>(target.itemsize()), walk_of<1>(sizes, steps), pattern, target.mutable_data()});
}

// Whether an index was outside of the table.
bool embedding(const std::string& level, int threads, const py::array& table, const py::array& indices,
               py::array output) {
  constexpr Kernel<EmbeddingArgs> kernel{{FASTNN_LEVELS(embedding)}};
  bool outside = false;
  kernel(level, threads,
         {table.shape(0), table.shape(1) * table.itemsize(), indices.size(), indices.itemsize() == 8,
          indices.data(), table.data(), output.mutable_data(), &outside});
  return outside;
}

void softmax(const std::string& level, int threads, const py::array& input, py::array output) {
  constexpr Kernel<SoftmaxArgs> kernel{{FASTNN_LEVELS(softmax)}};
  kernel(level, threads,
         {dtype_of(input), input.shape(0), input.shape(1), input.data(), output.mutable_data()});
}

}  // namespace

void bind_program(py::module_& m) {
  m.def("arithmetic", &arithmetic);
  m.def("activation", &activation);
  m.def("copy", &copy);
  m.def("fill", &fill);
  m.def("embedding", &embedding);
  m.def("softmax", &softmax);
}

}  // namespace fastnn::tests
