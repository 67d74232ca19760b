// Runs the CUDA kernels that have barriers, with the threads of a block as threads: ThreadSanitizer ends the
// process with an error where one of them reads what no barrier keeps apart from another's write. "mistake"
// runs a kernel that lacks one.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/attention.h"
#include "cuda/depthwise.h"
#include "cuda/linear.h"
#include "cuda/pool_large_windows.h"
#include "cuda/pool_staged.h"
#include "cuda/runtime.h"

namespace {

using namespace fastnn;

void no_barrier(float* out) {
  float* shared = cuda::shared_memory<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// Zeros, of more bytes than any of the cases needs.
struct Memory {
  std::vector<uint64_t> words = std::vector<uint64_t>(1 << 18);
  void* data() { return words.data(); }
};

const char* run(DType dtype, bool tf32, cuda::TileSize tile, const ConvShape& s) {
  Memory x, w, y, locations, workspace;
  const bool depthwise = cuda::is_depthwise(s);
  const cuda::ConvForwardArgs forward{
      dtype,           s,          tf32,     tile,
      x.data(),        w.data(),   nullptr,  Activation::relu,
      nullptr,         !depthwise, y.data(), static_cast<uint8_t*>(locations.data()),
      workspace.data()};
  const cuda::ConvInputGradientArgs input{dtype,    s,        tf32,     tile,
                                          y.data(), w.data(), x.data(), workspace.data()};
  const cuda::ConvWeightGradientArgs weight{dtype,    s,        tf32,     tile,
                                            y.data(), x.data(), w.data(), workspace.data()};
  const cuda::MaskAndSumArgs mask{dtype,    s.n,
                                  s.oh,     s.ow,
                                  s.k,      y.data(),
                                  x.data(), Activation::relu,
                                  nullptr,  locations.data(),
                                  w.data(), workspace.data()};
  if (const char* wrong = (depthwise ? cuda::depthwise_forward : cuda::conv_forward)(forward, nullptr))
    return wrong;
  if (const char* wrong =
          (depthwise ? cuda::depthwise_input_gradient : cuda::conv_input_gradient)(input, nullptr)) {
    return wrong;
  }
  if (const char* wrong =
          (depthwise ? cuda::depthwise_weight_gradient : cuda::conv_weight_gradient)(weight, nullptr)) {
    return wrong;
  }
  return cuda::mask_and_sum(mask, nullptr);
}

const char* run_attention() {
  Memory q, k, v, output, sums, workspace;
  const HeadStrides rows{0, 330 * 64, 64};
  const AttentionShape s{1, 2, 2, 330, 290, 64, 64};
  auto* statistics = static_cast<float*>(sums.data());
  uint32_t taken = 0;
  const char* wrong =
      cuda::attention_forward_on_hopper({DType::bf16, s, true, 1.0f, q.data(), k.data(), v.data(), rows, rows,
                                         rows, output.data(), rows, statistics, &taken},
                                        nullptr);
  if (wrong != nullptr) return wrong;
  Memory gradients[3];
  return cuda::attention_backward_on_hopper({DType::bf16,
                                             s,
                                             false,
                                             1.0f,
                                             output.data(),
                                             q.data(),
                                             k.data(),
                                             v.data(),
                                             output.data(),
                                             rows,
                                             rows,
                                             rows,
                                             rows,
                                             rows,
                                             statistics,
                                             gradients[0].data(),
                                             gradients[1].data(),
                                             gradients[2].data(),
                                             rows,
                                             rows,
                                             rows,
                                             workspace.data(),
                                             cuda::kMostKept},
                                            nullptr);
}

const char* run_linear() {
  Memory a, b, beside, output, workspace;
  // Tiles one after another in a block, of a depth of more steps than the ring has stages; and parts.
  for (const int tile_columns : {64, 128, 256}) {
    cuda::MatrixProductArgs args{DType::bf16,
                                 200,
                                 264,
                                 200,
                                 tile_columns,
                                 false,
                                 {a.data(), true},
                                 {b.data(), true},
                                 beside.data(),
                                 Activation::silu,
                                 beside.data(),
                                 output.data(),
                                 nullptr};
    if (const char* wrong = cuda::matrix_product(args, nullptr)) return wrong;
    args.pairs = tile_columns == 256;
    if (const char* wrong = args.pairs ? cuda::matrix_product(args, nullptr) : nullptr) return wrong;
    args.depth = 1100;
    args.a.depth_inside = args.b.depth_inside = false;
    args.bias = args.residual = nullptr;
    args.activation = Activation::none;
    args.columns = 72;
    args.workspace = workspace.data();
    if (const char* wrong = cuda::matrix_product(args, nullptr)) return wrong;
  }
  return nullptr;
}

const char* run_pool() {
  Memory x, y, locations;
  constexpr PoolAxis kRows{90, 45, 3, 2, 1, 1, false}, kColumns{81, 41, 3, 2, 1, 1, false},
      kSixths{90, 4, 0, 1, 0, 1, true}, kAll{9, 1, 0, 1, 0, 1, true};
  const PoolShape squares{1, 1, kRows, kColumns, false}, adaptive{1, 1, kSixths, kColumns, false},
      large{1, 8, kAll, kAll, true}, small{3, 8, kAll, kAll, false};
  auto* places = static_cast<uint8_t*>(locations.data());
  const char* wrong = nullptr;
  const auto run = [&](bool taken) { return taken ? wrong : "not for these kernels"; };
  const MaxPoolArgs forward{DType::f32, squares, x.data(), y.data(), places, nullptr};
  const MaxPoolBackwardArgs backward{DType::f32, squares, y.data(), places, nullptr, x.data()};
  const AvgPoolBackwardArgs spread{DType::f32, adaptive, true, 0, y.data(), x.data()};
  const MaxPoolArgs largest{DType::f32, large, x.data(), y.data(), nullptr, nullptr};
  const AvgPoolArgs mean{DType::f32, large, true, 0, x.data(), y.data()};
  if (const char* failed = run(cuda::pool_staged(forward, nullptr, wrong))) return failed;
  if (const char* failed = run(cuda::pool_staged(backward, nullptr, wrong))) return failed;
  if (const char* failed = run(cuda::pool_staged(spread, nullptr, wrong))) return failed;
  const AvgPoolArgs small_mean{DType::f32, small, true, 0, x.data(), y.data()};
  if (const char* failed = run(cuda::pool_large_windows(largest, nullptr, wrong))) return failed;
  if (const char* failed = run(cuda::pool_large_windows(small_mean, nullptr, wrong))) return failed;
  return run(cuda::pool_large_windows(mean, nullptr, wrong));
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "mistake") == 0) {
    Memory memory;
    cuda::launch(no_barrier, dim3{1}, dim3{64}, 64 * sizeof(float), nullptr,
                 static_cast<float*>(memory.data()));
    return 0;
  }
  constexpr ConvShape kByVectors{1, 16, 6, 6, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6, 6},
      kOneByOne{1, 3, 6, 6, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6, 6},
      kDepthwise{1, 8, 6, 6, 8, 3, 3, 1, 1, 1, 1, 1, 1, 8, 6, 6},
      // A weight gradient of more steps of its depth than there are stages.
      kDeep{1, 8, 24, 24, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 24, 24},
      // As many taps as make a product in parts.
      kParts{1, 8, 6, 6, 8, 7, 7, 1, 1, 3, 3, 1, 1, 1, 6, 6};
  constexpr cuda::TileSize kSmall = cuda::TileSize::small, kLarge = cuda::TileSize::large,
                           kWarpgroups = cuda::TileSize::warpgroups;
  const char* wrong = nullptr;
  for (const DType dtype : {DType::bf16, DType::f32}) {
    for (const ConvShape& s : {kByVectors, kOneByOne, kDepthwise}) {
      if (wrong == nullptr) wrong = run(dtype, false, kSmall, s);
    }
  }
  if (wrong == nullptr) wrong = run(DType::bf16, false, kSmall, kParts);
  if (wrong == nullptr) wrong = run(DType::bf16, false, kSmall, kDeep);
  if (wrong == nullptr) wrong = run(DType::bf16, false, kWarpgroups, kDeep);
  if (wrong == nullptr) wrong = run(DType::f16, false, kLarge, kByVectors);
  if (wrong == nullptr) wrong = run(DType::f32, true, kLarge, kByVectors);
  if (wrong == nullptr) wrong = run(DType::bf16, false, cuda::TileSize::automatic, kOneByOne);
  if (wrong == nullptr) wrong = run(DType::bf16, false, kWarpgroups, kByVectors);
  if (wrong == nullptr) wrong = run_attention();
  if (wrong == nullptr) wrong = run_linear();
  if (wrong == nullptr) wrong = run_pool();
  if (wrong != nullptr) std::fprintf(stderr, "%s\n", wrong);
  return wrong != nullptr;
}
