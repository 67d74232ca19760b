#include "cuda/conv.h"
#include "cuda/conv_stem.h"
#include "cuda/depthwise.h"
#include "cuda/runtime.h"
#include "tests/module.h"

namespace fastnn::tests {
namespace {

using Ints = std::vector<int64_t>;

ConvShape shape_of(const Ints& s) {
  return {s[0], s[1], s[2],  s[3],  s[4],  s[5],  s[6],  s[7],
          s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
}

void succeed(const char* wrong) {
  if (wrong != nullptr) throw std::runtime_error(wrong);
}

// Of exactly so many bytes, and full of NaN.
struct Workspace {
  explicit Workspace(size_t bytes) : memory(::operator new(bytes, std::align_val_t{64})) {
    std::memset(memory, 0xff, bytes);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(memory, std::align_val_t{64}); }
  void* memory;
};

// Forward and the input gradient tell how many bytes of workspace they had.
size_t forward(const Ints& shape, bool tf32, int tile, const py::array& x, const py::array& w,
               const py::object& bias, const std::string& activation, const py::object& residual, bool pooled,
               py::array y, const py::object& locations) {
  const ConvShape s = shape_of(shape);
  cuda::ConvForwardArgs args{dtype_of(x),
                             s,
                             tf32,
                             static_cast<cuda::TileSize>(tile),
                             x.data(),
                             w.data(),
                             in(bias),
                             activation_named(activation),
                             in(residual),
                             pooled,
                             y.mutable_data(),
                             static_cast<uint8_t*>(out(locations)),
                             nullptr};
  const bool depthwise = cuda::is_depthwise(s);
  const size_t bytes = depthwise ? 0 : cuda::forward_workspace(args);
  const Workspace workspace(bytes);
  args.workspace = workspace.memory;
  succeed(depthwise ? cuda::depthwise_forward(args, nullptr) : cuda::conv_forward(args, nullptr));
  return bytes;
}

size_t input_gradient(const Ints& shape, bool tf32, int tile, const py::array& grad, const py::array& w,
                      py::array gx) {
  const ConvShape s = shape_of(shape);
  cuda::ConvInputGradientArgs args{
      dtype_of(grad),    s,      tf32, static_cast<cuda::TileSize>(tile), grad.data(), w.data(),
      gx.mutable_data(), nullptr};
  const bool depthwise = cuda::is_depthwise(s);
  const size_t bytes = depthwise ? 0 : cuda::input_gradient_workspace(args);
  const Workspace workspace(bytes);
  args.workspace = workspace.memory;
  succeed(depthwise ? cuda::depthwise_input_gradient(args, nullptr)
                    : cuda::conv_input_gradient(args, nullptr));
  return bytes;
}

void weight_gradient(const Ints& shape, bool tf32, int tile, const py::array& grad, const py::array& x,
                     py::array gw) {
  const ConvShape s = shape_of(shape);
  const bool depthwise = cuda::is_depthwise(s);
  const Workspace workspace(
      depthwise ? cuda::depthwise_workspace(s)
                : cuda::weight_gradient_workspace(s, dtype_of(x), static_cast<cuda::TileSize>(tile)));
  const cuda::ConvWeightGradientArgs args{
      dtype_of(x),     s, tf32, static_cast<cuda::TileSize>(tile), grad.data(), x.data(), gw.mutable_data(),
      workspace.memory};
  succeed(depthwise ? cuda::depthwise_weight_gradient(args, nullptr)
                    : cuda::conv_weight_gradient(args, nullptr));
}

// Arrays of [n, h, w, k].
void bias_activation(const py::array& x, const py::object& bias, const std::string& activation,
                     const py::object& residual, bool pooled, py::array y, const py::object& locations) {
  succeed(cuda::bias_activation({dtype_of(x), x.shape(0), x.shape(1), x.shape(2), x.shape(3), x.data(),
                                 in(bias), activation_named(activation), in(residual), pooled,
                                 y.mutable_data(), static_cast<uint8_t*>(out(locations))},
                                nullptr));
}

void mask_and_sum(const Ints& sizes, const py::array& grad, const py::object& output,
                  const std::string& activation, const py::object& locations, const py::object& masked,
                  const py::object& grad_bias) {
  cuda::MaskAndSumArgs args{dtype_of(grad),
                            sizes[0],
                            sizes[1],
                            sizes[2],
                            sizes[3],
                            grad.data(),
                            in(output),
                            activation_named(activation),
                            static_cast<const uint8_t*>(in(locations)),
                            out(masked),
                            out(grad_bias),
                            nullptr};
  const Workspace workspace(cuda::mask_and_sum_workspace(args));
  args.workspace = workspace.memory;
  succeed(cuda::mask_and_sum(args, nullptr));
}

// Kernels with a mistake each, of which the model of the GPU is to tell.
namespace wrong {

void no_barrier(float* out) {
  float* shared = cuda::shared_memory<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void lonely_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}

void no_wait(float* out) {
  float* shared = cuda::shared_memory<float>();
  cuda::copy_async_16(shared + 4 * threadIdx.x, out + 4 * threadIdx.x, true);
  cuda::commit_copies();
  __syncthreads();
  const float seen = shared[4 * threadIdx.x];
  cuda::wait_for_copies<0>();
  __syncthreads();
  out[4 * threadIdx.x] = seen;
}

void past_the_end(float* out) { out[threadIdx.x] = cuda::shared_memory<float>()[blockDim.x]; }

}  // namespace wrong

void run_wrong(const std::string& which, py::array_t<float> memory) {
  void (*kernel)(float*) = which == "no barrier"       ? wrong::no_barrier
                           : which == "lonely barrier" ? wrong::lonely_barrier
                           : which == "no wait"        ? wrong::no_wait
                                                       : wrong::past_the_end;
  succeed(cuda::launch(kernel, dim3{1}, dim3{64}, (which == "no wait" ? 4 : 1) * 64 * sizeof(float), nullptr,
                       memory.mutable_data()));
}

bool is_stem(const Ints& shape, const py::array& x, bool tf32) {
  const ConvShape s = shape_of(shape);
  return cuda::is_stem({dtype_of(x), s, tf32, cuda::TileSize::automatic, nullptr, nullptr, nullptr,
                        Activation::none, nullptr, false, nullptr, nullptr, nullptr});
}

}  // namespace

void bind_cuda_conv(py::module_& m) {
  m.def("cuda_conv_forward", &forward);
  m.def("cuda_conv_input_gradient", &input_gradient);
  m.def("cuda_conv_weight_gradient", &weight_gradient);
  m.def("cuda_conv_is_stem", &is_stem);
  m.def("cuda_bias_activation", &bias_activation);
  m.def("cuda_mask_and_sum", &mask_and_sum);
  m.def("cuda_run_wrong", &run_wrong);
  m.def("copies_arrive_at_once", [](bool at_once) { cuda::host::copies_arrive_at_once = at_once; });
}

}  // namespace fastnn::tests
