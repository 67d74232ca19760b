#include "cuda/linear.h"

#include <memory>

#include "tests/module.h"

namespace fastnn::tests {
namespace {

// Arrays of [rows][depth], or of [depth][rows] where the depth is outside; those of the output are its sizes.
// Tells how many bytes of workspace it had.
size_t product(int tile_columns, bool pairs, const py::array& a, bool depth_inside_a, const py::array& b,
               bool depth_inside_b, const py::object& bias, const std::string& activation,
               const py::object& residual, py::array output) {
  cuda::MatrixProductArgs args{dtype_of(a),
                               output.shape(0),
                               output.shape(1),
                               a.shape(depth_inside_a ? 1 : 0),
                               tile_columns,
                               pairs,
                               {a.data(), depth_inside_a},
                               {b.data(), depth_inside_b},
                               in(bias),
                               activation_named(activation),
                               in(residual),
                               output.mutable_data(),
                               nullptr};
  if (!cuda::fits_matrix_product(args)) throw py::value_error("no tiles for these matrices");
  // Of exactly so many bytes, and full of NaN.
  const size_t bytes = cuda::matrix_product_workspace(args);
  const std::unique_ptr<void, void (*)(void*)> workspace(
      ::operator new(bytes, std::align_val_t{64}),
      [](void* p) { ::operator delete(p, std::align_val_t{64}); });
  std::memset(workspace.get(), 0xff, bytes);
  args.workspace = workspace.get();
  const char* wrong = cuda::matrix_product(args, nullptr);
  if (wrong != nullptr) throw std::runtime_error(wrong);
  return bytes;
}

}  // namespace

void bind_cuda_linear(py::module_& m) { m.def("matrix_product_on_hopper", product); }

}  // namespace fastnn::tests
